"""What the miniature compares, and what every run on a data set needs on disk: its store, metric encoder and banks.

Each part is made by the project's own commands when it is first asked for, by the one process that has claimed it.
"""

import argparse
import contextlib
import fcntl
import gc
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from dataset import PROGRESS, read_meta
from memory import build_bank
from scripts import derive_features, encode_dataset, make_glyphs, train_metric_encoder

ENCODER, METRIC = "efficientnet-lite0", "regnetx_002@64"  # of the snippets, and of the score
ALIGN = f"{ENCODER}@256"  # of the alignment: 8 × 8 patches, as many as the network has tokens; 164 kB of them an image
HELD_OUT = "HELD-OUT"  # stands for a file of held-out images' features
CURVE = (500, 1_000, 2_000, 4_000)  # steps at which a run is scored, besides its last


@dataclass(frozen=True)
class Data:
    """A data set: how its images are made, what share is held out, whose metric encoder and search serve it, which
    learning rates and factors on the condition are searched, and where its curves have points."""

    characters: int | None = None  # of glyphs; None: Fashion-MNIST
    holdout: float = 0.1
    like: str = "glyphs"
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    scales: tuple[float, ...] = (1, 6)
    images: str | None = None  # the data set whose images, split and metric encoder it takes; None: its own
    points: tuple[int, ...] = CURVE
    beside_from: int = 1_000  # steps from which points are sampled in BESIDE's ways, too

    def beside(self, step: int) -> dict[str, tuple[str, ...]]:
        """Ways in which a point is sampled besides that of the curves."""
        return BESIDE if step >= self.beside_from else {}


SAMPLER = ("--sampler", "euler", "--steps", "50")  # of the curves
BESIDE = {"heun-50": ("--sampler", "heun")}  # changes to it, whose figures stand beside its own in each point

FINER = (500, 750, 1_000, 1_500, 2_000, 4_000)  # memories on fashion pass labels' last FD between 500 and 1,500
DATA = {
    "glyphs": Data(2500),
    "fashion": Data(like="fashion", rates=(1e-3, 2e-3), scales=(1,)),
    "fashion-6": Data(
        like="fashion-6", rates=(1e-3, 2e-3), scales=(6,), images="fashion", points=FINER, beside_from=500
    ),
    "glyphs-100": Data(100),
    "glyphs-500": Data(500),
    "glyphs-6384": Data(6384),
    "glyphs-half": Data(2500, holdout=0.5),  # trained on half A, scored against half B
}


@dataclass(frozen=True)
class Arm:
    """What one arm of the comparison trains on."""

    condition: str = "snippet"
    features: str = ENCODER
    share: float = 0.1  # rows of the bank by training images; 1 keeps every feature, and trains on the image's own
    passes: int = 5  # of k-means; 0 takes random rows
    options: tuple[str, ...] = ()  # of the network
    aligned: bool = False  # with the alignment term
    like: str | None = None  # the arm whose search it shares
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)  # other ways to sample its last checkpoint


GUIDED = {f"guided-{scale}": ("--guide", "null", "--guidance-scale", str(scale)) for scale in (1.25, 1.5, 2.0)}
SAMPLERS = {"euler-50": ()}  # as the curve: the others compare with it, if lost weights had to be trained again
SAMPLERS |= {"sde-250": ("--sampler", "sde", "--steps", "250"), "euler-250": ("--steps", "250")}
SAMPLERS |= BESIDE | {"fp32": ("--precision", "fp32")}
DRAWS = {"draw-random": ("--snippets", "random"), "snippets-held-out": ("--snippets", HELD_OUT)}

ARMS = {
    "none": Arm("none", variants=SAMPLERS),
    "label": Arm("label", variants=GUIDED | SAMPLERS),
    "nearest-10": Arm(variants=SAMPLERS | DRAWS),
    "own": Arm(share=1, variants=SAMPLERS | DRAWS),
    "label-align": Arm("label", aligned=True, like="label"),
    "nearest-10-align": Arm(aligned=True, like="nearest-10"),
    "rows-10": Arm(passes=0, like="nearest-10"),
    "random": Arm(features="random", share=1, like="own"),
    "class-mean": Arm(features="class-mean", share=1, like="own"),
    "nearest-1": Arm(share=0.01, like="nearest-10"),
    "nearest-50": Arm(share=0.5, like="nearest-10"),
    "label+nearest-10": Arm("label+snippet", like="nearest-10"),
    "label+nearest-10-align": Arm("label+snippet", aligned=True, like="nearest-10"),
    "dropout-0": Arm(options=("snippet_dropout=0",), like="nearest-10"),
    "dropout-40": Arm(options=("snippet_dropout=0.4",), like="nearest-10"),
    "label-dropout-0": Arm("label", options=("label_dropout=0",), like="label"),
}


