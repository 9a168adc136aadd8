"""Which groups of training images do samples draw too seldom or too often?

    python -m scripts.shares samples/NAME --store data/NAME --encoder NAME --encoder-weights FILE --out shares.json

A sample counts for the group of the training image nearest to it, by the features of an encoder that the store holds,
or, without `--encoder`, by latents. Groups are the files' names where classes share them (the fonts of glyphs), or else
the classes; `--by class` is for files that are numbered alike in every class. If the samples were drawn by labels and
the groups are no classes, only images of a sample's own class count, and what is expected of a group is its mean share
of the drawn classes; otherwise, its share of all.

The nearest image misses the group at times, and more often for some groups. Two controls say how often, images of known
groups that are searched for like samples: random training images, each of which may not find itself, and held-out ones.
A sample that repeats a training image finds it, so that good samples lie below the controls. `chance` is the total
variation distance of as many training images, drawn without any error of theirs or ours.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import NAMES, LatentDataset
from evaluations.card import table
from evaluations.controls import spread
from evaluations.copies import feature_space, open_holdout
from evaluations.samples import Samples
from evaluations.search import LatentSpace, Space, nearest
from memory.bank import read_snippets
from memory.command import Help, execute
from memory.files import sha256, write_json
from memory.provenance import provenance
from models.autoencoder import load_codec
from models.kernels import fitting
from sample_ddp import label_rules

NAME, CLASS = "name", "class"  # of a file; what a group is
SAMPLES, TRAINING, HELD_OUT = "samples", "random training images", "held-out images"


class Grouping(NamedTuple):
    """The training images' groups, and the classes within which neighbours are searched for."""

    names: list[str]  # of the groups, G
    groups: np.ndarray  # (N,)
    classes: np.ndarray  # (N,); all 0 where the search is among all images
    by: str  # what a group is

    def sizes(self, most: int) -> np.ndarray:
        """Images of each class below `most`."""
        return np.bincount(self.classes, minlength=most)

    def expected(self, classes: np.ndarray) -> np.ndarray:
        """Mean share (G,) of each group in the classes (M,), each of which has images."""
        sizes = self.sizes(0)
        drawn = np.bincount(classes, minlength=len(sizes)) / sizes.clip(1)  # how often each image of a class
        return np.bincount(self.groups, drawn[self.classes], minlength=len(self.names)) / len(classes)


class Shares(NamedTuple):
    """How a set of images is shared among the groups."""

    found: np.ndarray  # (G,)
    expected: np.ndarray  # (G,)
    count: int  # images

    def errors(self) -> np.ndarray:
        """Binomial standard errors (G,) of the found shares, were they the expected ones."""
        return np.sqrt(self.expected * (1 - self.expected) / self.count)

    def total_variation(self) -> float:
        """Half the sum of the differences: the share of images that would have to change their group."""
        return np.abs(self.found - self.expected).sum() / 2

    def chance(self) -> float:
        """What `total_variation` is in the mean for independent draws, each share being nearly normal."""
        return self.errors().sum() / math.sqrt(2 * math.pi)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts.shares", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("samples", type=Path, help="images: folder of sample_ddp.py, npz with arr_0, or folder")
    add("--store", type=Path, required=True, help="store of the training images; STORE-holdout lies beside it")
    add("--encoder", metavar="NAME", help="compare by these features of the store")
    add("--encoder-weights", metavar="FILE", help="local weights of --encoder")
    add("--by", choices=(NAME, CLASS), help="what a group is (default: the file's name if classes share them)")
    add("--labels", metavar="FILE", help="the file of labels, if the samples were drawn by one")
    add("--num-samples", metavar="N", type=int, help="use the first N of the samples (default: all)")
    add("--batch-size", metavar="B", type=int, default=256, help="images at once through the encoder")
    add("--out", metavar="FILE", type=Path, required=True, help="JSON of the results")
    args = parser.parse_args(argv)
    if args.encoder_weights and not args.encoder:
        parser.error("--encoder-weights needs --encoder")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1")
    return args


