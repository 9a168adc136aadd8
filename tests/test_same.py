"""Four processes against one, in every command; `python -m benchmarks.same` is the long form."""

import json
import subprocess

from benchmarks.same import BOUNDS


def test_four_processes_give_what_one_gives(root, environment, tmp_path):
    words = ["--processes", "4", "--images", "120", "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    command = ["python", "-m", "benchmarks.same", *map(str, words)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == BOUNDS.keys()
