"""Which launch parameters the kernels of models/fused.py and models/attention.py are fastest with on this GPU, and what
products save it.

    python -m benchmarks.bench_kernels --network --out benchmarks/results/kernels.json

At the shapes of SiT-XL/2 and in bf16, random data. Each kernel runs as a CUDA graph, with the sums that follow it, for
every choice in its sweep, compared with float64 before it is timed: `ms` is the median, the GPU's cache emptied before
each run, `tb_s` the terabytes a second that it reads and writes at least, `chosen` what those files have now. Of
attention's backward pass, which only Hopper GPUs use, all kernels are timed at once, with the parameters of one of them
changed (KEYS, QUERIES).
The MLP's first layer and GELU, within cuBLAS's product and apart, are timed in turns without a pause, 500 each, because
a GPU's clock falls under a steady load; so are the products that give weights their gradients: as PyTorch forms them,
transposed, and with float32 coming out instead of bf16 that another kernel widens. With --network whole compiled
networks are timed, too: evaluations with GELU within its product and apart, passes forward and backward with weights'
gradients as float32 from their products and widened.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_train import difference, randomize, show
from memory.files import write_json
from memory.provenance import provenance
from models.inference import round_weights
from models.kernels import can_fuse, can_pack, compile_blocks, fast_attention
from models.sit import SiT_models

MODEL, TOKENS, WIDTH, HEADS, HALF, EPS = "SiT-XL/2", 256, 1152, 16, torch.bfloat16, 1e-6
TOLERANCE = 3e-3  # relative, of results rounded to bf16
IN_A_ROW, TURNS = 500, 3
NETWORK_BATCH, EVALUATIONS, COMPARED = 256, 100, 16  # images; evaluations in a row; images compared with float32
TRAINED_BATCH, PASSES, AT_ONCE = 128, 20, 32  # images; passes forward and backward in a row; images at once in float32
CHOICES = {  # launch parameters that are tried, by the name of those of models/fused.py or, IN_ATTENTION, attention.py
    "JOIN": {"num_warps": [1, 2, 4, 8]},
    "JOIN_BACKWARD": {"chunk": [16, 32, 64], "stages": [2, 3, 4], "num_warps": [4, 8]},
    "ACTIVATE": {"block": [2048, 4096, 8192], "num_warps": [4, 8]},
    "ACTIVATE_BACKWARD": {
        "columns": [512, 1024],
        "tile": [2, 4, 8],
        "span": [64, 128],
        "stages": [2, 3],
        "num_warps": [4],
    },
    "KEYS": {"step": [32, 64], "stages": [2, 3], "num_warps": [4]},
    "QUERIES": {"step": [32, 64, 128], "stages": [2, 3], "num_warps": [4]},
}
IN_ATTENTION = ("KEYS", "QUERIES")
IMAGES = {"JOIN": [256, 128, 16], "JOIN_BACKWARD": [128, 32], "ACTIVATE": [256, 16], "ACTIVATE_BACKWARD": [128, 32]}
IMAGES |= {name: [128, 32] for name in IN_ATTENTION}
GELU_IMAGES = [256, 64, 16]
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # numbers in and out, in widths
GRADIENT_IMAGES = [128, 32]
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a weight's gradient (out, in) from d_out and x, rows
    "as it is": lambda d_out, x: (d_out.t() @ x).float(),
    "transposed": lambda d_out, x: (x.t() @ d_out).t().float().contiguous(),
    "float32 out": lambda d_out, x: torch.mm(d_out.t(), x, out_dtype=torch.float32),
    "transposed, float32 out": lambda d_out, x: torch.mm(x.t(), d_out, out_dtype=torch.float32).t().contiguous(),
}
BYTES = {"JOIN": 12, "JOIN_BACKWARD": 18, "ACTIVATE": 16, "ACTIVATE_BACKWARD": 24}  # for each of B·T·D numbers
BYTES |= dict.fromkeys(IN_ATTENTION, 16 + 4 * HEADS * TOKENS / WIDTH)  # the latter the scores' gradients, out and in
Work = Callable[[], tuple[Tensor, ...]]


def plain_join(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`fused.join` as PyTorch has it."""
    total = x + gate[:, None] * branch
    return total, F.layer_norm(total, total.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def join_work(images: int, device: torch.device) -> tuple[Work, Work, list[Tensor]]:
    """`fused.join`, the same in float64, and what both read."""
    from models import fused  # here, because Triton is not everywhere

    x, branch = torch.randn(2, images, TOKENS, WIDTH, device=device)
    gate, shift, scale = torch.randn(images, 6 * WIDTH, device=device).to(HALF).chunk(6, 1)[:3]  # rows not packed
    read = [x, branch.to(HALF), gate, shift, scale]
    bias = x.new_zeros(WIDTH)
    return lambda: fused.join(*read, bias, EPS), lambda: plain_join(*(tensor.double() for tensor in read)), read


def join_backward_work(images: int, device: torch.device) -> tuple[Work, Work]:
    """The kernel of `fused.join`'s gradients and its sums, and the same in float64."""
    from models import fused

    _, _, (x, branch, gate, shift, scale) = join_work(images, device)
    total, _, mean, rstd = fused._join_op(x, branch, gate, shift, scale, x.new_zeros(WIDTH), EPS)
    d_total, d_normed = torch.randn_like(x), torch.randn_like(branch)

    @torch.enable_grad()
    def exact() -> tuple[Tensor, ...]:
        wide = [tensor.double().requires_grad_() for tensor in (x, branch, gate, shift, scale)]
        gradients = torch.autograd.grad(plain_join(*wide), wide, (d_total.double(), d_normed.double()))
        return *gradients[:2], torch.stack([*gradients[2:], gradients[1].sum(1)], 1)  # the last is the bias's

    return lambda: fused._join_backward_op(d_total, d_normed, total, branch, gate, scale, mean, rstd), exact


def activate_work(images: int, device: torch.device) -> tuple[Work, Work]:
    """`fused.activate`, and the same in float64."""
    from models import fused

    hidden, bias = torch.randn(images, TOKENS, 4 * WIDTH, device=device).to(HALF), torch.zeros(4 * WIDTH, device=device)
    return lambda: (fused.activate(hidden, bias),), lambda: (F.gelu(hidden.double(), approximate="tanh"),)


def activate_backward_work(images: int, device: torch.device) -> tuple[Work, Work]:
    """The kernel of GELU's gradient and its sum, and the same in float64."""
    from models import fused

    hidden, d_active = torch.randn(2, images, TOKENS, 4 * WIDTH, device=device).to(HALF)

    @torch.enable_grad()
    def exact() -> tuple[Tensor, ...]:
        wide = hidden.double().requires_grad_()
        (gradient,) = torch.autograd.grad(F.gelu(wide, approximate="tanh"), wide, d_active.double())
        return gradient, gradient.sum((0, 1))

    return lambda: fused._activate_backward_op(d_active, hidden), exact


def attention_backward_work(images: int, device: torch.device) -> tuple[Work, Work]:
    """The kernels of `attention`'s gradients and their sums, and the same in float64."""
    from models import attention

    qkv, d_out = (torch.randn(images, TOKENS, parts * WIDTH, device=device).to(HALF) for parts in (3, 1))
    out, lse = attention._attention_op(qkv, qkv.new_zeros(3 * WIDTH), HEADS)

    @torch.enable_grad()
    def exact() -> tuple[Tensor, ...]:
        wide = qkv.double().requires_grad_()
        q, k, v = wide.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, S) each
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        (gradient,) = torch.autograd.grad((weights @ v).transpose(1, 2).flatten(2), wide, d_out.double())
        d_queries, d_keys, d_values = gradient.sum((0, 1)).chunk(3)
        return gradient, torch.cat([d_queries, torch.zeros_like(d_keys), d_values])

    return lambda: attention._attention_backward_op(d_out, qkv, out, lse, HEADS), exact


