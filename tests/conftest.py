"""Shared set-up of the tests: import from the repository root, one thread, and no GPU tests where there is no GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start; tensors here are small
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Deselect (rather than skip) the GPU tests on a machine without a GPU, so that a green run has no holes in it."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, from which every command runs."""
    return ROOT
