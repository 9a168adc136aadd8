"""Stopping long work at a step's end when a scheduler or a user asks for it, in all processes alike."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

SECOND_SIGNAL = 130  # exit status when a second signal cuts a step short


class StopSignal:
    """SIGTERM or SIGINT: the first asks for a stop after the running step, a second leaves at once."""

    def __init__(self, timeout: timedelta):
        self.received = self.stopping = False
        multiple = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=timeout) if multiple else None

    def __enter__(self) -> "StopSignal":
        self.former = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stopping:  # this process's own signal may still come, and must not turn its success into a failure
            self.former[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            os._exit(SECOND_SIGNAL)
        self.received = True

    def agreed(self) -> bool:
        """Whether any process was told to stop; every process gets the same answer, without waiting for its GPU."""
        flag = torch.tensor(int(self.received))
        if self.group:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        self.stopping = bool(flag)
        return self.stopping


def leave_signals_alone(worker: int) -> None:
    """Start of a reading process: launchers signal the whole process group, and the training process decides."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
