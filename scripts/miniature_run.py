"""One run of the miniature: an arm trained with one seed and one setting, and what is measured of it.

Its log is written after every part, and no part that it has is done again.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import sample_ddp
import train
from dataset import LatentDataset
from evaluations import controls, copies, evaluator
from evaluations.features import summarize
from evaluations.reference import Reference
from evaluations.samples import Samples
from memory.bank import MemoryBank
from memory.files import atomic, read_json, write_json
from memory.processes import join
from memory.provenance import provenance
from models.checkpoint import read_checkpoint
from scripts.arms import differing
from scripts.miniature_data import (
    ALIGN,
    ARMS,
    ENCODER,
    HELD_OUT,
    METRIC,
    SAMPLER,
    DataSet,
    afresh,
    call,
    claimed,
    line,
)

WARMUP, BETA2 = 250, 0.95  # steps, and of AdamW, in every arm: with train.py's own, losses jump at these learning rates
SAVED = 2_000  # steps between full checkpoints, with which a run that was cut off continues
LOSSES = {"loss": "train_loss", "holdout_loss": "holdout_loss"}  # names in train.py's log and in ours
DRAWS = 5  # of random training images, for their standard deviation
AUDITED = ("threshold", "near_copies", "near_copies_held_out", "excess", "standard_error")
AUDITED += (*(f"wide_{name}" for name in AUDITED), "authenticity", "authenticity_held_out")
MEDIAN = "0.5"  # among the audit's quantiles


class Scores:
    """Figures of samples against held-out and training images, the very ones of the evaluator's command.

    The command loads the network, hashes and reads the reference and embeds the samples each time; here the network and
    what it makes of both references are kept, and samples are embedded once for both.
    """

    def __init__(self, data: DataSet):
        self.data, self.references = data, {}

    def words(self, samples: Path) -> list[str]:
        """What the evaluator's command is told for the figures against held-out images."""
        return [str(self.data.holdout), str(samples / "samples.npz"), *self.data.metric]

    def __call__(self, folder: Path) -> dict[str, dict[str, float]]:
        """By reference and figure: fd, precision, recall, kd."""
        began, args = time.perf_counter(), evaluator.parse(self.words(folder))
        afresh()
        state = join()
        size = evaluator.batch_size_of(args, state.device)
        if not self.references:
            self.network = evaluator.load_network(args, state.device)
            for name, path in (("held_out", self.data.holdout), ("training", self.data.store)):
                reference = Reference(path, use_moments=False, use_images=True)
                self.references[name] = reference.summary(self.network, size, state, cache=True)
        samples = Samples(args.samples, None)
        found = summarize(samples.images, samples.count, range(samples.count), self.network, size, state, "samples")
        scores = {}
        for name, known in self.references.items():
            scores[name] = named(evaluator.metrics(known, found, self.network.name, images=True))
        print(f"{folder}: {in_words(scores['held_out'])}; {time.perf_counter() - began:.1f} s", flush=True)
        return scores


