"""Arms of the miniature beside each other: the steps each needs for the baselines' quality; and a check of your run.

    python -m scripts.compare benchmarks/miniature/glyphs
    python -m scripts.compare benchmarks/miniature/glyphs --check my-run.json

Reads   FOLDER/*.json, the runs that scripts/miniature.py wrote (any arms and seeds), and FOLDER/controls.json
Writes  FOLDER/curve.png   distance to held-out images over steps and over seconds of training: mean and range of seeds
        FOLDER/table.md    the same as a table, steps to the baselines' final distance, ways to sample, copies

Steps to a distance: where the arm's mean curve, linear in log(step) and log(FD) between its points, first reaches the
mean final FD of the baseline; "not reached" if it does not. The ratio is the baseline's last step divided by it, with
the range of the arm's single seeds: over `label`, the miniature of the paper's 46.7 times over SiT, over `label-align`,
of its 16 times over REPA. A baseline whose FD still falls by a fifth in the last half of its steps is unfinished.

`--check` compares a run of your own with the committed seeds of its arm and settings. Its FD has to lie within their
mean ± 3 standard deviations; the last step decides, and exit status 1 says that it is outside. With three seeds one run
in eight of the very same procedure is, because so few say little about their deviation (t with 2 degrees of freedom).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluations.card import copy_figures, table
from memory.command import execute
from memory.files import atomic, read_json

PRIMARY = ("none", "label", "label-align", "nearest-10", "nearest-10-align", "own")  # first, and drawn as full lines
BASELINES = ("label", "label-align", "none")
SEEDS = 3  # of a primary arm
FLOOR = "random training images"  # the control row that no arm is expected to beat
FLATTENED = 0.2  # of its FD that a finished baseline loses at most in the last half of its steps
ALIKE = 1.2  # largest ratio of speeds at which seconds of different runs compare
DEVIATIONS = 3  # from the seeds' mean, within which a run agrees with them
KEYS = ("arm", "seed", "dataset", "settings", "curve")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Arms of the miniature beside each other.")
    add = parser.add_argument
    add("folder", type=Path, help="folder with the runs of one data set")
    add("--check", metavar="RUN.json", type=Path, nargs="+", default=[], help="runs to compare with the folder's seeds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw and print; or check, and leave with status 1 if a run is outside."""
    args = parse(argv)
    arms = read_arms(args.folder)
    if args.check:
        inside = [check(read_run(path), path, arms) for path in args.check]
        sys.exit(not all(inside))
    controls = args.folder / "controls.json"
    floor = read_json(controls)["rows"][FLOOR]["held_out"]["fd"] if controls.is_file() else None
    page = "\n\n".join(tables(arms, floor)) + "\n"
    print(page, end="")
    with atomic(args.folder / "table.md") as temporary:
        temporary.write_text(page)
    draw(arms, floor, args.folder / "curve.png")


@dataclass
class Arm:
    """The runs of one arm, a seed each, and their points: those that all of them have."""

    name: str
    runs: list[dict]

    def __post_init__(self) -> None:
        curves = [{p["step"]: p for p in run["curve"] if "held_out" in p} for run in self.runs]
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
    if not any("held_out" in point for point in run["curve"]):
        raise ValueError(f"{path}: no point of its curve was scored against held-out images (held_out)")
    return run


def read_arms(folder: Path) -> dict[str, Arm]:
    """The arms in a folder, primary ones first.

    Raises:
        ValueError: no run is there; or runs of one arm differ in data set or settings, share a seed or have no step in
            common.
    """
    runs = {}
    for path in sorted(folder.glob("*.json")):
        if "arm" in read_json(path):
            run = read_run(path)
            runs.setdefault(run["arm"], {}).setdefault(run["seed"], []).append((path, run))
    if not runs:
        raise ValueError(f"{folder}: no runs in it; python -m scripts.miniature writes such JSON files")
    arms = {}
    for name in sorted(runs, key=lambda name: (PRIMARY.index(name) if name in PRIMARY else len(PRIMARY), name)):
        found = [pair for _, pairs in sorted(runs[name].items()) for pair in pairs]
        (first, like), *others = found
        for path, run in others:
            if (run["dataset"], run["settings"]) != (like["dataset"], like["settings"]):
                raise ValueError(f"{path} and {first}: seeds of one arm with other settings, {differing(run, like)}")
        if len(found) != len(runs[name]):
            raise ValueError(f"{folder}: two runs of arm {name!r} have one seed: {[str(path) for path, _ in found]}")
        arms[name] = Arm(name, [run for _, run in found])
        if not arms[name].steps:
            raise ValueError(f"{folder}: the runs of arm {name!r} have no step in common")
    return arms


