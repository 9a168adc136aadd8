"""The Triton kernels equal plain arithmetic: interpreted on a CPU, and compiled inside a network on a GPU."""

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the interpreted run of this very file
from models import agreement, kernels, update
from models.inference import round_weights
from models.sit import SiT, SiT_models

pytest.importorskip("triton")
from models import adamw, attention, fused

EPS = 1e-6


def relative(given, expected):
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


def plain_join(x, branch, gate, shift, scale, bias):
    total = x + gate[:, None] * (branch + bias - bias.detach())
    return total, F.layer_norm(total, total.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def check_join(device, tokens, width, dtype, tolerance):
    torch.manual_seed(0)
    x, modulation = torch.randn(3, tokens, width, device=device), torch.randn(3, 6 * width, device=device).to(dtype)
    branch = torch.randn(3, tokens, width, device=device).to(dtype)
    weights = torch.randn(2, 3, tokens, width, device=device)
    results = []
    for join, wide in ((lambda *inputs: fused.join(*inputs, EPS), False), (plain_join, True)):
        inputs = [tensor.double() if wide else tensor for tensor in (x, branch, modulation, torch.zeros_like(x[0, 0]))]
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        gate, shift, scale = inputs[2].chunk(6, 1)[1:4]  # rows that are not packed
        total, normed = join(*inputs[:2], gate, shift, scale, inputs[3])
        (total * weights[0]).sum().add((normed * weights[1]).sum()).backward()
        results.append([total, normed, *(tensor.grad for tensor in inputs)])
    for given, expected in zip(*results, strict=True):
        assert relative(given, expected) < tolerance


def check_attention(device, tokens, heads, size, dtype, tolerance):
    torch.manual_seed(0)
    images, width = 2, heads * size
    qkv, d_out = (torch.randn(images, tokens, parts * width, device=device) for parts in (3, 1))
    wide = qkv.to(dtype).double().requires_grad_()
    q, k, v = wide.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)  # (images, heads, tokens, size) each
    scores = q @ k.transpose(-1, -2) / size**0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out.backward(d_out.to(dtype).double())
    lse = scores.logsumexp(-1, keepdim=True).float()
    given = [tensor.detach().to(dtype) for tensor in (d_out, qkv, out)]
    gradient, sums = torch.ops.gmem.attention_backward(*given, lse.detach(), heads)
    for place in range(3):  # queries, keys, values
        expected = wide.grad.chunk(3, -1)[place]
        assert relative(gradient.chunk(3, -1)[place], expected) < tolerance
        error = (sums.chunk(3)[place] - expected.sum((0, 1))).abs().max()
        assert error < tolerance * expected.abs().sum((0, 1)).max()  # what cancels in the sum has been rounded


def check_activate(device, tokens, width, dtype, tolerance):
    torch.manual_seed(0)
    hidden, weights = 2 * torch.randn(2, 3, tokens, width, device=device).to(dtype)
    bias = torch.zeros(width, device=device, requires_grad=True)
    given, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    active, expected = fused.activate(given, bias), F.gelu(wide, approximate="tanh")
    active.backward(weights)
    expected.backward(weights.double())
    assert relative(active, expected) < tolerance
    assert relative(given.grad, wide.grad) < tolerance
    assert relative(bias.grad, wide.grad.sum((0, 1))) < tolerance


def check_adamw(device):
    """Three steps on tensors longer and shorter than a program, one of them not aligned, clipped and not."""
    torch.manual_seed(0)
    parameters = [
        torch.randn(9001, device=device)[1:],
        torch.randn(64, 128, device=device),
        torch.randn(5, device=device),
    ]
    averages, plain = [tensor.clone() for tensor in parameters], [tensor.double() for tensor in parameters]
    expected = [tensor.clone() for tensor in plain]
    optimizer = torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), eps=1e-8, weight_decay=0.0)
    moments = [[torch.zeros_like(tensor) for tensor in parameters] for _ in range(2)]
    kernel = adamw.Kernel(parameters)
    for step, size in ((1, 1.0), (2, 1e-4), (3, 1.0)):
        gradients = [size * torch.randn_like(tensor) for tensor in parameters]
        for tensor, gradient in zip(plain, gradients, strict=True):
            tensor.grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5).float()
        optimizer.step()
        torch._foreach_lerp_(expected, plain, 0.1)
        kernel([parameters, gradients, *moments, averages], norm, 0.5, step, optimizer.param_groups[0], 0.1)
    states = [optimizer.state[tensor] for tensor in plain]
    pairs = [(parameters, plain), (averages, expected)]
    pairs += [(moments[i], [state[name] for state in states]) for i, name in enumerate(("exp_avg", "exp_avg_sq"))]
    for ours, theirs in pairs:
        for given, wanted in zip(ours, theirs, strict=True):
            assert relative(given, wanted) < 1e-6


