"""The encode benchmark runs on a CPU and measures the command itself."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_encode
from benchmarks.bench_encode import check, errors, main, make_jpegs
from scripts import encode_dataset


def test_the_small_benchmark_times_the_command(tmp_path, monkeypatch, capsys):
    commands = []
    run = encode_dataset.main
    monkeypatch.setattr(encode_dataset, "main", lambda argv: (commands.append(argv), run(argv))[1])
    writer = encode_dataset.Writer
    main(["--small", "--folder", str(tmp_path), "--out", str(tmp_path / "encode.json")])
    assert len(commands) == 1
    assert encode_dataset.Writer is writer
    result = json.loads((tmp_path / "encode.json").read_text())
    assert result["images_per_second"] > 0
    assert result["seconds_to_first_images"] < result["seconds_in_all"]
    for error in result["errors"].values():  # on a CPU the command's networks are the plain ones
        assert error["relative_error"] < 1e-6
    networks = list(result["networks"].values())
    assert all(part["tflops"] == pytest.approx(part["per_second"] * part["gflop"] / 1e3, rel=2e-3) for part in networks)
    gflop = sum(part["gflop"] for part in networks)
    assert result["tflops"] == pytest.approx(result["images_per_second"] * 2 * gflop / 1e3, rel=2e-3), "of two views"
    for part in (result, *networks):
        assert part["share_of_ceiling"] == pytest.approx(part["tflops"] / result["ceiling_tflops"], rel=2e-3)
    bound = 1 / sum(2 / network["per_second"] for network in result["networks"].values())
    assert result["bounds"]["both networks"] == pytest.approx(bound, rel=1e-3)
    assert result["on_imagenet"]["GB of patch tokens in the store, a view"] == pytest.approx(
        1281167 * 4 * 64 * 2 / 1e9, rel=1e-3
    )
    assert {"device", "versions", "command", "date", "code"} <= result.keys()
    assert str(tmp_path) not in json.dumps({key: value for key, value in result.items() if key != "command"})
    assert "THE COMMAND, files to store" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["encode.json"]


def test_files_are_of_imagenets_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_encode, "DISTINCT", 6)
    mean = make_jpegs(tmp_path, 20)
    assert 100e3 < mean < 120e3
    files = sorted(tmp_path.rglob("*.jpg"), key=lambda path: path.name)
    assert len(files) == 20
    assert len({path.read_bytes() for path in files}) == 6
    assert Image.open(files[0]).size == (500, 375)


def test_errors_are_relative_and_a_wrong_network_is_refused():
    expected = torch.randn(8, 4, 4, 4)
    assert errors(expected * 1.01, expected)["relative_error"] == pytest.approx(0.01, rel=1e-3)
    assert errors(-expected, expected)["smallest_cosine"] == pytest.approx(-1)

    class Network:
        """Gives its input times a factor, as codec and as encoder."""

        def __init__(self, factor):
            self.factor = factor

        def encode(self, pixels):
            return pixels * self.factor

        __call__ = encode

    exact, pixels = Network(1.0), torch.from_numpy(np.random.default_rng(0).random((4, 8, 2, 2)))
    assert check(Network(1.01), exact, (exact, exact), pixels)["posterior std"]["relative_error"] < 0.02
    with pytest.raises(AssertionError, match="class token"):
        check(exact, Network(1.1), (exact, exact), pixels)
