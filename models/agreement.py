"""The kernels of this folder beside plain PyTorch, on the GPU and at the shapes that a network is about to run on.

One block and the final layer, of the network's shapes and precision but with random weights everywhere, see two images
by the kernels, by PyTorch, and in float64. The output and, where a network trains, each gradient of the kernels may lie
a few times as far from float64 as PyTorch's does, as a whole and in its worst row. So no tolerance depends on shapes or
precision, and nothing small hides in a sum: what a block splits is compared in parts, and each token is a row. The
network and the global random generators stay as they are.

Triton compiles the kernels for this: seconds, unless its cache has them. Each process decides for itself, but for the
update, which must be the same in all processes, because their weights must stay equal.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memory.trust import Disagreement, distrust

FACTOR = 4.0  # of PyTorch's error; that of right kernels is about the same, at the worst twice, of wrong ones a hundred
FLOOR = 2.0**-18  # of a result's size: float32 sums in another order
LONG = 1024  # tokens, beyond which it is one image: float64 keeps the scores of all heads
LISTS = ("weights", "gradients", "first moments", "second moments", "averages")  # what an update reads and writes
ADAMW, CLIP, STEP, SHARE = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}, 64.0, 3, 0.1  # half of the gradients' norm


@dataclass(frozen=True)
class Error:
    """How far `what` lies from float64, relative to its size, by the kernels and by PyTorch."""

    what: str
    kernels: float
    plain: float

    @property
    def allowed(self) -> float:
        """The largest error of the kernels that counts as agreement."""
        return FACTOR * self.plain + FLOOR

    def __str__(self) -> str:
        return f"{self.what} is off by {self.kernels:.2g}, PyTorch's by {self.plain:.2g}; {self.allowed:.2g} is allowed"


def errors(
    given: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], width: int | None = None
) -> list[Error]:
    """Errors of the kernels' results `given` and of PyTorch's, by name, each as a whole and in its worst row.

    What is a multiple of `width` long (None: nothing is) is compared in as many parts, relative to the size of all.
    """
    names, numbers = [], []
    for name, expected in exact.items():
        parts = max(1, len(expected) // (width or len(expected)))
        size = lengths(expected).clamp(min=torch.finfo(torch.float64).tiny)
        for part, pieces in enumerate(zip(*(side[name].chunk(parts) for side in (given, plain, exact)), strict=True)):
            ours, theirs, wanted = (piece.double() for piece in pieces)
            numbers.append(torch.stack([lengths(ours - wanted) / size, lengths(theirs - wanted) / size], 1))  # (2, 2)
            label = name if parts == 1 else f"{name} (part {part + 1} of {parts})"
            names += [label, f"the worst row of {label}"]
    return [Error(name, *pair) for name, pair in zip(names, torch.cat(numbers).tolist(), strict=True)]


def lengths(tensor: Tensor) -> Tensor:
    """The norm of a tensor and of its longest row, (2,); a vector is one row."""
    each = tensor.norm(dim=-1, keepdim=True)
    return torch.stack([each.norm(), each.amax()])


def require(found: list[Error], where: str) -> None:
    """Raise Disagreement for the first of the errors that is larger than allowed, or no number."""
    for error in found:
        if not error.kernels <= error.allowed:
            raise Disagreement(f"{where}, {error}")


class Comparison:
    """A block and a final layer like a network's, and what PyTorch makes of them; see the top of this file.

    The ambient autocast and gradient mode are the network's. `inputs` are what the kernels give its first block, by the
    names of `fused.run_block`: shapes and types count, not values.
    """

    def __init__(self, network: nn.Module, inputs: dict[str, Tensor]):
        self.device = inputs["x"].device
        generator = torch.Generator(self.device).manual_seed(0)

        def random(like: Tensor, *shape: int) -> Tensor:
            """Normal numbers of the type of `like` that bf16 holds."""
            return torch.randn(shape, generator=generator, device=self.device).bfloat16().to(like.dtype)

        self.parts = copy.deepcopy(nn.ModuleDict({"block": network.blocks[0], "final_layer": network.final_layer}))
        self.trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parts.parameters())
        for weight in self.parts.parameters():
            weight.data = random(weight, *weight.shape) * (weight.shape[1] ** -0.5 if weight.ndim > 1 else 0.5)
        tokens, self.width = inputs["x"].shape[1:]
        images = 1 if tokens > LONG else 2
        shapes = {name: (images, *value.shape[1:]) if value.ndim > 1 else value.shape for name, value in inputs.items()}
        self.inputs = {name: random(value, *shapes[name]) for name, value in inputs.items()}
        self.weights = random(inputs["x"], images, tokens, network.final_layer.linear.out_features)
        heads, dtype = network.blocks[0].attn.num_heads, str(inputs["branch"].dtype).removeprefix("torch.")
        self.where = f"{tokens} tokens of {self.width} numbers, {heads} heads, {dtype}"
        self.plain = self._results(plain, self.parts, self.inputs)
        exact = {name: value.double() for name, value in self.inputs.items()}
        with torch.autocast(self.device.type, enabled=False):
            self.exact = self._results(plain, copy.deepcopy(self.parts).double(), exact)

    def _results(self, path: Callable[..., Tensor], parts: nn.ModuleDict, inputs: dict[str, Tensor]) -> dict:
        """The output of `path`, and the gradients of all that it reads."""
        inputs = {name: value.detach().requires_grad_(self.trains) for name, value in inputs.items()}
        output = path(*parts.values(), **inputs)
        if not self.trains:
            return {"the output": output}
        leaves = inputs | dict(parts.named_parameters())
        # Normalised keys have one bias for all, which changes no weight: its gradient is rounding alone.
        read = [name for name, leaf in leaves.items() if leaf.requires_grad and not name.endswith("k_norm.bias")]
        gradients = torch.autograd.grad(output, [leaves[name] for name in read], self.weights.to(output.dtype))
        named = {f"the gradient of {name}": gradient for name, gradient in zip(read, gradients, strict=True)}
        return {"the output": output.detach(), **named}

    def errors(self, packed: bool) -> list[Error]:
        """The errors of models/fused.py, with `packed` of models/attention.py, too."""
        from models import fused  # here, because Triton is not everywhere

        def kernels(block: nn.Module, layer: nn.Module, **inputs: Tensor) -> Tensor:
            x, branch, gate = fused.run_block(packed, block, **inputs)
            return fused.finish(layer, x, branch, gate, block.mlp.fc2.bias, inputs["c"])

        with torch.cuda.device_of(self.weights):  # Triton launches on the current GPU
            return errors(self._results(kernels, self.parts, self.inputs), self.plain, self.exact, self.width)


def plain(
    block: nn.Module, layer: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, c: Tensor
) -> Tensor:
    """A block and a final layer as models/sit.py has them, on x + gate·branch, where `branch` contains `bias`."""
    return layer(block(x + gate[:, None] * (branch + (bias - bias.detach())), c), c)


def trusted(network: nn.Module, packed: bool, inputs: dict[str, Tensor]) -> bool | None:
    """Whether attention is by models/attention.py: if `packed`, it fits, and it agrees. None, where the kernels of
    models/fused.py do not agree, and none should run. What does not agree is told in a warning.

    `inputs`, autocast and gradient mode as for `Comparison`.
    """
    kind, device = inputs["x"].device.type, inputs["x"].device
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with torch.autocast(kind, dtype, enabled, cache_enabled=False):  # the ambient one would keep rounded weights
        try:
            from models import attention

            comparison = Comparison(network, inputs)
            require(comparison.errors(packed=False), comparison.where)
        except Exception as error:
            distrust("models/fused.py", error, device, "PyTorch runs the blocks, slower")
            return None
        if not packed or not attention.fits(network.blocks[0].attn, inputs["branch"]):
            return False
        try:
            require(comparison.errors(packed=True), comparison.where)
        except Exception as error:
            distrust("models/attention.py", error, device, "PyTorch differentiates attention, slower")
            return False
    return True


def update_errors(device: torch.device) -> list[Error]:
    """The errors of models/adamw.py in a step on tensors longer and shorter than a program, aligned and not."""
    from models.adamw import Kernel

    generator, found = torch.Generator(device).manual_seed(0), []
    for start, name in ((0, "aligned"), (1, "unaligned")):
        sizes = [start + size for size in (9001, 8192, 5, 1)]
        lists = [[torch.randn(size, generator=generator, device=device)[start:] for size in sizes] for _ in LISTS]
        lists[3] = [tensor.square() for tensor in lists[3]]
        norm = nn.utils.get_total_norm(lists[1])
        plain, exact = (pytorch_update(lists, norm, dtype) for dtype in (torch.float32, torch.float64))
        Kernel(lists[0])(lists, norm, CLIP, STEP, ADAMW, SHARE)
        results = (
            {f"{name} {what}": torch.cat(part) for what, part in zip(LISTS, side, strict=True) if what != "gradients"}
            for side in (lists, plain, exact)
        )
        found += errors(*results)
    return found


def pytorch_update(lists: list[list[Tensor]], norm: Tensor, dtype: torch.dtype) -> list[list[Tensor]]:
    """What `models/update.py` makes of LISTS by PyTorch alone."""
    lists = [[tensor.to(dtype, copy=True) for tensor in part] for part in lists]
    weights, gradients, first, second, averages = lists
    optimizer = torch.optim.AdamW(weights, **ADAMW, weight_decay=0.0, fused=True)
    for place, weight in enumerate(weights):
        weight.grad, before = gradients[place], torch.tensor(STEP - 1.0, device=weight.device)
        optimizer.state[weight] = {"step": before, "exp_avg": first[place], "exp_avg_sq": second[place]}
    nn.utils.clip_grads_with_norm_(weights, CLIP, norm.to(dtype))
    optimizer.step()
    torch._foreach_lerp_(averages, weights, SHARE)
    return lists


def trusted_update(device: torch.device) -> bool:
    """Whether models/adamw.py agrees with PyTorch; if not, a warning says so."""
    try:
        require(update_errors(device), "one step")
    except Exception as error:
        distrust("models/adamw.py", error, device, "PyTorch updates the weights, slower")
        return False
    return True


def everywhere(verdict: bool, device: torch.device) -> bool:
    """Whether it is so in all of a run's processes, which all have to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return verdict
    verdicts = torch.tensor(float(verdict), device=device)
    dist.all_reduce(verdicts, dist.ReduceOp.MIN)
    return verdicts.item() == 1
