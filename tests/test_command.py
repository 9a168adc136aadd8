"""What the user can mend is one line and status 2; what we must mend keeps its traceback."""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from memory import command
from memory.files import read_json


def refuse():
    raise ValueError("--flag 3: expected 2")


def not_finite():
    raise FloatingPointError("step 3")


def refuse_after_another():
    try:
        int("three")
    except ValueError as error:
        raise ValueError(
            "--flag three: expected a number",
        ) from error


def hand_on():
    try:
        int("three")
    except ValueError:
        raise


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (refuse, "error: --flag 3: expected 2\n"),
        (refuse_after_another, "error: --flag three: expected a number\n"),
        (not_finite, "error: step 3\n"),
        (lambda: os.stat("nowhere"), "error: [Errno 2] No such file or directory: 'nowhere'\n"),
        (lambda: read_json(__file__), f"error: {__file__} is no JSON file"),
    ],
)
def test_a_named_error_is_one_line(main, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        command.execute(main)
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "main",
    [
        lambda: np.zeros(3) + np.zeros(4),
        lambda: int("three"),
        hand_on,
        lambda: torch.distributions.Normal(0, -1, validate_args=True),
        lambda: {}["key"],
    ],
)
def test_a_mistake_of_ours_keeps_its_traceback(main):
    with pytest.raises((ValueError, KeyError)):
        command.execute(main)


def test_a_warning_of_ours_is_a_plain_line():
    """And that of a library says where it comes from, as in Python, as does every one once the command has ended."""
    usual, said = warnings.formatwarning, []

    def main():
        said.append(warnings.formatwarning("--bank b: another", UserWarning, __file__, 3))
        for category, file in ((UserWarning, torch.__file__), (DeprecationWarning, __file__)):
            said.append(warnings.formatwarning("old", category, file, 3, "code"))

    command.execute(main)
    assert said == [
        "warning: --bank b: another\n",
        f"{torch.__file__}:3: UserWarning: old\n  code\n",
        f"{__file__}:3: DeprecationWarning: old\n  code\n",
    ]
    assert warnings.formatwarning is usual


def test_libraries_in_an_environment_inside_the_repository_are_not_ours(monkeypatch):
    monkeypatch.setattr(command, "ROOT", command.Path(torch.__file__).resolve().parents[4])
    with pytest.raises(ValueError, match="scale"):
        command.execute(lambda: torch.distributions.Normal(0, -1, validate_args=True))


def test_neither_the_source_nor_the_way_to_it_is_needed(tmp_path, monkeypatch):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "link").symlink_to("checkout")
    monkeypatch.setattr(command, "ROOT", tmp_path.resolve() / "checkout")
    code = compile("if flag: raise ValueError('--flag')\nint('three')", str(tmp_path / "link" / "gone.py"), "exec")
    with pytest.raises(SystemExit):
        command.execute(lambda: exec(code, {"flag": True}))
    with pytest.raises(ValueError, match="three"):
        command.execute(lambda: exec(code, {"flag": False}))


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("scripts.encode_dataset", "--batch-size"),
        ("scripts.train_metric_encoder", "--batch-size"),
        ("memory.build_bank", "--k"),
        ("evaluations.evaluator", "--batch-size"),
        ("evaluations.controls", "--batch-size"),
        ("evaluations.copies", "--batch-size"),
    ],
)
def test_a_gpu_that_is_too_small_is_an_error_with_a_remedy(module, remedy, monkeypatch, capsys):
    def fill(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    module = importlib.import_module(module)
    monkeypatch.setattr(module, "parse", fill)
    with pytest.raises(SystemExit):
        command.execute(module.main)
    assert re.fullmatch(rf"error: the GPU's memory is too small.*{remedy}.*\n", capsys.readouterr().err)


def test_ctrl_c_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as leaving:
        command.execute(interrupted)
    assert leaving.value.code == 130
    assert capsys.readouterr().err == ""


def test_success_returns():
    assert command.execute(lambda: None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")
def test_freed_memory_serves_the_next_tensor(root):
    """Page faults of sums of tensors of 64 MB, made again and again: 32,768 each if all pages are new."""
    program = """
import resource, torch
from memory.command import execute
def faults_after(times):
    for _ in range(times):
        torch.ones(2**24) + torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
execute(lambda: print(faults_after(10), faults_after(10)))  # small blocks may break up the large ones at first
"""
    given = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    first, second = map(int, given.stdout.split())
    assert second - first < 32_768


def test_every_command_ends_this_way(root):
    sources = [path for folder in (".", "scripts", "memory", "evaluations") for path in (root / folder).glob("*.py")]
    commands = {path.name: path.read_text() for path in sources if "__main__" in path.read_text()}
    assert {"train.py", "sample_ddp.py", "encode_dataset.py", "build_bank.py", "evaluator.py"} <= commands.keys()
    assert [name for name, text in commands.items() if not text.endswith("    execute(main)\n")] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_tells_its_launcher(rank, tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        command.execute(refuse)
    message = ["error: --flag 3: expected 2", "error of process 1: --flag 3: expected 2"][rank]
    assert capsys.readouterr().err == message + "\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"] == message
    assert waited == [command.GRACE] * rank


def test_under_torchrun_one_process_speaks_and_the_report_ends_with_its_line(root, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["train.py", "--store", "nowhere", "--out", tmp_path / "run", "--condition", "none", "--model", "SiT-Ti/2"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1  # torchrun's
    line = "error: --store: nowhere does not exist; `python -m scripts.encode_dataset` makes it"
    lines = done.stderr.splitlines()
    assert lines.count(line) == 1
    assert lines[-2].strip() == f"traceback : {line}"
    assert 'train.py", line' not in done.stderr