class Run:
    """One run: where its parts lie, its settings, and its log, as far as an earlier start came."""

    def __init__(self, args: argparse.Namespace, scores: Scores, arm: str, seed: int, lr: float, scale: float | None):
        self.args, self.scores, self.data = args, scores, scores.data
        self.arm, self.spec, self.seed, self.lr, self.scale = arm, ARMS[arm], seed, lr, scale
        self.name = f"search/{searched_name(arm, lr, scale)}" if args.search else f"{arm}-{seed}"
        self.path = self.data.logs / f"{self.name}.json"
        self.folder, self.samples = (self.data.root / part / self.data.name / self.name for part in ("runs", "samples"))
        self.bank = self.data.bank(self.spec) if "snippet" in self.spec.condition else None
        self.settings = {"lr": lr, "scale": scale, "k": self.bank and read_json(self.bank / "bank.json")["k"]}
        self.settings |= {"model": args.model, "batch_size": args.batch_size, "num_images": args.num_images}
        self.settings |= {"metric": METRIC, "warmup": WARMUP, "beta2": BETA2}
        self.points = [*(step for step in self.data.kind.points if step < args.steps), args.steps]
        self.log = self.earlier()

    def earlier(self) -> dict:
        """The log of an earlier start, or of the same run in the search; a new one if it is of a training that is lost,
        or of one that `--again` repeats.

        Raises:
            ValueError: it has other settings, more steps, or ended without a point, and is not to be repeated.
        """
        if not self.path.is_file():
            self.adopt()
        log = read_json(self.path) if self.path.is_file() else {}
        new = {"format": 1, "dataset": self.data.name, "arm": self.arm, "seed": self.seed, "settings": self.settings}
        new |= {"steps": 0, "parameters": 0, "images_per_second": 0, "commands": {}, "curve": [], "variants": {}}
        changed = bool(log) and log["settings"] != self.settings
        lacking = self.lacking(log)
        finished = "copies" in log and bool(lacking)  # whose weights of other steps are gone
        beyond = log.get("steps", 0) > self.args.steps  # whose last weights are of another step
        if (changed or finished or beyond) and not self.args.again:
            if changed:
                what = f"has other settings, {differing(log, new)}"
            elif finished:
                what = f"is finished at step {log['steps']:,}, without points at {', '.join(map(str, lacking))}"
            else:
                what = f"ends at step {log['steps']:,}, beyond --steps {self.args.steps}"
            raise ValueError(f"{self.path} {what}; --again moves it to other/ and does the run anew")
        self.repeated = self.args.again and (changed or finished or beyond or self.incomplete(log))
        lost = not log.keys() & {"copies", "diverged"} and not self.folder.is_dir()  # a curve is of one training
        return new if not log or lost or self.repeated else log

    def adopt(self) -> None:
        """Take a run of the search, log and weights, for one of the same seed and settings, which would repeat it."""
        wanted = (self.arm, self.seed, self.settings, self.args.steps)
        for searched in sorted((self.data.logs / "search").glob("*.json")):
            log = read_json(searched)
            same = (log["arm"], log["seed"], log["settings"], log["steps"]) == wanted
            asked = not self.args.search and not (self.args.again and self.incomplete(log))
            if same and asked and "copies" in log and not self.lacking(log):
                write_json(self.path, log)
                weights = self.data.root / "runs" / self.data.name / "search" / searched.stem
                if weights.is_dir() and not self.folder.exists():
                    shutil.copytree(weights, self.folder)

    def incomplete(self, log: dict) -> bool:
        """Whether a point of a log lacks a way in which points are sampled today."""
        points = log.get("curve", ())
        return any(way not in point for point in points for way in self.data.kind.beside(point["step"]))

    def lacking(self, log: dict) -> list[int]:
        """Points of the curve that a log does not have."""
        return sorted({*self.points} - {point["step"] for point in log.get("curve", ())})

    def variants_left(self) -> dict[str, tuple[str, ...]]:
        """Ways to sample the last checkpoint that are asked for and not there."""
        asked = self.args.variants and not self.args.search
        return {way: words for way, words in self.spec.variants.items() if asked and way not in self.log["variants"]}

    def ended(self) -> bool:
        """Whether nothing is left to do."""
        done = "copies" in self.log and not self.lacking(self.log) and not self.variants_left()
        return done or "diverged" in self.log

    def write(self, **parts: object) -> None:
        """Add to the log."""
        self.log |= parts
        write_json(self.path, self.log)

    def go(self) -> None:
        """Do what is left: train, score each point, audit the last, sample it in other ways, clean up."""
        if self.repeated:
            self.set_aside()
            self.log = self.earlier()
            if self.ended():  # in the search
                return
        began, last = time.perf_counter(), self.samples / str(self.args.steps)
        made, points = provenance(), self.lacking(self.log)
        if points:  # else what is left is made here, the curve was not
            self.log["commands"]["train"], self.log["made"] = line(train, self.training()), made
        try:
            scored = {step: self.add_point(step) for step in points}
            weights = self.trained(self.args.steps)
        except FloatingPointError as error:
            if not self.args.search:
                raise
            self.write(diverged=str(error))  # a setting that diverges loses the search
            return
        if "copies" not in self.log:
            self.complete(last, weights)
            shutil.copyfile(last / "preview.png", self.path.with_suffix(".png"))
            copies_by = {}
            for way, changes in self.data.kind.beside(self.args.steps).items():
                samples = last.with_name(f"{last.name}-{way}")
                self.complete(samples, weights, changes)
                copies_by[way] = self.audit(samples)
            self.write(copies_by=copies_by, copies=self.audit(last))  # which end a run
            self.control(last)
        for way, changes in self.variants_left().items():
            point = scored.get(self.args.steps, {})
            if way in point:  # these very weights were sampled so
                figures, command = point[way], self.log["commands"][f"sample-{way}"]
            else:
                command = self.sample(weights, self.samples / way, self.filled(changes))
                figures = self.scores(self.samples / way)
            self.log["variants"][way] = {**figures, "command": command, "made": made}
            self.write()
        self.clean(weights)
        speed = f"{self.log['images_per_second']:,.0f} images/s, {time.perf_counter() - began:.0f} s in all"
        print(f"{self.name}: {in_words(self.log['curve'][-1]['held_out'])}; {speed}", flush=True)

    def set_aside(self) -> None:
        """Move weights, picture and log to folders `other/DATE/`, of the day when the log was made.

        Raises:
            ValueError: one of that day is there already.
        """
        day = Path("other", read_json(self.path)["made"]["date"].partition("T")[0])
        picture, logs = self.path.with_suffix(".png"), self.data.logs
        places = {self.folder: self.data.root / "runs" / self.data.name, picture: logs, self.path: logs}
        moves = {old: base / day / old.relative_to(base) for old, base in places.items() if old.exists()}
        for new in moves.values():
            if new.exists():
                raise ValueError(f"--again: an earlier {self.name} is in {new} already; move that away")
        for old, new in moves.items():  # the log last: until then this start can be repeated
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
            print(f"{old}: now {new}", flush=True)
        shutil.rmtree(self.samples, ignore_errors=True)

    def training(self) -> list[str]:
        """What train.py is told."""
        args, spec, every = self.args, self.spec, math.gcd(*self.points)
        options = [*spec.options]
        if "snippet" in spec.condition:
            options += [f"snippet_scale={self.scale:g}"]
        if "label" in spec.condition:
            options += [f"label_scale={self.scale:g}"]
        words = ["--store", str(self.data.store), "--model", args.model, "--condition", spec.condition]
        words += ["--lr", f"{self.lr:g}", "--warmup", str(WARMUP), "--beta2", str(BETA2)]
        words += ["--batch-size", str(args.batch_size), "--resident"]
        words += ["--align-coeff", "0.5", "--align-encoder", ALIGN] if spec.aligned else []
        words += ["--model-options", *options] if options else []
        nearest = "own" if spec.share == 1 else "nearest"
        words += ["--bank", str(self.bank), "--snippet-from", nearest] if self.bank else []
        words += ["--out", str(self.folder), "--seed", str(self.seed)]
        words += [f"--{what}-every={every}" for what in ("snapshot", "eval")]
        words += [f"--log-every={min(every, 100)}", f"--save-every={SAVED}", "--keep=1"]
        return [*words, "--sample-every=0", "--steps", str(args.steps)]

    def trained(self, step: int) -> Path:
        """The averaged weights of a step; if they are not there, the run goes to its end, for every start compiles."""
        path = self.folder / "checkpoints" / f"{step:07d}-ema.pt"
        if not path.is_file():
            if self.spec.aligned:
                self.data.add_missing_patches()
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            with claimed(self.data.root, f"training-on-{gpus}", wait=True):  # two take longer at once than by turns
                call(train, self.training())
        return path

    def add_point(self, step: int) -> dict:
        """A point of the curve, and what it tells of the whole run."""
        weights = self.trained(step)
        point = self.losses(step) | self.scored(weights, str(step))
        for way, changes in self.data.kind.beside(step).items():
            point[way] = self.scored(weights, str(step), f"-{way}", changes)
        curve = sorted([*self.log["curve"], point], key=lambda point: point["step"])
        parameters = sum(tensor.numel() for tensor in read_checkpoint(weights)["ema"].values())  # fixed positions too
        self.write(steps=step, parameters=parameters, images_per_second=rate_of(self.folder), curve=curve)
        return point

    def scored(self, weights: Path, name: str, way: str = "", changes: Sequence[str] = ()) -> dict[str, dict]:
        """Figures of a point's samples, by the sampler of the curves or with changes; the commands' lines are kept."""
        samples, commands = self.samples / f"{name}{way}", self.log["commands"]
        commands[f"sample{way}"] = self.sample(weights, samples, changes)
        commands[f"evaluate{way}"] = line(evaluator, self.scores.words(samples))
        return self.scores(samples)

    def losses(self, step: int) -> dict:
        """A curve's point as far as training knows it."""
        images = step * self.args.batch_size
        point = {"step": step, "seconds": round(images / rate_of(self.folder), 2), "images": images}
        for entry in entries(self.folder):
            if entry["step"] == step:
                point |= {LOSSES[key]: entry[key] for key in LOSSES if key in entry}
        return point

    def complete(self, samples: Path, weights: Path, changes: Sequence[str] = ()) -> None:
        """Make the last point's samples where an earlier start did not, or not all of them."""
        if not (samples / "samples.npz").is_file():
            self.sample(weights, samples, changes)

    def sample(self, weights: Path, out: Path, more: Sequence[str] = ()) -> str:
        """Images from averaged weights into a folder; the command's line."""
        words = ["--checkpoint", str(weights), "--out", str(out), "--num-images", str(self.args.num_images)]
        words += [*SAMPLER, "--seed", str(self.seed), "--format", "npz", "--batch-size", "2500"]
        return call(sample_ddp, [*words, *self.draw(), *more])

    def draw(self) -> list[str]:
        """How samples get conditions: by sample_ddp.py's rules, but pairs of label and snippet from one image each."""
        if self.spec.condition != "label+snippet":
            return []
        rows = np.random.default_rng(self.seed).integers(self.data.num_images, size=self.args.num_images)
        arrays = {"labels": np.array(LatentDataset(self.data.store).labels)[rows]}
        arrays["snippets"] = MemoryBank.load(self.bank).assignment[rows, 0].numpy().astype(np.int64)
        words = []
        for what, values in arrays.items():
            words += [f"--{what}", str(self.file(f"{self.arm}-{self.seed}-{what}", values))]
        return words

    def filled(self, words: Sequence[str]) -> list[str]:
        """A variant's words, with a file of the held-out images' features where it asks for them."""
        if HELD_OUT not in words:
            return list(words)
        features = LatentDataset(self.data.holdout, ENCODER).features[:, 0].astype(np.float32)
        return [str(self.file("held-out-features", features)) if word == HELD_OUT else word for word in words]

    def file(self, name: str, values: np.ndarray) -> Path:
        """An array on disk."""
        path = self.data.root / "samples" / self.data.name / f"{name}.npy"
        with atomic(path) as temporary:
            np.save(temporary, values)
        return path

    def audit(self, samples: Path) -> dict[str, dict[str, float]]:
        """The copy audit's figures, in the latents and in the metric encoder's features."""
        words = ["--store", str(self.data.store), "--samples", str(samples), *self.data.metric, "--out", str(samples)]
        call(copies, words)
        spaces = read_json(samples / "copies.json")["spaces"]
        kept = {space: {key: figures[key] for key in AUDITED} for space, figures in spaces.items()}
        for space, figures in spaces.items():  # beside which a threshold is small, or not
            kept[space]["median"] = figures["quantiles"][MEDIAN]
            kept[space]["median_held_out"] = figures["quantiles_held_out"][MEDIAN]
        return kept

    def control(self, samples: Path) -> None:
        """Add what real images score to controls.json: random and held-out ones, and those nearest to the snippets."""
        if self.bank and self.spec.features == ENCODER and "+" not in self.spec.condition:
            with self.data.claimed("controls", wait=True):
                self.add_controls(samples)

    def add_controls(self, samples: Path) -> None:
        """`control`, by the one process that may write them."""
        path, out, store = self.data.logs / "controls.json", samples / "controls.json", str(self.data.store)
        known = read_json(path) if path.is_file() else {"rows": {}}
        title = f"nearest training images of the snippets ({self.arm})"
        if title in known["rows"]:
            return
        words = [store, str(samples), "--store", store, "--bank", str(self.bank), "--out", str(out)]
        draws = 1 if controls.RANDOM in known["rows"] else DRAWS  # the same for each bank
        call(controls, [*words, *self.data.metric, "--draws", str(draws)])
        found = read_json(out)
        for row, figures in found["rows"].items():
            name = title if row == controls.COPIED else row
            if row == "samples" or name in known["rows"]:
                continue
            known["rows"][name] = {"num_images": figures["num_images"], **by_reference(figures["metrics"])}
            if "deviation" in figures:
                known["rows"][name]["deviation"] = by_reference(figures["deviation"])
        write_json(path, known | {"made": found["run"]})

    def clean(self, last: Path) -> None:
        """Remove what can be made again: all but the last weights."""
        shutil.rmtree(self.samples, ignore_errors=True)
        for file in {*self.folder.glob("checkpoints/*.pt")} - {last}:
            file.unlink()


def searched_name(arm: str, lr: float, scale: float | None) -> str:
    """What a run of the search is called."""
    return f"{arm}-lr{lr:g}-scale{scale or 0:g}"


def named(metrics: dict[str, float]) -> dict[str, float]:
    """The evaluator's figures without the encoder's name: fd, precision, recall, kd."""
    return {key.partition("-")[0].lower(): value for key, value in metrics.items()}


def by_reference(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figures against each reference under the names of the logs: training, held_out."""
    return {reference.replace("-", "_"): named(metrics) for reference, metrics in figures.items()}


def in_words(figures: dict[str, float]) -> str:
    """Figures for a line that is printed."""
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items())


def entries(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def rate_of(folder: Path) -> float:
    """Images a second of training alone: the median over the log's lines, which leaves out what compiling takes."""
    return statistics.median(entry["images_per_second"] for entry in entries(folder) if "images_per_second" in entry)
