"""The paper's claim in miniature: one command for each arm, which makes whatever it needs that is not there yet.

    python -m scripts.miniature glyphs label nearest-10 own --search            # a run of seed 0 for each setting
    python -m scripts.miniature glyphs label nearest-10 own --seeds 0 1 2       # the best of them, and other seeds

evaluations/miniature.md is the protocol. Everything is done by the project's own commands, called one after another in
this process; each log holds their lines. What is finished is skipped, so that runs can be spread over many calls, and
`--seconds` begins none that would not end in time. The same command may run several times at once, on one GPU or more
(CUDA_VISIBLE_DEVICES): each takes what no other is at.

Reads   ROOT/sources/ (glyphs are rendered, Fashion-MNIST is Debian's package), and LOGS/DATASET/metric.safetensors,
        the encoder that scores, so that figures of different days compare
Writes  ROOT/{data,banks,runs,samples,claims}/…    LOGS/DATASET/ARM-SEED.json    LOGS/DATASET/search/ARM-SETTING.json
        LOGS/DATASET/controls.json          what real images score
"""

import argparse
import contextlib
import fcntl
import gc
import json
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import sample_ddp
import train
from dataset import PROGRESS, LatentDataset, read_meta
from evaluations import controls, copies, evaluator
from memory import build_bank
from memory.bank import MemoryBank
from memory.command import Help, execute
from memory.files import atomic, read_json, write_json
from memory.provenance import provenance
from models.checkpoint import read_checkpoint
from scripts import derive_features, encode_dataset, make_glyphs, train_metric_encoder

ENCODER, METRIC = "efficientnet-lite0", "regnetx_002@64"  # of the snippets, and of the score
CURVE = (500, 1_000, 2_000, 4_000)  # steps at which a run is scored, besides its last
RATES, SCALES = (5e-4, 1e-3, 2e-3), (1, 6)  # searched: learning rate, factor on the condition
MIDDLE = 1e-3  # the rate at which scales are compared
ALIGN = f"{ENCODER}@256"  # of the alignment: 8 × 8 patches, as many as the network has tokens; 164 kB of them an image
WARMUP, BETA2 = 250, 0.95  # steps, and of AdamW, in every arm: with train.py's own, losses jump at these learning rates
SAMPLER = ("--sampler", "euler", "--steps", "50")  # of the curves
SAVED = 2_000  # steps between full checkpoints, with which a run that was cut off continues
LOSSES = {"loss": "train_loss", "holdout_loss": "holdout_loss"}  # names in train.py's log and in ours
AUDITED = ("near_copies", "near_copies_held_out", "excess", "standard_error", "authenticity", "authenticity_held_out")
HELD_OUT = "HELD-OUT"  # stands for a file of held-out images' features


@dataclass(frozen=True)
class Data:
    """A data set: how its images are made, what share is held out, and whose metric encoder and search serve it."""

    characters: int | None = None  # of glyphs; None: Fashion-MNIST
    holdout: float = 0.1
    like: str = "glyphs"


DATA = {
    "glyphs": Data(2500),
    "fashion": Data(like="fashion"),
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
SAMPLERS = {"sde-250": ("--sampler", "sde", "--steps", "250"), "euler-250": ("--steps", "250")}
SAMPLERS |= {"heun-50": ("--sampler", "heun"), "fp32": ("--precision", "fp32")}
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
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("dataset", choices=DATA, help="data set")
    add("arms", nargs="*", metavar="ARM", help=f"in the order to run: {', '.join(ARMS)}; none given: only the data")
    add("--seeds", type=int, nargs="+", default=[0], help="all arms run with the first, then all with the next")
    add("--search", action="store_true", help="search learning rate and scale, with seed 0")
    add("--lr", type=float, help="learning rate, instead of what the search found, or would try")
    add("--scale", type=float, help="factor on the condition, likewise")
    add("--steps", type=int, default=8_000, help="of training")
    add("--num-images", type=int, default=10_000, help="samples that are scored")
    add("--model", default="SiT-S/4", help="preset of models/sit.py")
    add("--batch-size", type=int, default=256, help="of training")
    add("--variants", action="store_true", help="also sample the last checkpoint in the arm's other ways")
    add("--seconds", type=float, default=math.inf, help="begin no run that would end later than this")
    add("--root", type=Path, default=Path("runs/miniature"), help="folder of everything large")
    add("--logs", type=Path, default=Path("benchmarks/miniature"), help="folder of the logs")
    args = parser.parse_args(argv)
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"arms {', '.join(unknown)}: expected {', '.join(ARMS)}")
    if unsearched := [arm for arm in args.arms if args.search and ARMS[arm].like]:
        parser.error(f"--search: {', '.join(unsearched)} share another arm's settings; search that one")
    if args.search and DATA[args.dataset].like != args.dataset:
        parser.error(f"--search: {args.dataset} shares the settings of {DATA[args.dataset].like}; search there")
    return args


