"""Both precisions learn the same, for a few steps; `python -m benchmarks.precision` is the long form."""

import json

import pytest

from benchmarks import precision


def test_few_steps_agree_but_not_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["--steps", "4", "--images", "80", "--model", "SiT-S/8", "--work", str(tmp_path)]
    with pytest.raises(SystemExit, match="does not learn"):
        precision.main([*words, "--bound", "1e-9", "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert 0 < result["largest_difference_of_last_quarter"] < 0.01
    assert len(result["rows"]) == 4