def drawn_labels(samples: Samples, file: str | None, num_classes: int | None) -> np.ndarray | None:
    """The label (M,) that each sample was drawn by, as its samples.json says; None without labels.

    Raises:
        ValueError: they came from a file that is not given, or it is another one, or of other classes than the store's.
    """
    rule, images = samples.settings.get("labels"), torch.arange(samples.count)
    if rule is None:
        return None
    if not num_classes:
        raise ValueError(f"{samples.path} was drawn by labels and the store has none: name the store it was trained on")
    if rule in label_rules:
        return label_rules[rule](samples.settings["seed"], images, num_classes).numpy()
    if file is None or sha256(file) != rule:
        raise ValueError(f"--labels {file}: {samples.path} was drawn by the file whose SHA-256 is {rule}; name it")
    labels = read_snippets(file, "--labels")
    labels = labels[images % len(labels)].numpy()
    if labels.max() >= num_classes:
        raise ValueError(f"--labels {file}: class {labels.max()}, and the store has {num_classes}: name its own store")
    return labels


def grouped(store: LatentDataset, within_classes: bool, by: str | None) -> Grouping:
    """The groups of a store's images, by what is asked for or can be; ValueError if it has not that."""
    stems = [Path(name).stem for name in (store.path / NAMES).read_text().splitlines()]
    names, groups = np.unique(stems, return_inverse=True)
    if by == NAME or (by is None and len(names) <= len(stems) // 2):
        classes = np.array(store.labels) if within_classes else np.zeros(len(stems), np.int64)
        return Grouping(names.tolist(), groups, classes, NAME)
    if not store.meta.get("num_classes"):
        lacking = "no labels: leave out --by class" if by else "neither file names that repeat nor labels: no groups"
        raise ValueError(f"--store {store.path}: its images have {lacking}")
    labels, groups = np.unique(store.labels, return_inverse=True)
    titles = store.meta["class_names"] or [str(label) for label in range(store.meta["num_classes"])]
    return Grouping([titles[label] for label in labels], groups, np.zeros(len(stems), np.int64), CLASS)


def nearest_rows(
    points: Tensor,
    classes: np.ndarray,
    stored: np.ndarray,
    among: np.ndarray,
    space: Space,
    exclude: np.ndarray | None,
    title: str,
) -> np.ndarray:
    """The row (M,) of a store's array (N, V, …) nearest to each point (M, D), among images of its class.

    Args:
        classes: of the points (M,).
        among: classes of the stored images (N,).
        exclude: the row (M,) that each point may not find.
    """
    found, different = np.empty(len(points), np.int64), np.unique(classes)
    for one in tqdm(different, desc=title, unit=" classes", disable=len(different) == 1):
        mine, rows = np.flatnonzero(classes == one), np.flatnonzero(among == one)
        images = stored if len(rows) == len(stored) else stored[rows]  # a copy of all may not fit into memory
        own = None if exclude is None else torch.from_numpy(np.searchsorted(rows, exclude[mine])).to(points.device)
        bar = title if len(different) == 1 else None
        found[mine] = rows[nearest(points[mine], images, space, own, bar).rows.cpu().numpy()]
    return found


def embedded(samples: Samples, space: Space, batch_size: int, device: torch.device) -> Tensor:
    """Samples as points (M, D)."""
    batches = samples.images.batches(range(samples.count), batch_size)
    return torch.cat([space.points(space.embed(batch.to(device))) for batch in batches])


def choose(classes: np.ndarray, sizes: np.ndarray, least: int, number: int) -> np.ndarray:
    """At most `number` random rows whose class (N,) has at least `least` training images, ascending."""
    rows = np.flatnonzero(sizes[classes] >= least)
    return rows[spread(len(rows), number)]


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    """Search, count, print, write."""
    args, device = parse(argv), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store, holdout = LatentDataset(args.store, args.encoder), open_holdout(args.store, args.encoder)
    samples, side = Samples(args.samples, args.num_samples), store.meta["image_size"]
    if samples.images.size != (side, side):
        sizes = f"its images are {samples.images.size}, those of {args.store} {(side, side)}"
        raise ValueError(f"{samples.path}: {sizes}; name the store that their network was trained on")
    labels = drawn_labels(samples, args.labels, store.meta.get("num_classes"))
    training = grouped(store, labels is not None, args.by)
    within = labels is not None and training.by == NAME
    sizes = training.sizes(store.meta["num_classes"] if within else 1)
    unseen = np.array(holdout.labels) if within else np.zeros(len(holdout), np.int64)
    drawn = labels if within else np.zeros(samples.count, np.int64)
    if not sizes[drawn].all():
        raise ValueError(f"--store {args.store}: no image of class {drawn[sizes[drawn] == 0][0]}, which was drawn")
    space: Space
    if args.encoder:
        space = feature_space(args, store, device)
    else:
        codec = load_codec(store.codec["name"], device, channels=store.codec["image_channels"])
        space = LatentSpace(store.codec, codec)

    stored = space.stored(store.path)
    known = choose(training.classes, sizes, 2, samples.count)
    new = choose(unseen, sizes, 1, samples.count)
    kept = {TRAINING: stored[known, 0], HELD_OUT: space.stored(holdout.path)[new, 0]}  # original view, as samples are
    points = {SAMPLES: embedded(samples, space, args.batch_size, device)}
    points |= {name: space.points(torch.from_numpy(array).to(device)) for name, array in kept.items()}
    classes = {SAMPLES: drawn, TRAINING: training.classes[known], HELD_OUT: unseen[new]}
    shares = {}
    for name, own in ((SAMPLES, None), (TRAINING, known), (HELD_OUT, None)):
        rows = nearest_rows(points[name], classes[name], stored, training.classes, space, own, name)
        found = np.bincount(training.groups[rows], minlength=len(training.names)) / len(rows)
        shares[name] = Shares(found, training.expected(classes[name]), len(rows))
    report(shares, training, within, space.name, samples, store, args)


def report(
    shares: dict[str, Shares],
    training: Grouping,
    within: bool,
    space: str,
    samples: Samples,
    store: LatentDataset,
    args: argparse.Namespace,
) -> None:
    """Print the table, the group that is drawn least of its expected share first, and write the same as JSON."""
    ours, groups = shares[SAMPLES], {}
    there = np.flatnonzero(ours.expected)  # a few samples need not meet all groups
    for i in sorted(there, key=lambda i: ours.found[i] / ours.expected[i]):
        groups[training.names[i]] = {
            "expected": ours.expected[i],
            SAMPLES: ours.found[i],
            "standard_error": ours.errors()[i],
            "ratio": ours.found[i] / ours.expected[i],
            **{name: shares[name].found[i] for name in (TRAINING, HELD_OUT)},
        }
    print(f"{ours.count:,} samples of {samples.path} by the nearest image {'of their class ' * within}in {space}\n")
    lines = []
    for name, row in groups.items():
        cells = {key: f"{value:.3f}" if key == "ratio" else f"{value:.2%}" for key, value in row.items()}
        lines.append({training.by: name} | cells)
    print(table(lines))
    variation = {name: {"distance": of.total_variation(), "chance": of.chance()} for name, of in shares.items()}
    print("\ntotal variation distance to the expected shares:")
    for name, of in shares.items():
        print(f"  {name} ({of.count:,}): {of.total_variation():.4f}, by chance {of.chance():.4f}")
    write_json(
        args.out,
        {
            "groups": groups,
            "total_variation": variation,
            "by": training.by,
            "within_classes": within,
            "space": space,
            "num_images": {name: of.count for name, of in shares.items()},
            "samples": {"path": str(samples.path), "made": samples.made},
            "store": {"path": str(store.path), "fingerprint": store.meta["fingerprint"]},
            "run": provenance(),
        },
    )


if __name__ == "__main__":
    execute(main)
