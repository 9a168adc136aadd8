"""The network: published sizes and names, the published arithmetic in an independent form, conditions and heads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.sit import SiT_models, conditions, position_embedding

SMALL = {"input_size": 8, "snippet_dim": 12, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return SiT_models["SiT-Ti/2"](**{**SMALL, **options})


def randomise(model):
    """Random weights everywhere, because the untrained output is zero whatever the input."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *model.latent_shape, generator=generator)
    labels = torch.arange(batch) % 5
    snippets = torch.randn(batch, 12, generator=generator)
    cond = {"snippet": snippets, "label": labels, "label+snippet": (labels, snippets), "none": None}
    return x, torch.rand(batch, generator=generator), cond[model.condition]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("SiT-XL/2", {"align_dims": (768,)}, 682_975_248),  # GMem's released network
        ("SiT-XL/2", {"condition": "label"}, 675_111_184),
        ("SiT-L/2", {"condition": "label"}, 458_086_416),
        ("SiT-B/2", {"condition": "label"}, 130_500_112),
        ("SiT-S/2", {"condition": "label"}, 32_957_200),
    ],
)
def test_published_parameter_counts(name, options, count):
    with torch.device("meta"):
        model = SiT_models[name](**options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_presets():
    assert set(SiT_models) == {f"SiT-{s}/{p}" for s in ("Ti", "S", "B", "L", "XL") for p in (1, 2, 4, 8)}
    with torch.device("meta"):
        for name, build in SiT_models.items():
            model = build(input_size=32)
            assert model.x_embedder.proj.kernel_size == (int(name[-1]),) * 2
            assert model.config["model"] == name


def test_shapes_are_known_without_computing():
    """On the meta device, where sizes such as XL's are counted in no time."""
    with torch.device("meta"):
        model = SiT_models["SiT-XL/2"](condition="none", align_dims=(768,))
        velocity, tokens = model(torch.empty(2, 4, 32, 32), torch.empty(2), return_tokens=True)
    assert (velocity.shape, tokens[0].shape) == ((2, 4, 32, 32), (2, 256, 768))


def test_multiply_adds_of_the_small_preset():
    """SiT's paper gives 6.06 G multiply-adds for S/2 at 32×32: counted here from the modules that a forward meets."""
    model, total = SiT_models["SiT-S/2"](condition="label"), 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += args[0].numel() * module.out_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    attention = 12 * 2 * 256 * 256 * 384
    assert (total + attention) / 1e9 == pytest.approx(6.06, abs=0.02)


def test_names_of_the_published_weights():
    model = small(condition="label+snippet", align_dims=(7, 9), align_depth=3)
    names = set(model.state_dict())
    parts = ["x_embedder.proj.weight", "pos_embed", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias"]
    parts += ["condition_projection.linear.weight", "y_embedder.embedding_table.weight", "blocks.5.attn.qkv.bias"]
    parts += ["blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias"]
    parts += ["blocks.0.adaLN_modulation.1.weight", "projectors.1.0.weight", "projectors.0.2.bias"]
    parts += ["projectors.0.4.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias"]
    assert names.issuperset(parts)
    assert not [name for name in names if "_embed_condition" in name]


@pytest.mark.parametrize("condition", conditions)
def test_the_first_velocity_is_exactly_zero(condition):
    model = small(condition=condition)
    x, t, cond = inputs(model)
    assert model(x, t, cond).count_nonzero() == 0


def published_forward(state, x, t, snippet, heads=3, depth=6, patch=2):
    """The published network from its parameters alone: plain arithmetic, no modules shared with models/sit.py."""
    frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    c = F.linear(
        torch.cat([angles.cos(), angles.sin()], 1), state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"]
    )
    c = F.linear(F.silu(c), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])
    unit = snippet / snippet.norm(dim=1, keepdim=True)
    c = c + F.linear(unit, state["condition_projection.linear.weight"], state["condition_projection.linear.bias"])
    size, width = x.shape[-1], state["pos_embed"].shape[-1]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).mT + state["pos_embed"]
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): p for name, p in state.items() if name.startswith(f"blocks.{i}.")}
        m = F.linear(F.silu(c), block["adaLN_modulation.1.weight"], block["adaLN_modulation.1.bias"])[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.split(width, -1)
        y = F.layer_norm(h, (width,), eps=1e-6) * (1 + scale1) + shift1
        qkv = F.linear(y, block["attn.qkv.weight"], block["attn.qkv.bias"]).unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / (width // heads) ** 0.5).softmax(-1) @ v
        y = F.linear(attention.transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"])
        h = h + gate1 * y
        y = F.layer_norm(h, (width,), eps=1e-6) * (1 + scale2) + shift2
        y = F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]), approximate="tanh")
        h = h + gate2 * F.linear(y, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    m = F.linear(
        F.silu(c), state["final_layer.adaLN_modulation.1.weight"], state["final_layer.adaLN_modulation.1.bias"]
    )
    shift, scale = m[:, None].chunk(2, -1)
    h = F.layer_norm(h, (width,), eps=1e-6) * (1 + scale) + shift
    h = F.linear(h, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    grid = h.reshape(len(x), size // patch, size // patch, patch, patch, x.shape[1])
    return torch.einsum("bhwpqc->bchpwq", grid).reshape(x.shape)


def test_forward_is_the_published_arithmetic():
    model = randomise(small()).eval()
    x, t, snippet = inputs(model)
    expected = published_forward(model.state_dict(), x, t, snippet)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x, t, snippet), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", conditions)
def test_a_network_in_float64_agrees_with_float32(condition):
    """So that the network itself can be the exact reference of a faster form."""
    model = randomise(small(condition=condition, align_dims=(7,), align_depth=2, null_dropout=0.1)).eval()
    x, t, cond = inputs(model)
    velocity, [tokens] = model(x, t, cond, return_tokens=True)
    wide, [wide_tokens] = model.double()(x.double(), t.double(), cond, return_tokens=True)
    assert (wide.dtype, wide_tokens.dtype) == (torch.float64, torch.float64)
    for narrow, exact in ((velocity, wide), (tokens, wide_tokens)):
        assert (narrow - exact).abs().max() < 1e-5 * exact.abs().max()


def test_positions_code_the_column_first_and_sine_before_cosine():
    grid = position_embedding(8, 5)[0].reshape(5, 5, 8)
    h, w = 3, 2
    frequencies = torch.tensor([1.0, 10_000.0**-0.5])
    expected = torch.cat(
        [(w * frequencies).sin(), (w * frequencies).cos(), (h * frequencies).sin(), (h * frequencies).cos()]
    )
    torch.testing.assert_close(grid[h, w], expected)


def test_snippet_scale_and_norm():
    model = randomise(small(snippet_scale=3.0)).eval()
    x, t, snippet = inputs(model)
    torch.testing.assert_close(model(x, t, snippet), model(x, t, 7 * snippet))
    torch.testing.assert_close(
        model.embed_condition(snippet, 3, None), model.condition_projection.linear(3 * F.normalize(snippet))
    )


def test_label_scale():
    model = randomise(small(condition="label", num_classes=5, label_scale=3.0)).eval()
    labels = torch.arange(5)
    torch.testing.assert_close(model.embed_condition(labels, 5, None), 3 * model.y_embedder.embedding_table(labels))


def test_dropout_acts_where_it_is_asked_for():
    for place in ("embedding", "snippet"):
        model = randomise(small(snippet_dropout=0.5, snippet_dropout_at=place)).train()
        snippet = torch.ones(200, 12)
        c = model.embed_condition(snippet, 200, None)
        assert ((c == 0).float().mean() - (0.5 if place == "embedding" else 0)).abs() < 0.02


def test_null_replaces_the_rows_that_the_numbers_name():
    model = randomise(small(null_dropout=0.3)).train()
    _, _, snippet = inputs(model)
    uniforms = torch.tensor([[0.29, 0.9], [0.3, 0.0], [0.9, 0.0]])
    model.condition_projection.dropout.p = 0
    c = model.embed_condition(snippet, 3, uniforms)
    assert torch.equal(c[0], model.null_embedding)
    assert torch.equal(c[1:], model.condition_projection(snippet)[1:])
    assert torch.equal(model.embed_condition(None, 3, None), model.null_embedding.expand(3, -1))
    assert torch.equal(model.eval().embed_condition(snippet, 3, uniforms), model.condition_projection(snippet))


def test_null_label():
    model = randomise(small(condition="label", label_dropout=0.5)).train()
    uniforms = torch.tensor([[0.0, 0.49], [0.0, 0.5]])
    c = model.embed_condition(torch.tensor([1, 1]), 2, uniforms)
    assert torch.equal(c, model.y_embedder.embedding_table.weight[[5, 1]])
    assert torch.equal(model.eval().embed_condition(None, 2, None), model.y_embedder.embedding_table.weight[[5, 5]])
    labels = torch.zeros(4000, dtype=torch.long)
    dropped = (model.train().embed_condition(labels, 4000, None) == model.y_embedder.embedding_table.weight[5]).all(1)
    assert 0.45 < dropped.float().mean() < 0.55


def test_alignment_tokens_come_from_the_named_block():
    model = randomise(small(align_dims=(7, 9), align_depth=2)).eval()
    x, t, snippet = inputs(model)
    velocity, tokens = model(x, t, snippet, return_tokens=True)
    assert [tuple(part.shape) for part in tokens] == [(3, 16, 7), (3, 16, 9)]
    torch.testing.assert_close(velocity, model(x, t, snippet))
    for block in model.blocks[2:]:
        nn.init.normal_(block.mlp.fc2.weight)
    _, after = model(x, t, snippet, return_tokens=True)
    assert torch.equal(tokens[0], after[0])


def test_a_copy_is_independent():
    """An EMA is a deep copy: its condition must be its own, too."""
    model = randomise(small()).eval()
    x, t, snippet = inputs(model)
    ema = copy.deepcopy(model)
    before = ema(x, t, snippet)
    nn.init.zeros_(model.condition_projection.linear.weight)
    assert torch.equal(ema(x, t, snippet), before)
    assert not torch.equal(model(x, t, snippet), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "text"}, "condition='text': expected one of snippet, label"),
        ({"input_size": 9}, "input_size=9 is not a multiple of the patch size 2 of SiT-Ti/2: .*--image-size.*--model"),
        ({"align_dims": (768,), "align_depth": 8}, "align_depth=8: SiT-Ti/2 has blocks 1 to 6; .* align_depth=3"),
        ({"snippet_dropout_at": "end"}, "snippet_dropout_at='end'"),
        ({"null_dropout": 1.0}, "null_dropout=1.0: expected a probability"),
    ],
)
def test_impossible_networks(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_no_condition_where_there_is_no_null():
    model = small()
    x, t, _ = inputs(model)
    with pytest.raises(ValueError, match=r"no null condition.*--model-options null_dropout=0\.1"):
        model(x, t, None)
