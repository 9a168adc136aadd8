"""Runs of the miniature, an arm at a time: their curves, the steps to a baseline's quality, what is missing.

A mean ratio is that of the seeds' mean curve; runs of an arm that end before its others do not count yet.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memory.files import read_json

PRIMARY = ("none", "label", "label-align", "nearest-10", "nearest-10-align", "own")
OTHERS = ("nearest-1", "nearest-50", "rows-10", "random", "class-mean", "label+nearest-10", "label+nearest-10-align")
OTHERS += ("dropout-0", "dropout-40", "label-dropout-0")
BASELINES = {"label": "SiT, 46.7× in the paper", "label-align": "REPA, 16× in the paper", "none": "no condition"}
SHARES = {"nearest-1": 0.01, "nearest-10": 0.1, "nearest-50": 0.5, "own": 1}  # rows of the bank by training images
CHARACTERS = {"glyphs-100": 100, "glyphs-500": 500, "glyphs": 2_500, "glyphs-6384": 6_384}  # of the data sets
DIVERSE = ("none", "label", "nearest-10", "own")  # arms whose gain is followed over them
FLOOR = "random training images"  # the control row that no arm is expected to beat
SEEDS = 3  # of a primary arm
STEPS = 8_000  # of a run that counts, but for
LEAST = 4_000  # where fewer do: of the arms with one seed, and of all on
FEWER = dict.fromkeys(("fashion", "fashion-6", "glyphs-100", "glyphs-500", "glyphs-6384", "glyphs-half"), LEAST)
KEYS = ("arm", "seed", "dataset", "settings", "curve")


@dataclass
class Arm:
    """The runs of one arm, a seed each, and their points: those that all of them have."""

    name: str
    runs: list[dict]
    behind: list[dict] = field(default_factory=list)  # runs that have not come as far, and do not count yet

    def __post_init__(self) -> None:
        curves = [scored(run) for run in self.runs]
        self.steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        self.points = [[curve[step] for curve in curves] for step in self.steps]  # of each step, of each seed

    def values(self, *names: str) -> np.ndarray:
        """A figure of all points (steps, seeds), by its keys in a point."""
        return np.array([[dig(point, names) for point in points] for points in self.points])

    @property
    def distances(self) -> np.ndarray:
        """FD to held-out images (steps, seeds)."""
        return self.values("held_out", "fd")

    @property
    def final(self) -> float:
        """Mean distance at the last step."""
        return float(self.distances[-1].mean())

    @property
    def aligned(self) -> bool:
        """Whether it trains with the alignment term."""
        return self.name.endswith("-align")

    def seconds(self, rate: float) -> np.ndarray:
        """Seconds of training at each step (steps,), at `rate` images a second."""
        return self.values("images").mean(1) / rate

    def until(self, step: int) -> "Arm":
        """The arm as it was at a step: without later points, and what else is known of the last one."""
        if step == self.steps[-1]:
            return self
        cut = [
            run | {"curve": [point for point in run["curve"] if point["step"] <= step], "variants": {}, "copies": {}}
            for run in self.runs
        ]
        return Arm(self.name, cut)


@dataclass(frozen=True)
class Target:
    """A distance that arms are to reach, and the steps after which a baseline first had it."""

    distance: float
    steps: float
    at_once: bool = False  # by its first point, so that the steps are at most so many


@dataclass(frozen=True)
class Reach:
    """Steps that a curve takes to a target, None if it does not come there, and the target's steps divided by them; NaN
    if both are at most so many, and which of the two was sooner is not known."""

    steps: float | None
    ratio: float
    at_once: bool  # by the first point, so that the steps are at most, the ratio at least so many


def whole_steps(name: str) -> int:
    """Steps of a run that counts on a data set."""
    return FEWER.get(name, STEPS)


def scored(run: dict) -> dict[int, dict]:
    """The points of a run that have a distance, by step."""
    return {point["step"]: point for point in run["curve"] if "held_out" in point}


def dig(point: dict, names: Iterable[str]) -> float:
    """A number inside dictionaries; NaN where it is not given."""
    for name in names:
        point = point.get(name, {})
    return point if isinstance(point, int | float) else math.nan


def read_run(path: Path) -> dict:
    """A run's JSON; ValueError, naming the file, if it is none or has no point with a distance."""
    run = read_json(path)
    lacking = [key for key in KEYS if key not in run]
    if lacking:
        raise ValueError(f"{path} is no run of scripts.miniature: it has no {', '.join(lacking)}")
    if not scored(run):
        raise ValueError(f"{path}: no point of its curve was scored against held-out images (held_out)")
    return run


