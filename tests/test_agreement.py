"""Kernels that are wrong or fail are noticed before anything trains or samples with them, and PyTorch takes over."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the interpreted run of this very file
from memory.trust import distrust, triton_release
from models import agreement, kernels, update
from models.sit import SiT, SiT_models

pytest.importorskip("triton")
from models import adamw, attention, fused

HALF = torch.float16  # which Triton's interpreter rounds as a GPU does; it cuts bf16 off


def make_network(tokens=4, width=48, heads=2, **options):
    torch.manual_seed(0)
    shape = {"depth": 2, "width": width, "num_heads": heads, "patch_size": 1, "input_size": round(tokens**0.5)}
    network = SiT(name="small", **shape, condition="none", **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def choice(network, packed=False, precision=HALF, device="cpu"):
    """What `agreement.trusted` says of this network, and its warnings; the random generator stays as it is."""
    x = torch.randn(3, *network.latent_shape, device=device)
    c = torch.randn(3, network.pos_embed.shape[-1], device=device)
    generator = torch.cuda if device == "cuda" else torch
    state = generator.get_rng_state()
    with warnings.catch_warnings(record=True) as told, torch.autocast(device, precision, precision is not None):
        warnings.simplefilter("always")
        chosen = agreement.trusted(network, packed, kernels.entrance(network, x) | {"c": c})
    assert torch.equal(generator.get_rng_state(), state)
    return chosen, [str(warning.message) for warning in told if "models/" in str(warning.message)]


def plain_join(x, branch, gate, shift, scale, bias, eps):
    total = x + gate[:, None] * (branch + (bias - bias.detach()))
    normed = F.layer_norm(total, total.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return total, normed.to(branch.dtype)


def plain_activate(hidden, bias):
    return F.gelu(hidden + (bias - bias.detach()).to(hidden.dtype), approximate="tanh")


class OnACpu(torch.autograd.Function):
    """models/attention.py, with the forward pass that cuDNN has for a GPU alone."""

    @staticmethod
    def forward(ctx, qkv, bias, heads):
        q, k, v = qkv.float().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, S) each
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)
        ctx.save_for_backward(qkv, out, scores.logsumexp(-1, keepdim=True))
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *attention._attention_backward_op(d_out, *ctx.saved_tensors, ctx.heads), None


def spoiled(module, name, change):
    """The function `name` of a module, with its results changed by `change`, in place."""

    right = getattr(module, name)

    def wrong(*given):
        results = right(*given)
        change(*results)
        return results

    return mock.patch.object(module, name, wrong)


def fails(*given, **more):
    raise RuntimeError("while compiling:\nPTX was generated for another GPU")


def zero_gate(d_x, d_branch, sums):
    sums[:, 0] = 0


def zero_bias(d_x, d_branch, sums):
    sums[:, 3] = 0


def one_token(d_x, d_branch, sums):
    d_branch[1, 3] = d_branch[0, 2]


def enlarge(total, normed, mean, rstd):
    normed *= 1.1


def some_keys(d_qkv, sums):
    """In one image, of one head of two, sixteen tokens of 64."""
    d_qkv.unflatten(-1, (3, 2, 64))[1, 32:48, 1, 0] *= -1


WRONG = {
    "a result too large": (lambda: spoiled(fused, "_join_op", enlarge), "the output"),
    "a gradient of zero": (lambda: spoiled(fused, "_join_backward_op", zero_gate), "the gradient of gate"),
    "a bias without a gradient": (lambda: spoiled(fused, "_join_backward_op", zero_bias), "the gradient of bias"),
    "garbage in one token": (lambda: spoiled(fused, "_join_backward_op", one_token), "the gradient of"),
    "not compiled": (lambda: mock.patch.object(fused, "_activate_op", fails), "PTX was generated for another GPU"),
}


def check_right_kernels():
    """Agree in every precision, with gradients and without, and leave the network as it is."""
    for precision, options in ((HALF, {}), (HALF, {"qk_norm": True}), (None, {"qk_norm": True})):
        network = make_network(**options)
        before = [parameter.clone() for parameter in network.parameters()]
        for trains in (True, False):
            with torch.set_grad_enabled(trains):
                assert choice(network, precision=precision) == (False, [])
        assert all(map(torch.equal, before, network.parameters()))
        assert all(parameter.grad is None for parameter in network.parameters())


def check_wrong_kernels():
    for name, (broken, what) in WRONG.items():
        with broken():
            chosen, [told] = choice(make_network())
        assert chosen is None, name
        assert what in told, told
        for part in ("models/fused.py", "the CPU", "Triton 3"):
            assert part in told, told
        assert ("allowed" in told) == ("4 tokens of 48 numbers, 2 heads, float16" in told) == ("PTX" not in told), told
    with torch.no_grad(), spoiled(fused, "_join_backward_op", one_token):  # sampling does not differentiate
        assert choice(make_network()) == (False, [])


def check_attention():
    """Of 64 tokens in heads of 64, which the kernels take; between plain joins, that are quicker to interpret."""
    network = make_network(tokens=64, width=128)
    with mock.patch.multiple(fused, attention=OnACpu.apply, join=plain_join, activate=plain_activate):
        assert choice(network, packed=True) == (True, [])
        assert choice(network, packed=True, precision=None) == (False, [])  # float32 is not theirs
        for broken in (
            spoiled(attention, "_attention_backward_op", some_keys),
            mock.patch.object(fused, "attention", fails),
        ):
            with broken:
                chosen, [told] = choice(network, packed=True)
            assert chosen is False
            assert "models/attention.py" in told


def check_update():
    def second_moments(self, tensors, *given, right=adamw.Kernel.__call__):
        right(self, tensors, *given)
        tensors[3][1] *= 1.001

    cpu = torch.device("cpu")
    assert agreement.trusted_update(cpu)
    with mock.patch.object(update, "can_fuse", return_value=True):
        made = update.Update(torch.nn.Linear(3, 3), 1e-3, 0.999, 1.0, 0.9)
        assert made.kernel
        for broken in (second_moments, fails):
            with (
                mock.patch.object(adamw.Kernel, "__call__", broken),
                pytest.warns(UserWarning, match="models/adamw.py"),
            ):
                assert not update.Update(torch.nn.Linear(3, 3), 1e-3, 0.999, 1.0, 0.9).kernel


def check_benchmark():
    """The table has a row for each use of a network, whose kernels agree; attention is a GPU's."""
    from benchmarks import bench_agreement

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(SiT_models, small=lambda **given: make_network()):
        bench_agreement.main(["--models", "small", "--out", f"{folder}/out.json"])
        result = json.loads(Path(folder, "out.json").read_text())
    assert [(row["precision"], row["trains"]) for row in result["rows"]] == bench_agreement.USES
    for row in (*result["rows"], result["update"]):
        assert 0 < row["share"] <= 1
        assert min(row["seconds"], row["again"]) > 0
    assert all(row["chosen"] == "fused" and row["attention"] is None for row in result["rows"])


