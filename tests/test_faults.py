"""Disks that are full or read-only, and folders that vanish: an error that says so, and nothing lost."""

import json
import multiprocessing
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

from benchmarks import chaos
from dataset import LatentDataset
from memory.claim import CLAIM, claimed


@pytest.fixture
def mount(tmp_path):
    """Mount a small file system in a new folder, where that is allowed."""
    mounted = []

    def small(options):
        place = tmp_path / "mounted"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(place)
        return place

    yield small
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, environment):
    """What each command of the path leaves, at small size, and the command lines."""
    work = tmp_path_factory.mktemp("stages")
    words = ["--kills", "0", "--images", "150", "--processes", "1", "--work", str(work)]
    command = ["python", "-m", "benchmarks.chaos", *words]
    subprocess.run(command, check=True, cwd=chaos.ROOT, env=environment, timeout=600)
    return work


@pytest.fixture(autouse=True)
def short_grids(monkeypatch):
    monkeypatch.setattr(chaos.train, "GRID_STEPS", 1)


def redirected(work, stage, out):
    """A stage's `main` and its command line, writing below another folder."""
    main, words = chaos.commands(work)[stage]
    return main, [word.replace(str(work / "out"), str(out)) for word in words]


def test_full_disks_lose_nothing(root, environment, tmp_path, mount):
    mount("size=4k")  # or skip
    words = ["--full-disks", "2", "--images", "150", "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    command = ["python", "-m", "benchmarks.chaos", *map(str, words)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert sum(facts["full_disks"] for facts in outcomes) >= 5


@pytest.mark.parametrize("stage", ["encode", "bank", "train", "sample", "evaluate"])
def test_a_read_only_place_is_named(stages, stage, mount):
    place = mount("ro,size=1m")
    main, words = redirected(stages, stage, place)
    with pytest.raises((ValueError, OSError), match=str(place)):
        main(words)


@pytest.mark.parametrize(
    ("stage", "folder"), [("encode", "store"), ("bank", "bank"), ("train", "run"), ("sample", "samples")]
)
def test_a_folder_in_which_another_command_works_is_refused(stages, stage, folder, tmp_path):
    main, words = redirected(stages, stage, tmp_path)
    with claimed("--out", tmp_path / folder):
        with pytest.raises(ValueError, match=rf"{folder}: process \d+ on .* is writing to this folder"):
            main(words)
        assert [path.name for path in (tmp_path / folder).iterdir()] == [CLAIM]


def test_ten_readers_of_a_store_that_is_extended(stages, tmp_path, monkeypatch):
    """While features are added, readers see the store as it was, and at last with them; a second writer is refused."""
    for name in ("store", "store-holdout"):
        shutil.copytree(stages / "encode" / name, tmp_path / name)
    context = multiprocessing.get_context("fork")
    begun, done, reads = context.Barrier(11), context.Event(), context.Value("i", 0)
    whole = LatentDataset(stages / "encode" / "store", encoder="efficientnet-lite0@32")
    rows = np.arange(len(whole))
    expected = whole.fetch(rows, rows % 2)

    def read():
        seen, last = [], False
        while not last:
            last = done.is_set()
            data = LatentDataset(tmp_path / "store", encoder="efficientnet-lite0@32")
            batch = data.fetch(rows, rows % 2)
            assert all(torch.equal(batch[name], values) for name, values in expected.items())
            seen.append(len(data.meta["encoders"]))
            if len(seen) == 1:
                begun.wait()
            time.sleep(0.05)
        assert seen[0] == 1
        assert seen[-1] == 2
        with reads:
            reads.value += len(seen)

    words = [str(stages / "images"), "--out", str(tmp_path / "store"), "--add", "efficientnet-lite0@48"]
    encode, refused = chaos.encode_dataset.encode_job, []

    def with_a_rival(*arguments):
        if not refused:
            refused.append(1)
            with pytest.raises(ValueError, match=r"store: process \d+ on .* is writing to this folder"):
                chaos.encode_dataset.main([*words, "--workers", "0"])
        encode(*arguments)

    monkeypatch.setattr(chaos.encode_dataset, "encode_job", with_a_rival)
    readers = [context.Process(target=read) for _ in range(10)]
    for reader in readers:
        reader.start()
    try:
        begun.wait()
        chaos.encode_dataset.main([*words, "--workers", "0"])
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 10
    assert reads.value > 3 * 10, "they also read meanwhile"
    assert refused
    assert len(LatentDataset(tmp_path / "store", encoder="efficientnet-lite0@48")) == len(whole)


def test_a_checkpoint_folder_that_vanishes_comes_back(stages, tmp_path, monkeypatch):
    main, words = redirected(stages, "train", tmp_path)
    step = chaos.train.Trainer.train_step

    def vanish(trainer, batch):
        step(trainer, batch)
        if trainer.step == 14:
            shutil.rmtree(trainer.out / "checkpoints")

    monkeypatch.setattr(chaos.train.Trainer, "train_step", vanish)
    main(words)
    found, expected = (
        torch.load(folder / "run" / "checkpoints" / "0000024.pt", weights_only=True)["ema"]
        for folder in (tmp_path, stages / "train")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_elsewhere(stages, tmp_path):
    """The folder of a run may be moved to another disk."""
    main, words = redirected(stages, "train", tmp_path)
    shutil.copytree(stages / "train" / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0000024.pt").unlink()
    main(words)
    logs = [
        [json.loads(line).get("loss") for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, stages / "train")
    ]
    assert logs[0] == logs[1]
    assert np.isfinite([loss for loss in logs[0] if loss is not None]).all()
