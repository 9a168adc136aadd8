"""The seconds of saving are those of train.py's own saving, of a state that can be continued."""

import json

import torch

import train
from benchmarks import bench_save


def test_saving_is_timed(tmp_path, monkeypatch, capsys):
    saved, save = [], train.Trainer.save

    def watch(trainer):
        save(trainer)
        [path] = trainer.folder.checkpoints  # `--keep 1`
        saved.append((path.stat().st_size, len(torch.load(path, weights_only=True)["opt"]["state"])))

    monkeypatch.setattr(train.Trainer, "save", watch)
    words = ["--model", "SiT-Ti/2", "--times", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "o.json")]
    bench_save.main(words)
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["bytes"] == saved[-1][0]
    assert capsys.readouterr().out.count(f"{result['bytes'] / 1e9:.2f} GB saved in") == 2
    assert len(saved) == len(result["save_seconds"]) == 2
    assert saved[0][1] > 70, "moments of all parameters"
    assert not list((tmp_path / "work").iterdir())