def differing(run: dict, like: dict) -> str:
    """Where the settings of two runs differ, in words."""
    both = {"dataset": (run["dataset"], like["dataset"])}
    for key in run["settings"] | like["settings"]:
        both[key] = (run["settings"].get(key), like["settings"].get(key))
    return "; ".join(f"{key}: {mine} and {other}" for key, (mine, other) in both.items() if mine != other)


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


def reached(arm: Arm, baseline: Arm) -> str:
    """Steps that an arm takes to a baseline's final distance, and the ratio of the baseline's own steps to them."""

    def ratio(distances: np.ndarray) -> tuple[float | None, str]:
        """Of one curve: its steps, and the ratio as text."""
        steps = steps_to(baseline.final, arm.steps, distances)
        bound = "≥ " if steps == arm.steps[0] else ""  # reached before the first look
        return steps, f"{bound}{baseline.steps[-1] / steps:.2g}×" if steps else "not reached"

    steps, mean = ratio(arm.distances.mean(1))
    if steps is None:
        return f"not reached in {arm.steps[-1]:,}"
    bound = "≤ " if steps == arm.steps[0] else ""
    seeds = sorted((ratio(seed) for seed in arm.distances.T), key=lambda found: -(found[0] or math.inf))
    spread = f"; {seeds[0][1]} to {seeds[-1][1]}" * (len(seeds) > 1)
    return f"{bound}{steps:,.0f} ({mean}{spread})"


def unfinished(arm: Arm) -> str | None:
    """What keeps a baseline from being finished, in words; None if nothing does."""
    half = arm.steps[-1] / 2
    if half not in arm.steps:
        return f"The baseline {arm.name} was not scored at {half:,.0f} steps, half of its last"
    before = arm.distances[arm.steps.index(int(half))].mean()
    fall = 1 - arm.final / before
    if fall < FLATTENED:
        return None
    return (
        f"The baseline {arm.name} is unfinished: its FD falls by {fall:.0%} from {half:,.0f} to {arm.steps[-1]:,} steps"
    )


def tables(arms: dict[str, Arm], floor: float | None) -> Iterable[str]:
    """Markdown: what is missing, the main table, other ways to sample, copies."""
    dataset = next(iter(arms.values())).runs[0]["dataset"]
    yield f"# {dataset}: FD to held-out images, the mean of the seeds"
    baselines = [arms[name] for name in BASELINES if name in arms]
    rows = []
    for arm in arms.values():
        means, last = arm.distances.mean(1), arm.distances[-1]
        row = {"arm": arm.name, "seeds": str(len(arm.runs)), "last step": f"{arm.steps[-1]:,}"}
        row |= {f"{step:,} steps": f"{mean:.3g}" for step, mean in zip(arm.steps, means, strict=True)}
        row["range of the last"] = f"{last.min():.3g} to {last.max():.3g}" if len(last) > 1 else ""
        row |= {f"steps to {base.name}'s {base.final:.3g}": reached(arm, base) for base in baselines if base != arm}
        row |= {name: f"{arm.values('held_out', name)[-1].mean():.3f}" for name in ("precision", "recall")}
        row["held-out loss"] = f"{arm.values('holdout_loss')[-1].mean():.4f}"
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=column_place)
    yield table([{name: row.get(name, "") for name in columns} for row in rows])
    if floor is not None:
        yield f"Floor, {FLOOR} in equal number: FD {floor:.3g}."
    rates = sorted(run["images_per_second"] for arm in arms.values() for run in arm.runs if "images_per_second" in run)
    if rates and rates[-1] > ALIKE * rates[0]:
        yield f"Speeds differ, {rates[0]:,.0f} to {rates[-1]:,.0f} images/s of training: compare steps, not seconds."
    yield from (f"{line}." for line in map(unfinished, baselines) if line)
    yield from (f"Missing: {line}." for line in [", ".join(missing(arms))] if line)
    yield from variants(arms)
    yield from copies(arms)


def column_place(name: str) -> tuple[int, int]:
    """Where a column stands: those of steps by their number, what is known at the end after them."""
    leading = ("arm", "seeds", "last step")
    first = leading.index(name) - len(leading) if name in leading else 0
    steps = name.removesuffix(" steps").replace(",", "")
    return first, int(steps) if steps.isdigit() else sys.maxsize


def missing(arms: dict[str, Arm]) -> list[str]:
    """Primary arms without runs, or with few seeds."""
    counts = {name: len(arms[name].runs) if name in arms else 0 for name in PRIMARY}
    return [f"{name} ({count} of {SEEDS} seeds)" for name, count in counts.items() if count < SEEDS]


