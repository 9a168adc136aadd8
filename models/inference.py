"""A trained network made ready to sample in bf16: what autocast would do at every step is done once."""

from torch import nn

from models.sit import SiT, TimestepEmbedder


def round_weights(network: SiT) -> None:
    """Round to bf16, in place, the weights that autocast would round at every step: the same numbers come out.

    The time's embedder stays in float32, and so does every state between the products.
    """
    kept = {module for part in network.modules() if isinstance(part, TimestepEmbedder) for module in part.modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in kept:
            module.bfloat16()
