"""The benchmark of reading takes all its batches from a store that `LatentDataset` accepts."""

import json

from benchmarks import bench_data


def test_every_way_of_reading_is_timed(tmp_path):
    words = ["--num-images", 64, "--batch-size", 4, "--steps", 8, "--folder", tmp_path, "--out", tmp_path / "data.json"]
    bench_data.main(list(map(str, words)))
    result = json.loads((tmp_path / "data.json").read_text())
    assert list(result["samples_per_second"]) == ["direct calls", *(f"DataLoader, {i} workers" for i in range(3))]
    assert all(rate > 0 for rate in result["samples_per_second"].values())
    assert {"code", "device", "processes", "versions", "command", "date"} <= result.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
