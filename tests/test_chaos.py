"""Kills at random moments, few of them; `python -m benchmarks.chaos` is the long form."""

import json
import signal
import subprocess

import torch

from benchmarks import chaos


def test_every_command_survives_kills(root, environment, tmp_path):
    words = ["--kills", "2", "--images", "150", "--processes", "1", "--work", tmp_path / "work"]
    command = ["python", "-m", "benchmarks.chaos", *map(str, words), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert [facts["stage"] for facts in outcomes] == ["encode", "bank", "train", "sample", "evaluate"]
    assert all(facts["kills"] == 2 for facts in outcomes)


def test_partial_and_other_files_are_seen(tmp_path):
    torch.save({"ema": torch.ones(3)}, tmp_path / "1.pt")
    (tmp_path / "metrics.json").write_text('{"FID": 3, "made": "today"}')
    reference = {name: chaos.content(path) for name, path in chaos.files_of(tmp_path).items()}
    assert chaos.damaged(chaos.files_of(tmp_path), reference) == []
    (tmp_path / "metrics.json").write_text('{"FID": 3, "made": "tomorrow"}')
    assert chaos.damaged(chaos.files_of(tmp_path), reference) == []
    (tmp_path / "metrics.json").write_text('{"FID": 4, "made": "today"}')
    whole = (tmp_path / "1.pt").read_bytes()
    (tmp_path / "1.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".2.tmp.pt").write_bytes(b"may be partial")
    found = chaos.damaged(chaos.files_of(tmp_path), reference)
    assert [problem.split()[0].strip(":") for problem in found] == ["1.pt", "metrics.json"]


def test_features_kept_beside_a_reference_count_as_written(tmp_path):
    for name in ("encode/store/meta.json", "encode/store.net.npz", "encode/.store.net.tmp.npz", "out/metrics.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"cut short")
    assert chaos.written(tmp_path).keys() == {"metrics.json", "beside/store.net.npz", "beside/.store.net.tmp.npz"}
    damage = chaos.damaged(chaos.written(tmp_path), {"beside/store.net.npz": "whole"})
    assert "beside/store.net.npz differs" in damage
    chaos.clear(tmp_path)
    assert chaos.written(tmp_path) == {}
    assert (tmp_path / "encode" / "store" / "meta.json").exists()


def test_a_command_that_starts_over_wrongly_is_seen(root, environment, tmp_path):
    """A command that loses what it had appends to its log twice."""
    source = (
        "import time, pathlib, sys\n"
        "from benchmarks import chaos\n"
        "def main(words):\n"
        "    out = pathlib.Path(words[0]); out.mkdir(exist_ok=True)\n"
        "    with open(out / 'log.jsonl', 'a') as log:\n"
        "        for step in range(20):\n"
        "            log.write('{\"step\": %d}\\n' % step); log.flush(); time.sleep(0.02)\n"
        "chaos.commands = lambda work: {'forgetful': (main, [str(work / 'out')])}\n"
        f"import random, signal\nwork = pathlib.Path({str(tmp_path)!r})\n"
        f"facts = chaos.endure(work, 'forgetful', 1, 5, {int(signal.SIGKILL)}, random.Random(0))\n"
        "sys.exit(0 if any('different' in problem for problem in facts['problems']) else 1)\n"
    )
    assert subprocess.run(["python", "-c", source], cwd=root, env=environment, timeout=120).returncode == 0