WORKS = {
    "JOIN": lambda images, device: join_work(images, device)[:2],
    "JOIN_BACKWARD": join_backward_work,
    "ACTIVATE": activate_work,
    "ACTIVATE_BACKWARD": activate_backward_work,
    **dict.fromkeys(IN_ATTENTION, attention_backward_work),
}


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of `work`, so that no launch waits for the host."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(work: Callable[[], None]) -> float:
    """The median of many runs, the cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(work, warmup=5, rep=25, return_mode="median")


def in_a_row(work: Callable[[], object], times: int) -> float:
    """Milliseconds of each of so many runs without a pause, after a fifth as many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(times // 5):
        work()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def in_turns(works: dict[str, Callable[[], float]]) -> dict[str, dict[str, object]]:
    """By name, what TURNS calls of each returned, one after the other in turn: the median, and all."""
    turns = [{name: work() for name, work in works.items()} for _ in range(TURNS)]
    columns = {name: [turn[name] for turn in turns] for name in works}
    return {name: {"ms": statistics.median(column), "turns": column} for name, column in columns.items()}


def sweep(name: str, images: int, device: torch.device) -> Iterator[dict]:
    """A row for each choice of a kernel's launch parameters."""
    from models import fused

    (work, exact), chosen = WORKS[name](images, device), in_use(name, images)
    wanted = exact()
    for values in itertools.product(*CHOICES[name].values()):
        setting = dict(zip(CHOICES[name], values, strict=True))
        with mock.patch.dict(parameters(name), setting), mock.patch.object(fused, "PROGRAMS", 0):
            error = max(difference([given], [expected]) for given, expected in zip(work(), wanted, strict=True))
            assert error <= TOLERANCE, f"{name} with {setting}: off by {error:.2g} of its size"
            ms = milliseconds(recorded(work))
        row = {"kernel": name, "images": images, **chosen, **setting}
        row |= {"chosen": chosen | setting == chosen, "error": error, "ms": ms}
        yield row | {"tb_s": BYTES[name] * images * TOKENS * WIDTH / ms / 1e9}


def parameters(name: str) -> dict[str, int]:
    """The launch parameters themselves, which a sweep changes in place."""
    from models import attention, fused

    return getattr(attention if name in IN_ATTENTION else fused, name)


def in_use(name: str, images: int) -> dict[str, int]:
    """What a kernel is launched with for so many images."""
    from models import fused

    chosen = dict(parameters(name))
    return chosen | {"chunk": fused.chunk_of(images, TOKENS)} if name == "JOIN_BACKWARD" else chosen


@torch.no_grad()
def gelu(images: int, device: torch.device) -> dict[str, object]:
    """The MLP's first layer and GELU by two kernels and by one: errors and milliseconds."""
    from models import fused

    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, 4 * WIDTH, device=device).to(HALF), torch.randn(images, TOKENS, WIDTH, device=device)
    x = x.to(HALF)
    works = {
        "within": lambda: fused.activated(layer, x),
        "apart": lambda: fused.activate(fused.detached(layer, x), layer.bias),
    }
    some = slice(0, COMPARED)
    exact = F.gelu(F.linear(x[some].double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    errors = {name: difference([work()[some]], [exact]) for name, work in works.items()}
    assert max(errors.values()) <= TOLERANCE, errors
    graphs = {name: recorded(work) for name, work in works.items()}
    taken = in_turns({name: partial(in_a_row, graph, IN_A_ROW) for name, graph in graphs.items()})
    return {"images": images, "in_a_row": IN_A_ROW} | {name: {"error": errors[name]} | taken[name] for name in works}


def make_network(device: torch.device) -> nn.Module:
    """SiT-XL/2, its gates and output away from zero."""
    torch.manual_seed(0)
    network = SiT_models[MODEL](condition="none").to(device)
    randomize(network)
    return network


@torch.no_grad()
def evaluations(device: torch.device) -> dict[str, object]:
    """An evaluation of the compiled network, GELU within its product or apart: errors against float32, milliseconds."""
    from models import fused

    network = make_network(device).eval()
    x = torch.randn(NETWORK_BATCH, *network.latent_shape, device=device)
    c, some = torch.randn(NETWORK_BATCH, network.pos_embed.shape[-1], device=device), slice(0, COMPARED)
    exact = network.velocity(x[some], c[some])
    round_weights(network)
    compile_blocks(network)
    ways = {"within": contextlib.nullcontext(), "apart": mock.patch.object(fused, "fits_product", never)}
    with fast_attention(device):
        return compared(
            ways,
            device,
            error=lambda: difference([network.velocity(x, c)[some]], [exact]),
            work=lambda: network.velocity(x, c),
            times=EVALUATIONS,
            images=NETWORK_BATCH,
        )


def passes(device: torch.device) -> dict[str, object]:
    """The compiled network forward and backward, its weights' gradients coming out of their products as float32 or
    rounded and widened: errors of all gradients against float32, milliseconds."""
    from models import fused

    network = make_network(device)
    x, weights = torch.randn(2, TRAINED_BATCH, *network.latent_shape, device=device)
    c = torch.randn(TRAINED_BATCH, network.pos_embed.shape[-1], device=device)

    def work(some: slice = slice(None)) -> Tensor:
        loss = (network.velocity(x[some], c[some]).float() * weights[some]).sum()
        loss.backward()
        return loss

    def gradients() -> list[Tensor]:
        return [weight.grad for weight in network.parameters() if weight.grad is not None]

    for first in range(0, TRAINED_BATCH, AT_ONCE):
        work(slice(first, first + AT_ONCE))
    exact = [gradient.clone() for gradient in gradients()]
    compile_blocks(network)

    def afresh() -> Tensor:
        network.zero_grad(set_to_none=True)
        return work()

    def error() -> float:
        afresh()
        return difference(gradients(), exact)

    ways = {"float32 out": contextlib.nullcontext(), "widened": mock.patch.object(fused, "widens", never)}
    with fast_attention(device, network.pos_embed.shape[1]):
        return compared(ways, device, error, afresh, PASSES, TRAINED_BATCH)


def compared(
    ways: dict[str, contextlib.AbstractContextManager],
    device: torch.device,
    error: Callable[[], float],
    work: Callable[[], object],
    times: int,
    images: int,
) -> dict[str, object]:
    """The error and the milliseconds of `work` each way, in bf16."""

    def within(way: str, call: Callable[[], float]) -> float:
        with ways[way], torch.autocast(device.type, HALF, cache_enabled=False):
            return call()

    errors = {way: within(way, error) for way in ways}
    assert max(errors.values()) <= 1.25 * min(errors.values()), errors
    taken = in_turns({way: partial(within, way, partial(in_a_row, work, times)) for way in ways})
    return {"images": images, "in_a_row": times} | {way: {"error": errors[way]} | taken[way] for way in ways}


@torch.no_grad()
def weight_gradients(images: int, device: torch.device) -> Iterator[dict]:
    """A row for each layer of a block: errors and milliseconds of its weight's gradient, formed in several ways."""
    torch.manual_seed(0)
    for layer, (width_in, width_out) in LAYERS.items():
        x, d_out = (torch.randn(images * TOKENS, width * WIDTH, device=device) for width in (width_in, width_out))
        x, d_out = x.to(HALF), d_out.to(HALF)
        exact, row = d_out.double().t() @ x.double(), {"layer": layer, "images": images, "in_a_row": IN_A_ROW}
        errors = {way: difference([form(d_out, x)], [exact]) for way, form in FORMS.items()}
        assert max(errors.values()) <= TOLERANCE, (layer, errors)
        graphs = {way: recorded(partial(form, d_out, x)) for way, form in FORMS.items()}
        taken = in_turns({way: partial(in_a_row, graph, IN_A_ROW) for way, graph in graphs.items()})
        yield row | {way: {"error": errors[way]} | taken[way] for way in FORMS}


def never(layer: nn.Linear, x: Tensor) -> bool:
    """In the place of `fused.fits_product` or `fused.widens`."""
    return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the kernels between a network's products, and some products.")
    parser.add_argument("--network", action="store_true", help="also whole networks, compiled either way")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not can_fuse(device):
        raise ValueError("the kernels need a GPU since Ampere and Triton, and this machine lacks one or the other")
    for result in measure(args, device):
        write_json(args.out, provenance(argv) | result)


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """All tables, printed and yielded as they grow, what decides most first."""
    result = {"gelu": [], "weight_gradients": [], "rows": []}
    if args.network:
        result["evaluations"] = evaluations(device)
        show_ways("network, GELU", result["evaluations"])
        yield result
        result["passes"] = passes(device)
        show_ways("network, gradients of weights", result["passes"])
        yield result
    for images in GELU_IMAGES:
        result["gelu"].append(gelu(images, device))
        show_ways("layer, GELU", result["gelu"][-1])
        yield result
    for images in GRADIENT_IMAGES:
        for row in weight_gradients(images, device):
            result["weight_gradients"].append(row)
            show_ways(f"gradient of {row['layer']}'s weight,", row)
            yield result
    for name in CHOICES:
        for images in IMAGES[name] if name not in IN_ATTENTION or can_pack(device) else ():
            rows = list(sweep(name, images, device))
            result["rows"] += rows
            ranks = enumerate(sorted(rows, key=lambda row: row["ms"]))
            best = [row for rank, row in ranks if rank < 3 or row["chosen"]]
            show(best, {"kernel": "", "images": "", **dict.fromkeys(CHOICES[name], ""), "chosen": "", "ms": ".4f"})
            yield result


def show_ways(what: str, row: dict) -> None:
    """Print a comparison of several ways to do the same."""
    for way, found in row.items():
        if isinstance(found, dict):
            print(f"{row['images']} images, {what} {way}: {found['ms']:.4f} ms, off by {found['error']:.2g}")


if __name__ == "__main__":
    main()
