"""Files are whole or absent, also when writing fails half-way or the disk is full."""

import errno
import hashlib
import io
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from memory.files import DAY, HOST, atomic, check_folder, free_space, read_json, remove_stale, sha256, write_json


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})

    def interrupted():
        with atomic(path) as temporary:
            temporary.write_text("half of a fi")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_leaves_is_removed_and_nothing_else(tmp_path):
    def half_written():
        with atomic(tmp_path / "result.json") as temporary:
            temporary.write_text("half of a fi")
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=half_written)
    killed.start()
    killed.join()
    assert [path.suffixes[-2:] for path in tmp_path.iterdir()] == [[".tmp", ".json"]]
    others = [
        f".log.{HOST}-{os.getpid()}.tmp.json",  # of a running process
        f".log.{HOST}-1.tmp.json",  # of another user's
        ".log.elsewhere-99.tmp.json",  # of another machine's
        f".log.{HOST}-{killed.pid}.json",
        f"log.{HOST}-{killed.pid}.tmp.json",
    ]
    for name in (*others, ".older.elsewhere-99.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".older.elsewhere-99.tmp", times=(0, time.time() - DAY - 60))
    remove_stale(tmp_path, tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_sha256_is_the_hash_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"snippet" * 1_000_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"snippet" * 1_000_000).hexdigest()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where mounting is allowed."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: np.save(path, x.numpy())], ids=["torch", "numpy"])
def test_a_full_disk_is_named_and_truncates_nothing(small_disk, save):
    path = small_disk / "weights.npy"
    with atomic(path) as temporary:
        save(torch.zeros(100), temporary)
    before = path.read_bytes()

    def fill():
        with atomic(path) as temporary:
            save(torch.zeros(1_000_000), temporary)

    with pytest.raises(OSError, match="disk filled up"):
        fill()
    assert path.read_bytes() == before
    assert list(small_disk.iterdir()) == [path]


class OverQuota(io.BytesIO):
    """A file of which the system takes a part."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return super().write(data)


@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write(x.numpy().tobytes())], ids=["torch", "plain"])
def test_a_quota_is_named(tmp_path, save):
    (tmp_path / "1.pt").write_text("as before")

    def fill():
        with atomic(tmp_path / "1.pt"):
            save(torch.zeros(1000), OverQuota())

    with pytest.raises(OSError, match=r"your quota of this disk is used up; free some space .*1\.pt"):
        fill()
    assert (tmp_path / "1.pt").read_text() == "as before"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\\xff"])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta.json"):
        read_json(tmp_path / "meta.json")


def test_a_json_file_that_lacks_what_is_read_is_named(tmp_path):
    write_json(tmp_path / "samples.json", {"num_images": 3, "complete": True})
    assert read_json(tmp_path / "samples.json", num_images=int, complete=bool)["num_images"] == 3
    for kinds, found in (({"settings": dict}, "settings is None"), ({"complete": int}, "complete is True")):
        with pytest.raises(ValueError, match=rf"samples\.json: {found}, expected"):
            read_json(tmp_path / "samples.json", **kinds)


FORM = {"count": int, "rate": float, "made": ({"name": str, "parts": [{"step": int}]}, None), "hashes": {str: str}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"made": None, "rate": 0.5, "hashes": {}, "unknown": 1}, None),
        ({"count": True}, r"x\.json: count is True, expected int"),
        ({"count": 1.0}, r"x\.json: count is 1\.0, expected int"),
        ({"rate": "1"}, r"x\.json: rate is '1', expected float"),
        ({"made": []}, r"x\.json: made is \[\], expected dict"),
        ({"made": {"parts": []}}, r"x\.json: made\.name is None, expected str"),
        (
            {"made": {"name": "n", "parts": [{"step": 1}, {"step": "2"}]}},
            r"made\.parts\[1\]\.step is '2', expected int",
        ),
        ({"hashes": {"a": "f", "b": 7}}, r"x\.json: hashes\.b is 7, expected str"),
    ],
)
def test_the_part_of_a_json_file_that_is_of_another_form_is_named(tmp_path, change, message):
    value = {"count": 1, "rate": 2, "made": {"name": "n", "parts": [{"step": 1}]}, "hashes": {"a": "f"}}
    write_json(tmp_path / "x.json", value | change)
    if message is None:
        assert read_json(tmp_path / "x.json", **FORM) == value | change
        return
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json", **FORM)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(ValueError, match=r"--out .*: the file .*/run is in the way"):
            check_folder("--out", path)
    check_folder("--out", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_free_space_of_a_folder_that_is_not_there_yet(small_disk):
    assert 0 < free_space(small_disk / "not" / "yet") == free_space(small_disk) <= 1 << 20
