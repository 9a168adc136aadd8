"""A store held whole on the training device, for `--resident`: a step reads nothing and copies only row numbers."""

import numpy as np
import torch
from torch import Tensor

from dataset import LatentDataset

CHUNK = 2**28  # bytes brought to the device at once
SPARE = 0.5  # share of the device's free memory that a store may take; weights and activations need the rest


class ResidentDataset:
    """The arrays of a `LatentDataset` on a device, fetched by the same addresses with the same bits.

    Raises:
        ValueError: what is asked for of the store is more than fits.
    """

    def __init__(self, store: LatentDataset, device: torch.device):
        self.device, self.num_views, self.length = device, store.num_views, len(store)
        arrays = {
            "moments": store.latents,
            "feature": store.features,
            "index": store.assignment,
            "patches": store.patches,
            "image": store.images,
        }
        arrays = {key: array for key, array in arrays.items() if array is not None}
        self._check_memory(store, sum(array.nbytes for array in arrays.values()))
        arrays = {key: self._load(array) for key, array in arrays.items()}
        self.images = arrays.pop("image", None)  # (N, c, H, W): kept once, mirrored when fetched
        self.mirrored = torch.tensor([view == "mirrored" for view in store.meta["views"]], device=device)  # (V,)
        self.arrays = {key: array.flatten(0, 1) for key, array in arrays.items()}  # (N·V, ...) each
        self.labels = torch.from_numpy(np.array(store.labels)).to(device)  # (N,)

    def _check_memory(self, store: LatentDataset, needed: int) -> None:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if needed > SPARE * free:
                raise ValueError(
                    f"--resident: the store {store.path} takes {needed / 1e9:.1f} GB and the GPU has {free / 1e9:.1f} "
                    f"GB free, of which {SPARE:.0%} may be used; leave --resident out"
                )

    def _load(self, array: np.ndarray) -> Tensor:
        """An array on disk to the device, read once from front to back through one buffer of CHUNK bytes."""
        rows = min(len(array), max(1, CHUNK // array[0].nbytes))
        buffer = torch.from_numpy(np.empty((rows, *array.shape[1:]), array.dtype))
        if self.device.type == "cuda":
            buffer = buffer.pin_memory()
        whole = torch.empty(array.shape, dtype=buffer.dtype, device=self.device)
        for start in range(0, len(array), rows):
            part = buffer[: len(array) - start]
            np.copyto(part.numpy(), array[start : start + rows])
            whole[start : start + rows] = part
        return whole

    def __len__(self) -> int:
        return self.length

    def fetch(self, rows: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """Samples `rows` (B,) seen in `views` (B,), as `LatentDataset.fetch` gives them, on the device."""
        rows, places = self._indices(rows), self._indices(rows * self.num_views + views)  # (B,)
        batch = {key: array[places] for key, array in self.arrays.items()}
        if "index" in batch:
            batch["index"] = batch["index"].long()
        if self.images is not None:
            images, mirrored = self.images[rows], self.mirrored[places % self.num_views]
            batch["image"] = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"label": self.labels[rows], **batch}

    def __getitem__(self, address: tuple[int, np.ndarray, np.ndarray]) -> dict[str, int | Tensor]:
        """The batch at an address of `StepSampler`, with its step."""
        step, rows, views = address
        return {"step": step, **self.fetch(rows, views)}

    def _indices(self, numbers: np.ndarray) -> Tensor:
        numbers = torch.from_numpy(numbers)
        pinned = numbers.pin_memory() if self.device.type == "cuda" else numbers
        return pinned.to(self.device, non_blocking=True)
