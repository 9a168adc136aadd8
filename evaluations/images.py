"""Sets of images to evaluate, read in batches and never whole: npz, folder, zip, store, or MNIST's idx file.

`open_images(path)` tells which. Whatever is wrong with a file (cut short, another dtype or shape, object arrays) is a
ValueError that names it, before any image is read where the header already shows it. Nothing is ever unpickled.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from memory.files import reading, sha256
from scripts.images import read_image

SUFFIXES = (".png", ".jpg", ".jpeg")
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DECODED_AHEAD = 256  # images of a folder that threads decode together


class ImageSet:
    """N images of one size, which is known from the start as their number is; each kind of file knows how to read."""

    path: Path
    count: int
    size: tuple[int, int]  # height, width

    def __len__(self) -> int:
        return self.count

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images at ascending `rows`, each uint8 (H, W, 1 or 3)."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of the content."""
        return sha256(self.path)

    def batches(self, rows: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
        """The images at ascending `rows` as uint8 (B, 3, H, W), grey repeated; the last batch may be smaller.

        A thread reads each batch while its predecessor is in use.
        """

        def batch(images: Iterator[np.ndarray], start: int) -> torch.Tensor:
            pixels = np.empty((min(batch_size, len(rows) - start), *self.size, 3), np.uint8)
            for place in pixels:
                place[:] = next(images)
            return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)

        with contextlib.closing(self.images(rows)) as images, ThreadPoolExecutor(1) as thread:
            batches = [thread.submit(batch, images, 0)]
            for start in range(batch_size, len(rows), batch_size):
                batches.append(thread.submit(batch, images, start))
                yield batches.pop(0).result()
            yield batches.pop().result()


class StreamedImages(ImageSet):
    """Images one after another in a file that is read from front to back."""

    channels: int  # 3, or 1 for grey

    def stream(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """The bytes of the images, opened at the first one."""
        raise NotImplementedError

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        shape = (*self.size, self.channels)
        length = math.prod(shape)
        with reading(self.path), self.stream() as file:
            position = 0
            for row in rows:
                file.seek((row - position) * length, os.SEEK_CUR)
                content = file.read(length)
                if len(content) != length:
                    raise EOFError(f"ends in image {row:,} of {self.count:,}")
                position = row + 1
                yield np.frombuffer(content, np.uint8).reshape(shape)


class NpzImages(StreamedImages):
    """`arr_0` of an npz: uint8 (N, H, W, 3), stored or deflated, C or Fortran order, beside any other arrays."""

    channels = 3

    def __init__(self, path: Path):
        self.path = path
        with reading(path), zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError("holds no images; expected arr_0, uint8 (N, H, W, 3)")
            with archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                if version not in HEADERS:
                    raise ValueError(f"arr_0 is in npy format {version}, expected {' or '.join(map(str, HEADERS))}")
                self.shape, self.fortran, dtype = HEADERS[version](file)
                self.offset = file.tell()
            if dtype != np.uint8:
                raise ValueError(f"arr_0 has dtype {dtype}, expected uint8 images in [0, 255]")
            if len(self.shape) != 4 or self.shape[-1] != 3 or min(self.shape) < 1:
                raise ValueError(f"arr_0 has shape {self.shape}, expected (N, H, W, 3), N > 0, grey repeated to 3")
            held, declared = archive.getinfo("arr_0.npy").file_size - self.offset, math.prod(self.shape)
            if held != declared:
                raise ValueError(f"arr_0 declares {declared:,} bytes of images and holds {held:,}; make it again")
        self.count, self.size = self.shape[0], self.shape[1:3]

    @contextlib.contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            file.read(self.offset)  # a seek would switch the checksum off
            yield file

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        if not self.fortran:
            yield from super().images(rows)
            return
        # In Fortran order an image is spread over the whole array: unpack it to disk once and map it.
        with TemporaryFile() as unpacked:
            with reading(self.path), self.stream() as file:
                while content := file.read(1 << 20):
                    unpacked.write(content)
            unpacked.flush()
            array = np.memmap(unpacked, np.uint8, "r", shape=self.shape, order="F")
            for row in rows:
                yield array[row]


class IdxImages(StreamedImages):
    """Grey images as MNIST and Fashion-MNIST publish them: `…-images-idx3-ubyte.gz`."""

    channels = 1

    def __init__(self, path: Path):
        self.path = path
        with reading(path), gzip.open(path) as file:
            magic, count, height, width = np.frombuffer(file.read(16).ljust(16, b"\0"), ">u4").tolist()
            if magic != 0x0803 or 0 in (count, height, width):
                raise ValueError(f"not an idx file of images: starts with {magic:#010x}, expected 0x00000803")
        self.count, self.size = count, (height, width)

    @contextlib.contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        with gzip.open(self.path) as file:
            file.seek(16)
            yield file


class FileImages(ImageSet):
    """PNG and JPEG files below a folder or inside a zip, in the order of their names."""

    def __init__(self, path: Path, names: Iterable[str], read: Callable[[str], BinaryIO]):
        self.path, self.read = path, read
        self.names = sorted(
            name for name in names if name.lower().endswith(SUFFIXES) and not Path(name).name.startswith(".")
        )
        if not self.names:
            raise ValueError(f"{path}: no images in it; looked for {', '.join(SUFFIXES)}")
        with ThreadPoolExecutor(8) as pool:
            self.size = self.size_of(self.names[0])
            for name, size in zip(self.names, pool.map(self.size_of, self.names), strict=True):
                self.check_size(name, size)
        self.count = len(self.names)

    def size_of(self, name: str) -> tuple[int, int]:
        with reading(self.path / name), self.read(name) as stream, Image.open(stream) as image:
            return image.height, image.width

    def check_size(self, name: str, size: tuple[int, int]) -> None:
        if size != self.size:
            sizes = f"{size} (height, width), but {self.names[0]} {self.size}"
            raise ValueError(f"{self.path}: {name} has {sizes}; crop and resize the images to one size first")

    def decode(self, name: str) -> np.ndarray:
        with reading(self.path / name), self.read(name) as stream:
            image = np.asarray(read_image(stream).convert("RGB"))
        self.check_size(name, image.shape[:2])  # a photograph may turn when it is decoded
        return image

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        names = [self.names[row] for row in rows]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(names), DECODED_AHEAD):
                yield from pool.map(self.decode, names[start : start + DECODED_AHEAD])

    def digest(self) -> str:
        if self.path.is_file():
            return sha256(self.path)
        whole = hashlib.sha256()
        for name in self.names:
            whole.update(f"{name} {sha256(self.path / name)}\n".encode(errors="surrogateescape"))
        return whole.hexdigest()


