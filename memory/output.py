"""The folder of generated images: PNGs, an npz, a preview, and samples.json that says what determined them."""

import json
import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from memory.files import atomic, free_space, read_json, write_json

PREVIEW = 64  # images in the preview grid
CHUNK = 1 << 24  # bytes copied at once
THREADS = min(8, os.cpu_count() or 1)  # compress PNGs


class Output:
    """The folder of the images; what is finished is on disk before it is marked so: a killed run loses two batches.

    An unfinished run also has `.pixels` (N, H, W, 3), the npz in the making, and `.done` (N,), a byte an image. Each
    process writes its bytes of both, without memory maps, whose pages would clash on network file systems.
    """

    def __init__(self, folder: str, num_images: int, formats: str, settings: dict):
        self.folder, self.num_images = Path(folder), num_images
        self.facts = {"num_images": num_images, "complete": False, "settings": settings}
        self.image_shape = settings["image_shape"]
        self.image_bytes = int(np.prod(self.image_shape))
        self.png, self.npz = formats != "npz", formats != "png"
        self.pixels, self.done = self.folder / ".pixels", self.folder / ".done"
        self.json, self.archive = self.folder / "samples.json", self.folder / "samples.npz"
        self.threads = ThreadPoolExecutor(1 + THREADS)  # one writes the batch, the others compress PNGs for it
        self.writing: Future | None = None

    def prepare(self) -> np.ndarray | None:
        """Check the folder, which this process has claimed, and make it ready for the images that are left.

        Returns:
            Their numbers (n,), or None if the run is complete.

        Raises:
            ValueError: it holds other images, or more of them, or the disk is too small.
        """
        old = read_json(self.json, num_images=int, complete=bool, settings=dict) if self.json.exists() else None
        if old:
            self._check_same(old)
        elif self.archive.exists() or any(self.folder.glob("*.png")):
            raise ValueError(
                f"--out {self.folder} holds images but no samples.json to say which; choose another folder"
            )
        if added := self.num_images - (old["num_images"] if old else 0):
            self._check_disk(added)  # before a mark for each image is allocated
        done = np.zeros(self.num_images, np.uint8)
        if old:
            marks = self._kept(old)
            done[: len(marks)] = marks[: self.num_images]
        left = np.flatnonzero(done == 0)
        if old and old["complete"] and not len(left):
            self._tidy()
            return None
        self._check_disk(len(left))
        if self.npz:
            with open(self.pixels, "ab"):
                os.truncate(self.pixels, self.num_images * self.image_bytes)
        if self.npz and old and old["complete"] and self.archive.exists():
            # A finished run goes on to more images: its own come back out of the npz.
            with zipfile.ZipFile(self.archive).open("arr_0.npy") as rows, open(self.pixels, "r+b") as to:
                np.lib.format.read_magic(rows)
                np.lib.format.read_array_header_1_0(rows)
                shutil.copyfileobj(rows, to, CHUNK)
        with atomic(self.done) as temporary:
            done.tofile(temporary)
        write_json(self.json, self.facts)
        return left

    def _kept(self, old: dict) -> np.ndarray:
        """Which images of an earlier run are still there, (M,) uint8: files may have been removed since."""
        needed = [] if old["complete"] else [self.done]
        if self.npz:
            needed.append(self.archive if old["complete"] else self.pixels)
        if not all(file.exists() for file in needed):
            return np.zeros(0, np.uint8)
        marks = np.ones(old["num_images"], np.uint8) if old["complete"] else np.fromfile(self.done, np.uint8)
        there = (not self.png or self._png(image).exists() for image in range(len(marks)))
        return marks * np.fromiter(there, np.uint8, len(marks))

    def _check_same(self, old: dict) -> None:
        now = json.loads(json.dumps(self.facts["settings"]))
        there = {key: old["settings"].get(key) for key in now}
        lines = [f"{key}: there {there[key]}, here {now[key]}" for key in now if there[key] != now[key]]
        if lines:
            raise ValueError(
                f"--out {self.folder} holds images made otherwise; choose another folder\n  " + "\n  ".join(lines)
            )
        if not 0 <= old["num_images"] <= self.num_images:
            raise ValueError(
                f"--num-images {self.num_images}: --out {self.folder} is a run of {old['num_images']}; ask for no fewer"
            )

    def _check_disk(self, left: int) -> None:
        needed = self.image_bytes * ((self.num_images + left) * self.npz + left * self.png)
        free = free_space(self.folder)
        if free < needed:
            sizes = f"up to {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free"
            raise ValueError(f"--out {self.folder}: {sizes}; choose another disk, --format png, or fewer --num-images")

    def write(self, images: np.ndarray, pixels: np.ndarray) -> None:
        """Write pixels (B, H, W, 3) of the images with numbers (B,) while the next batch is being made."""
        self.wait()
        self.writing = self.threads.submit(self._write, images, pixels)

    def wait(self) -> None:
        """Return when everything given to `write` is on disk; raises what went wrong with it."""
        if self.writing:
            self.writing.result()

    def _write(self, images: np.ndarray, pixels: np.ndarray) -> None:
        """Write a batch, and only then the marks that say so; runs in a thread."""
        if self.png:
            list(self.threads.map(self._write_png, images, pixels))
        if self.npz:
            self._write_at(self.pixels, images, pixels)
        self._write_at(self.done, images, np.ones(len(images), np.uint8))

    def _png(self, image: int) -> Path:
        return self.folder / f"{image:06d}.png"

    def _write_png(self, image: int, pixels: np.ndarray) -> None:
        with atomic(self._png(image)) as temporary:
            Image.fromarray(pixels).save(temporary)

    def _write_at(self, path: Path, images: np.ndarray, rows: np.ndarray) -> None:
        """Write each row at the place of its image, and flush them to disk."""
        with open(path, "r+b", buffering=0) as file:
            for image, row in zip(images.tolist(), rows, strict=True):
                if os.pwrite(file.fileno(), row.tobytes(), image * row.nbytes) != row.nbytes:
                    raise OSError(f"{path}: the disk is full; free some space and run the same command again")
            os.fsync(file.fileno())

    def count(self) -> int:
        """Number of images that all processes have finished."""
        return int(np.fromfile(self.done, np.uint8).sum())

    def pack(self) -> None:
        """Make the npz and the preview, in one process."""
        if self.npz:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *self.image_shape)}
            with atomic(self.archive) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                member = zipfile.ZipInfo("arr_0.npy")  # of a fixed date: the same images give the same file
                with archive.open(member, "w", force_zip64=True) as to, open(self.pixels, "rb") as rows:
                    np.lib.format.write_array_header_1_0(to, header)
                    shutil.copyfileobj(rows, to, CHUNK)
        shown = range(min(PREVIEW, self.num_images))
        if self.png:
            images = np.stack([np.asarray(Image.open(self._png(image))) for image in shown])
        else:
            images = np.fromfile(self.pixels, np.uint8, len(shown) * self.image_bytes).reshape(-1, *self.image_shape)
        grid = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=8)  # (3, H', W')
        with atomic(self.folder / "preview.png") as temporary:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary)

    def finish(self, run: dict) -> None:
        """Mark the packed folder as complete, in one process; `run` says where and how fast the images were made."""
        write_json(self.json, self.facts | {"complete": True, "run": run})
        self._tidy()

    def _tidy(self) -> None:
        for file in (self.pixels, self.done):
            file.unlink(missing_ok=True)
