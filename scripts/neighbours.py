"""Samples beside the images nearest to them, pixel by pixel, in a picture: a first look, which needs no store.

    python -m scripts.neighbours samples/NAME --among FOLDER --out neighbours.png

FOLDER is anything that scripts.encode_dataset reads; its images are framed or cropped to the samples' size as there.
The distance is the mean squared difference of pixels. Whether samples are copies of the images that a network was
trained on is measured by evaluations.copies, among all of those and beside held-out images; this picture only shows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from evaluations.images import open_images
from memory.command import execute
from memory.files import atomic
from scripts.images import square
from scripts.sources import open_source

COLUMNS = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Samples beside the images nearest to them.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("samples", type=Path, help="images: what sample_ddp.py wrote, or any npz, folder or zip of one size")
    add(
        "--among",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="images to search: folder, zip, tar, npz or idx files",
    )
    add("--called", default="the images searched", help="what the picture's title calls them")
    add("--count", type=int, default=64, help="samples to show, the first ones")
    add("--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count {args.count}: expected at least 1")
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: expected a name that ends in .png")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read, search, draw."""
    args = parse(argv)
    found, source = open_images(args.samples), open_source(args.among)
    if found.size[0] != found.size[1]:
        raise ValueError(f"{args.samples}: its images are {found.size}, expected squares")
    count = min(args.count, len(found))
    (samples,) = found.batches(range(count), count)  # (M, 3, H, W) uint8
    rows = range(len(source.names))
    searched = np.stack([square(source.image(row), found.size[0], 3, source.on_black) for row in rows])  # (N, 3, H, W)
    searched = torch.from_numpy(searched)
    nearest = nearest_by_pixels(samples, searched)  # (M,)
    title = f"left: sample, right: the nearest of {args.called} ({len(searched):,}, by pixels)"
    draw(samples, searched[nearest], title, args.out)
    print(f"{args.out}: {count} pairs; {title}")


def nearest_by_pixels(samples: Tensor, searched: Tensor) -> Tensor:
    """Rows (M,) of `searched` (N, 3, H, W) nearest to `samples` (M, 3, H, W), both uint8, the first among equals."""
    queries = samples.flatten(1).double()
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    rows = torch.zeros(len(queries), dtype=torch.long)
    for start in range(0, len(searched), 1024):
        some = searched[start : start + 1024].flatten(1).double()
        squares = queries.square().sum(1, keepdim=True) + some.square().sum(1) - 2 * queries @ some.T  # exact: integers
        distances, places = squares.min(1)
        nearer = distances < best
        best, rows = torch.where(nearer, distances, best), torch.where(nearer, start + places, rows)
    return rows


def draw(samples: Tensor, neighbours: Tensor, title: str, path: Path) -> None:
    """Pairs of uint8 images (M, 3, H, W) in rows of eight under a title, without resampling by a fraction."""
    zoom = max(1, 64 // samples.shape[-1])
    pairs = torch.cat([samples, neighbours], dim=3).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(pairs, nrow=COLUMNS, padding=2 * zoom, pad_value=128).permute(1, 2, 0).numpy()  # (H, W, 3)
    dpi, margin = 100, 26  # pixels: of the title
    height, width = grid.shape[:2]
    figure = Figure(figsize=(width / dpi, (height + margin) / dpi), dpi=dpi)
    figure.figimage(grid)
    figure.text(0.5, 1 - margin / 2 / (height + margin), title, ha="center", va="center", fontsize=9)
    with atomic(path) as temporary:
        figure.savefig(temporary)


if __name__ == "__main__":
    execute(main)