def sampled_by(run: dict, way: str) -> dict:
    """A run with the figures that its points have for another way to sample, in the place of the curve's own; without
    points that have none, and without what was measured of the curve's own samples but of these."""
    curve = [point | point[way] for point in run["curve"] if way in point]
    return run | {"curve": curve, "variants": {}, "copies": run.get("copies_by", {}).get(way, {})}


def read_arms(folder: Path, way: str | None = None) -> dict[str, Arm]:
    """The arms in a folder, primary ones first; of each the runs that have come furthest. With `way` their points are
    those that were also sampled so.

    Raises:
        ValueError: no run is there; or runs of one arm differ in data set or settings, or share a seed.
    """
    runs = {}
    for path in sorted(folder.glob("*.json")):
        if "arm" in read_json(path):
            run = read_run(path)
            run = sampled_by(run, way) if way else run
            if run["curve"]:
                runs.setdefault(run["arm"], {}).setdefault(run["seed"], []).append((path, run))
    if not runs:
        lacking = f"with points by {way} (--by)" if way else "in it"
        raise ValueError(f"{folder}: no runs {lacking}; python -m scripts.miniature writes such JSON files")
    arms, order = {}, (*PRIMARY, *OTHERS)
    for name in sorted(runs, key=lambda name: (order.index(name) if name in order else len(order), name)):
        found = [pair for _, pairs in sorted(runs[name].items()) for pair in pairs]
        (first, like), *others = found
        for path, run in others:
            if (run["dataset"], run["settings"]) != (like["dataset"], like["settings"]):
                other = differing(run, like)
                raise ValueError(f"{path} and {first}: seeds of one arm with other settings, {other}; move one away")
        if len(found) != len(runs[name]):
            raise ValueError(f"{folder}: two runs of arm {name!r} have one seed: {[str(path) for path, _ in found]}")
        furthest = max(max(scored(run)) for _, run in found)
        whole = [run for _, run in found if max(scored(run)) == furthest]
        behind = [run for _, run in found if max(scored(run)) < furthest]
        arms[name] = Arm(name, whole, behind)
    return arms


def differing(run: dict, like: dict) -> str:
    """Where the settings of two runs differ, in words."""
    both = {"dataset": (run["dataset"], like["dataset"])}
    for key in sorted(run["settings"] | like["settings"]):
        both[key] = (run["settings"].get(key), like["settings"].get(key))
    return "; ".join(f"{key}: {mine} and {other}" for key, (mine, other) in both.items() if mine != other)


def missing(arms: dict[str, Arm]) -> list[str]:
    """Primary arms without the seeds and steps that they should have."""
    lines, whole = [], whole_steps(dataset(arms))
    for name in PRIMARY:
        ends = [max(scored(run)) for run in arms[name].runs + arms[name].behind] if name in arms else []
        short = ", ".join(f"{end:,}" for end in ends if end < whole)
        another = f"; another at {short} steps" if short else ""
        if (done := sum(end >= whole for end in ends)) < SEEDS:
            lines.append(f"{name} ({done} of {SEEDS} seeds{another})")
    return lines


def steps_to(distance: float, steps: list[int], distances: np.ndarray) -> float | None:
    """First step at which a curve, linear in the logarithms of both, reaches `distance`; the first point's step if that
    is below already, None if it never does."""
    if distances[0] <= distance:
        return steps[0]
    for i in range(1, len(steps)):
        if distances[i] <= distance:
            xs, ys = np.log(steps[i - 1 : i + 1]), np.log(distances[i - 1 : i + 1])
            return float(np.exp(xs[0] + (xs[1] - xs[0]) * (math.log(distance) - ys[0]) / (ys[1] - ys[0])))
    return None


def last_of(steps: list[int], distances: np.ndarray) -> Target:
    """The last distance of a curve, which it had sooner than at its last step if it rises again."""
    first, last = steps_to(distances[-1], steps, distances), steps[-1]
    first = last if math.isclose(first, last) else first  # but for the rounding of logarithms
    return Target(float(distances[-1]), first, first == steps[0])