def make_update(kernel, device):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(37, 41), torch.nn.Linear(41, 64)).to(device)
    with mock.patch.multiple(update, can_fuse=lambda device: kernel, trusted_update=lambda device: True):
        made = update.Update(network, 1e-2, 0.99, clip=0.5, ema_decay=0.99, warmup=3)
    if made.kernel:
        made.kernel = mock.Mock(wraps=made.kernel)
    return made


def gradients_of(step, parameters, bucket):
    """The same in every call; as tensors of their own, or as DDP keeps them, one behind the other."""
    torch.manual_seed(step)
    values = [10.0 ** -(2 * step) * torch.randn(parameter.shape) for parameter in parameters]
    if not bucket:
        return [value.to(parameters[0].device) for value in values]
    flat = torch.cat([value.flatten() for value in values]).to(parameters[0].device)
    return [part.view_as(value) for part, value in zip(flat.split([v.numel() for v in values]), values, strict=True)]


@torch.no_grad()
def check_update(device, bucket, last):
    """By the kernel and by PyTorch: with a rate that rises, clipped and not, over a continuation from the second step's
    state, and where the `last` gradient has a number that is not finite."""
    updates = [make_update(kernel, device) for kernel in (True, False)]
    for step in range(4):
        if step == 2:
            for place, stopped in enumerate(updates):
                assert stopped.kernel is None or stopped.kernel.call_count == 1  # the first step is PyTorch's
                updates[place] = make_update(place == 0, device)
                for part in ("parameters", "averages"):
                    torch._foreach_copy_(getattr(updates[place], part), getattr(stopped, part))
                updates[place].optimizer.load_state_dict(copy.deepcopy(stopped.optimizer.state_dict()))
        norms = []
        for made in updates:
            gradients = gradients_of(step, made.parameters, bucket)
            if step == 3:
                gradients[0][0, 3] = last
            for parameter, gradient in zip(made.parameters, gradients, strict=True):
                parameter.grad = gradient
            norms.append(made(step))
        torch.testing.assert_close(*norms, equal_nan=True)
        for part in (lambda made: made.parameters, lambda made: made.averages, states_of):
            for given, expected in zip(*map(part, updates), strict=True):
                torch.testing.assert_close(given, expected, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert updates[0].kernel.call_count == 2


def states_of(made):
    """Steps and moments."""
    return [tensor for state in made.optimizer.state.values() for tensor in state.values()]


def interpreted_kernels():
    check_adamw("cpu")
    for bucket, last in ((False, 1e-6), (True, math.inf), (True, math.nan)):
        check_update("cpu", bucket, last)
    check_activate("cpu", tokens=50, width=1100, dtype=torch.float32, tolerance=1e-6)
    check_join("cpu", tokens=12, width=24, dtype=torch.float32, tolerance=1e-6)
    with mock.patch.object(fused, "PROGRAMS", 0):  # as of many images
        check_join("cpu", tokens=128, width=24, dtype=torch.float32, tolerance=1e-6)
    for tokens, heads, size in ((256, 1, 72), (128, 2, 64), (64, 3, 72), (64, 2, 64)):
        check_attention("cpu", tokens, heads, size, torch.float32, tolerance=1e-6)


def test_the_kernels_as_interpreted(root):
    """In a process of its own, because Triton reads the variable when it is imported."""
    words = [sys.executable, __file__]
    subprocess.run(words, check=True, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    check_adamw("cuda")
    for bucket, last in ((False, 1e-6), (True, math.inf), (True, math.nan)):
        check_update("cuda", bucket, last)
    check_activate("cuda", tokens=100, width=4608, dtype=torch.bfloat16, tolerance=3e-3)
    check_join("cuda", tokens=64, width=1152, dtype=torch.bfloat16, tolerance=3e-3)
    with mock.patch.object(fused, "PROGRAMS", 0):
        check_join("cuda", tokens=256, width=1152, dtype=torch.bfloat16, tolerance=3e-3)
    for tokens, size in attention.SHAPES:  # as many heads as SiT-S has, and SiT-XL
        for heads in (6, 16):
            check_attention("cuda", tokens, heads, size, torch.bfloat16, tolerance=3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_lies_within_the_product_where_no_gradient_is_wanted(dtype, monkeypatch):
    """In half precision, and then it is rounded once instead of twice; erf's form would be further off."""
    torch.manual_seed(0)
    layer, half = torch.nn.Linear(384, 1536, device="cuda", dtype=dtype), dtype != torch.float32
    x, product = torch.randn(3, 64, 384, device="cuda", dtype=dtype), mock.Mock(wraps=torch._addmm_activation)
    monkeypatch.setattr(torch, "_addmm_activation", product)
    exact = F.gelu(copy.deepcopy(layer).double()(x.double()), approximate="tanh")
    apart = fused.activated(layer, x)
    assert apart.requires_grad
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=half):
        rounded = fused.activated(copy.deepcopy(layer).float(), x)  # float32 weights, which autocast rounds
        assert not product.called
        within = fused.activated(layer, x)
    assert product.called == half
    assert relative(rounded, apart) < 1e-6
    assert relative(within, exact) <= (0.9 if half else 1.0) * relative(apart, exact)


@pytest.mark.parametrize(
    ("images", "tokens", "chunk"),
    [(128, 256, 64), (127, 256, 32), (2, 256, 32), (512, 64, 64), (2, 12, 4), (999, 100, 4)],
)
def test_a_program_of_the_joins_gradients_is_shorter_where_there_are_few(images, tokens, chunk):
    assert fused.chunk_of(images, tokens) == chunk


def wide_product(d_out, x):
    with torch.autocast("cpu", enabled=False):  # which is ambient where a backward pass is compiled
        return d_out.float().t() @ x.float()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_weights_gradient_is_not_rounded(device, compiled, monkeypatch):
    """What its product adds up in float32 comes out as it is; the other gradient is autocast's own. A CPU has no such
    product of bf16, so that float32's stands in."""
    torch._dynamo.reset()
    if device == "cpu":
        monkeypatch.setattr(fused, "weight_gradient", wide_product)
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 160, device=device)
    x, d_out = torch.randn(3, 64, 96, device=device), torch.randn(3, 64, 160, device=device)
    x, d_out = x.bfloat16().requires_grad_(), d_out.bfloat16()
    exact = d_out.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    found = {}
    for way, apply in {"ours": fused.detached, "autocast": torch.nn.Module.__call__}.items():
        if compiled and way == "ours":
            apply = torch.compile(apply, fullgraph=True)
        with torch.autocast(device, torch.bfloat16):
            out = apply(layer, x)
        out.backward(d_out)
        found[way] = out.detach(), x.grad, layer.weight.grad
        assert (layer.bias.grad is None) == (way == "ours")
        x.grad = layer.weight.grad = None
    (out, d_x, d_weight), autocast = found["ours"], found["autocast"]
    assert d_weight.dtype == torch.float32
    assert d_weight.stride() == layer.weight.stride()
    assert relative(out, autocast[0]) < 1e-6 > relative(d_x, autocast[1])
    assert relative(autocast[2], exact) > 1e-3
    assert relative(d_weight, exact) < 1e-5


def test_a_weights_gradient_on_a_cpu_is_that_of_autocast():
    d_out, x = torch.randn(40, 8).bfloat16(), torch.randn(40, 6).bfloat16()
    assert torch.equal(fused.weight_gradient(d_out, x), (d_out.t() @ x).float())


def test_a_weights_gradient_is_left_alone_where_nothing_is_rounded():
    layer, half = torch.nn.Linear(8, 8), torch.randn(1, 2, 8).bfloat16()
    assert fused.widens(layer, half)
    with torch.no_grad():
        assert not fused.widens(layer, half)
    assert not fused.widens(layer, half.float())
    assert not fused.widens(copy.deepcopy(layer).bfloat16(), half)
    assert not fused.widens(copy.deepcopy(layer).requires_grad_(False), half)


@pytest.fixture
def product(monkeypatch):
    """That of GELU, as if it fitted on a CPU, where it is erf's form; joins are plain, because Triton needs a GPU."""

    def join(*given):
        total, normed = plain_join(*given[:-1])
        return total, normed.to(given[1].dtype)

    monkeypatch.setattr(fused, "join", join)
    monkeypatch.setattr(fused, "fits_product", lambda layer, x: not torch.is_grad_enabled())
    monkeypatch.setattr(torch, "_addmm_activation", mock.Mock(wraps=torch._addmm_activation))
    return torch._addmm_activation


def sampled():
    """A network and what its first block is given, as in sampling, where bf16 is ambient."""
    network = make_network(8)
    round_weights(network)
    inputs = kernels.entrance(network, torch.randn(2, *network.latent_shape))
    return network, inputs | {"c": torch.randn(2, network.pos_embed.shape[-1])}


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def test_a_block_with_gelu_within_the_product_compiles_whole(product):
    """Without a break of its graph, to the same bits."""
    torch._dynamo.reset()  # of what other tests compiled: so many forms of one function are allowed
    network, inputs = sampled()
    layer = network.blocks[0].mlp.fc1
    torch.library.opcheck(fused._linear_gelu_op, (inputs["branch"], layer.weight, layer.bias))
    product.reset_mock()
    run = torch.compile(fused.run_block, fullgraph=True, dynamic=False, backend="aot_eager")
    given, eager = (function(False, network.blocks[0], **inputs) for function in (run, fused.run_block))
    assert product.call_count == 2
    assert all(map(torch.equal, given, eager))
    x, branch, gate = given
    wide = {name: value.double() for name, value in inputs.items()}
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(network.blocks[0]).double()(wide["x"] + wide["branch"], wide["c"])
    assert relative(x.double() + gate.double()[:, None] * branch, exact) < 5e-3


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
@pytest.mark.parametrize("told", ["", "are wrong", "no such product"])
def test_a_product_that_goes_wrong_is_noticed(told, product):
    def relu(*given, use_gelu):
        return F.relu(torch.addmm(*given))

    product.side_effect = {"": None, "are wrong": relu, "no such product": RuntimeError(told)}[told]
    network, inputs = sampled()
    with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext():
        assert agreement.trusted(network, False, inputs) is (None if told else False)
    assert product.called


def make_network(input_size, qk_norm=False):
    torch.manual_seed(0)
    options = {"input_size": input_size, "snippet_dim": 16, "align_dims": (5,), "align_depth": 2, "qk_norm": qk_norm}
    network = SiT_models["SiT-S/2"](**options)
    modulations = [part.adaLN_modulation[1] for part in (*network.blocks, network.final_layer)]
    for layer in (*modulations, network.final_layer.linear):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return network.eval()


def outputs_and_gradients(network, device):
    torch.manual_seed(1)
    x, t, snippets = torch.randn(2, *network.latent_shape), torch.rand(2), torch.randn(2, 16)
    network.zero_grad()
    velocity, (tokens,) = network(*(tensor.to(device) for tensor in (x, t, snippets)), return_tokens=True)
    (velocity.float() * x.to(device)).mean().add(tokens.float().square().mean()).backward()
    return [velocity, tokens, *(parameter.grad for parameter in network.parameters() if parameter.requires_grad)]


def worst(given, expected):
    """The largest relative error; of gradients together, because a tiny one's own error says little."""
    return max(relative(torch.cat([g.flatten() for g in a]), torch.cat([e.flatten() for e in b])) for a, b in (
        (given[:1], expected[:1]), (given[1:2], expected[1:2]), (given[2:], expected[2:])
    ))  # fmt: skip


def interpreted_network(qk_norm):
    network = make_network(8, qk_norm)
    network.blocks = network.blocks[:3]
    given = copy.deepcopy(network)
    packed = partial(fused.run_block, True)  # where it fits, which float32 does not
    given.velocity = lambda *inputs: kernels.fused_velocity(given, packed, fused.finish, *inputs)
    expected = outputs_and_gradients(network, "cpu")
    for checkpoint in (False, True):
        given.checkpoint_activations = checkpoint
        for ours, plain in zip(outputs_and_gradients(given, "cpu"), expected, strict=True):
            # what is added to all keys changes nothing: the gradient of their norm's bias is zero but for rounding
            assert relative(ours, plain) < 1e-4 or max(ours.norm(), plain.norm()) < 1e-8


def check_benchmark():
    """The tables have a row for each choice, one of them the one in use, and GELU is computed in both ways."""
    from benchmarks import bench_kernels as bench

    def eagerly(network):
        network.velocity = partial(kernels.fused_velocity, network, partial(fused.run_block, False), fused.finish)

    def small(condition):
        return SiT(name="small", depth=2, width=48, num_heads=2, patch_size=1, input_size=2, condition=condition)

    choices = {"JOIN": {"num_warps": [1]}, "JOIN_BACKWARD": {"chunk": [4, 32]}, "ACTIVATE_BACKWARD": {"tile": [4]}}
    patched = {"TOKENS": 12, "WIDTH": 24, "HALF": torch.float16, "MODEL": "small", "NETWORK_BATCH": 2, "TURNS": 1}
    patched |= {"TRAINED_BATCH": 4, "AT_ONCE": 2}
    patched |= {"CHOICES": choices, "IMAGES": {name: [2] for name in choices}, "GELU_IMAGES": [2]}
    plain = {way: form for way, form in bench.FORMS.items() if "out" not in way}  # what comes out is a GPU's choice
    patched |= {"GRADIENT_IMAGES": [2], "FORMS": plain}
    patched |= {"can_fuse": lambda device: True, "compile_blocks": eagerly, "recorded": lambda work: work}
    patched |= {"milliseconds": lambda work: 2.0, "in_a_row": lambda work, times: float(work().isfinite().all())}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(SiT_models, small=small),
        mock.patch.multiple(bench, **patched),
        mock.patch.object(fused, "fits_product", side_effect=lambda layer, x: not torch.is_grad_enabled()),
        mock.patch.object(torch, "_addmm_activation", side_effect=torch._addmm_activation) as product,
        mock.patch.object(fused, "weight_gradient", side_effect=fused.weight_gradient) as widened,
    ):
        bench.main(["--network", "--out", f"{folder}/out.json"])
        result = json.loads(Path(folder, "out.json").read_text())
    assert product.call_count == 2 + 2 * 2  # compared and timed: a layer, and a network of two blocks
    rows = [(row["kernel"], row["chosen"]) for row in result["rows"]]
    backward = [("JOIN_BACKWARD", True), ("JOIN_BACKWARD", False)]  # 4 divides the tokens
    assert rows == [("JOIN", True), *backward, ("ACTIVATE_BACKWARD", True)]
    assert [row["layer"] for row in result["weight_gradients"]] == ["qkv", "proj", "fc1", "fc2"]
    for row in result["weight_gradients"]:
        assert {*row} == {"layer", "images", "in_a_row", "as it is", "transposed"}
        assert all(row[way]["ms"] == 1 and row[way]["error"] < 0.001 for way in plain)
    ways = {"within": (*result["gelu"], result["evaluations"]), "float32 out": (result["passes"],)}
    ways |= {"apart": ways["within"], "widened": ways["float32 out"]}
    for way, rows in ways.items():
        assert all(row[way]["ms"] == 1 and 0 < row[way]["error"] < 0.01 for row in rows)
    assert widened.call_count == 2 * 2 * 3  # compared and timed: two blocks of three products, attention being plain


