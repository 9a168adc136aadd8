"""One command at a time in a folder, whatever became of the one before."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from memory.claim import claimed
from memory.files import HOST


def test_a_claimed_folder_is_refused_and_its_holder_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "--out", "runs/one"])
    folder = tmp_path / "runs" / "one"
    with claimed("--out", folder):
        message = rf"one: process {os.getpid()} on .*train.py --out runs/one"
        with pytest.raises(ValueError, match=message), claimed("--out", folder):
            pass
        with claimed("--out", folder, claim=False):
            pass
        assert [path.name for path in folder.iterdir()] == [".claim"]
    assert not folder.exists(), "an empty folder that the claim had made"
    with claimed("--out", folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_on_a_full_disk_is_claimed_too(tmp_path):
    """Whatever is then written there says which file it was, and a finished result can still be recognised."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with contextlib.suppress(OSError), open(tmp_path / "full", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        refused = pytest.raises(ValueError, match="another process is writing")
        with claimed("--out", tmp_path), refused, claimed("--out", tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_killed_process_holds_nothing(tmp_path):
    def killed():
        with claimed("--out", tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert (tmp_path / ".claim").exists()
    (tmp_path / f".result.{HOST}-{process.pid}.tmp.npy").touch()
    with claimed("--out", tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_children_of_a_killed_process_hold_nothing(tmp_path):
    """The reading processes of a command outlive it for seconds."""
    context = multiprocessing.get_context("fork")
    child = context.Value("i", 0)

    def killed():
        with claimed("--out", tmp_path):
            child.value = os.fork() or signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=killed)
    process.start()
    process.join()
    try:
        with claimed("--out", tmp_path):
            os.kill(child.value, 0)  # it lives
    finally:
        os.kill(child.value, signal.SIGKILL)


def test_of_many_processes_one_at_a_time_holds_a_folder(tmp_path):
    def worker(folder, held):
        for _ in range(200):
            try:
                with claimed("--out", folder):
                    (folder / "inside").mkdir()  # fails if another is inside
                    (folder / "inside").rmdir()
                    held.value += 1
            except ValueError:
                continue

    context = multiprocessing.get_context("fork")
    held = [context.Value("i", 0) for _ in range(4)]
    processes = [context.Process(target=worker, args=(tmp_path, value)) for value in held]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(value.value for value in held) > 4
