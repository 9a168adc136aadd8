"""The store: moments, features, labels and images on disk, read a batch at a time in an order that is a pure function.

A store is a folder made by `scripts/encode_dataset.py`. `layout` is the one place that says which arrays it holds and
in which shapes; the writer preallocates them from it and the reader checks them against it. Arrays are memory-mapped,
so that opening costs nothing and only what is fetched is read. Features and moments were checked to be finite when they
were written (`"finite": true` in meta.json); the reader does not scan them again.

Reading is one NumPy index a file. From the page cache that is ten times as fast in the training process as through
workers, which must copy every batch to shared memory (`benchmarks/bench_data.py`): use workers only where the disk is
slow, or `stage` the store first. Rows are read in the order asked for: sorting them costs a second copy and gains
nothing there.

The order of the rows is the endless concatenation of one permutation of all rows per (seed, epoch), cut into batches;
the coin that picks each sample's view is drawn for the whole batch from (seed, step). Both depend on nothing else, so
any number of processes sees the same data and "where training stopped" is a step number.
"""

import fcntl
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from memory.files import atomic, free_space, read_json, reading

FORMAT = 1  # of meta.json and the arrays; raised when an older reader would misread them
META, NAMES, LABELS, PROGRESS = "meta.json", "files.txt", "labels.npy", "progress"
COUNTS = {"num_images": 0, "num_views": 1, "image_size": 1, "image_channels": 1}  # of meta.json, each at least so many
FIELDS = {"codec": dict, "encoders": dict, "patches": dict, "fingerprint": str, "has_images": bool}  # and their kinds
ROW_STREAM, VIEW_STREAM = 0, 1  # addresses of the two streams of random numbers under one seed
COPY_BYTES = 2**24  # staging reads and writes this much at a time