def variants(arms: dict[str, Arm]) -> Iterable[str]:
    """Other ways to sample the last checkpoints, the mean over those seeds that have one."""
    rows = []
    for arm in arms.values():
        for name in dict.fromkeys(name for run in arm.runs for name in run.get("variants", {})):
            given = [run["variants"][name]["held_out"] for run in arm.runs if name in run.get("variants", {})]
            row = {"arm": arm.name, "sampled by": name, "seeds": str(len(given))}
            for figure in ("fd", "precision", "recall"):
                row[figure.replace("fd", "FD")] = f"{statistics.mean(one[figure] for one in given):.3g}"
            rows.append(row)
    if rows:
        yield "## Other ways to sample the last checkpoint"
        yield table(rows)


def copies(arms: dict[str, Arm]) -> Iterable[str]:
    """The copy audit at the end, the mean over those seeds that have one."""
    rows = []
    for arm in arms.values():
        for space in dict.fromkeys(space for run in arm.runs for space in run.get("copies", {})):
            given = [run["copies"][space] for run in arm.runs if space in run.get("copies", {})]
            mean = {name: statistics.mean(one[name] for one in given) for name in given[0]}
            row = {"arm": arm.name, "K": f"{arm.runs[0]['settings'].get('k') or 0:,}", "compared by": space}
            rows.append(row | copy_figures(mean))
    if rows:
        yield "## Are these copies?"
        yield table(rows)


def draw(arms: dict[str, Arm], floor: float | None, path: Path) -> None:
    """Distance over steps and over seconds of training, a line for each arm."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    for arm in arms.values():
        draw_arm(by_steps, arm, np.array(arm.steps))
        draw_arm(by_time, arm, arm.values("seconds").mean(1))
    for axes, label in ((by_steps, "training steps"), (by_time, "seconds of training")):
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if floor is not None:
            axes.axhline(floor, color="black", linewidth=1, linestyle=":", label=f"{FLOOR}: {floor:.3g}")
    by_steps.set(ylabel="FD to held-out images")
    by_steps.legend(fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"wrote {path}")


def draw_arm(axes: Axes, arm: Arm, places: np.ndarray) -> None:
    """Mean and range of an arm's seeds at `places` (steps,)."""
    seeds = f"{len(arm.runs)} seeds" if len(arm.runs) > 1 else "1 seed"
    style = "-" if arm.name in PRIMARY else "--"
    (line,) = axes.plot(places, arm.distances.mean(1), style, marker="o", markersize=3, label=f"{arm.name}, {seeds}")
    low, high = arm.distances.min(1), arm.distances.max(1)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def check(run: dict, path: Path, arms: dict[str, Arm]) -> bool:
    """Print a run's distances beside the committed seeds' intervals; whether the last one lies inside.

    Raises:
        ValueError: the arm is not among them, has other settings, fewer than two seeds, or no step in common.
    """
    arm = arms.get(run["arm"])
    if arm is None:
        raise ValueError(f"{path}: no runs of arm {run['arm']!r} to compare with, only of {', '.join(arms)}")
    if difference := differing(run, arm.runs[0]):
        raise ValueError(f"{path}: other settings than the committed runs of arm {arm.name!r}: {difference}")
    count = len(arm.runs)
    if count < 2:
        raise ValueError(f"{path}: one committed seed of arm {arm.name!r}; a spread takes two or more")
    mine = {point["step"]: point["held_out"]["fd"] for point in run["curve"] if "held_out" in point}
    shared = [step for step in arm.steps if step in mine]
    if not shared:
        raise ValueError(
            f"{path} was scored at steps {sorted(mine)}, the committed runs at {arm.steps}: none in common"
        )
    rows, inside = [], False
    for step in shared:
        seeds = arm.distances[arm.steps.index(step)]
        mean, reach = seeds.mean(), DEVIATIONS * seeds.std(ddof=1)
        inside = bool(abs(mine[step] - mean) <= reach)
        rows.append({"steps": f"{step:,}", "FD": f"{mine[step]:.4g}", "mean of seeds": f"{mean:.4g}"})
        rows[-1] |= {"interval": f"{mean - reach:.4g} to {mean + reach:.4g}", "": "inside" if inside else "outside"}
    verdict = f"{'inside' if inside else 'outside'} the spread at step {shared[-1]:,}"
    print(f"{path}: {run['dataset']}, {arm.name}, against {count} seeds\n\n{table(rows)}\n\n{verdict}\n")
    return inside


if __name__ == "__main__":
    execute(main)
