"""A folder that one command writes to at a time."""

import contextlib
import fcntl
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from memory.files import check_folder, remove_stale

CLAIM = ".claim"


@contextlib.contextmanager
def claimed(flag: str, folder: str | os.PathLike, claim: bool = True) -> Iterator[None]:
    """Keep a folder to this process while the block runs, and first remove what killed processes left in it.

    The claim is a lock on a file in the folder, which says who holds it. The system lifts it when the process ends,
    however it ends. `claim` is False in the processes of a command that rely on another one's claim.

    Raises:
        ValueError: another process writes to this folder, named with its machine and command; or `flag` is no folder.
    """
    if not claim:
        yield
        return
    check_folder(flag, folder)
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = lock(folder / CLAIM)
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        file = None
    if file is None:  # nobody writes here; a finished result can still be recognised
        yield
        return
    os.register_at_fork(after_in_child=file.close)  # reading processes outlive a killed one for seconds
    with file:
        remove_stale(folder)
        command = " ".join((Path(sys.argv[0]).name, *sys.argv[1:]))
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name, and there may be nothing to do
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()} ({command})".encode())
        try:
            yield
        finally:
            (folder / CLAIM).unlink(missing_ok=True)
            if made:  # leave nothing if nothing came of it
                with contextlib.suppress(OSError):
                    folder.rmdir()


def lock(path: Path) -> TextIO:
    """An open file that only this process has locked; closing it lifts the lock. ValueError if another has."""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read() or "another process"
            raise ValueError(
                f"{path.parent}: {holder} is writing to this folder; wait for its end, or choose another folder"
            ) from error
        except OSError as error:
            warnings.warn(f"{path}: no locks here ({error.strerror}): start no second command there", stacklevel=3)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder removed it between our opening and locking it
