"""A network made ready to sample computes what the plain one computes."""

import pytest
import torch

from models.inference import round_weights
from models.kernels import compile_blocks, fast_attention
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


@pytest.mark.gpu
@torch.no_grad()
def test_rounded_and_compiled_is_no_further_from_float32_than_autocast():
    x, t, snippets = *(tensor.cuda() for tensor in inputs()), CONDS["snippet"].cuda()
    plain, fast = network().cuda(), network().cuda()
    exact = plain(x, t, snippets)
    round_weights(fast)
    compile_blocks(fast)
    with torch.autocast("cuda", torch.bfloat16), fast_attention("cuda"):
        errors = [
            (made.velocity(x, made.t_embedder(t) + made.embed_condition(snippets, 3, None)) - exact).norm()
            for made in (fast, plain)
        ]
    assert errors[0] < 1.25 * errors[1]
