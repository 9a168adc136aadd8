"""The processes of a command: as many as the launcher started, each with its device."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Value = TypeVar("Value")


def join(timeout: timedelta | None = None) -> PartialState:
    """This process among the launcher's, or alone; one that waits for the others gives up after `timeout`.

    Without a GPU accelerate must be told so: else it leaves torchrun's processes apart, each to do all of the work.
    """
    options = {"timeout": timeout} if timeout else {}
    state = PartialState(cpu=not torch.cuda.is_available(), **options)
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", 1)), "accelerate and the launcher disagree"
    return state


def from_main(state: PartialState, make: Callable[[], Value]) -> Value:
    """What `make` returns in the main process, in all of them; if it raises there, the launcher ends the others."""
    return broadcast_object_list([make() if state.is_main_process else None])[0]


def share(count: int, state: PartialState) -> range:
    """This process's contiguous part of `count` things."""
    rank, world = state.process_index, state.num_processes
    return range(count * rank // world, count * (rank + 1) // world)
