"""Signals in one process: the first asks, the second leaves, and one that comes late does no harm."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from scripts.stop import SECOND_SIGNAL, StopSignal

SOURCE = """
import os, signal
from datetime import timedelta
from scripts.stop import StopSignal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with StopSignal(timedelta(seconds=1)) as stop:
    {inside}
    stop.agreed()
{after}
"""
SEND = "os.kill(os.getpid(), signal.SIG{})"


@pytest.mark.parametrize(
    ("inside", "after", "status"),
    [
        (["TERM"], [], 0),
        (["INT"], [], 0),
        (["TERM"], ["TERM"], 0),  # of a scheduler that signals twice, or of this process's own launcher
        (["TERM", "TERM"], [], SECOND_SIGNAL),
        (["INT", "TERM"], [], SECOND_SIGNAL),
        ([], ["TERM"], -signal.SIGTERM),
        ([], ["INT"], -signal.SIGINT),
    ],
)
def test_exit_statuses(root, inside, after, status):
    source = SOURCE.format(
        inside="\n    ".join(map(SEND.format, inside)) or "pass", after="\n".join(map(SEND.format, after))
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True)
    assert done.returncode == status, done.stderr


def test_a_signal_to_another_process_stops_this_one_and_its_own_comes_late(monkeypatch):
    former = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal(timedelta(seconds=1)) as stop:
            stop.group = "others"
            monkeypatch.setattr("torch.distributed.all_reduce", lambda flag, **options: flag.fill_(1))
            assert stop.agreed()
            assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