def check_attention_benchmark():
    """The sweeps of attention's kernels change the parameters of one of them, and compare each time."""
    from benchmarks import bench_kernels as bench

    def forward(qkv, bias, heads):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1, keepdim=True)

    def parameters():
        return {name: dict(getattr(attention, name)) for name in bench.IN_ATTENTION}

    launched, timed, wrapped = [], [], attention.wrap_triton
    names = ("attention_keys_kernel", "attention_queries_kernel")
    watch = {
        "wrap_triton": lambda kernel: launched.append(kernel.fn.__name__) or wrapped(kernel),
        "_attention_op": forward,
    }
    patched = {"WIDTH": 72, "HEADS": 1, "TOKENS": 128, "HALF": torch.float32, "TOLERANCE": 1e-6}
    patched |= {"recorded": lambda work: timed.append(parameters()) or work, "milliseconds": lambda work: 2.0}
    with mock.patch.multiple(bench, **patched), mock.patch.multiple(attention, **watch):
        for name, in_use in (("KEYS", attention.KEYS), ("QUERIES", attention.QUERIES)):
            timed.clear()
            before, rows = dict(in_use), list(bench.sweep(name, 2, torch.device("cpu")))
            assert timed == [parameters() | {name: {key: row[key] for key in in_use}} for row in rows]
            assert [row["step"] for row in rows if row["chosen"]] == [in_use["step"]]
            assert in_use == before
            assert len(rows) == math.prod(map(len, bench.CHOICES[name].values())) > 1
        with mock.patch.object(bench, "TOLERANCE", 1e-9), pytest.raises(AssertionError, match=r"KEYS .*off by"):
            next(bench.sweep("KEYS", 2, torch.device("cpu")))
    assert all(launched.count(name) > 10 for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fused", "checkpointed", "qk_norm", "without triton", "without cudnn"])
def test_a_compiled_network_is_as_close_to_float32_as_the_plain_one(kind, monkeypatch):
    torch._dynamo.reset()
    network = make_network(32, kind == "qk_norm").cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = outputs_and_gradients(network, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        plain = worst(outputs_and_gradients(network, "cuda"), expected)
    if kind == "without cudnn":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    given = copy.deepcopy(network)
    given.checkpoint_activations = kind == "checkpointed"
    kernels.compile_blocks(given, fuse=False if kind == "without triton" else None)
    with torch.autocast("cuda", torch.bfloat16), kernels.fast_attention("cuda"):
        assert worst(outputs_and_gradients(given, "cuda"), expected) < 1.25 * plain < 0.05


def test_the_order_of_attention_backends_follows_the_capability(monkeypatch):
    names = [backend.name.split("_")[0] for backend in kernels.attention_backends("cpu")]
    assert names == ["FLASH", "EFFICIENT", "MATH"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_works", lambda: True)
    for capability, first in (((9, 0), "CUDNN"), ((8, 9), "FLASH")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernels.attention_backends("cuda")[0].name.startswith(first)
        assert kernels.can_fuse("cuda")
        assert kernels.can_pack("cuda") == (capability == (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not kernels.can_pack("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert [backend.name.split("_")[0] for backend in kernels.attention_backends("cuda")] == names
    assert not kernels.can_pack("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.can_fuse("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert kernels.can_fuse("cuda")
    monkeypatch.setattr(kernels, "triton_works", lambda: False)
    assert not kernels.can_fuse("cuda")
    assert not kernels.can_fuse("cpu")
    assert not kernels.can_pack("cpu")


def test_nothing_is_compiled_by_default_where_no_compiler_is(monkeypatch):
    assert not kernels.compile_by_default()  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_works", lambda: True)
    assert kernels.compile_by_default()
    monkeypatch.setattr(kernels, "triton_works", lambda: False)
    with pytest.warns(UserWarning, match="gcc"):
        assert not kernels.compile_by_default()


if __name__ == "__main__":
    interpreted_kernels()
    for qk_norm in (False, True):
        interpreted_network(qk_norm)
    check_benchmark()
    check_attention_benchmark()
