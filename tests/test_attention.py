"""The backward pass of attention: which kernels may compute it, and that it stays finite."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from test_train import command, folder  # noqa: F401  (folder is a fixture)
from timm.models.vision_transformer import Attention

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


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, True), ({"tokens": 64}, True), ({"width": 1152}, True), ({"dtype": torch.float32}, False)]
    + [({"tokens": 64, "width": 1152}, False)]  # heads of 72
    + [({"tokens": tokens}, False) for tokens in (16, 128, 1024)]
    + [({"width": width}, False) for width in (512, 1280)]
    + [({"qk_norm": True}, False)],
)
def test_what_the_kernels_were_not_tried_with_is_left_to_pytorch(change, expected):
    attention = pytest.importorskip("models.attention")
    given = {"tokens": 256, "width": 1024, "dtype": torch.bfloat16, "qk_norm": False} | change
    layer = Attention(given["width"], num_heads=16, qk_norm=given["qk_norm"], norm_layer=torch.nn.LayerNorm)
    assert attention.fits(layer, torch.empty(2, given["tokens"], given["width"], dtype=given["dtype"])) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
def test_gradients_stay_finite_where_all_scores_are_far_below_zero(tokens):
    q, k, v = 0.1 * torch.randn(3, 1, 1, tokens, 64, device="cuda", dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1, -120 * 64**0.5  # scores of −120
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    with kernels.fast_attention("cuda", tokens):
        F.scaled_dot_product_attention(*leaves).backward(torch.randn_like(q))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 256])
def test_packed_attention_is_right_where_all_scores_are_far_below_zero(tokens):
    attention = pytest.importorskip("models.attention").attention
    if not kernels.can_pack("cuda"):
        pytest.skip("models/attention.py is for Hopper GPUs")
    torch.manual_seed(0)
    qkv = 0.1 * torch.randn(2, tokens, 3, 2, 64, device="cuda")
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 1, -120 * 64**0.5  # scores of −120, in both heads
    qkv = qkv.flatten(2).to(torch.bfloat16)
    weights = torch.randn(2, tokens, 128, device="cuda", dtype=torch.bfloat16)
    given, wide = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out = attention(given, torch.zeros(384, device="cuda", requires_grad=True), 2)
    out.backward(weights)
    q, k, v = wide.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)  # (2, 2, tokens, 64) each
    expected = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected.backward(weights.double())
    assert (out - expected).norm() < 0.01 * expected.norm()
    assert given.grad.isfinite().all()
    # the first of a head is left out, because it cancels to noise
    gradients = (tensor.grad.unflatten(-1, (3, 2, 64))[..., 1:] for tensor in (given, wide))
    for ours, theirs in zip(*(gradient.unbind(2) for gradient in gradients), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