class StoreImages(ImageSet):
    """The images of a store (`data/NAME`) that was encoded with `--keep-images`."""

    def __init__(self, path: Path):
        self.path = path
        with reading(path):
            if not json.loads((path / "meta.json").read_text()).get("complete"):
                raise ValueError("this store is not complete; run the same encode_dataset command again")
            if not (path / "images.npy").is_file():
                raise ValueError("this store has no images.npy; encode it with --keep-images, or give its source")
            self.array = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
            shape = self.array.shape
            if self.array.dtype != np.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
                raise ValueError(f"images.npy is {self.array.dtype} {shape}, expected uint8 (N, 3, H, W)")
        self.count, self.size = shape[0], shape[2:]

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        for row in rows:
            yield self.array[row].transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)

    def digest(self) -> str:
        return sha256(self.path / "images.npy")


class ChosenImages(StoreImages):
    """The images of a store at any of its rows, in any order, repeated or not."""

    def __init__(self, path: Path, rows: Sequence[int]):
        super().__init__(path)
        self.rows, self.count = rows, len(rows)

    def images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        return super().images([self.rows[row] for row in rows])


def open_images(path: str | os.PathLike) -> ImageSet:
    """The images at `path`: an npz, an idx file, a zip, a store, or a folder of PNG and JPEG files.

    A folder that `sample_ddp.py` wrote (it has a samples.json) also holds a preview: there samples.npz counts, or the
    files whose name is a number.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.name.endswith(".npz"):
        return NpzImages(path)
    if path.name.endswith(".gz"):
        return IdxImages(path)
    if path.name.endswith(".zip"):
        with reading(path):
            archive = zipfile.ZipFile(path)
        return FileImages(path, archive.namelist(), archive.open)
    if not path.is_dir():
        raise ValueError(f"{path}: expected an npz, a zip, an idx .gz, a store, or a folder of PNG and JPEG files")
    if (path / "meta.json").is_file():
        return StoreImages(path)
    sampled = (path / "samples.json").is_file()
    if sampled and (path / "samples.npz").is_file():
        return NpzImages(path / "samples.npz")
    files = [file for file in path.rglob("*") if file.stem.isdigit() or not sampled]
    return FileImages(path, [str(file.relative_to(path)) for file in files], lambda name: (path / name).open("rb"))
