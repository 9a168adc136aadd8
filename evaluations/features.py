"""A set of images becomes what the metrics need: moments of all its features, some features, class probabilities.

Images are shared among the processes in contiguous slices and the parts put together in order on every process, so
that one process and many give the same numbers up to the order of float64 sums.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm import tqdm

from evaluations.images import ImageSet
from evaluations.inception import Features
from evaluations.metrics import Statistics
from models.encoder import load_encoder


class Network(Protocol):
    """What turns images (B, 3, H, W) into features: `Inception`, or any encoder."""

    name: str

    def identity(self) -> dict: ...
    def __call__(self, images: torch.Tensor) -> Features: ...


class EncoderNetwork:
    """An encoder of `models.encoder` in Inception's place."""

    def __init__(self, name: str, weights: str | None, device: torch.device):
        self.encoder = load_encoder(name, weights, device)
        self.name = name_in_papers(self.encoder.meta())
        self.identity = self.encoder.meta

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> Features:
        return Features(self.encoder(images))


def name_in_papers(encoder: dict) -> str:
    """What papers call features of an encoder (its `meta`): DINOv2 is ViT-L/14 at 224 px, as in FD-DINOv2 of Stein et
    al. (2023); what differs is named (DINOv2-B, DINOv2-reg4, DINOv2@448). Any other encoder keeps its name."""
    found = re.fullmatch(r"vit_(small|base|large|giant)_patch14_(reg4_)?dinov2\b.*", encoder["model"])
    if found is None:
        return encoder["name"]
    size, registers = found.groups()
    side = encoder["input_size"]
    name = "DINOv2" + ("" if size == "large" else f"-{size[0].upper()}") + ("-reg4" if registers else "")
    return name if side == 224 else f"{name}@{side}"


@dataclass
class Summary:
    """What the metrics need of a set of images, on the network's device."""

    moments: dict[str, torch.Tensor]  # mu (F,), sigma (F, F) and, of Inception, mu_s (2023,), sigma_s (2023, 2023)
    features: torch.Tensor | None  # (M, F) of the kept images
    probs: torch.Tensor | None = None  # (M, 1008) of the kept images, Inception only


def summarize(
    images: ImageSet,
    count: int,
    kept: Sequence[int],
    network: Network,
    batch_size: int,
    state: PartialState,
    title: str,
) -> Summary:
    """Run the first `count` images through the network; keep features and probabilities of the ascending rows `kept`.

    `batch_size` is each process's. ValueError if there are fewer images than processes.
    """
    parts = shares(count, images.path, state)
    keep = torch.zeros(count, dtype=torch.bool)
    keep[list(kept)] = True
    mine = parts[state.process_index]
    pool, spatial, features, probs = None, None, [], []
    batches = images.batches(mine, batch_size)
    with tqdm(total=len(mine), unit="img", desc=title, disable=not state.is_main_process) as progress:
        for batch, rows in zip(batches, keep[mine.start : mine.stop].split(batch_size), strict=True):
            output = network(batch.to(state.device))
            rows = rows.to(state.device)
            pool = pool or Statistics(output.pool.shape[1], state.device)
            pool.update(output.pool)
            features.append(output.pool[rows])
            if output.spatial is not None:
                spatial = spatial or Statistics(output.spatial.shape[1], state.device)
                spatial.update(output.spatial)
                probs.append(output.probs[rows])
            progress.update(len(batch))

    counts = [int(keep[part.start : part.stop].sum()) for part in parts]
    pool = merged(pool, state)
    moments = {"mu": pool.mean, "sigma": pool.covariance()}
    features = gathered(torch.cat(features), counts, state)
    if spatial is None:
        return Summary(moments, features)
    spatial = merged(spatial, state)
    moments |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance()}
    return Summary(moments, features, gathered(torch.cat(probs), counts, state))


def shares(count: int, path: Path, state: PartialState) -> list[range]:
    """Contiguous parts of `count` images, one a process; ValueError, naming their path, if one would be empty."""
    world = state.num_processes
    if count < world:
        raise ValueError(f"{path}: {count} images for {world} processes; start fewer")
    return [range(count * rank // world, count * (rank + 1) // world) for rank in range(world)]


def merged(part: Statistics, state: PartialState) -> Statistics:
    """The statistics of all processes' images, on every process."""
    dim = len(part.mean)
    total = Statistics(dim, state.device)
    packed = torch.cat([part.mean.new_tensor([part.count]), part.mean, part.scatter.flatten()])
    for row in gather(packed[None]):  # (world, 1 + F + F²)
        total.combine(int(row[0]), row[1 : 1 + dim], row[1 + dim :].view(dim, dim))
    return total


def gathered(part: torch.Tensor, counts: list[int], state: PartialState) -> torch.Tensor:
    """The rows of all processes in order, on every process; process i has `counts[i]` of them."""
    padded = part.new_zeros(max(counts), part.shape[1])
    padded[: len(part)] = part
    parts = gather(padded).view(state.num_processes, max(counts), -1)
    return torch.cat([rows[:count] for rows, count in zip(parts, counts, strict=True)])
