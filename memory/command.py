"""How a command explains itself and how it ends: one line for what its user can mend, a traceback for our mistakes."""

import argparse
import ctypes
import dis
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFUSED, INTERRUPTED = 2, 130  # exit statuses: 2 is argparse's, too
RAISE = dis.opmap["RAISE_VARARGS"]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
KEPT = 2**31 - 1  # bytes at the end of the heap, the most that mallopt takes
PYTHONS_WARNING = warnings.formatwarning
GRACE = 5.0  # seconds that processes beside the first one leave it to say what all of them have met


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """For --help: a module's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def execute(main: Callable[[], object]) -> None:
    """Call a command's `main`; instead of a named error's traceback print `error: …` and leave with status 2.

    Under torchrun all processes usually meet the same error: the first one prints it and the launcher ends the others
    while they wait. An error of one of them alone names that process. The launcher's own report repeats the line.
    """
    keep_freed_memory()
    usual, warnings.formatwarning = warnings.formatwarning, plain_warning
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, FloatingPointError) as error:
        if not named(error):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(GRACE)
        message = f"error of process {rank}: {error}" if rank else f"error: {error}"
        print(message, file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
        sys.exit(REFUSED)
    finally:
        warnings.formatwarning = usual


def plain_warning(message: Warning | str, category: type[Warning], file: str, *place: object) -> str:
    """A warning of ours as a line to the user, without its place in the code; another's as Python writes it."""
    if category is UserWarning and ours(file):
        return f"warning: {message}\n"
    return PYTHONS_WARNING(message, category, file, *place)


def keep_freed_memory() -> None:
    """Without a GPU, have glibc keep the memory of freed tensors for the next ones.

    By default large blocks lie outside the heap and go back to the system, which clears all their pages anew when the
    next tensor asks for them: two thirds of the time that encoding images took on two cores of a virtual machine.
    """
    torch = sys.modules.get("torch")  # which not every command needs
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if torch and not torch.cuda.is_available() and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """Have glibc give what `keep_freed_memory` has kept so far back to the system."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def named(error: BaseException) -> bool:
    """Whether an error speaks to the user: the system's, of files and disks, or one that a `raise` of ours makes.

    A ValueError out of a library, or of an operation that was given what it cannot take, is a mistake of ours. The
    instruction tells them apart, since the source is not always at hand.
    """
    if isinstance(error, OSError):
        return True
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    return ours(code.co_filename) and code.co_code[last.tb_lasti] == RAISE


def ours(file: str) -> bool:
    """Whether code is this project's, and not of a library in an environment inside of it."""
    path = Path(file).resolve()  # ROOT is without links, too
    return path.is_relative_to(ROOT) and "lib" not in path.relative_to(ROOT).parts
