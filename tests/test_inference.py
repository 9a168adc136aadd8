"""A network made ready to sample computes what the plain one computes."""

import pytest
import torch
import torch.nn.functional as F

from models.inference import LinearGELU, fuse_gelu, gelu_is_tanh, round_weights
from models.sit import SiT_models

CONDS = {
    "snippet": torch.randn(3, 6, generator=torch.Generator().manual_seed(1)),
    "label": torch.tensor([0, 4, 2]),
    "none": None,
}
CONDS["label+snippet"] = (CONDS["label"], CONDS["snippet"])


def network(condition="snippet", **options):
    torch.manual_seed(0)
    made = SiT_models["SiT-Ti/2"](input_size=8, condition=condition, snippet_dim=6, num_classes=5, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return made.eval()


def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([1.0, 0.3, 0.3])


@pytest.mark.parametrize("condition", list(CONDS))
@torch.no_grad()
def test_a_condition_embedded_beforehand_gives_the_same_velocity(condition):
    plain, cond, (x, t) = network(condition), CONDS[condition], inputs()
    embedded = plain.embed_condition(cond, 3, None)
    assert torch.equal(plain.velocity(x, plain.t_embedder(t) + embedded), plain(x, t, cond))


@pytest.mark.parametrize("condition", list(CONDS))
@torch.no_grad()
def test_weights_rounded_once_give_the_bits_of_autocast(condition):
    rounded, cond, (x, t) = network(condition, qk_norm=True), CONDS[condition], inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = rounded(x, t, cond)
        round_weights(rounded)
        assert torch.equal(rounded(x, t, cond), expected)
    assert rounded.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {p.dtype for p in (*rounded.t_embedder.parameters(), rounded.pos_embed)} == {torch.float32}
    assert rounded.blocks[0].attn.q_norm.weight.dtype == torch.float32


@torch.no_grad()
def test_gelu_inside_the_product_is_used_only_where_it_is_the_tanh_form(monkeypatch):
    x, t = inputs()
    plain, fused = network(), network()
    fuse_gelu(fused)
    assert not gelu_is_tanh("cpu", torch.float32), "on a CPU it is the erf form"
    assert not any(isinstance(module, LinearGELU) for module in fused.modules())

    def tanh_form(bias, rows, weight, use_gelu):
        assert use_gelu
        return F.gelu(torch.addmm(bias, rows, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", tanh_form)
    fuse_gelu(fused)
    assert sum(isinstance(module, LinearGELU) for module in fused.modules()) == 6
    assert fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fused(x, t, CONDS["snippet"]), plain(x, t, CONDS["snippet"]), rtol=1e-5, atol=1e-6)
    assert gelu_is_tanh("cpu", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_approximate_tanh_is_told_from_erf(monkeypatch, dtype):
    exact = torch._addmm_activation
    assert not gelu_is_tanh("cpu", dtype)

    def approximate(bias, rows, weight, use_gelu):
        hidden = torch.addmm(bias, rows, weight).double()
        angle = (2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)
        rough = angle.tanh() * (1 + 2**-12 * (40 * hidden).sin())  # relative error of a GPU's tanh instruction
        return (0.5 * hidden * (1 + rough)).to(dtype)

    monkeypatch.setattr(torch, "_addmm_activation", approximate)
    assert gelu_is_tanh("cpu", dtype)
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, use_gelu: exact(*a, use_gelu=use_gelu) + 0.01)
    assert not gelu_is_tanh("cpu", dtype)


@pytest.mark.gpu
@torch.no_grad()
def test_gelu_inside_the_product_on_a_gpu():
    x, t, snippets = *(tensor.cuda() for tensor in inputs()), CONDS["snippet"].cuda()
    plain, fused = network().cuda(), network().cuda()
    exact = plain(x, t, snippets)
    round_weights(fused)
    fuse_gelu(fused)
    assert isinstance(fused.blocks[5].mlp.fc1, LinearGELU)
    with torch.autocast("cuda", torch.bfloat16):
        errors = [(made(x, t, snippets) - exact).norm() for made in (fused, plain)]
    assert errors[0] < 1.25 * errors[1]
