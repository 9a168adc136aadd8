"""Both precisions learn the same, for a few steps; `python -m benchmarks.precision` is the long form."""

import json

import pytest
import torch

from benchmarks import precision


def test_few_steps_agree_but_not_to_the_bit(tmp_path, environment, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(precision.sys, "executable", environment["PYTHON_EXEC"])
    words = [
        "--steps",
        "4",
        "--images",
        "80",
        "--model",
        "SiT-Ti/2",
        "--image-size",
        "8",
        "--seeds",
        "1",
        "--work",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match="does not learn"):
        precision.main([*words, "--bound", "1e-9", "--parallel", "3", "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert 0 < abs(result["mean_difference"]) == result["largest_difference"] < 0.01
    assert 0 < result["spread_of_nudged"] < 0.01
    assert [row["kind"] for row in result["rows"]] == ["fp32", "nudged", "bf16"]
    assert all(list(row["loss"]) == ["1", "2", "3", "4"] for row in result["rows"])
    assert result["rows"][0]["difference"] == [0.0] * 4
    first = torch.load(tmp_path / "fp32-0.pt", weights_only=True)["ema"]
    for name, weight in torch.load(tmp_path / "nudged-0.pt", weights_only=True)["ema"].items():
        moved = (weight - first[name]).norm() / first[name].norm().clamp(min=1e-9)
        assert moved == pytest.approx(0 if name == "pos_embed" or not weight.any() else 2**-9, rel=0.1)


@pytest.mark.parametrize(
    ("factors", "fails"),
    [
        ({"nudged": (0.99, 1.01), "bf16": (1.006, 0.994)}, False),  # of either sign
        ({"nudged": (0.99, 1.01), "bf16": (1.011, 1.011)}, True),  # beyond the bound in the mean
        ({"nudged": (0.999, 1.001), "bf16": (1.004, 0.996)}, True),  # beyond what chance explains
    ],
)
def test_what_fails(factors, fails, tmp_path, monkeypatch):
    def trained(args, work, kind, seed):
        factor = factors.get(kind, (1, 1))[seed]
        return {name: {step: factor / step for step in range(1, 21)} for name in ("loss", "holdout_loss")}

    monkeypatch.setattr(precision, "train", trained)
    monkeypatch.setattr(precision, "copy_images", lambda *arguments: None)
    monkeypatch.setattr(precision.encode_dataset, "main", lambda words: None)
    monkeypatch.setattr(precision, "write_start", lambda *arguments: None)
    words = ["--seeds", "2", "--work", str(tmp_path)]
    if fails:
        with pytest.raises(SystemExit, match="does not learn"):
            precision.main(words)
    else:
        precision.main(words)
