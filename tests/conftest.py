"""Shared set-up of the tests: import from the repository root, one thread, and a GPU only for the tests marked so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from memory.command import keep_freed_memory  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start; tensors here are small
torch.set_num_threads(1)
keep_freed_memory()

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
has_gpu = torch.cuda.is_available


def pytest_collection_modifyitems(config, items):
    """Deselect (rather than skip) the GPU tests on a machine without a GPU, so that a green run has no holes in it."""
    if has_gpu():
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Hide the GPUs from all other tests and the commands they start: these promise results bit for bit on a CPU."""
    on_gpu = "gpu" in item.keywords
    torch.cuda.is_available = has_gpu if on_gpu else lambda: False
    if on_gpu and GPUS is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = GPUS if on_gpu else ""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, from which every command runs."""
    return ROOT


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Path:
    """A folder with a `python` that has imported every library (preloaded_python.py)."""
    folder = tmp_path_factory.mktemp("python")
    helper, socket = ROOT / "tests" / "preloaded_python.py", folder / "socket"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, helper, "serve", socket]
    server = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {helper} client {socket} {sys.executable} "$@"\n')
    program.chmod(0o755)
    yield folder
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def environment(python) -> dict[str, str]:
    """The variables of a shell in which `python`, also torchrun's for its workers, is that one, without a GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    path = f"{python}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHON_EXEC": str(python / "python"), "CUDA_VISIBLE_DEVICES": "", "NPROC": "1"}
