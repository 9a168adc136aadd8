"""The benchmark of reading takes all its batches from a store that `LatentDataset` accepts, and compares some."""

import json

import pytest

from benchmarks import bench_data
from dataset import LatentDataset


def run(folder):
    words = ["--num-images", 64, "--batch-size", 4, "--steps", 8, "--folder", folder, "--out", folder / "data.json"]
    bench_data.main(list(map(str, words)))


def test_every_way_of_reading_is_timed(tmp_path):
    run(tmp_path)
    result = json.loads((tmp_path / "data.json").read_text())
    assert list(result["samples_per_second"]) == ["direct calls", *(f"DataLoader, {i} workers" for i in range(3))]
    assert all(rate > 0 for rate in result["samples_per_second"].values())
    assert 10**7 < result["peak_host_bytes"] < 10**11
    assert {"code", "device", "processes", "versions", "command", "date"} <= result.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize("key", ["moments", "feature", "label"])
@pytest.mark.parametrize("reader", bench_data.READERS)
def test_what_is_read_wrongly_is_not_timed(tmp_path, monkeypatch, reader, key):
    """By any reader: no rate and no record, and the store is removed."""

    def fetch(dataset, rows, views):
        batch = right(dataset, rows, views)
        batch[key] = batch[key].roll(1, 0)  # each sample has its neighbour's
        return batch

    right = LatentDataset.fetch
    monkeypatch.setattr(LatentDataset, "fetch", fetch)
    monkeypatch.setattr(bench_data, "READERS", {reader: bench_data.READERS[reader]})
    monkeypatch.setattr(bench_data, "samples_per_second", lambda *given: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"step 0: {key} is not what is stored"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_record_is_overwritten_unasked(capsys):
    with pytest.raises(SystemExit):
        bench_data.main([])
    assert "required: --out" in capsys.readouterr().err