def test_kernels_are_compared_as_interpreted(root):
    """In a process of its own, because Triton reads the variable when it is imported."""
    words = [sys.executable, __file__]
    subprocess.run(words, check=True, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_a_network_whose_kernels_fail_runs_by_pytorch():
    """On a CPU they do; one warning, and no second try."""
    network, x, c = make_network(), torch.randn(3, 4, 2, 2), torch.randn(3, 48)
    expected = network.velocity(x, c)
    kernels.compile_blocks(network, fuse=True, backend="eager")
    with pytest.warns(UserWarning, match="models/fused.py fail.*PyTorch runs the blocks") as told:
        assert torch.equal(network.velocity(x, c), expected)
    assert len(told) == 1
    assert all(part._compiled_call_impl for part in (*network.blocks, network.final_layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(network.velocity(x, c), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_whose_kernels_agree_runs_by_them(packed, monkeypatch):
    monkeypatch.setattr(agreement.Comparison, "errors", lambda self, packed: [agreement.Error("the output", 1e-6, 0.0)])
    monkeypatch.setattr(kernels, "can_pack", lambda device: packed)
    monkeypatch.setattr(attention, "fits", lambda layer, x: True)
    monkeypatch.setattr(fused, "join", lambda *given: plain_join(*given))
    monkeypatch.setattr(fused, "activate", plain_activate)
    asked = []
    monkeypatch.setattr(fused, "attend", lambda packed, layer, x: asked.append(packed) or attend(layer, x))
    network, x, c = make_network(), torch.randn(3, 4, 2, 2), torch.randn(3, 48)
    expected = network.velocity(x, c)
    kernels.compile_blocks(network, fuse=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(network.velocity(x, c), expected)
    assert set(asked) == {packed}


def attend(layer, x):
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("ours", "others", "expected"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)])
def test_the_update_is_the_same_in_all_processes(ours, others, expected, monkeypatch):
    cpu = torch.device("cpu")
    assert agreement.everywhere(ours, cpu) == ours  # one process
    monkeypatch.setattr(agreement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(agreement.dist, "all_reduce", lambda verdict, op: verdict.clamp_(max=others))
    assert agreement.everywhere(ours, cpu) == expected


def test_nothing_small_hides_in_a_sum():
    """One token of many, or the small part of a gradient beside large ones, is wrong; PyTorch is off by 0.001."""
    torch.manual_seed(0)
    exact = {"tokens": torch.randn(2, 500, 8, dtype=torch.float64), "parts": torch.randn(24, 8, dtype=torch.float64)}
    exact["parts"][:8] /= 20
    plain = {name: value + 1e-3 * torch.randn_like(value) for name, value in exact.items()}
    right = {name: value + 1e-3 * torch.randn_like(value) for name, value in exact.items()}
    found = agreement.errors(right, plain, exact, width=8)
    agreement.require(found, "here")
    assert [error.what for error in found][::2] == ["tokens", *(f"parts (part {part} of 3)" for part in (1, 2, 3))]
    relative = (right["tokens"] - exact["tokens"]).norm() / exact["tokens"].norm()
    assert found[0].kernels == pytest.approx(relative.item())
    token, part = ({name: value.clone() for name, value in right.items()} for _ in range(2))
    token["tokens"][1, 7] *= 1.05
    part["parts"][:8] *= 0.9
    for wrong, what in ((token, "the worst row of tokens"), (part, "parts \\(part 1 of 3\\)")):
        with pytest.raises(agreement.Disagreement, match=f"^here, {what} is off by"):
            agreement.require(agreement.errors(wrong, plain, exact, width=8), "here")


def test_what_is_no_number_does_not_agree():
    for kernels_error, plain_error in ((float("nan"), 0.1), (0.1, float("nan")), (float("inf"), 0.1)):
        with pytest.raises(agreement.Disagreement):
            agreement.require([agreement.Error("the output", kernels_error, plain_error)], "here")


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["SiT-XL/2", "SiT-B/2", "SiT-S/4", "SiT-XL/4"])
@pytest.mark.parametrize("trains", [True, False])
def test_kernels_agree_on_a_gpu(model, trains):
    """In less than a minute even where Triton compiles them, and with no memory kept."""
    network = SiT_models[model](condition="none").cuda()
    tokens, size = network.pos_embed.shape[1], network.blocks[0].attn.head_dim
    begin = time.perf_counter()
    for _ in range(2):  # the first leaves the libraries' own memory
        held = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(trains), kernels.fast_attention("cuda", tokens if trains else None):
            chosen, told = choice(network, kernels.can_pack("cuda"), torch.bfloat16, "cuda")
        assert told == []
        assert chosen == (kernels.can_pack("cuda") and (tokens, size) in attention.SHAPES)
    assert torch.cuda.memory_allocated() == held
    assert time.perf_counter() - begin < 60


@pytest.mark.gpu
def test_what_triton_once_compiled_wrong_is_found(root):
    """Attention of 64 tokens in heads of 72, which models/attention.py leaves out for that: wrong numbers, or an access
    that ends a process's use of the GPU, so it happens in one of its own."""
    if not kernels.can_pack("cuda") or not triton_release().startswith("3.6."):
        pytest.skip("seen on an H200 with Triton 3.6")
    program = """if True:
        import test_agreement as tests
        tests.attention.SHAPES = ((64, 72),)
        network = tests.SiT_models["SiT-XL/4"](condition="none").cuda()
        with tests.kernels.fast_attention("cuda", 64):
            try:
                chosen, [told] = tests.choice(network, True, tests.torch.bfloat16, "cuda")
                assert chosen is False
            except RuntimeError as error:
                told = str(error)
        print(told)"""
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    found = "are wrong: 64 tokens of 1152 numbers", "fail, and the GPU takes nothing more"
    assert any(f"the kernels of models/attention.py {how}" in told for how in found), told


def test_a_gpu_that_computes_no_more_is_an_error(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z100")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    gpu = torch.device("cuda")
    with pytest.warns(UserWarning, match=r"Z100 .* of some.py fail: ValueError: no; PyTorch does it"):
        distrust("some.py", ValueError("no"), gpu, "PyTorch does it")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match=r"of some.py fail, and the GPU takes nothing more.*illegal.*without Triton"):
        distrust("some.py", RuntimeError("CUDA error: an illegal memory access\nhint"), gpu, "PyTorch does it")


@pytest.mark.gpu
def test_the_update_agrees_on_a_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreement.trusted_update(torch.device("cuda"))


if __name__ == "__main__":
    for check in (check_right_kernels, check_wrong_kernels, check_attention, check_update, check_benchmark):
        check()