def targets(arms: dict[str, Arm]) -> dict[str, Target]:
    """The last distances of the baselines that are there, and that of `label` with its best guidance, if that helps."""
    found = {name: last_of(arms[name].steps, arms[name].distances.mean(1)) for name in BASELINES if name in arms}
    guided = {way: of for way, of in variants(arms["label"]).items() if "guided" in way} if "label" in arms else {}
    if guided:
        best = min(guided, key=lambda way: score(guided[way], "held_out", "fd"))
        if (distance := score(guided[best], "held_out", "fd")) < found["label"].distance:
            found[f"label {best}"] = Target(distance, arms["label"].steps[-1])
    return found


def reach(arm: Arm, target: Target) -> tuple[Reach, list[Reach]]:
    """How soon the mean of an arm's seeds, and each of them, comes to a target."""

    def of(distances: np.ndarray) -> Reach:
        """One curve (steps,)."""
        steps = steps_to(target.distance, arm.steps, distances)
        at_once = steps == arm.steps[0]
        if target.at_once and steps and (at_once or steps <= target.steps):
            return Reach(steps, math.nan, at_once)
        return Reach(steps, target.steps / steps if steps else 0, at_once)

    return of(arm.distances.mean(1)), [of(seed) for seed in arm.distances.T]


def over_each(arm: Arm, baseline: Arm) -> list[Reach]:
    """How soon an arm's mean curve comes to the last distance of each of a baseline's seeds, by that seed's own steps:
    how much a ratio over their mean is in doubt."""
    return [reach(arm, last_of(baseline.steps, seed))[0] for seed in baseline.distances.T]


def ratio_of(reached: Reach) -> str:
    """A ratio as text."""
    if not reached.steps:
        return "not reached"
    if math.isnan(reached.ratio):
        return "not known"
    return f"{'≥ ' if reached.at_once else ''}{reached.ratio:.3g}×"


def variants(arm: Arm) -> dict[str, list[dict]]:
    """Other ways in which the last checkpoints were sampled, and what the seeds scored."""
    ways = dict.fromkeys(way for run in arm.runs for way in run.get("variants", {}))
    return {way: [run["variants"][way] for run in arm.runs if way in run.get("variants", {})] for way in ways}


def score(scores: list[dict], *names: str) -> float:
    """Mean of a figure over what several seeds scored."""
    return statistics.mean(dig(one, names) for one in scores)


def audits(arm: Arm) -> dict[str, dict[str, float]]:
    """The copy audit's figures by space, means over the seeds that have one; figures that all of these have."""
    spaces = dict.fromkeys(space for run in arm.runs for space in run.get("copies", {}))
    given = {space: [run["copies"][space] for run in arm.runs if space in run.get("copies", {})] for space in spaces}
    shared = {space: [name for name in ones[0] if all(name in one for one in ones)] for space, ones in given.items()}
    return {space: {name: score(ones, name) for name in shared[space]} for space, ones in given.items()}


def dataset(arms: dict[str, Arm]) -> str:
    """Name of the data set."""
    return next(iter(arms.values())).runs[0]["dataset"]


def made(runs: Iterable[dict], ways: bool = False) -> str:
    """First and last day, devices and versions of torch of runs, or "" if no log has any; with `ways`, of what sampled
    their last checkpoints in other ways, too."""
    logs = [log.get("made", {}) for run in runs for log in (run, *(run.get("variants", {}).values() if ways else ()))]
    days = sorted({log["date"].partition("T")[0] for log in logs if "date" in log})
    devices = sorted({log["device"] for log in logs if "device" in log})
    versions = sorted({log["versions"]["torch"] for log in logs if "torch" in log.get("versions", {})})
    parts = [" to ".join(dict.fromkeys((days[0], days[-1]))) if days else "", " and ".join(devices)]
    parts += [f"torch {' and '.join(versions)}"] if versions else []
    return ", ".join(filter(None, parts))


def rates(arms: dict[str, Arm]) -> dict[bool, float]:
    """Images a second of training with alignment (True) and without: of the fastest run, since others may have shared
    their GPU with one. Runs without a speed count as 1."""
    found: dict[bool, float] = {}
    for arm in arms.values():
        fastest = max(run.get("images_per_second", 1.0) for run in arm.runs)
        found[arm.aligned] = max(fastest, found.get(arm.aligned, 0.0))
    return found


def common_step(arms: Iterable[Arm]) -> int | None:
    """The last step at which all of the arms were scored; None if there is none, or no arm."""
    steps = [set(arm.steps) for arm in arms]
    return max(set.intersection(*steps), default=None) if steps else None
