"""Samples of the best network there could be: by the exact velocity of a store's training images, given a condition.

    python -m scripts.exact --store runs/miniature/data/glyphs --condition label --steps 50 --out exact/label-euler-50
    python -m evaluations.evaluator runs/miniature/data/glyphs-holdout exact/label-euler-50/samples.npz \\
        --encoder regnetx_002@64 --encoder-weights benchmarks/miniature/glyphs/metric.safetensors

Trained without end on images y_1 … y_n of a class, a network would give E[v | x_t] = (x_t − Σ w_i y_i)/t, where w is
the softmax over i of −|x_t − (1 − t)·y_i|²/(2·t²). What samples by this velocity lack is the sampler's doing, not a
network's. With `--condition none` the images are all, with `own` n is 1, and with `real` they are drawn without any
velocity: random training images of the drawn labels, which nothing should beat. Labels and noise are those of
sample_ddp.py.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import LatentDataset
from memory.command import Help, execute
from memory.files import atomic, write_json
from models.autoencoder import to_uint8
from samplers import LABEL_DRAW, noise, samplers, uniform

CONDITIONS = ("none", "label", "own", "real")
AT_ONCE = 500  # samples, each of which is compared with all images that its condition allows


def exact_velocity(images: Tensor, x: Tensor, t: float) -> Tensor:
    """E[v | x_t = x] over images (n, D) float32 in [−1, 1], for x (B, D) float64 and t in (0, 1]."""
    nearness = 2 * (1 - t) * x.float() @ images.T - (1 - t) ** 2 * images.square().sum(1)  # (B, n)
    return (x - ((nearness / (2 * t * t)).softmax(1) @ images).double()) / t


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--store", required=True, help="store of pixels with labels, its training part")
    add("--condition", default="label", choices=CONDITIONS, help="what the velocity is told")
    add("--sampler", default="euler", choices=("euler", "heun"), help="which solves the ODE")
    add("--steps", type=int, default=50, help="of the sampler")
    add("--num-images", type=int, default=10_000, help="samples")
    add("--seed", type=int, default=0, help="of labels and noise")
    add("--out", type=Path, required=True, help="folder of samples.npz")
    return parser.parse_args(argv)


def allowed(args: argparse.Namespace, labels: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of samples (B,), with the rows that their condition allows, (n,) for all of them or (B,) one for each."""
    indices = torch.arange(args.num_images)
    if args.condition == "none":
        yield from ((part, torch.arange(len(labels))) for part in indices.split(AT_ONCE))
        return
    drawn = (uniform(args.seed, indices, LABEL_DRAW) * (labels.max() + 1)).long()
    for label in drawn.unique():
        rows = torch.from_numpy(np.flatnonzero(labels == label.item()))
        for part in indices[drawn == label].split(AT_ONCE):
            if args.condition != "label":  # one of the class, by a draw of its own
                yield part, rows[(uniform(args.seed, part, LABEL_DRAW + 1) * len(rows)).long()]
            else:
                yield part, rows


def sampled(args: argparse.Namespace, indices: Tensor, pixels: Tensor) -> Tensor:
    """Samples (B, C, H, W) uint8 by the exact velocity of some images (n, C, H, W), or of one image each."""
    images = pixels.flatten(1).float() / 127.5 - 1  # (n, D)
    z = noise(args.seed, indices, 0, pixels.shape[1:]).flatten(1)  # (B, D)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - images) / t[:, None] if args.condition == "own" else exact_velocity(images, x, float(t[0]))

    return to_uint8(samplers[args.sampler](velocity, z, args.steps).unflatten(1, pixels.shape[1:]))


def main(argv: list[str] | None = None) -> None:
    """Draw the samples and write them."""
    args = parse(argv)
    store = LatentDataset(args.store)
    if store.meta["codec"]["name"] != "pixels" or not store.meta.get("num_classes"):
        raise ValueError(f"--store {args.store}: expected pixels with labels, as `--codec pixels` encodes them")
    pixels = torch.from_numpy(np.array(store.latents[:, 0]))  # (N, C, H, W) uint8
    samples = pixels.new_empty(args.num_images, *pixels.shape[1:])
    with tqdm(total=args.num_images, unit=" images") as bar:
        for indices, rows in allowed(args, np.array(store.labels)):
            if args.condition == "real":
                samples[indices] = pixels[rows]
            else:
                samples[indices] = sampled(args, indices, pixels[rows])
            bar.update(len(indices))
    with atomic(args.out / "samples.npz") as temporary, open(temporary, "wb") as stream:
        np.savez(stream, arr_0=samples.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    settings = {"labels": "random", "seed": args.seed} if args.condition != "none" else {"seed": args.seed}
    if args.condition != "real":
        settings |= {"sampler": args.sampler, "steps": args.steps}
    write_json(args.out / "samples.json", {"num_images": args.num_images, "complete": True, "settings": settings})
    print(f"{args.num_images} images in {args.out / 'samples.npz'}")


if __name__ == "__main__":
    execute(main)
