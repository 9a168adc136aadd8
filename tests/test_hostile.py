"""Broken and hostile files: every reader gives a result or an error that names the file, and runs nothing in it."""

import ast
import contextlib
import io
import random
import shutil
import time

import numpy as np
import pytest
import torch

from benchmarks import fuzz
from memory.bank import MemoryBank
from memory.files import reading
from models.encoder import load_encoder
from models.published import read_file

CASES = 8  # of each reader
# Cases that once ended inside a library, or did not end.
FOUND = (
    *(("zip", 5240), ("zip", 10417), ("vae-config", 5308), ("vae-config", 5385)),
    *(("inception", 20021), ("samples.json", 20005), ("samples.json", 20086), ("output", 20001), ("output", 20003)),
    *(("config.json", 20004), ("config.json", 20012), ("progress", 20000), ("progress", 20007), ("kept", 20006)),
    *(("log.jsonl", 20149), ("log.jsonl", 20011), ("image.tiff", 50109), ("zip", 90200)),
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    fuzz.write_seeds(folder)
    return folder


def test_the_real_files_are_read(seeds, tmp_path):
    """Else every mutation would be refused for the same dull reason."""
    for name, target in fuzz.TARGETS.items():
        shutil.copytree(seeds / target.folder, tmp_path / name)
        target.read(tmp_path / name / target.at)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_files(seeds, name):
    assert fuzz.run([(name, number) for number in range(CASES)], seeds) == {}


def test_cases_that_once_did_harm(seeds):
    assert fuzz.run(list(FOUND), seeds) == {}


def hostile_files(planted):
    """Files that create the folder `planted` when they are unpickled, in each format that torch and NumPy unpickle."""
    code = fuzz.Planted(planted)
    streams = {name: io.BytesIO() for name in ("torch", "torch-legacy", "npz", "npy")}
    torch.save({"ema": code}, streams["torch"])
    torch.save({"ema": code}, streams["torch-legacy"], _use_new_zipfile_serialization=False)
    np.savez(streams["npz"], arr_0=np.array([code], object))
    np.save(streams["npy"], np.array([code], object))
    return {name: stream.getvalue() for name, stream in streams.items()}


def test_the_hostile_files_are_hostile(tmp_path):
    """To a reader that unpickles."""
    planted = tmp_path / "code-ran"
    for name, content in hostile_files(planted).items():
        stream = io.BytesIO(content)
        if name.startswith("torch"):
            torch.load(stream, weights_only=False)
        else:
            loaded = np.load(stream, allow_pickle=True)
            loaded = loaded["arr_0"] if name == "npz" else loaded
        planted.rmdir()


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_planted_code_does_not_run(seeds, name, tmp_path):
    """Neither whole hostile files in the place of real ones, nor members of an archive, if that is what they are."""
    target, planted = fuzz.TARGETS[name], tmp_path / "code-ran"
    whole = (seeds / target.folder / target.file).read_bytes()
    contents = list(hostile_files(planted).values())
    if whole[:2] == b"PK" and name not in ("npz-packed", "reference"):  # compressed, they hide what is in them
        mutations = (fuzz.mutated(whole, random.Random(number), planted) for number in range(120))
        members = [content for content in mutations if b"code-ran" in content]
        assert len(members) > 1
        contents += members[:4]
    for number, content in enumerate(contents):
        place = tmp_path / str(number)
        shutil.copytree(seeds / target.folder, place)
        (place / target.file).write_bytes(content)
        with contextlib.suppress(ValueError, OSError):
            target.read(place / target.at)
        assert not planted.exists()


def test_nothing_here_unpickles(root):
    """Every call of a function that could is told not to, or uses NumPy's default."""
    folders = (".", "scripts", "memory", "models", "evaluations", "benchmarks")
    sources = [path for folder in folders for path in (root / folder).glob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                told = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
                where, name = f"{path.name}:{call.lineno}", ast.unparse(call.func)
                assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), where
                assert name != "torch.load" or told.get("weights_only") is True, where
                assert name != "np.load" or told.get("allow_pickle") in (None, False), where


def test_the_fuzzer_sees_a_crash_a_hang_and_a_foreign_error(seeds, monkeypatch):
    def crash(path):
        raise SystemExit(3)

    def foreign(path):
        np.load(path / "no such file")

    def unnamed(path):
        int("a mistake of ours, of which a command prints the traceback")

    def greedy(path):
        torch.ones(5 << 26)

    monkeypatch.setattr(fuzz, "SECONDS", 2)
    cases = {"crash": crash, "hang": lambda path: time.sleep(20), "foreign": foreign, "greedy": greedy}
    cases["unnamed"] = unnamed
    for name, read in cases.items():
        monkeypatch.setitem(fuzz.TARGETS, name, fuzz.Target("snippets", "rows.txt", read))
    torch.ones(6 << 26)  # what this process keeps of it must not serve its children
    problems = fuzz.run(
        [("foreign", 0), ("crash", 0), ("snippets.txt", 1), ("hang", 0), ("greedy", 0), ("unnamed", 0)], seeds
    )
    assert problems["foreign", 0].startswith("FileNotFoundError from a library")
    assert problems["crash", 0].startswith("ended the process")
    assert problems["hang", 0] == "hung"
    assert problems["greedy", 0].startswith("took ")
    assert problems["unnamed", 0].startswith("ValueError from a library")
    assert len(problems) == 5


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError(), RuntimeError("odd"), ValueError("no"), OSError("gone")]
)
def test_reading_names_the_file(error):
    with pytest.raises(ValueError, match=r"^some\.npz: "), reading("some.npz"):
        raise error


def test_reading_lets_an_interrupt_through():
    with pytest.raises(KeyboardInterrupt), reading("some.npz"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "load",
    [MemoryBank.load, read_file, lambda path: load_encoder("test_vit", path)],
    ids=["bank", "checkpoint", "encoder"],
)
def test_nobody_is_advised_to_load_what_may_run_code(load, tmp_path):
    torch.save([1], tmp_path / "bank.freq")
    for value, reason in ((tmp_path, "it holds pathlib.PosixPath, which may run code"), (None, "it is cut short")):
        torch.save(value, tmp_path / "bank.pth")
        if value is None:
            (tmp_path / "bank.pth").write_text("text")
        with pytest.raises(ValueError, match=rf"bank\.pth .*{reason}") as refusal:
            load(tmp_path / "bank.pth")
        assert "weights_only" not in str(refusal.value)
