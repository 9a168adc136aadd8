"""Files on disk: written whole or not at all, and known by their hash.

Every result of this project is made under a temporary name beside its final one and renamed when it is complete, so a
killed process or a full disk never leaves a truncated file where a good one is expected.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

HOST = re.sub(r"\W", "-", platform.node())
TEMPORARY = re.compile(r"\..+\.(?P<host>[\w-]*)-(?P<pid>\d+)\.tmp(\.[^.]+)?")
DAY = 86_400  # seconds
LONGEST = 10_000  # of a library's message that is read: it may quote a whole file


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` if the block succeeds, remove it if it does not.

    The temporary file lies in the same folder (a rename across file systems is not atomic), keeps the suffix (NumPy
    appends one where it is missing), and is flushed to disk before the rename. Parent folders are made.

    Raises:
        OSError: the disk filled up while writing; whatever stood at `path` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{HOST}-{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of what the system says
        cause = error if isinstance(error, OSError) else error.__context__
        quota, free = getattr(cause, "errno", None) == errno.EDQUOT, shutil.disk_usage(path.parent).free
        if quota or free < 1 << 20:
            full = "your quota of this disk is used up" if quota else f"the disk filled up ({free} bytes are left)"
            reason = f"{full}; free some space and run the same command again"
            raise OSError(errno.ENOSPC, reason, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(*folders: str | os.PathLike) -> None:
    """Remove what killed processes have left in folders under `atomic`'s temporary names.

    A file is stale if its process has ended; one of another machine, whose processes cannot be asked, after a day.
    """
    for folder in map(Path, folders):
        for path in folder.glob(".*.tmp*"):
            name = TEMPORARY.fullmatch(path.name)
            if not name:
                continue
            stale = not running(int(name["pid"])) if name["host"] == HOST else aged(path)
            if stale:
                with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
                    path.unlink()


def running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def aged(path: Path) -> bool:
    """Whether nothing has been written to a file for a day."""
    try:
        return time.time() - path.stat().st_mtime > DAY
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def reading(source: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a library raises over a damaged or hostile file into a ValueError that names the file.

    Libraries meet such files with exceptions of every kind, a KeyError or MemoryError as well as their own. For the
    reading of files alone, never around computation, where it would hide our mistakes.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:
        terse = isinstance(error, LookupError | AttributeError | TypeError | MemoryError)
        kind = f"{type(error).__name__}: " if terse else ""
        reason = kind + " ".join(str(error)[:LONGEST].split())[:300]
        raise ValueError(f"{source}: {reason}; was it cut short or damaged? make or copy it again") from error


def why_unreadable(error: Exception) -> str:
    """Why a torch file could not be read, in one line, without torch's advice to load it unsafely."""
    reason = " ".join(str(error)[:LONGEST].split())
    inner = pickle.UnpicklingError | LookupError | AttributeError | TypeError | EOFError | MemoryError
    if not isinstance(error, inner) and "weights_only" not in reason:
        return reason[:300]
    found = re.search(r"(?:GLOBAL|globals:) ([\w.]*\w)", reason)
    return f"it holds {found[1]}, which may run code" if found else "it is cut short, or of another format"


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike, **forms: object) -> dict:
    """The object in a JSON file; ValueError, naming the file, if it holds none, or if a value has not the form that
    `check_form` would have under its key."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:  # of the decoding of text or JSON
        raise ValueError(f"{path} is no JSON file (cut short?): {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    for key, form in forms.items():
        check_form(value.get(key), form, f"{path}: {key}")
    return value


def check_form(value: object, form: object, place: str) -> None:
    """Raise ValueError, naming the place, unless a value of JSON has a form.

    A form is a type, where float takes whole numbers too; (FORM, None) for what may be null or absent; [FORM] for a
    list of such; a dictionary of forms by key, or {str: FORM} for any keys.
    """
    if isinstance(form, tuple):
        if value is None:
            return
        form = form[0]
    kind = form if isinstance(form, type) else type(form)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{place} is {value!r:.80}, expected {kind.__name__}; restore or remove it")
    if isinstance(form, list):
        for index, item in enumerate(value):
            check_form(item, form[0], f"{place}[{index}]")
    elif isinstance(form, dict):
        for key in value if str in form else form:
            check_form(value.get(key), form.get(key) or form[str], f"{place}.{key}")


def check_folder(flag: str, path: str | os.PathLike) -> None:
    """Raise ValueError if the folder that `flag` names cannot be, because a file is in the way."""
    path = Path(path).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{flag} {path}: the file {existing} is in the way of this folder; choose another")


def weights_folder() -> Path:
    """Where `scripts/fetch.sh` puts published weights, and where their names are looked for before any hub:
    $GMEM_WEIGHTS, or `weights` in the working directory."""
    return Path(os.environ.get("GMEM_WEIGHTS", "weights"))


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(path: str | os.PathLike) -> int:
    """Free bytes of the disk on which `path` is or will be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