class Miniature:
    """One data set: its files, and the runs on them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.data = args, DATA[args.dataset]
        self.store, self.logs = args.root / "data" / args.dataset, args.logs / args.dataset
        self.holdout = self.store.with_name(f"{self.store.name}-holdout")
        self.searched = args.logs / self.data.like / "search"
        weights = args.logs / self.data.like / "metric.safetensors"
        self.metric = ["--encoder", METRIC, "--encoder-weights", str(weights)]
        self.began, self.longest = time.perf_counter(), 0.0
        with self.claimed("data", wait=True):
            self.prepare(weights)
        self.images = read_meta(self.store)["num_images"]

    @contextlib.contextmanager
    def claimed(self, what: str, wait: bool) -> Iterator[bool]:
        """Keep a part of the work to this process while the block runs; whether no other has it, or `wait` for that."""
        path = self.args.root / "claims" / f"{self.args.dataset}-{what}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{what}: another process is at it", flush=True)
                yield False
                return
            yield True

    def prepare(self, weights: Path) -> None:
        """Make store and metric encoder where they are missing."""
        encode = ["--out", str(self.store), "--batch-size", "512"]
        if not (self.store / "meta.json").is_file():
            words = ["--codec", "pixels", "--image-size", "32", "--holdout", str(self.data.holdout), "--keep-images"]
            call(encode_dataset, [str(self.source()), *encode, *words, "--encoder", ENCODER])
        if not weights.is_file():
            if self.data.like != self.args.dataset:
                raise ValueError(f"{weights} scores {self.args.dataset}: `scripts.miniature {self.data.like}` first")
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

    def source(self) -> Path:
        """The images as they come: glyphs, rendered if they are not there, or Debian's Fashion-MNIST."""
        sources = self.args.root / "sources"
        if self.data.characters is None:
            copy = sources / "fashion-mnist"
            return copy if copy.is_dir() else Path("/usr/share/datasets/fashion-mnist")
        path = sources / f"glyphs-{self.data.characters}.zip"
        if not path.is_file():
            call(make_glyphs, ["--out", str(path), "--characters", str(self.data.characters)])
        return path

    def bank(self, arm: Arm) -> Path:
        """The bank that an arm draws from, built if it is not there."""
        with self.claimed("data", wait=True):  # the features of some arms are added to the store
            return self.built(arm)

    def built(self, arm: Arm) -> Path:
        """`bank`, by the one process that may build."""
        if arm.features not in read_meta(self.store)["encoders"]:
            call(derive_features, [arm.features, "--store", str(self.store), "--encoder", ENCODER])
        rows = "all" if arm.share == 1 else str(max(1, round(arm.share * self.images)))
        folder = self.args.root / "banks" / self.args.dataset / f"{arm.features}-{rows}-{arm.passes}"
        if not (folder / "bank.json").is_file():
            words = ["--store", str(self.store), "--encoder", arm.features, "--out", str(folder), "--k", rows]
            call(build_bank, [*words, "--passes", str(arm.passes)])
        return folder

    def best(self, arm: str) -> dict:
        """Settings of the search's run with the lowest last FD on held-out images.

        Raises:
            ValueError: no run of the arm's search gave a score.
        """
        logs = [read_json(path) for path in sorted(self.searched.glob("*.json"))]
        scored = [log for log in logs if log["arm"] == arm and "copies" in log]
        if not scored:
            raise ValueError(f"{arm}: no run of the search in {self.searched} gave a score: give --lr and --scale")
        return min(scored, key=lambda log: log["curve"][-1]["held_out"]["fd"])["settings"]

    def scales(self, arm: str) -> tuple[float | None, ...]:
        """Scales that the search of an arm tries, or the one that is given."""
        given = SCALES if self.args.scale is None else (self.args.scale,)
        return (None,) if ARMS[arm].condition == "none" else given

    def search(self, arms: Sequence[str]) -> None:
        """Runs of seed 0 over the scales, then over the other learning rates at the best scale; several processes share
        them, and the second part waits for the first. A learning rate or a scale that is given is the only one."""
        lr = self.args.lr or MIDDLE
        for wait in (False, True):
            for arm in arms:
                for scale in self.scales(arm):
                    self.tried(arm, lr, scale, wait)
                if wait and self.args.lr is None:
                    scale = self.best(arm)["scale"]
                    for other in RATES:
                        self.tried(arm, other, scale, wait=False)

    def tried(self, arm: str, lr: float, scale: float | None, wait: bool) -> None:
        """A run of the search, unless another process is at it; or, with `wait`, once that has ended."""
        with self.claimed(f"search-{searched_name(arm, lr, scale)}", wait) as mine:
            if mine:
                self.run(arm, 0, lr, scale)

    def settings(self, arm: str) -> tuple[float, float | None]:
        """Learning rate and scale of an arm: as given, or as found by a search that has ended, for which this waits.

        Raises:
            ValueError: a run of the search is missing, or none gave a score.
        """
        if self.args.lr and (self.args.scale or ARMS[arm].condition == "none"):
            return self.args.lr, self.args.scale
        like = ARMS[arm].like or arm
        for scale in self.scales(like):
            self.ended(searched_name(like, MIDDLE, scale))
        scale = self.best(like)["scale"]
        for lr in RATES:
            self.ended(searched_name(like, lr, scale))
        best = self.best(like)
        return self.args.lr or best["lr"], self.args.scale or best["scale"]

    def ended(self, name: str) -> None:
        """Wait until no process is at a run of the search; raise ValueError if it has not ended."""
        with self.claimed(f"search-{name}", wait=True):
            path = self.searched / f"{name}.json"
            log = read_json(path) if path.is_file() else {}
            if not log.keys() & {"copies", "diverged"}:
                raise ValueError(f"nothing in {path}, or half a run: run --search, or give --lr and --scale")

    def run(self, arm: str, seed: int, lr: float, scale: float | None) -> None:
        """Train, then score each point; write the log after every part, and do no part that it has."""
        args, began = self.args, time.perf_counter()
        name = f"search/{searched_name(arm, lr, scale)}" if args.search else f"{arm}-{seed}"
        path, samples = self.logs / f"{name}.json", args.root / "samples" / args.dataset / name
        bank = self.bank(ARMS[arm]) if "snippet" in ARMS[arm].condition else None
        settings = {"lr": lr, "scale": scale, "k": bank and len(MemoryBank.load(bank)), "model": args.model}
        settings |= {"batch_size": args.batch_size, "num_images": args.num_images, "metric": METRIC}
        settings |= {"warmup": WARMUP, "beta2": BETA2}
        folder = args.root / "runs" / args.dataset / name
        if not path.is_file():
            self.adopt(arm, seed, settings, path, folder)
        log = read_json(path) if path.is_file() else {}
        cut_off = log.get("steps", 0) < args.steps and not folder.is_dir()  # a curve is of one training
        if log.get("settings") != settings or (cut_off and "diverged" not in log):
            log = {"format": 1, "dataset": args.dataset, "arm": arm, "seed": seed, "settings": settings}
            log |= {"steps": 0, "parameters": 0, "images_per_second": 0, "commands": {}, "curve": [], "variants": {}}
        points = [*(step for step in CURVE if step < args.steps), args.steps]
        left = [step for step in points if step not in [point["step"] for point in log["curve"]]]
        variants = {} if args.search or not args.variants else ARMS[arm].variants
        variants = {way: words for way, words in variants.items() if way not in log["variants"]}
        if "diverged" in log or ("copies" in log and not left and not variants):
            return
        if began - self.began + self.longest > args.seconds:
            print(f"{name}: not begun, its time would be over", flush=True)
            return

        words = [*self.training(arm, bank, lr, scale), "--out", str(folder), "--seed", str(seed)]
        words += [f"--{what}-every={math.gcd(*points)}" for what in ("snapshot", "eval")]
        words += [f"--log-every={min(math.gcd(*points), 100)}", f"--save-every={SAVED}", "--keep=1"]
        words += ["--sample-every=0", "--steps", str(args.steps)]
        log["commands"] |= {"train": line(train, words)}
        log["made"] = provenance()
        draw = self.draw(arm, bank, seed)
        for step in left:
            try:
                weights = self.trained(arm, words, folder, step)
            except FloatingPointError as error:
                if not args.search:
                    raise
                write_json(path, log | {"diverged": str(error)})  # a setting that diverges loses the search
                return
            log |= {"steps": step, "parameters": self.parameters(weights), "images_per_second": rate_of(folder)}
            log["commands"]["sample"] = self.sample(weights, samples / str(step), seed, draw)
            point = self.losses(folder, step) | self.score(samples / str(step))
            log["curve"] = sorted([*log["curve"], point], key=lambda point: point["step"])
            write_json(path, log)
        last = self.trained(arm, words, folder, args.steps)
        if "copies" not in log:
            if not (samples / str(args.steps)).is_dir():
                self.sample(last, samples / str(args.steps), seed, draw)
            shutil.copyfile(samples / str(args.steps) / "preview.png", path.with_suffix(".png"))
            log["copies"] = self.audit(samples / str(args.steps))
            write_json(path, log)
            self.control(arm, bank, samples / str(args.steps))
        for way, changes in variants.items():
            command = self.sample(last, samples / way, seed, [*draw, *self.filled(changes)])
            log["variants"][way] = {**self.score(samples / way), "command": command}
            write_json(path, log)
        self.clean(folder, last, samples)
        self.longest = max(self.longest, time.perf_counter() - began)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in log["curve"][-1]["held_out"].items())
        speed = f"{log['images_per_second']:,.0f} images/s, {time.perf_counter() - began:.0f} s in all"
        print(f"{name}: {figures}; {speed}", flush=True)

    def trained(self, arm: str, words: list[str], folder: Path, step: int) -> Path:
        """The averaged weights of a step; if they are not there, the run goes to its end, for every start compiles."""
        path = folder / "checkpoints" / f"{step:07d}-ema.pt"
        if not path.is_file():
            if ARMS[arm].aligned:
                with self.claimed("data", wait=True):
                    if ALIGN not in read_meta(self.store)["patches"]:
                        self.add_patches()
            call(train, words)
        return path

    def parameters(self, weights: Path) -> int:
        """Numbers in the network, the fixed positions among them."""
        return sum(tensor.numel() for tensor in read_checkpoint(weights)["ema"].values())

    def losses(self, folder: Path, step: int) -> dict:
        """A curve's point as far as training knows it."""
        images = step * self.args.batch_size
        point = {"step": step, "seconds": round(images / rate_of(folder), 2), "images": images}
        for entry in entries(folder):
            if entry["step"] == step:
                point |= {LOSSES[key]: entry[key] for key in LOSSES if key in entry}
        return point

    def training(self, arm: str, bank: Path | None, lr: float, scale: float | None) -> list[str]:
        """What train.py is told of an arm."""
        args, spec = self.args, ARMS[arm]
        options = [*spec.options]
        if "snippet" in spec.condition:
            options += [f"snippet_scale={scale:g}"]
        if "label" in spec.condition:
            options += [f"label_scale={scale:g}"]
        words = ["--store", str(self.store), "--model", args.model, "--condition", spec.condition, "--lr", f"{lr:g}"]
        words += ["--warmup", str(WARMUP), "--beta2", str(BETA2), "--batch-size", str(args.batch_size), "--resident"]
        words += ["--align-coeff", "0.5", "--align-encoder", ALIGN] if spec.aligned else []
        words += ["--model-options", *options] if options else []
        words += ["--bank", str(bank), "--snippet-from", "own" if spec.share == 1 else "nearest"] if bank else []
        return words

    def draw(self, arm: str, bank: Path | None, seed: int) -> list[str]:
        """How samples get conditions: by sample_ddp.py's rules, but pairs of label and snippet from one image each."""
        if ARMS[arm].condition != "label+snippet":
            return []
        rows = np.random.default_rng(seed).integers(self.images, size=self.args.num_images)
        arrays = {"labels": np.array(LatentDataset(self.store).labels)[rows]}
        arrays["snippets"] = MemoryBank.load(bank).assignment[rows, 0].numpy().astype(np.int64)
        words = []
        for what, values in arrays.items():
            words += [f"--{what}", str(self.file(f"{arm}-{seed}-{what}", values))]
        return words

    def filled(self, words: Sequence[str]) -> list[str]:
        """A variant's words, with a file of the held-out images' features where it asks for them."""
        if HELD_OUT not in words:
            return list(words)
        features = LatentDataset(self.holdout, ENCODER).features[:, 0].astype(np.float32)
        return [str(self.file("held-out-features", features)) if word == HELD_OUT else word for word in words]

    def file(self, name: str, values: np.ndarray) -> Path:
        """An array on disk."""
        path = self.args.root / "samples" / self.args.dataset / f"{name}.npy"
        with atomic(path) as temporary:
            np.save(temporary, values)
        return path

    def sample(self, weights: Path, out: Path, seed: int, words: list[str]) -> str:
        """Images from averaged weights into a folder; the command's line."""
        base = ["--checkpoint", str(weights), "--out", str(out), "--num-images", str(self.args.num_images)]
        base += [*SAMPLER, "--seed", str(seed), "--format", "npz", "--batch-size", "2500"]
        return call(sample_ddp, [*base, *words])

    def score(self, samples: Path) -> dict[str, dict[str, float]]:
        """Samples against held-out and training images, in the metric encoder's features."""
        found, references = {}, {"held_out": self.holdout, "training": self.store}
        for name, reference in references.items():
            out = samples / f"{name}.json"
            call(evaluator, [str(reference), str(samples / "samples.npz"), *self.metric, "--out", str(out)])
            found[name] = named(read_json(out)["metrics"])
        return found

    def audit(self, samples: Path) -> dict[str, dict[str, float]]:
        """The copy audit's figures, in the latents and in the metric encoder's features."""
        call(copies, ["--store", str(self.store), "--samples", str(samples), *self.metric, "--out", str(samples)])
        spaces = read_json(samples / "copies.json")["spaces"]
        return {space: {key: figures[key] for key in AUDITED} for space, figures in spaces.items()}

    def control(self, arm: str, bank: Path | None, samples: Path) -> None:
        """Add what real images score to controls.json: random and held-out ones, and those nearest to the snippets."""
        if bank is not None and ARMS[arm].features == ENCODER and "+" not in ARMS[arm].condition:
            with self.claimed("controls", wait=True):
                self.add_controls(arm, bank, samples)

    def add_controls(self, arm: str, bank: Path, samples: Path) -> None:
        """`control`, by the one process that may write them."""
        path = self.logs / "controls.json"
        known = read_json(path) if path.is_file() else {"rows": {}}
        title = f"nearest training images of the snippets ({arm})"
        if title in known["rows"]:
            return
        out = samples / "controls.json"
        words = [str(self.store), str(samples), "--store", str(self.store), "--bank", str(bank), "--out", str(out)]
        call(controls, [*words, *self.metric])
        found = read_json(out)
        for row, figures in found["rows"].items():
            scores = {key.replace("-", "_"): named(values) for key, values in figures["metrics"].items()}
            name = title if row == "training images of the snippets" else row
            if row != "samples":
                known["rows"][name] = {"num_images": figures["num_images"], **scores}
        write_json(path, known | {"made": found["run"]})

    def adopt(self, arm: str, seed: int, settings: dict, path: Path, folder: Path) -> None:
        """Take a run of the search, log and weights, for one of the same seed and settings, which would repeat it."""
        for searched in sorted((self.logs / "search").glob("*.json")):
            log = read_json(searched)
            same = (log["arm"], log["seed"], log["settings"], log["steps"]) == (arm, seed, settings, self.args.steps)
            if same and "copies" in log and not self.args.search:
                write_json(path, log)
                weights = self.args.root / "runs" / self.args.dataset / "search" / searched.stem
                if weights.is_dir() and not folder.exists():
                    shutil.copytree(weights, folder)

    def clean(self, folder: Path, last: Path, samples: Path) -> None:
        """Remove what can be made again: all but the last weights."""
        shutil.rmtree(samples, ignore_errors=True)
        for file in {*folder.glob("checkpoints/*.pt")} - {last}:
            file.unlink()


