"""A network made ready to sample computes what the plain one computes."""

import pytest
import torch
import torch.nn.functional as F

from models.inference import LogisticGELU, round_weights, simplify_gelu
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


def test_gelu_by_the_logistic_function_is_the_tanh_form():
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float32)
    exact = F.gelu(x.double(), approximate="tanh")
    ours, theirs = (form.double() - exact for form in (LogisticGELU()(x), F.gelu(x, approximate="tanh")))
    assert ours.abs().max() <= max(theirs.abs().max(), 1e-6)
    tail = (x > -5) & (x < -1)
    assert (ours / exact)[tail].abs().max() < 1e-5, "nothing cancels, as 1 + tanh does"
    assert (theirs / exact)[tail].abs().max() > 1e-3
    half = x.bfloat16()
    assert torch.equal(LogisticGELU()(half), LogisticGELU()(half.float()).bfloat16())


@torch.no_grad()
def test_a_network_with_it_is_the_same():
    plain, simple, (x, t) = network(), network(), inputs()
    simplify_gelu(simple)
    assert simple.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(simple(x, t, CONDS["snippet"]), plain(x, t, CONDS["snippet"]), rtol=1e-5, atol=5e-6)