def layout(meta: dict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Relative file name → (shape, dtype) of every array in a store with this meta.json."""
    n, v, size = meta["num_images"], meta["num_views"], meta["image_size"]
    arrays = {"latents.npy": ((n, v, *meta["codec"]["moments_shape"]), meta["codec"]["dtype"])}
    for name, encoder in meta["encoders"].items():
        arrays[f"features/{name}.npy"] = ((n, v, encoder["dim"]), "float16")
    for name, tokens in meta["patches"].items():  # tokens is [T, F]
        arrays[f"patches/{name}.npy"] = ((n, v, *tokens), "float16")
    if meta["has_images"]:
        arrays["images.npy"] = ((n, meta["image_channels"], size, size), "uint8")
    arrays[LABELS] = ((n,), "int64")
    return {file: (tuple(shape), np.dtype(dtype)) for file, (shape, dtype) in arrays.items()}


def holdout_path(store: str | os.PathLike) -> Path:
    """Where the held-out images of a store lie, if it has any: in NAME-holdout beside it."""
    path = Path(store).resolve()
    return path.with_name(f"{path.name}-holdout")


def read_meta(store: str | os.PathLike) -> dict:
    """The meta.json of a complete store; ValueError if the store is missing, unfinished or of a newer format."""
    path = Path(store)
    if (path / META).is_file():
        meta = read_json(path / META)
    elif (path / "latents.npy").is_file():
        meta = {"complete": False}
    elif any(path.glob("[!.]*")):  # a folder of images, most likely
        remedy = f"`python -m scripts.encode_dataset {path} --out data/NAME …` makes a store of the images in it"
        raise ValueError(f"{path} is a folder, but no store: it has no {META}; {remedy}")
    else:
        raise ValueError(f"no store at {path}: `python -m scripts.encode_dataset SOURCE --out {path} …` makes one")
    if isinstance(meta.get("format"), int) and meta["format"] > FORMAT:
        raise ValueError(
            f"{path / META} has format {meta['format']}, this version reads up to {FORMAT}: "
            "update the code or encode again"
        )
    if not meta.get("complete"):
        raise ValueError(f"the store {path} is incomplete: run the same encode command again to finish it")
    for key, kind in (dict.fromkeys(COUNTS, int) | FIELDS).items():
        value = meta.get(key)
        if type(value) is not kind or (key in COUNTS and not COUNTS[key] <= value < 2**40):
            raise ValueError(f"{path / META}: {key} is {value!r}, expected {kind.__name__}: copy or encode it again")
    with reading(path / META):
        layout(meta)
        if len(meta["views"]) != meta["num_views"]:
            raise ValueError(f"it names the views {meta['views']}, but num_views is {meta['num_views']}")
    return meta


class LatentDataset(Dataset):
    """A store opened for reading by batch.

    `encoder` names the features to return, `patches` the encoder whose patch tokens to return, `images` asks for the
    stored pixels. `assignment` (N, V) integers is a bank's nearest row for each image's view. `.meta` is meta.json,
    `.path` the folder, `.num_views` V, `.codec` the codec's meta. Raises ValueError, naming the file, for a missing or
    unfinished store, an array of another shape or length than meta.json says, or content that the store does not hold.
    """

    def __init__(
        self,
        store: str | os.PathLike,
        encoder: str | None = None,
        assignment: np.ndarray | Tensor | None = None,
        patches: str | None = None,
        images: bool = False,
    ):
        self.arguments = (store, encoder, assignment, patches, images)
        self.path, self.meta = Path(store), read_meta(store)
        self.num_views, self.codec = self.meta["num_views"], self.meta["codec"]
        for kind, name, present in (
            ("features", encoder, self.meta["encoders"]),
            ("patch tokens", patches, self.meta["patches"]),
        ):
            if name is not None and name not in present:
                raise ValueError(
                    f"the store {self.path} has no {kind} of encoder {name!r}; it has {', '.join(present) or 'none'}. "
                    f"`python -m scripts.encode_dataset SOURCE --out {self.path} --add {name}`"
                    f"{' --patches' if patches == name else ''} adds them"
                )
        if images and not self.meta["has_images"]:
            raise ValueError(f"the store {self.path} has no images: encode it with --keep-images")

        self.labels = self.open(LABELS)  # (N,)
        self.latents = self.open("latents.npy")  # (N, V, P, h, w)
        self.features = None if encoder is None else self.open(f"features/{encoder}.npy")  # (N, V, F)
        self.patches = None if patches is None else self.open(f"patches/{patches}.npy")  # (N, V, T, F)
        self.images = self.open("images.npy") if images else None  # (N, c, H, W)
        self.assignment = None if assignment is None else np.asarray(assignment)  # (N, V)
        if assignment is not None and self.assignment.shape != (len(self), self.num_views):
            raise ValueError(
                f"the bank assigns rows of shape {self.assignment.shape} (images, views), the store {self.path} has "
                f"{(len(self), self.num_views)}: build the bank from this store"
            )

    def __reduce__(self):
        return LatentDataset, self.arguments  # pickling a memory map would copy its content

    def open(self, file: str) -> np.ndarray:
        """Memory-map one array, after comparing its header and length with meta.json."""
        path, (shape, dtype) = self.path / file, layout(self.meta)[file]
        if not path.is_file():
            raise ValueError(f"{path} is missing: encode the store again, or copy it again with all its files")
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # of every kind, whatever is wrong with the file
            raise ValueError(f"{path} was cut short or is no npy file: copy or encode it again ({error})") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, {META} says {dtype} {shape}: encode it again")
        return array

    def __len__(self) -> int:
        return self.meta["num_images"]

    def fetch(self, rows: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """Samples `rows` (B,) seen in `views` (B,), as tensors of their own memory.

        "moments" (B, P, h, w), "label" (B,) long (−1: none), and where asked for "feature" (B, F) float16, "index" (B,)
        long, "patches" (B, T, F) float16 and "image" (B, c, H, W) uint8. One view index serves them all.
        """
        batch = {"moments": self.latents[rows, views], "label": self.labels[rows]}
        if self.features is not None:
            batch["feature"] = self.features[rows, views]
        if self.assignment is not None:
            batch["index"] = self.assignment[rows, views].astype(np.int64)
        if self.patches is not None:
            batch["patches"] = self.patches[rows, views]
        if self.images is not None:
            batch["image"] = self.images[rows]  # kept once, mirrored here
            mirrored = np.array([view == "mirrored" for view in self.meta["views"]])[views]
            batch["image"][mirrored] = batch["image"][mirrored, ..., ::-1]
        return {key: torch.from_numpy(np.asarray(value)) for key, value in batch.items()}

    def __getitem__(self, address: tuple[int, np.ndarray, np.ndarray]) -> dict[str, int | Tensor]:
        """The batch at an address of `StepSampler`, with its step: what a DataLoader with `batch_size=None` calls."""
        step, rows, views = address
        return {"step": step, **self.fetch(rows, views)}


def generator(seed: int, stream: int, position: int) -> np.random.Generator:
    """Random numbers that depend only on the seed, the stream and the position in it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, position))))


