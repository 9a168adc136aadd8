"""Exact velocities against their definition, and samples by them, which are images of the store."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import write_store

from evaluations.samples import Samples
from samplers import LABEL_DRAW, uniform
from scripts import exact


def test_the_velocity_is_the_mean_over_the_posterior():
    torch.manual_seed(0)
    images, x, t = torch.rand(3, 5) * 2 - 1, torch.randn(2, 5, dtype=torch.float64), 0.4
    for row in x:
        likely = [torch.exp(-((row - (1 - t) * y) ** 2).sum() / (2 * t * t)) for y in images.double()]
        of_each = [(row - (1 - t) * y) / t - y for y in images.double()]  # its noise, less the image
        expected = sum(p * v for p, v in zip(likely, of_each, strict=True)) / sum(likely)
        torch.testing.assert_close(exact.exact_velocity(images, row[None], t)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", pixels=True)
    return tmp_path / "store"


@pytest.mark.parametrize("condition", ["none", "label", "own", "real"])
def test_samples_are_images_of_their_class(store, condition, tmp_path):
    words = ["--store", store, "--condition", condition, "--num-images", 6, "--steps", 100, "--seed", 3]
    exact.main([*map(str, words), "--out", str(tmp_path / "out")])
    samples = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    pixels, labels = np.load(store / "latents.npy")[:, 0], np.load(store / "labels.npy")
    sampler = {} if condition == "real" else {"sampler": "euler", "steps": 100}
    told = {} if condition == "none" else {"labels": "random"}
    assert Samples(tmp_path / "out", None).settings == {"seed": 3} | told | sampler
    drawn = (uniform(3, torch.arange(6), LABEL_DRAW) * 3).long().numpy()
    for sample, label in zip(samples, drawn, strict=True):
        others = pixels[(labels == label) | (condition == "none")].transpose(0, 2, 3, 1).astype(int)
        assert np.abs(others - sample).max((1, 2, 3)).min() <= 1


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_sampler_is_the_one_that_is_named(sampler, store, tmp_path, monkeypatch):
    asked = []
    for name, solve in exact.samplers.items():
        monkeypatch.setitem(
            exact.samplers, name, lambda *given, n=name, f=solve: asked.append((n, given[2])) or f(*given)
        )
    words = ["--store", store, "--condition", "none", "--num-images", 6, "--sampler", sampler, "--steps", 7]
    exact.main([*map(str, words), "--out", str(tmp_path / "out")])
    assert asked == [(sampler, 7)]


@pytest.mark.parametrize(("condition", "count"), [("none", 12), ("label", 4)])
def test_what_a_condition_allows(condition, count):
    """All rows, or those of the drawn label; each sample once."""
    labels, args = np.arange(12) % 3, SimpleNamespace(condition=condition, num_images=50, seed=1)
    found = [*exact.allowed(args, labels)]
    assert sorted(torch.cat([part for part, _ in found]).tolist()) == [*range(50)]
    drawn = (uniform(1, torch.arange(50), LABEL_DRAW) * 3).long()
    for part, rows in found:
        assert len(rows) == count
        assert condition == "none" or {*labels[rows]} == {*drawn[part].tolist()}


def test_latents_are_refused(tmp_path):
    write_store(tmp_path / "latents")
    with pytest.raises(ValueError, match="expected pixels with labels"):
        exact.main(["--store", str(tmp_path / "latents"), "--out", str(tmp_path / "out")])
