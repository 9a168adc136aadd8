"""A trained network made ready to sample: autocast's rounding of weights done once, GELU in fewer operations."""

import math

import torch
from torch import Tensor, nn

from models.sit import SiT, TimestepEmbedder

CUBIC = 0.044715  # of tanh-GELU (Hendrycks and Gimpel, arXiv 1606.08415)


class LogisticGELU(nn.Module):
    """tanh-GELU by the identity (1 + tanh u)/2 = σ(2u), in float32: once compiled, one exponential in place of a tanh
    whose arithmetic takes a GPU longer than reading and writing the hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.float()
        slope = math.sqrt(8 / math.pi) * (1 + CUBIC * hidden.square())  # 2u = slope·x
        return (hidden * torch.sigmoid(slope * hidden)).to(x.dtype)


def round_weights(network: SiT) -> None:
    """Round to bf16, in place, the weights that autocast would round at every step: the same numbers come out.

    The time's embedder stays in float32, and so does every state between the products.
    """
    kept = {module for part in network.modules() if isinstance(part, TimestepEmbedder) for module in part.modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in kept:
            module.bfloat16()


def simplify_gelu(network: SiT) -> None:
    """Give every block, in place, the GELU that is faster once compiled."""
    for block in network.blocks:
        block.mlp.act = LogisticGELU()
