"""The image of a store nearest to a query, exactly: by an encoder's features or by latents, in chunks of the store.

Points are rounded to a grid on which float64 holds every squared distance without error (features of unit length to
multiples of 2⁻²⁴; latents to multiples of 2⁻¹⁶, for squared lengths up to 2¹⁹). So the answer does not depend on
chunks, device or number of processes, equal points lie at distance zero, and among equals the lowest row and view wins.

Memory does not grow with the store: the queries in float32, and a few blocks of `VALUES` float64 numbers.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from dataset import LatentDataset
from memory.kmeans import normalised, refuse, undirected
from models.autoencoder import Codec, latents_from_moments
from models.encoder import Encoder

VALUES = 2**24  # float64 numbers in a block of points or of distances: 134 MB
LATENT_GRID = 2.0**16


class Space(Protocol):
    """A way to compare images: as a store keeps them, and as points whose Euclidean distance counts."""

    name: str

    def stored(self, store: Path) -> np.ndarray:
        """The store's array (N, V, …), memory-mapped."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) as a store would keep them, (B, …)."""

    def points(self, kept: torch.Tensor) -> torch.Tensor:
        """What is kept of images (B, …) as points (B, D) float32."""


class FeatureSpace:
    """Features of an encoder at unit length, so that distances are √(2 − 2·cosine); `encoder` serves `embed` alone."""

    def __init__(self, name: str, encoder: Encoder | None = None):
        self.name, self.encoder = name, encoder

    def stored(self, store: Path) -> np.ndarray:
        return LatentDataset(store, encoder=self.name).features  # (N, V, F)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images).half()  # (B, F)

    def points(self, kept: torch.Tensor) -> torch.Tensor:
        refuse(f"features of {self.name}", undirected(kept))
        return normalised(kept)


class LatentSpace:
    """Means of a codec's latents, scaled as the network sees them; `codec` serves `embed` alone."""

    name = "latent"

    def __init__(self, meta: dict, codec: Codec | None = None):
        self.meta, self.codec = meta, codec

    def stored(self, store: Path) -> np.ndarray:
        return LatentDataset(store).latents  # (N, V, P, h, w)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.codec.encode(images[:, : self.meta["image_channels"]])  # (B, P, h, w)

    def points(self, kept: torch.Tensor) -> torch.Tensor:
        latents = latents_from_moments(kept, self.meta, None).flatten(1)  # (B, C·h·w)
        return (latents * LATENT_GRID).round() / LATENT_GRID


class Neighbours(NamedTuple):
    """The nearest stored image of each query."""

    distances: torch.Tensor  # (M,) float64, Euclidean
    rows: torch.Tensor  # (M,) long
    views: torch.Tensor  # (M,) long


def nearest(
    queries: torch.Tensor,
    stored: np.ndarray,
    space: Space,
    exclude: torch.Tensor | None = None,
    title: str | None = None,
    values: int = VALUES,
) -> Neighbours:
    """The view of a stored image nearest to each query (M, D), in all views of a store's array (N, V, …).

    `exclude` (M,) names a row that each query may not find, in none of its views; N must then be 2 or more. With a
    `title` a progress bar is shown. Runs on the queries' device; `values` bounds the memory and changes no result.
    """
    device, (count, views) = queries.device, stored.shape[:2]
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=device)
    found = torch.zeros(len(queries), dtype=torch.long, device=device)  # row · V + view
    chunk = max(1, values // (queries.shape[1] * views))
    block = max(1, values // max(queries.shape[1], chunk * views))
    with tqdm(total=count, unit="img", unit_scale=True, desc=title, disable=title is None) as bar:
        for start in range(0, count, chunk):
            kept = torch.from_numpy(np.array(stored[start : start + chunk])).to(device)  # (n, V, …)
            points = space.points(kept.flatten(0, 1)).double()  # (n·V, D)
            norms = points.square().sum(1)  # (n·V,)
            for first in range(0, len(queries), block):
                some = slice(first, first + block)
                scores = torch.addmm(norms, queries[some].double(), points.T, alpha=-2)  # (m, n·V), |p|² − 2 p·q
                if exclude is not None:
                    own = exclude[some, None] == torch.arange(start, start + len(kept), device=device)  # (m, n)
                    scores.masked_fill_(own.repeat_interleave(views, 1), torch.inf)
                least, at = scores.min(1)  # the first of equals
                found[some] = torch.where(least < best[some], at + start * views, found[some])
                best[some] = torch.minimum(best[some], least)
            bar.update(len(kept))
    for some in torch.arange(len(queries), device=device).split(block):
        best[some] += queries[some].double().square().sum(1)
    return Neighbours(best.sqrt(), found // views, found % views)
