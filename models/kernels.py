"""Which kernels a network runs on: attention's backend, and blocks compiled by torch.compile.

Nothing here changes what is computed beyond rounding. On a CPU attention is left as it is, and compiling is the
caller's choice; both commands that run networks (train.py, sample_ddp.py) go through this file.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_CAPABILITY = (9, 0)  # the first where cuDNN's attention is the faster one at head dimension 72: Hopper


def attention_backends(device: torch.device | str) -> list[SDPBackend]:
    """Attention backends in order of preference on this device; each call takes the first that supports its tensors."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    device = torch.device(device)
    cudnn = device.type == "cuda" and torch.backends.cudnn.is_available()
    if cudnn and torch.cuda.get_device_capability(device) >= CUDNN_CAPABILITY:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return backends


@contextlib.contextmanager
def fast_attention(device: torch.device | str) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` prefers `attention_backends(device)`; on a CPU nothing changes.

    A compiled network keeps the backend that was chosen while it was compiled, so its first call belongs inside, too.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    with sdpa_kernel(attention_backends(device), set_priority=True):
        yield


def compile_blocks(network: nn.Module, **options: object) -> None:
    """Compile each of `network.blocks` in place, for static shapes; parameters and their names stay as they are.

    The blocks share their code, so the first call with new shapes compiles once for all of them (seconds, not the
    minutes of a whole network). `options` go to torch.compile.
    """
    torch._dynamo.config.optimize_ddp = (
        False  # it would cut each block at DDP's buckets, and blocks overlap well enough
    )
    for block in network.blocks:
        block.compile(dynamic=False, **options)
