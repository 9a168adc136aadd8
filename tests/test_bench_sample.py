"""The benchmark of sampling, tiny and on a CPU: the real command runs, and the tables hold together."""

import json
import os
from pathlib import Path

import pytest

import sample_ddp
from benchmarks import bench_sample

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_every_table_at_a_tiny_size(tmp_path, monkeypatch):
    compiled = []

    def run_here(words, memory_gib):  # in this process, which has everything imported
        assert memory_gib is None
        compiled.append([Path(os.environ[name]) for name in CACHES])
        if len(compiled) == 1:
            assert not any(file.is_file() for cache in compiled[0] for file in cache.rglob("*"))
        return sample_ddp.main(words) is None

    monkeypatch.setattr(bench_sample, "run_command", run_here)
    for name in CACHES:
        monkeypatch.setenv(name, "put back afterwards")
    words = ["--model", "SiT-Ti/2", "--image-size", 32, "--bank-rows", 20, "--num-images", 3, "--steps", 3, "--few", 2]
    words += ["--batches", 2, 1, "--small", "--no-compile", "--reference", "--profile", "--work", tmp_path]
    bench_sample.main([str(word) for word in (*words, "--out", tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())

    assert compiled == [[cache for cache in compiled[0] if cache.is_relative_to(tmp_path)]] * 2
    assert len(set(compiled[0])) == len(CACHES)
    first, second = result["commands"]
    assert (first["images"], first["batch"], first["evaluations"]) == (3, 2, 3)
    assert (second["images"], second["evaluations"]) == (2, 2)
    assert first["images_per_second"] > 0
    assert first["startup_seconds"] <= first["first_images_seconds"]
    assert len(list((tmp_path / "first").glob("0*.png"))) == 3

    assert result["errors"]["velocity"] < 1e-5, "the fast path on a CPU is the plain one"
    assert result["errors"]["images"]["largest"] <= 1
    flops = result["operations_an_evaluation"]
    width, tokens, patch = 192, 4, 16
    per_token = 6 * (12 * width**2 + 2 * tokens * width) + 2 * patch * width
    per_image = 6 * 6 * width**2 + 2 * width**2 + (256 * width + width**2) + 768 * width
    assert flops == pytest.approx(2 * (tokens * per_token + per_image), rel=0.01)
    for row in result["rows"]:
        assert row["tflops"] == pytest.approx(row["evaluations_per_second"] * flops / 1e12)
        seconds = 250 / row["evaluations_per_second"] + 1 / row["decoded_per_second"]
        assert row["images_per_second_at_250"] == pytest.approx(1 / seconds)
    assert result["reference"]["evaluations_per_second"] > 0
    assert {"code", "command", "device", "versions"} <= result.keys()
    assert str(tmp_path) not in json.dumps(result["rows"])


def test_levels():
    a = bench_sample.np.array([[0, 10, 255, 7]], dtype="uint8")
    b = bench_sample.np.array([[0, 11, 250, 5]], dtype="uint8")
    found = bench_sample.levels(a, b)
    assert found == {"largest": 5, "mean": 2, "share_beyond_0": 0.75, "share_beyond_1": 0.5, "share_beyond_2": 0.25}
