"""Features without an encoder, beside those of one, to find out what in a snippet helps.

    python -m scripts.derive_features random --store data/NAME --encoder efficientnet-lite0
    python -m scripts.derive_features class-mean --store data/NAME --encoder efficientnet-lite0

random      a fixed random direction for each image: who it is, and nothing of what it looks like
class-mean  the mean feature of its class's training images: a label in the form of a snippet

Both become features of the store, and of STORE-holdout where there is one, under these names: banks are built from them
and networks trained on them as on any encoder's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataset import META, LatentDataset, holdout_path, layout
from memory.claim import claimed
from memory.command import execute
from memory.files import atomic, write_json


def random(training: LatentDataset, part: LatentDataset, seed: int) -> np.ndarray:
    """Random directions (N, F), others in the held-out part than in training."""
    held_out = part.path != training.path
    return np.random.default_rng([seed, held_out]).standard_normal((len(part), part.features.shape[2]), np.float32)


def class_mean(training: LatentDataset, part: LatentDataset, seed: int) -> np.ndarray:
    """(N, F): the mean over the training images of the same label, each of unit length; nothing is drawn."""
    features = np.array(training.features[:, 0], np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels, counts = np.unique(training.labels, return_counts=True)
    if not np.isin(part.labels, labels).all() or labels[0] < 0:
        raise ValueError(f"{part.path}: images whose label no training image has; class-mean needs labels of all")
    sums = np.zeros((len(labels), features.shape[1]), np.float64)
    np.add.at(sums, np.searchsorted(labels, training.labels), features)
    return (sums / counts[:, None])[np.searchsorted(labels, part.labels)]


rules: dict[str, Callable[[LatentDataset, LatentDataset, int], np.ndarray]] = {
    "random": random,
    "class-mean": class_mean,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rule", choices=rules, help="what the features are")
    add("--store", type=Path, required=True, help="store of the training images; STORE-holdout lies beside it")
    add("--encoder", required=True, help="whose features of the store give the dimension, and the means")
    add("--seed", type=int, default=0, help="of the random directions (default 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Derive the features of both parts, write them, then name them in meta.json."""
    args = parse(argv)
    training, beside = LatentDataset(args.store, args.encoder), holdout_path(args.store)
    parts = [training, *([LatentDataset(beside, args.encoder)] if beside.is_dir() else [])]
    dim = training.features.shape[2]
    made = {"name": args.rule, "dim": dim, "derived_from": training.meta["encoders"][args.encoder], "seed": args.seed}
    for part in parts:
        if part.meta["encoders"].get(args.rule, made) != made:
            raise ValueError(
                f"{part.path} has other features {args.rule!r} already: {part.meta['encoders'][args.rule]}"
            )
        features = rules[args.rule](training, part, args.seed)  # (N, F)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        meta = part.meta | {"encoders": part.meta["encoders"] | {args.rule: made}}
        file = f"features/{args.rule}.npy"
        shape, dtype = layout(meta)[file]  # (N, V, F): the same in every view
        with claimed("--store", part.path):
            with atomic(part.path / file) as temporary:
                np.save(temporary, np.broadcast_to(features[:, None], shape).astype(dtype))
            write_json(part.path / META, meta)
        print(f"wrote {part.path / file}")


if __name__ == "__main__":
    execute(main)
