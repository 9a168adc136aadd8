"""Writing a store: files reserved at full size, rows written in place by any process, continued and finished later.

While a store is being made its folder holds `progress/`: `job.json` is the meta.json it will get, and each process
keeps a file with the rows it has written, updated only after their data is on disk. A run that was stopped is continued
by the same command with any number of processes; meta.json is written last and `progress/` removed.

An image that cannot be read keeps its place, with zeros. When everything else is written the store either stays
unfinished and such images are named, or (`--skip-broken`) the last rows move into their places and the store is that
much shorter. That order depends only on the source, and the move can be stopped and repeated at any point.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset import LABELS, META, NAMES, PROGRESS, layout
from memory.claim import CLAIM
from memory.files import atomic, read_json, reading, remove_stale, write_json
from scripts.sources import Source

JOB, PART = "job.json", "rows-{}.json"
DETERMINING = ("source_hash", "codec", "precision", "image_size", "image_channels", "upright", "views")
# What a plan cannot know, or what may differ without a consequence.
NOT_PLANNED = ("source", "num_images", "skipped", "fingerprint", "finite", "complete", "runs")


@dataclass
class Progress:
    """The rows that are written, as (N,) bool, those of them whose image could not be read, with the reason, and the
    seconds that it took, summed over processes."""

    done: np.ndarray
    broken: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write as JSON: half-open intervals of rows, and the broken ones."""
        edges = np.flatnonzero(np.diff(self.done, prepend=False, append=False))
        write_json(path, {"done": edges.reshape(-1, 2).tolist(), "broken": self.broken, "seconds": self.seconds})

    @classmethod
    def merged(cls, folder: Path, num_rows: int) -> "Progress":
        """The union of what all processes of all earlier runs have saved in a folder, left there as one file."""
        progress, merged = cls(np.zeros(num_rows, bool)), folder / PART.format("merged")
        parts = list(folder.glob(PART.format("*")))
        for path in parts:
            content = read_json(path, done=list, broken=dict)
            with reading(path):
                for begin, end in content["done"]:
                    progress.done[begin:end] = True
                progress.broken |= {int(row): reason for row, reason in content["broken"].items()}
                progress.seconds += content.get("seconds", 0.0)  # not noted by earlier versions
        progress.save(merged)
        for path in parts:
            if path != merged:
                path.unlink()
        return progress


@dataclass
class Job:
    """One store to make, or to extend (`extends`).

    `path` is its folder, `rows` (N,) the numbers of the source's images that become its rows, `meta` the meta.json it
    will get, `files` the arrays to write, a part of `dataset.layout(meta)`.
    """

    path: Path
    rows: np.ndarray
    meta: dict
    files: list[str]
    extends: bool = False

    def sizes(self) -> dict[str, int]:
        """Bytes of each array to write."""
        arrays = layout(self.meta)
        return {file: int(np.prod(arrays[file][0])) * arrays[file][1].itemsize for file in self.files}

    def begun(self) -> Progress | None:
        """What earlier runs of this job have left; None if the store is already complete.

        Raises ValueError, showing the differences, if the folder belongs to another command.
        """
        if (self.path / PROGRESS / JOB).is_file():
            self.compare(read_json(self.path / PROGRESS / JOB))
            return Progress.merged(self.path / PROGRESS, len(self.rows))
        if not self.extends and (self.path / META).is_file():
            present = read_json(self.path / META, encoders=dict, patches=dict)
            for key in ("encoders", "patches"):  # there may be more of them by now
                present[key] = {name: value for name, value in present[key].items() if name in self.meta[key]}
            self.compare(present)
            return None
        remove_stale(self.path / PROGRESS)  # a run may have been killed before its first note was whole
        if not self.extends and any(file.is_file() and file.name != CLAIM for file in self.path.rglob("*")):
            raise ValueError(f"--out {self.path} is neither empty nor a store: choose another folder")
        return Progress(np.zeros(len(self.rows), bool))

    def compare(self, present: dict) -> None:
        """Raise ValueError unless `present` agrees with the planned meta, but for what is not planned."""
        found, wanted = dict(flat(present)), dict(flat(json.loads(json.dumps(self.meta))))
        keys = [key for key in found | wanted if found.get(key) != wanted.get(key) and key not in NOT_PLANNED]
        if keys:
            raise ValueError(
                f"--out {self.path} was begun by a different command: "
                + "; ".join(f"{key} was {found.get(key)}, now {wanted.get(key)}" for key in keys)
                + ". Give the same flags and source to continue, --add to add an encoder, or another --out"
            )

    def reserve(self) -> None:
        """Note the job, then make the files that do not exist yet, all their blocks allocated, so that a full disk
        shows now and not after hours; it leaves nothing behind."""
        arrays, note = layout(self.meta), self.path / PROGRESS / JOB
        remove_stale(*{(self.path / file).parent for file in (META, *arrays)})
        with contextlib.ExitStack() as undo:
            if not note.exists():
                shutil.rmtree(note.parent, ignore_errors=True)  # of an earlier job, stopped while it cleaned up
                undo.callback(shutil.rmtree, note.parent, ignore_errors=True)
            write_json(note, self.meta)
            for file in self.files:
                if not (self.path / file).exists():
                    reserve_array(self.path / file, *arrays[file])
                    undo.callback((self.path / file).unlink)
            undo.pop_all()

    def finish(self, progress: Progress, source: Source, made: dict) -> None:
        """Leave out the broken rows, write names, labels and, last of all, meta.json, which the job becomes, with where
        the last run was `made`; remove the progress."""
        assert progress.done.all()
        order = leave_out(len(self.rows), progress.broken)
        for file in self.files:
            shorten(self.path / file, order)
        run = {**made, "files": self.files, "process_seconds": round(progress.seconds, 3)}
        meta = self.meta | {"runs": [*self.meta.get("runs", []), run]}
        if not self.extends:
            rows = self.rows[order]
            names = [source.names[row] for row in rows]
            with atomic(self.path / NAMES) as part:
                part.write_bytes("".join(f"{name}\n" for name in names).encode(errors="surrogateescape"))
            with atomic(self.path / LABELS) as part:
                np.save(part, np.full(len(rows), -1) if source.labels is None else source.labels[rows])
            meta = meta | {"num_images": len(rows), "skipped": len(progress.broken), "finite": True, "complete": True}
            meta["fingerprint"] = fingerprint(meta, names)
        write_json(self.path / PROGRESS / JOB, meta)
        os.replace(self.path / PROGRESS / JOB, self.path / META)
        shutil.rmtree(self.path / PROGRESS)


