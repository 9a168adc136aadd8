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


CASES = [  # signals inside the block, after it, and the status
    (["TERM"], [], 0),
    (["INT"], [], 0),
    (["TERM"], ["TERM"], 0),  # of a scheduler that signals twice, or of this process's own launcher
    (["TERM", "TERM"], [], SECOND_SIGNAL),
    (["INT", "TERM"], [], SECOND_SIGNAL),
    ([], ["TERM"], -signal.SIGTERM),
    ([], ["INT"], -signal.SIGINT),
]
# A Python that runs each program in a fork of its own, which ends as any Python does, and prints the statuses.
EACH = """
import os, sys
import torch
for source in {sources!r}:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
exec(source)
"""


@pytest.fixture(scope="module")
def statuses(root):
    """The exit status of each case, and what they printed as errors."""
    sources = []
    for inside, after, _ in CASES:
        inside, after = (list(map(SEND.format, names)) for names in (inside, after))
        sources.append(SOURCE.format(inside="\n    ".join(inside) or "pass", after="\n".join(after)))
    words = [sys.executable, "-c", EACH.format(sources=sources)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    return list(map(int, done.stdout.split())), done.stderr


@pytest.mark.parametrize("case", range(len(CASES)))
def test_exit_statuses(statuses, case):
    found, errors = statuses
    assert found[case] == CASES[case][2], errors


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
