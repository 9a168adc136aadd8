"""A trained network made ready to sample in bf16: what autocast would do at every step is done once.

Training keeps float32 weights and a GELU that has a derivative; a network that only samples needs neither.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sit import SiT, TimestepEmbedder


class LinearGELU(nn.Module):
    """A linear layer and tanh-GELU in one kernel, which spares writing and reading the hidden layer; no derivative."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(self.weight.dtype)  # (B·T, D)
        hidden = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return hidden.unflatten(0, x.shape[:-1])  # (B, T, 4·D)


def round_weights(network: SiT) -> None:
    """Round to bf16, in place, the weights that autocast would round at every step: the same numbers come out.

    The time's embedder stays in float32, and so does every state between the products.
    """
    kept = {module for part in network.modules() if isinstance(part, TimestepEmbedder) for module in part.modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in kept:
            module.bfloat16()


def fuse_gelu(network: SiT) -> None:
    """Let each block's first product apply GELU itself, in place, where this device does so in the tanh form."""
    weight = network.blocks[0].mlp.fc1.weight
    if gelu_is_tanh(weight.device, weight.dtype):
        for block in network.blocks:
            block.mlp.fc1, block.mlp.act = LinearGELU(block.mlp.fc1), nn.Identity()


def gelu_is_tanh(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product's own GELU is the tanh form, as cuBLAS's is, and not the erf form, as on a CPU.

    The two differ by up to 5e-4, and cuBLAS's tanh is an approximate one: the nearer form on many points is meant.
    """
    points = torch.linspace(-4, -1, 256, device=device).to(dtype)
    identity = torch.eye(256, device=device, dtype=dtype)
    values = torch._addmm_activation(torch.zeros_like(points), points.diag(), identity, use_gelu=True).diagonal()
    errors = {form: values.double() - F.gelu(points.double(), approximate=form) for form in ("tanh", "none")}
    return bool(errors["tanh"].norm() < errors["none"].norm()) and bool(errors["tanh"].abs().max() < 2e-3)