class DataSet:
    """One data set on disk; claims keep several processes from doing the same work.

    Made with the miniature's arguments, it makes store and metric encoder where they are missing.
    """

    def __init__(self, args: argparse.Namespace):
        self.name, self.kind, self.root = args.dataset, DATA[args.dataset], args.root
        self.images = self.kind.images or self.name
        self.store, self.logs = args.root / "data" / self.images, args.logs / self.name
        self.holdout = self.store.with_name(f"{self.store.name}-holdout")
        weights = args.logs / (self.kind.images or self.kind.like) / "metric.safetensors"
        self.metric = ["--encoder", METRIC, "--encoder-weights", str(weights)]
        with self.writing():
            self.prepare(weights)
        self.num_images = read_meta(self.store)["num_images"]

    def claimed(self, what: str, wait: bool) -> contextlib.AbstractContextManager[bool]:
        """`claimed` for a part of the work on this data set."""
        return claimed(self.root, f"{self.name}-{what}", wait)

    def writing(self) -> contextlib.AbstractContextManager[bool]:
        """Keep store and banks, which data sets of the same images share, to this process."""
        return claimed(self.root, f"{self.images}-data", wait=True)

    def prepare(self, weights: Path) -> None:
        """Make store and metric encoder where they are missing."""
        encode = ["--out", str(self.store), "--batch-size", "512"]
        if not (self.store / "meta.json").is_file():
            words = ["--codec", "pixels", "--image-size", "32", "--holdout", str(self.kind.holdout), "--keep-images"]
            call(encode_dataset, [str(self.source()), *encode, *words, "--encoder", ENCODER])
        if not weights.is_file():
            if self.name != weights.parent.name:
                raise ValueError(f"{weights} scores {self.name}: `scripts.miniature {weights.parent.name}` first")
            words = ["--store", str(self.store), "--out", str(weights), "--model", METRIC.partition("@")[0]]
            call(train_metric_encoder, [*words, "--steps", "2000"])
        if METRIC not in read_meta(self.store)["encoders"]:
            call(encode_dataset, [str(self.source()), *encode, "--add", METRIC, *self.metric[2:]])
        if (self.store / PROGRESS).is_dir():  # cut off, and to be ended before features of other arms are added
            self.add_patches()

    def add_patches(self) -> None:
        """Add the alignment's patch tokens to the store: by the one process that may write to it."""
        words = ["--out", str(self.store), "--batch-size", "512", "--add", ALIGN, "--patches"]
        call(encode_dataset, [str(self.source()), *words])

    def add_missing_patches(self) -> None:
        """Add them unless they are there."""
        with self.writing():
            if ALIGN not in read_meta(self.store)["patches"]:
                self.add_patches()

    def source(self) -> Path:
        """The images as they come: glyphs, rendered if they are not there, or Debian's Fashion-MNIST."""
        sources = self.root / "sources"
        if self.kind.characters is None:
            copy = sources / "fashion-mnist"
            return copy if copy.is_dir() else Path("/usr/share/datasets/fashion-mnist")
        path = sources / f"glyphs-{self.kind.characters}.zip"
        if not path.is_file():
            call(make_glyphs, ["--out", str(path), "--characters", str(self.kind.characters)])
        return path

    def bank(self, arm: Arm) -> Path:
        """The bank that an arm draws from, built if it is not there."""
        with self.writing():  # the features of some arms are added to the store
            return self.built(arm)

    def built(self, arm: Arm) -> Path:
        """`bank`, by the one process that may build."""
        if arm.features not in read_meta(self.store)["encoders"]:
            call(derive_features, [arm.features, "--store", str(self.store), "--encoder", ENCODER])
        rows = "all" if arm.share == 1 else str(max(1, round(arm.share * self.num_images)))
        folder = self.root / "banks" / self.images / f"{arm.features}-{rows}-{arm.passes}"
        if not (folder / "bank.json").is_file():
            words = ["--store", str(self.store), "--encoder", arm.features, "--out", str(folder), "--k", rows]
            call(build_bank, [*words, "--passes", str(arm.passes)])
        return folder


@contextlib.contextmanager
def claimed(root: Path, what: str, wait: bool) -> Iterator[bool]:
    """Keep a part of the work, or a device, to this process while the block runs; whether no other has it, or `wait`
    for that."""
    path = root / "claims" / what.replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{what}: another process is at it", flush=True)
            yield False
            return
        yield True


def line(command: ModuleType, words: Sequence[str]) -> str:
    """A command as one would type it."""
    name = command.__name__
    return shlex.join(["python", *([f"{name}.py"] if "." not in name else ["-m", name]), *words])


def afresh() -> None:
    """Multiply as a fresh process would: commands set their own precision."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def call(command: ModuleType, words: Sequence[str]) -> str:
    """Run a command in this process, as in a fresh one; its line."""
    print("$", line(command, words), flush=True)
    began = time.perf_counter()
    afresh()
    torch.compiler.reset()
    command.main(list(words))
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    print(f"  {time.perf_counter() - began:.1f} s", flush=True)
    return line(command, words)