def fingerprint(meta: dict, names: Iterable[str]) -> str:
    """SHA-256 of what determines the latents: the images by name, the codec and its precision, size and views."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    determining = {key: meta[key] for key in DETERMINING}
    digest.update(json.dumps(determining, sort_keys=True).encode())
    return digest.hexdigest()


def flat(value: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Nested dictionaries as (dotted key, value) pairs."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def write_header(file, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Write an npy header at the position of an open file; NumPy pads it so that its length does not depend on N."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def reserve_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Make an npy file of zeros with all its blocks allocated; ValueError, and no file, if the disk is too small."""
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        with atomic(path) as part, open(part, "wb") as file:
            offset = write_header(file, shape, dtype)
            file.truncate(offset + size)
            if hasattr(os, "posix_fallocate"):  # absent on a Mac
                os.posix_fallocate(file.fileno(), 0, offset + size)
    except OSError as error:
        raise ValueError(f"cannot reserve {size / 1e9:.2f} GB for {path}: {error.strerror}") from error


def leave_out(num_rows: int, broken: Iterable[int]) -> np.ndarray:
    """Which planned row each final row holds: all but the broken ones, their places filled by the last whole ones."""
    whole = np.ones(num_rows, bool)
    whole[list(broken)] = False
    order = np.arange(whole.sum())  # (n,)
    order[~whole[: len(order)]] = len(order) + np.flatnonzero(whole[len(order) :])
    return order


def shorten(path: Path, order: np.ndarray) -> None:
    """Rearrange an array's rows in place to `order`, as `leave_out` gives it, and cut the rest off."""
    array = np.load(path, mmap_mode="r+")
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(array) > len(order):  # else nothing is broken, or a run stopped in finishing has done this file
        array[moved] = array[order[moved]]
        array.flush()
        with open(path, "r+b") as file:
            offset = write_header(file, (len(order), *array.shape[1:]), array.dtype)
            assert offset == array.offset
            file.truncate(offset + len(order) * array[0].nbytes)


class Writer:
    """The arrays of a job, open for writing rows in place. Rows are written, not memory-mapped: two machines that share
    a network file system may write the two halves of a memory page."""

    def __init__(self, job: Job):
        self.files, self.offsets = {}, {}
        for file in job.files:
            self.offsets[file] = np.load(job.path / file, mmap_mode="r").offset
            self.files[file] = open(job.path / file, "r+b")  # noqa: SIM115

    def write(self, begin: int, arrays: dict[str, np.ndarray]) -> None:
        """Write rows `begin` … of each file."""
        for file, values in arrays.items():
            self.files[file].seek(self.offsets[file] + begin * values[0].nbytes)
            self.files[file].write(np.ascontiguousarray(values))

    def flush(self) -> None:
        """Return when everything written is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in self.files.values():
            file.close()
