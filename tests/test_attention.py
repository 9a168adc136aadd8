"""The backward pass of attention: which kernels may compute it, and that it stays finite."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from test_train import command, folder  # noqa: F401  (folder is a fixture)

import train
from models import kernels


def test_cudnn_makes_gradients_of_whole_tiles_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for tokens, first in ((None, "CUDNN"), (64, "FLASH"), (192, "FLASH"), (256, "CUDNN"), (1024, "CUDNN")):
        assert kernels.attention_backends("cuda", tokens)[0].name.startswith(first), tokens


def test_training_says_how_many_tokens_it_has(folder, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(train, "fast_attention", lambda *given: asked.append(given) or contextlib.nullcontext())
    train.main(command(folder, folder / "attention", "--steps", 1))
    [(device, tokens)] = asked
    assert (device.type, tokens) == ("cpu", 16)  # latents of 8×8 in patches of 2×2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
def test_gradients_stay_finite_where_all_scores_are_far_below_zero(tokens):
    q, k, v = 0.1 * torch.randn(3, 1, 1, tokens, 64, device="cuda", dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1, -120 * 64**0.5  # scores of −120
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    with kernels.fast_attention("cuda", tokens):
        F.scaled_dot_product_attention(*leaves).backward(torch.randn_like(q))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
