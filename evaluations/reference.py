"""The reference of an evaluation: its statistics, some features, its hash, and the file that keeps them.

ADM's layout of an npz is `mu, sigma` (pool features), `mu_s, sigma_s` (spatial features) of a whole training set and up
to 10,000 of its images in `arr_0`, which serve precision and recall. Any set of images is a reference too; its features
are kept in an npz beside it, under a name and key that hold the hash of its content and of the network.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from evaluations.features import Network, Summary, summarize
from evaluations.images import open_images, reading
from memory.files import atomic, sha256

MOMENTS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
MOST_IMAGES = 10_000  # that serve precision, recall and KID, as many as in ADM's files


class Reference:
    """Images, or statistics with some of their images.

    `use_moments`: take the statistics in the file if it has any (they belong to Inception). `use_images`: precision and
    recall are wanted; ValueError if there are no images.
    """

    def __init__(self, path: Path, use_moments: bool, use_images: bool):
        self.path = path
        self.moments = read_moments(path) if use_moments and path.suffix == ".npz" and path.is_file() else {}
        self.images = None
        self.kept = []
        if self.moments and not use_images:
            self.digest = sha256(path)
            return
        try:
            self.images = open_images(path)
        except ValueError as error:
            if not self.moments:
                raise
            raise ValueError(f"{error}; add --no-precision-recall to go without images of the reference") from error
        number = min(len(self.images), MOST_IMAGES)
        self.kept = [i * len(self.images) // number for i in range(number)]  # evenly spread
        self.digest = self.images.digest()

    def summary(self, network: Network, batch_size: int, state: PartialState, cache: bool) -> Summary:
        """Moments and features; with `cache` from the file beside the reference, which is written if it is missing."""
        given = {name: value.to(state.device) for name, value in self.moments.items()}
        if self.images is None:
            return Summary(given, None)
        identity = json.dumps([self.digest, network.identity()], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()
        file = self.path.with_name(f"{self.path.name}.{network.name}.{key[:12]}.npz")
        summary = load_summary(file, key, state.device) if cache else None
        if not all(gather_object([summary is not None])):  # another command may keep it between two processes' looks
            count = len(self.images)
            summary = summarize(self.images, count, self.kept, network, batch_size, state, "reference")
            if cache and state.is_main_process:
                keep_summary(file, key, summary)
        return Summary(summary.moments | given, summary.features)

    def save(self, path: Path, summary: Summary, batch_size: int) -> None:
        """Write ADM's layout: the moments, and the kept images as `arr_0`, streamed."""
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name in MOMENTS:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, summary.moments[name].cpu().numpy(), allow_pickle=False)
            if self.images is None:
                return
            shape = (len(self.kept), *self.images.size, 3)
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in self.images.batches(self.kept, batch_size):
                    file.write(batch.permute(0, 2, 3, 1).contiguous().numpy())  # (B, H, W, 3)


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """An npz without pickles; what is wrong with it is a ValueError that names it."""
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise EOFError("not an npz file")
        with np.load(path, allow_pickle=False) as archive:
            yield archive


@contextlib.contextmanager
def if_writable(path: Path) -> Iterator[None]:
    """Say so and go on where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        print(f"not written: {path} ({error.strerror})")


def read_moments(path: Path) -> dict[str, torch.Tensor]:
    """ADM's four statistics in an npz as float64, {} if it has no `mu`; ValueError if they are not ADM's."""
    with open_npz(path) as archive:
        if "mu" not in archive.files:
            return {}
        missing = [name for name in MOMENTS if name not in archive.files]
        if missing:
            raise ValueError(f"it holds mu but not {', '.join(missing)}; --save-reference writes all from the images")
        moments = {name: archive[name] for name in MOMENTS}
        for name, value in moments.items():
            if value.shape != MOMENTS[name] or value.dtype.kind != "f":
                raise ValueError(f"{name} is {value.dtype} {value.shape}, expected floats {MOMENTS[name]} of Inception")
    return {name: torch.from_numpy(value).double() for name, value in moments.items()}


def load_summary(file: Path, key: str, device: torch.device) -> Summary | None:
    """What an earlier run kept under this key, or None."""
    if not file.is_file():
        return None
    with open_npz(file) as archive:
        if str(archive["key"]) != key:
            return None
        arrays = {name: archive[name] for name in archive.files if name in MOMENTS or name == "features"}
        tensors = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
        return Summary({name: value for name, value in tensors.items() if name in MOMENTS}, tensors["features"])


def keep_summary(file: Path, key: str, summary: Summary) -> None:
    """Keep a reference's summary for later runs."""
    arrays = {name: value.cpu().numpy() for name, value in (summary.moments | {"features": summary.features}).items()}
    with if_writable(file), atomic(file) as temporary:
        np.savez(temporary, key=np.array(key), **arrays)