@functools.lru_cache(maxsize=2)  # a batch spans at most two epochs, unless the whole data set is smaller than it
def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all rows in one epoch, (num_rows,) int64."""
    order = generator(seed, ROW_STREAM, epoch).permutation(num_rows)
    order.flags.writeable = False  # the cache hands out the array itself
    return order


def rows_of_step(num_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows (batch_size,) int64 of a global batch: positions step·batch_size … of the epochs' permutations laid end to
    end, so that no row is dropped or seen twice within an epoch, whatever the batch size."""
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        permutation(num_rows, seed, epoch)[max(start - epoch * num_rows, 0) : stop - epoch * num_rows]
        for epoch in range(start // num_rows, (stop - 1) // num_rows + 1)
    ]
    return np.concatenate(parts)


def views_of_step(batch_size: int, num_views: int, seed: int, step: int) -> np.ndarray:
    """The one coin of each sample of a global batch, (batch_size,) int64 in [0, num_views)."""
    return generator(seed, VIEW_STREAM, step).integers(num_views, size=batch_size)


class StepSampler(Sampler):
    """Addresses (step, rows, views) for the steps `start` … `stop` − 1.

    `batch_size` is global and `share` this process's part of it. Its position is the step, so resuming is a new
    sampler with another `start`. Use it with `DataLoader(dataset, sampler=StepSampler(…), batch_size=None)`.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        num_views: int,
        seed: int,
        start: int,
        stop: int,
        share: slice = slice(None),
    ):
        self.num_rows, self.batch_size, self.num_views, self.seed = num_rows, batch_size, num_views, seed
        self.start, self.stop, self.share = start, stop, share

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for step in range(self.start, self.stop):
            rows = rows_of_step(self.num_rows, self.batch_size, self.seed, step)
            views = views_of_step(self.batch_size, self.num_views, self.seed, step)
            yield step, rows[self.share], views[self.share]


def stage(store: str | os.PathLike, directory: str | os.PathLike) -> Path:
    """Copy a store into `directory` (a local disk or /dev/shm) and return the copy's path.

    Files are read once from front to back, which slow shared storage does well and random rows it does not; the rate is
    shown. Every file appears whole under its name and meta.json last. A copy that is already complete and identical is
    used as it is. Processes that call this at the same moment wait for the one that copies.
    Raises ValueError if the disk is too small or another store lies at the target.
    """
    source, meta = Path(store).resolve(), read_meta(store)
    target = Path(directory) / source.name
    target.mkdir(parents=True, exist_ok=True)
    files = [*layout(meta), NAMES, META]  # meta.json last: a copy without it is incomplete
    sizes = {file: (source / file).stat().st_size for file in files}
    with open(target / ".staging", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / META).is_file():
            present = read_json(target / META)
            if present["fingerprint"] != meta["fingerprint"]:
                raise ValueError(
                    f"{target} holds another store than {source}: remove it, or stage to another directory"
                )
            whole = all((target / file).is_file() and (target / file).stat().st_size == sizes[file] for file in files)
            if present == meta and whole:
                print(f"staged: using the copy in {target}")
                return target
            (target / META).unlink()
        space, total = free_space(target), sum(sizes.values())
        if total > space:
            raise ValueError(
                f"staging {source} needs {total / 1e9:.2f} GB, {directory} has {space / 1e9:.2f} GB free: "
                "make room or choose another directory"
            )
        begin = time.perf_counter()
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"staging to {target}") as bar:
            for file in files:
                with open(source / file, "rb") as reader, atomic(target / file) as part, open(part, "wb") as writer:
                    while block := reader.read(COPY_BYTES):
                        writer.write(block)
                        bar.update(len(block))
        seconds = time.perf_counter() - begin
        print(f"staged {total / 1e9:.2f} GB in {seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s")
    return target
