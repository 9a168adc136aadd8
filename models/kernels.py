"""Which kernels a network runs on: precision, attention's backend, and blocks compiled by torch.compile.

Nothing here changes what is computed beyond rounding. On a CPU attention is left as it is, and compiling is the
caller's choice; both commands that run networks (train.py, sample_ddp.py) go through this file.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory.kmeans import triton_works
from models.agreement import trusted
from models.sit import SiT, checkpointed

HOPPER = (9, 0)  # from here on cuDNN's attention is the faster one; for this generation alone is models/attention.py
CUDNN_TILE = 128  # tokens, of which its backward pass goes wrong in parts
TRITON_CAPABILITY = (8, 0)  # the first with bf16


def attention_backends(device: torch.device | str, tokens: int | None = None) -> list[SDPBackend]:
    """Attention backends in order of preference on this device; each call takes the first that supports its tensors.

    `tokens` says that there will be a backward pass, over so many: cuDNN's on Hopper pads them to tiles of 128 with
    scores of 0, whose weights overflow where all of a query's true scores are below about −88, and gives NaN
    (github.com/pytorch/pytorch/issues/196678).
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    device = torch.device(device)
    cudnn = device.type == "cuda" and torch.backends.cudnn.is_available() and (tokens or 0) % CUDNN_TILE == 0
    if cudnn and torch.cuda.get_device_capability(device) >= HOPPER:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return backends


@contextlib.contextmanager
def fast_attention(device: torch.device | str, tokens: int | None = None) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` prefers `attention_backends(device, tokens)`; on a CPU nothing changes.

    A compiled network keeps the backend that was chosen while it was compiled, so its first call belongs inside, too.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    with sdpa_kernel(attention_backends(device, tokens), set_priority=True):
        yield


def default_precision() -> str:
    """The networks' precision where nobody says: bf16 where the GPU computes in it natively, else fp32."""
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


@contextlib.contextmanager
def fitting(remedy: str) -> Iterator[None]:
    """Turn running out of the GPU's memory inside into a ValueError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU's memory is too small for this: {remedy}") from error


def compile_by_default() -> bool:
    """Whether networks are compiled where nobody says: with a GPU, if what compiles for it is there; warns if not."""
    if torch.cuda.is_available() and not triton_works():
        warnings.warn("Triton or a C compiler (gcc) is missing: networks run uncompiled, much slower", stacklevel=2)
        return False
    return torch.cuda.is_available()


def can_fuse(device: torch.device | str) -> bool:
    """Whether the kernels of models/fused.py and adamw.py run on this device: a GPU since Ampere, if Triton works."""
    capable = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
    return capable and triton_works()


def can_pack(device: torch.device | str) -> bool:
    """Whether models/attention.py runs on this device, where `can_fuse`: cuDNN's attention, on a Hopper GPU."""
    cudnn = SDPBackend.CUDNN_ATTENTION in attention_backends(device)
    return cudnn and torch.cuda.get_device_capability(device) == HOPPER


def compile_blocks(network: SiT, fuse: bool | None = None, **options: object) -> None:
    """Compile `network.blocks` in place, for static shapes; parameters and their names stay as they are.

    The blocks share their code, so the first call with new shapes compiles once for all of them (seconds, not the
    minutes of a whole network). With `fuse` (None: where `can_fuse`) norms, modulation and gated residuals run as the
    kernels of models/fused.py and models/attention.py, as far as they agree with PyTorch on the shapes, the precision
    and the need of gradients that the first call has (models/agreement.py). `options` go to torch.compile.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut a block at DDP's buckets; whole blocks overlap well enough
    device = network.pos_embed.device
    if can_fuse(device) if fuse is None else fuse:
        network.velocity = partial(first_velocity, network, options)
    else:
        compile_plain(network, options)


def compile_plain(network: SiT, options: dict[str, object]) -> None:
    """Compile the blocks as models/sit.py has them."""
    for part in (*network.blocks, network.final_layer):
        part.compile(dynamic=False, **options)


def first_velocity(
    network: SiT, options: dict[str, object], x: Tensor, c: Tensor, return_tokens: bool = False
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """`SiT.velocity` of a first call, which chooses what computes it and all later ones."""
    packed = trusted(network, can_pack(x.device), entrance(network, x) | {"c": c})
    torch.cuda.empty_cache()  # of what only the choice took
    del network.velocity
    if packed is None:
        compile_plain(network, options)
    else:
        from models.fused import finish, run_block  # here, because Triton is not everywhere

        run, end = (torch.compile(function, dynamic=False, **options) for function in (run_block, finish))
        network.velocity = partial(fused_velocity, network, partial(run, packed), end)
    return network.velocity(x, c, return_tokens)


def entrance(network: SiT, x: Tensor) -> dict[str, Tensor]:
    """What the first block is given for x (B, C, H, W), but for c: x and branch (B, T, D), gate (B, D), bias (D,)."""
    branch = network.x_embedder(x).contiguous()  # the patches are the branch that joins the positions
    x, gate = network.pos_embed.expand_as(branch).contiguous(), branch.new_ones(len(x), branch.shape[-1])
    bias = nn.Parameter(torch.zeros_like(network.blocks[0].mlp.fc2.bias))
    if torch.is_grad_enabled():  # gradients that nobody reads: with them the first block has the graph of the others
        x, gate = x.requires_grad_(), gate.requires_grad_()
    return {"x": x, "branch": branch, "gate": gate, "bias": bias}


def fused_velocity(
    network: SiT, run_block: Callable, finish: Callable, x: Tensor, c: Tensor, return_tokens: bool = False
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """`SiT.velocity`, with each residual added by the kernel that normalises it for the next branch."""
    tokens = []
    x, branch, gate, bias = entrance(network, x).values()  # (B, T, D), (B, T, D), (B, D), (D,)
    run = partial(checkpointed, run_block) if network.checkpoint_activations else run_block
    for depth, block in enumerate(network.blocks, start=1):
        x, branch, gate = run(block, x, branch, gate, bias, c)  # (B, T, D), (B, T, D), (B, D)
        bias = block.mlp.fc2.bias
        if return_tokens and depth == network.align_depth:
            now = x + gate[:, None] * (branch + (bias - bias.detach()))  # `branch` itself hides the bias's gradient
            tokens = [head(now) for head in network.projectors]  # (B, T, F) each
    velocity = network.unpatchify(finish(network.final_layer, x, branch, gate, bias, c))  # (B, C, H, W)
    return (velocity, tokens) if return_tokens else velocity
