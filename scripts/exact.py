"""Samples of the best network there could be: by the exact velocity of a store's training images, given a condition.

    python -m scripts.exact --store runs/miniature/data/glyphs --condition label --steps 50 --out exact/label-euler-50
    python -m evaluations.evaluator runs/miniature/data/glyphs-holdout exact/label-euler-50/samples.npz \\
        --encoder regnetx_002@64 --encoder-weights benchmarks/miniature/glyphs/metric.safetensors

Trained without end on images y_1 … y_n of a class, a network would give E[v | x_t] = (x_t − Σ w_i y_i)/t, where w is
the softmax over i of −|x_t − (1 − t)·y_i|²/(2·t²). What samples by this velocity lack is the sampler's doing, not a
network's. With `--condition own` n is 1, and with `--condition real` the images are drawn without any velocity: random
training images of the drawn labels, which nothing should beat. Labels and noise are those of sample_ddp.py.
"""

import argparse
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

AT_ONCE = 250  # images, because each is compared with its whole class


def exact_velocity(images: Tensor, known: Tensor, x: Tensor, t: float) -> Tensor:
    """E[v | x_t = x] over some images of each sample.

    Args:
        images: (B, n, D) float32 in [−1, 1].
        known: (B, n), which of them there are; classes differ in size.
        x: (B, D) float64.
        t: in (0, 1].
    """
    nearness = 2 * (1 - t) * (images @ x.float()[..., None])[..., 0] - (1 - t) ** 2 * images.square().sum(-1)  # (B, n)
    weights = (nearness / (2 * t * t)).masked_fill(~known, -torch.inf).softmax(1)
    return (x - (weights[:, None] @ images)[:, 0].double()) / t


def classes_of(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of each class (C, n), filled up with the first, and which of them there are (C, n)."""
    rows = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    most = max(map(len, rows))
    filled = [np.pad(some, (0, most - len(some)), mode="edge") for some in rows]
    known = [np.arange(most) < len(some) for some in rows]
    return torch.from_numpy(np.stack(filled)), torch.from_numpy(np.stack(known))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--store", required=True, help="store of pixels with labels, its training part")
    add("--condition", default="label", choices=("label", "own", "real"), help="what the velocity is told")
    add("--sampler", default="euler", choices=("euler", "heun"), help="which solves the ODE")
    add("--steps", type=int, default=50, help="of the sampler")
    add("--num-images", type=int, default=10_000, help="samples")
    add("--seed", type=int, default=0, help="of labels and noise")
    add("--out", type=Path, required=True, help="folder of samples.npz")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the samples and write them."""
    args = parse(argv)
    store = LatentDataset(args.store)
    if store.meta["codec"]["name"] != "pixels" or not store.meta.get("num_classes"):
        raise ValueError(f"--store {args.store}: expected pixels with labels, as `--codec pixels` encodes them")
    rows, known = classes_of(np.array(store.labels))
    pixels = torch.from_numpy(np.array(store.latents[:, 0]))  # (N, C, H, W) uint8
    images, shape = [], pixels.shape[1:]
    for indices in tqdm(torch.arange(args.num_images).split(AT_ONCE)):
        labels = (uniform(args.seed, indices, LABEL_DRAW) * len(rows)).long()
        some, there = rows[labels], known[labels]
        if args.condition != "label":  # one of the class, by a draw of its own
            one = (uniform(args.seed, indices, LABEL_DRAW + 1) * there.sum(1)).long()[:, None]
            some, there = some.gather(1, one), there.new_ones(len(some), 1)
        if args.condition == "real":
            images.append(pixels[some[:, 0]])
            continue
        targets = pixels[some].flatten(2).float() / 127.5 - 1  # (B, n, D)
        z = noise(args.seed, indices, 0, shape).flatten(1)

        def velocity(x: Tensor, t: Tensor, targets: Tensor = targets, there: Tensor = there) -> Tensor:
            return exact_velocity(targets, there, x, float(t[0]))

        images.append(to_uint8(samplers[args.sampler](velocity, z, args.steps).unflatten(1, shape)))
    with atomic(args.out / "samples.npz") as temporary, open(temporary, "wb") as stream:
        np.savez(stream, arr_0=torch.cat(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    settings = {"labels": "random", "seed": args.seed}
    if args.condition != "real":
        settings |= {"sampler": args.sampler, "steps": args.steps}
    write_json(args.out / "samples.json", {"num_images": args.num_images, "complete": True, "settings": settings})
    print(f"{args.num_images} images in {args.out / 'samples.npz'}")


if __name__ == "__main__":
    execute(main)
