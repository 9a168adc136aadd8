"""On a GPU: a network trains in bf16 with compiled blocks, continues, and samples what the CPU samples."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import command, final, folder, log, write_bank, write_store  # noqa: F401  (folder is a fixture)

import sample_ddp
import train
from models import replay
from models.update import Update

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one precision and one device a process; every test here chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_training_continues(folder):  # noqa: F811
    plain = ("--model-options", "snippet_dropout=0", "--precision", "fp32")
    train.main(command(folder, folder / "gpu", "--steps", 3, *plain))
    train.main(command(folder, folder / "gpu", "--steps", 6, *plain))
    train.main(command(folder, folder / "gpu-whole", "--steps", 6, *plain))
    for a, b in zip(log(folder / "gpu"), log(folder / "gpu-whole"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert final(folder / "gpu")["steps"] == 6


def test_bf16_stays_close_to_float32(folder):  # noqa: F811
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ("--steps", 6, "--model-options", "snippet_dropout=0", "--precision", precision)
        train.main(command(folder, folder / precision, *words))
    one, two = log(folder / "bf16"), log(folder / "fp32")
    losses = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(losses) == 3
    assert all(a == pytest.approx(b, rel=0.02) for a, b in losses)


def test_the_cpu_samples_the_same_images(folder, monkeypatch):  # noqa: F811
    store = write_store(folder / "gpu-pixels", pixels=True)
    bank = write_bank(folder / "gpu-pixel-bank", store)
    train.main(command(folder, folder / "gpu-run", "--steps", 6, "--store", store, "--bank", bank))
    words = ["--checkpoint", folder / "gpu-run", "--num-images", 8, "--steps", 10]

    def sample(name, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        sample_ddp.main([str(word) for word in (*words, "--out", folder / name, *more)])
        facts = json.loads((folder / name / "samples.json").read_text())["run"]
        return np.load(folder / name / "samples.npz")["arr_0"].astype(int), facts

    on_gpu, gpu_facts = sample("on-gpu", "--precision", "fp32")
    compiled, compiled_facts = sample("compiled", "--precision", "fp32", "--compile", "--batch-size", 3)
    half, _ = sample("half", "--compile")
    plain_half, _ = sample("plain-half", "--no-compile")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu, cpu_facts = sample("on-cpu", "--precision", "fp32")
    assert np.abs(on_gpu - on_cpu).max() <= 2
    assert np.abs(compiled - on_cpu).max() <= 2
    assert np.abs(half - on_cpu).mean() < 1.25 * np.abs(plain_half - on_cpu).mean() + 0.1
    assert gpu_facts["device"] != cpu_facts["device"]
    assert compiled_facts["compiled"]


def test_replayed_steps_train_as_those_that_are_not(folder, monkeypatch):  # noqa: F811
    """With dropout, two micro-batches a step, and a shape of its own for the held-out loss in between."""
    for name, warm in (("launched", 1000), ("replayed", 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(replay, "WARM_STEPS", warm)
        words = ("--steps", 6, "--micro-batch", 4, "--precision", "fp32", "--resident")
        train.main(command(folder, folder / name, *words))
    for a, b in zip(log(folder / "launched"), log(folder / "replayed"), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "holdout_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    one, two = (final(folder / name)["ema"] for name in ("launched", "replayed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_the_update_is_the_cpus():
    """Where clipping changes the gradients; on the last GPU, which is not the current one where there are several."""
    torch.manual_seed(0)
    network, gradients = torch.nn.Linear(64, 64), torch.randn(3, 64, 64)
    devices = "cpu", f"cuda:{torch.cuda.device_count() - 1}"
    cpu, gpu = (Update(copy.deepcopy(network).to(device), 1e-3, 0.999, 0.1, 0.9) for device in devices)
    for step, gradient in enumerate(gradients):
        norms = []
        for update in (cpu, gpu):
            for parameter, grad in zip(update.parameters, (gradient, gradient[0]), strict=True):
                parameter.grad = grad.to(parameter.device, copy=True)  # which the update changes in place
            norms.append(update(step).item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for part in ("parameters", "averages"):
        for a, b in zip(getattr(cpu, part), getattr(gpu, part), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)
