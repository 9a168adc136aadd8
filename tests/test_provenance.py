"""Code version with and without git; nothing private; plain values."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys

import torch

from memory import provenance as module
from memory.provenance import ROOT, provenance


def git(folder, *words):
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    subprocess.run(("git", *identity, *words), cwd=folder, check=True, capture_output=True)


def test_states_what_ran():
    made = json.loads(json.dumps(provenance(["--k", "5"], processes=2)))
    assert made["command"][1:] == ["--k", "5"]
    assert "/" not in made["command"][0]
    assert torch.__version__.startswith(made["versions"]["torch"])
    assert made["processes"] == 2


def test_command_of_this_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--out", "x"])
    assert provenance()["command"] == ["train.py", "--out", "x"]


def test_triton_is_named_without_being_imported(monkeypatch):
    """It compiles kernels; of a machine that lacks it nothing is said."""

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setitem(sys.modules, "triton", None)  # so that an import fails
    monkeypatch.setattr(importlib.metadata, "version", version)
    for installed in ({"torch": "2.11.0", "triton": "3.6.0"}, {"torch": "2.11.0"}):
        assert provenance()["versions"] == {"python": platform.python_version()} | installed


def test_code_version_follows_the_commit_and_its_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = module.code_version()
    assert len(commit) == 40
    (tmp_path / "untracked.txt").write_text("a result")
    assert module.code_version() == commit
    (tmp_path / "train.py").write_text("two")
    assert module.code_version() == f"{commit}+changes"


def test_code_version_without_git_hashes_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    shutil.copy(ROOT / "loss.py", tmp_path)
    first = module.code_version()
    assert first.startswith("sources-")
    assert len(first) == len("sources-") + 40
    (tmp_path / "README.md").write_text("no code")
    assert module.code_version() == first
    (tmp_path / "loss.py").write_text("changed")
    assert module.code_version() != first