def searched_name(arm: str, lr: float, scale: float | None) -> str:
    """What a run of the search is called."""
    return f"{arm}-lr{lr:g}-scale{scale or 0:g}"


def named(metrics: dict[str, float]) -> dict[str, float]:
    """The evaluator's figures without the encoder's name: fd, precision, recall, kd."""
    return {key.partition("-")[0].lower(): value for key, value in metrics.items()}


def entries(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def rate_of(folder: Path) -> float:
    """Images a second of training alone: the median over the log's lines, which leaves out what compiling takes."""
    return statistics.median(entry["images_per_second"] for entry in entries(folder) if "images_per_second" in entry)


def line(command: ModuleType, words: Sequence[str]) -> str:
    """A command as one would type it."""
    name = command.__name__
    return shlex.join(["python", *([f"{name}.py"] if "." not in name else ["-m", name]), *words])


def call(command: ModuleType, words: Sequence[str]) -> str:
    """Run a command in this process, as in a fresh one; its line."""
    print("$", line(command, words), flush=True)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # commands set their own
    torch.compiler.reset()
    began = time.perf_counter()
    command.main(list(words))
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    print(f"  {time.perf_counter() - began:.1f} s", flush=True)
    return line(command, words)


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set, then run the arms: all at the first seed, then all at the next."""
    args = parse(argv)
    miniature = Miniature(args)
    if args.search:
        miniature.search(args.arms)
        return
    for seed in args.seeds:
        for arm in args.arms:
            with miniature.claimed(f"{arm}-{seed}", wait=False) as mine:
                if mine:
                    miniature.run(arm, seed, *miniature.settings(arm))


if __name__ == "__main__":
    execute(main)
