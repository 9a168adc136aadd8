"""Arms of the miniature beside each other: the steps each needs for the baselines' quality; and a check of your run.

    python -m scripts.compare benchmarks/miniature/glyphs
    python -m scripts.compare benchmarks/miniature/glyphs*                      # and how the gain grows with diversity
    python -m scripts.compare benchmarks/miniature/glyphs --by heun-50          # of the points that are scored by it
    python -m scripts.compare benchmarks/miniature/glyphs --check my-run.json

Reads   FOLDER/*.json, the runs that scripts/miniature.py wrote (any arms and seeds), FOLDER/search/*.json, and
        controls.json there or in the folder above
Writes  FOLDER/curve.png   distance to held-out images over steps and over seconds of training: mean and range of seeds;
                           a second row for the arms that are not primary, and for the size of the bank. Seconds are
                           those of the fastest run with or without alignment, since runs may have shared a GPU
        FOLDER/table.md    whether the claim holds, the same as a table, steps to the baselines' last distance, size of
                           the bank, search, ways to sample, real images, copies
        FOLDER/samples.png the primary arms' first samples of one seed, if their previews (ARM-SEED.png) are there
        diversity.md, diversity.png beside the folders, where several hold glyphs of different numbers of characters
        with --by WAY, curve-WAY.png, table-WAY.md and so on, without other ways to sample
        Pages end with days, devices and versions of torch, figures have them at their foot, where the logs name them

Steps to a distance: where the arm's mean curve, linear in log(step) and log(FD) between its points, first reaches the
mean final FD of the baseline; "not reached" if it does not. The ratio is the baseline's own steps to it divided by them
(its last step, unless its distance rises again), with those of the single seeds: over `label`, the miniature of the
paper's 46.7 times over SiT, over `label-align`, of its 16 times over REPA. How sure the target is shows in the ratios
to the last FD of the best and of the worst of label's seeds. scripts/verdict.py holds the protocol's conditions and
checks.

`--check` compares a run of your own with the committed seeds of its arm and settings. Its FD has to lie within their
mean ± 3 standard deviations; the last step decides, and exit status 1 says that it is outside. With three seeds one run
in eight of the very same procedure is, because so few say little about their deviation (t with 2 degrees of freedom).
Where one seed is committed the other arms' deviation, as a share of FD, stands in, for the difference of two runs; and
where no arm of FOLDER has several, that of the arms of the data set whose search it shares, in the folder beside it.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluations.card import copy_figures, table
from memory.command import Help, execute
from memory.files import atomic, read_json
from scripts.arms import (
    BASELINES,
    CHARACTERS,
    DIVERSE,
    FLOOR,
    LEAST,
    OTHERS,
    PRIMARY,
    SHARES,
    Arm,
    Target,
    audits,
    common_step,
    dataset,
    differing,
    dig,
    made,
    missing,
    over_each,
    rates,
    ratio_of,
    reach,
    read_arms,
    read_run,
    sampled_by,
    score,
    scored,
    targets,
    variants,
)
from scripts.draw_arms import draw, draw_diversity, draw_samples
from scripts.verdict import Finding, conditions, flattening, sanity, verdict

CONTROLS = "controls.json"  # of a folder, or of the one that it lies in, as again/ does
DEVIATIONS = 3  # from the seeds' mean, within which a run agrees with them
RESULTS = {True: "passed", False: "FAILED", None: "not run"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("folders", metavar="FOLDER", type=Path, nargs="+", help="folder with the runs of one data set")
    add("--by", metavar="WAY", help="take the figures that points have of another way to sample, as heun-50")
    add("--check", metavar="RUN.json", type=Path, nargs="+", default=[], help="runs to compare with the folder's seeds")
    args = parser.parse_args(argv)
    if args.check and (len(args.folders) > 1 or args.by):
        parser.error("--check compares with the seeds of one FOLDER, by the curves' own sampler")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw and print; or check, and leave with status 1 if a run is outside."""
    args = parse(argv)
    sets, ending = {folder: read_arms(folder, args.by) for folder in args.folders}, f"-{args.by}" if args.by else ""
    if args.check:
        ((folder, arms),) = sets.items()
        lent = lenders(folder, arms)
        inside = [check(read_run(path), path, arms, *lent) for path in args.check]
        sys.exit(not all(inside))
    grown = {}
    for folder, arms in sets.items():
        found = [path for path in (folder / CONTROLS, folder.parent / CONTROLS) if path.is_file()]
        rows = read_json(found[0])["rows"] if found else {}
        floor = dig(rows, (FLOOR, "held_out", "fd"))
        tried = [read_json(path) for path in sorted((folder / "search").glob("*.json"))]
        tried = [run for run in (sampled_by(run, args.by) for run in tried) if run["curve"]] if args.by else tried
        write("\n\n".join(page(arms, rows, tried, args.by)), folder / f"table{ending}.md")
        save(draw(arms, floor, args.by), folder / f"curve{ending}.png")
        if not args.by and (pictures := draw_samples(folder, arms)):
            save(pictures, folder / "samples.png")
        if (name := dataset(arms)) in CHARACTERS:
            grown[CHARACTERS[name]] = (arms, floor)
    for characters, (arms, floor) in grown.items():
        grown[characters] = ({name: arm for name, arm in arms.items() if arm.steps[-1] >= LEAST}, floor)
    step = common_step(arms[name] for arms, _ in grown.values() for name in DIVERSE if name in arms)
    if len(grown) > 1 and step:
        cut = {n: ({name: arm.until(step) for name, arm in grown[n][0].items()}, grown[n][1]) for n in sorted(grown)}
        write("\n\n".join(diversity(cut, step)), args.folders[0].parent / f"diversity{ending}.md")
        save(draw_diversity(cut, step), args.folders[0].parent / f"diversity{ending}.png")


def write(text: str, path: Path) -> None:
    """Print a page and keep it."""
    print(text)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n")


def save(figure: Figure, path: Path) -> None:
    """Keep a figure."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    print(f"wrote {path}")


def number(value: float, form: str = ".3g") -> str:
    """A figure as text, nothing where it is not given."""
    return "" if np.isnan(value) else format(value, form)


def page(arms: dict[str, Arm], rows: dict[str, dict], tried: list[dict], way: str | None = None) -> Iterable[str]:
    """Markdown: the claim, what is missing, and the tables; from the arms, the rows of real images, and the search. The
    points are those of another `way` to sample, if one is given."""
    by = f", sampled by {way}" if way else ""
    yield f"# {dataset(arms)}: FD to held-out images{by}, the mean of the seeds"
    checks, baselines = sanity(arms, rows), [flattening(arms[name]) for name in BASELINES if name in arms]
    yield claim(arms, checks, baselines)
    if lacking := missing(arms):
        yield f"Missing: {', '.join(lacking)}."
    if others := [name for name in OTHERS if name not in arms]:
        yield f"Not run: {', '.join(others)}."
    yield table(
        [{"check": one.what, "result": RESULTS[one.passed], "figures": one.figures} for one in checks + baselines]
    )
    parts = {
        "Curves": scores(arms),
        "Steps to the baselines' last FD (ratio; of each seed)": ratios(arms),
        "Size of the bank": sizes(arms),
        "Search (whole runs of one seed; the best of an arm is that of the seed above, unless repeated)": searched(
            tried
        ),
        "Other ways to sample the last checkpoint": sampled(arms),
        "Real images": real(rows),
        "Are these copies?": copies(arms),
    }
    for title, lines in parts.items():
        if lines:
            yield f"## {title}"
            yield table(lines)
    speed = [f"{rate:,.0f} images/s with{'' if aligned else 'out'} alignment" for aligned, rate in rates(arms).items()]
    yield f"Seconds are at the speed of the fastest run: {', '.join(speed)}."
    yield from origin([run for arm in arms.values() for run in arm.runs + arm.behind] + tried)


def origin(runs: list[dict]) -> Iterable[str]:
    """The last line of a page: when and on what its runs were made, if their logs say so."""
    if words := made(runs, ways=True):
        yield f"Runs of {words}; each log has its command."


def claim(arms: dict[str, Arm], checks: list[Finding], baselines: list[Finding]) -> str:
    """The protocol's verdict in a paragraph."""
    if "nearest-10" not in arms:
        return "**The claim is open**: there is no run of nearest-10."
    believed = "" if all(one.passed for one in checks) else " Not to be believed before all checks pass."
    words = [f"**The claim, K = 10% of the images: {verdict(conditions(arms, 'nearest-10'))}.{believed}**"]
    if any(one.passed is False for one in baselines):
        words.append("Ratios are those of unfinished training: not every baseline has flattened.")
    for state, text in ((False, "To be looked into as a bug first"), (None, "Not checked yet")):
        if lines := [one.what for one in checks if one.passed is state]:
            words.append(f"{text}: {'; '.join(lines)}.")
    return " ".join(words)


def scores(arms: dict[str, Arm]) -> list[dict]:
    """The main table: distances by step, and what else the last step scored."""
    rows = []
    for arm in arms.values():
        means, last = arm.distances.mean(1), arm.distances[-1]
        row = {"arm": arm.name, "seeds": str(len(arm.runs)), "last step": f"{arm.steps[-1]:,}"}
        row |= {f"{step:,} steps": f"{mean:.3g}" for step, mean in zip(arm.steps, means, strict=True)}
        row["range of the last"] = f"{last.min():.3g} to {last.max():.3g}" if len(last) > 1 else ""
        row["to training images"] = number(arm.values("training", "fd")[-1].mean())
        row |= {name: number(arm.values("held_out", name)[-1].mean(), ".3f") for name in ("precision", "recall")}
        row["held-out loss"] = number(arm.values("holdout_loss")[-1].mean(), ".4f")
        row |= {f"copies, {space}": copy_figures(one)["excess"] for space, one in audits(arm).items()}
        settings = arm.runs[0]["settings"]
        known = {key: settings.get(key) for key in ("lr", "scale", "k") if settings.get(key) is not None}
        rows.append(row | {"settings": ", ".join(f"{key} {value:g}" for key, value in known.items())})
    steps = sorted({step for arm in arms.values() for step in arm.steps})
    first = ["arm", "seeds", "last step", *(f"{step:,} steps" for step in steps)]
    others = dict.fromkeys(name for row in rows for name in row if name not in (*first, "settings"))
    return [{name: row.get(name, "") for name in (*first, *others, "settings")} for row in rows]


def ratios(arms: dict[str, Arm]) -> list[dict]:
    """Steps of each arm to each target but its own."""
    found = targets(arms)
    rows = []
    for arm in arms.values() if found else ():
        row = {"arm": arm.name}
        for name, target in found.items():
            first = f", had after {target.steps:,.0f}" if target.steps < arms[name.split()[0]].steps[-1] else ""
            title = f"{name}'s {target.distance:.3g}{first} ({BASELINES.get(name, 'best guidance')})"
            row[title] = reached(arm, target) if name != arm.name else ""
            if name == "label" and len(arms[name].runs) > 1:
                row["over each of label's seeds"] = ", ".join(map(ratio_of, over_each(arm, arms[name])))
        rows.append(row)
    return rows


def reached(arm: Arm, target: Target) -> str:
    """Steps that an arm takes to a target, and the ratio of a baseline's steps to them: of the mean, of each seed."""
    mean, seeds = reach(arm, target)
    several = len(seeds) > 1 and any(seed.steps for seed in seeds)
    each = f"; {', '.join(map(ratio_of, seeds))}" if several else ""
    if mean.steps is None:
        return f"not reached in {arm.steps[-1]:,}{each}"
    return f"{'≤ ' if mean.at_once else ''}{mean.steps:,.0f} ({ratio_of(mean)}{each})"


def sizes(arms: dict[str, Arm]) -> list[dict]:
    """What depends on the number of the bank's rows, with the verdict on each."""
    rows = []
    for name in [name for name in SHARES if name in arms]:
        arm, found = arms[name], conditions(arms, name)
        _, mean, seeds, order, few, _ = found
        row = {"K of the images": f"{SHARES[name]:.0%}", "rows": f"{arm.runs[0]['settings'].get('k') or 0:,}"}
        row |= {"arm": name, "seeds": str(len(arm.runs)), "last step": f"{arm.steps[-1]:,}"}
        row |= {"FD": f"{arm.final:.3g}", "ratio over label": mean.figures}
        row |= {"of each seed": seeds.figures, "order of the arms": order.figures, few.what: few.figures}
        rows.append(row | {"the claim": verdict(found)})
    return rows


def searched(tried: list[dict]) -> list[dict]:
    """Runs of the search, arms in their order, the best first in each; one that diverged comes last."""
    rows, order = [], (*PRIMARY, *OTHERS)
    for run in tried:
        points, scale = scored(run), run["settings"]["scale"]
        row = {"arm": run["arm"], "lr": f"{run['settings']['lr']:g}", "scale": "" if scale is None else f"{scale:g}"}
        row |= {f"{step:,} steps": f"{point['held_out']['fd']:.3g}" for step, point in points.items()}
        last = math.inf if "diverged" in run or not points else points[max(points)]["held_out"]["fd"]
        rows.append((order.index(run["arm"]), last, row | ({"diverged": run["diverged"]} if "diverged" in run else {})))
    rows = [row for *_, row in sorted(rows, key=lambda found: found[:2])]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in names} for row in rows]


def sampled(arms: dict[str, Arm]) -> list[dict]:
    """Other ways to sample, the mean over those seeds that have one, beside the curve's way on the same seeds."""
    rows = []
    for arm in arms.values():
        for way, given in variants(arm).items():
            last = zip(arm.runs, arm.points[-1], strict=True)
            usual = [point for run, point in last if way in run.get("variants", {})]
            row = {"arm": arm.name, "sampled by": way, "seeds": str(len(given))}
            row |= {"FD": number(score(given, "held_out", "fd")), "as usual": number(score(usual, "held_out", "fd"))}
            row["to training images"] = number(score(given, "training", "fd"))
            rows.append(row | {name: number(score(given, "held_out", name)) for name in ("precision", "recall")})
    return rows


def real(rows: dict[str, dict]) -> list[dict]:
    """What real images score, the floor first."""
    return [
        {"images": name, "N": f"{row['num_images']:,}", "FD": number(dig(row, ("held_out", "fd")))}
        | {"± of draws": number(dig(row, ("deviation", "held_out", "fd")), ".2g")}
        | {"to training images": number(dig(row, ("training", "fd")))}
        | {what: number(dig(row, ("held_out", what)), ".3f") for what in ("precision", "recall")}
        for name, row in sorted(rows.items(), key=lambda item: item[0] != FLOOR)
    ]


def copies(arms: dict[str, Arm]) -> list[dict]:
    """The copy audit at the end, the mean over those seeds that have one."""
    return [
        {"arm": arm.name, "K": f"{arm.runs[0]['settings'].get('k') or 0:,}", "compared by": space} | copy_figures(mean)
        for arm in arms.values()
        for space, mean in audits(arm).items()
    ]


def diversity(sets: dict[int, tuple[dict[str, Arm], float]], step: int) -> Iterable[str]:
    """Markdown: how the gain over labels grows with the number of characters."""
    rows = []
    for characters, (arms, floor) in sets.items():
        row = {"characters": f"{characters:,}", "floor": number(floor)}
        row |= {f"FD of {name}": f"{arms[name].final:.3g}" if name in arms else "not run" for name in DIVERSE}
        for name in (name for name in DIVERSE if name in SHARES):
            if name in arms and "label" in arms:
                row[f"{name} to label's FD"] = reached(arms[name], targets(arms)["label"])
        rows.append(row)
    yield f"# Diversity: FD to held-out images after {step:,} steps, and the steps to that of label, by characters"
    yield table(rows)
    yield "Images held out are few where characters are: distances compare within a row, and with its floor."
    shown = [arms[name] for arms, _ in sets.values() for name in DIVERSE if name in arms]
    yield from origin([run | {"variants": {}} for arm in shown for run in arm.runs])


def lenders(folder: Path, arms: dict[str, Arm]) -> tuple[dict[str, Arm], str]:
    """The arms whose spread stands in for an arm of one seed, and what they are called: those of its folder, or, where
    none has two seeds, those of the folder beside it of the data set that shares its search, if runs are there."""
    if all(len(arm.runs) == 1 for arm in arms.values()):
        from scripts.miniature_data import DATA  # here, because it imports all that makes data, and takes seconds

        name = DATA[dataset(arms)].like if dataset(arms) in DATA else None
        if name and any("arm" in read_json(path) for path in sorted((folder / ".." / name).glob("*.json"))):
            return read_arms(folder / ".." / name), f"the arms in ../{name}"
    return arms, "the other arms"


def deviation(arm: Arm, arms: dict[str, Arm], step: int) -> float:
    """Standard deviation of an arm's distance at a step: of its seeds, or, if it has one, by the seeds of other arms,
    as a share of the distance (root of the mean square over the arms).

    Raises:
        ValueError: no arm has two seeds at this step.
    """
    place = arm.steps.index(step)
    if len(arm.runs) > 1:
        return float(arm.distances[place].std(ddof=1))
    several = [other for other in arms.values() if len(other.runs) > 1 and step in other.steps]
    if not several:
        raise ValueError(
            f"one committed seed of arm {arm.name!r}, and no arm with two or more at step {step:,} to take a spread "
            "from, in FOLDER or in that of the data set whose search it shares (../glyphs beside glyphs-100)"
        )
    rows = [other.distances[other.steps.index(step)] for other in several]
    shares = [row.std(ddof=1) / row.mean() for row in rows]
    return float(arm.distances[place].mean() * np.sqrt(np.mean(np.square(shares))))


def check(run: dict, path: Path, arms: dict[str, Arm], lent: dict[str, Arm], whose: str) -> bool:
    """Print a run's distances beside the committed seeds' intervals, for one seed by the spread of arms that are `lent`
    and whose they are; whether the last one lies inside.

    Raises:
        ValueError: the arm is not among them, has other settings, no step in common, or no spread is known.
    """
    arm = arms.get(run["arm"])
    if arm is None:
        raise ValueError(f"{path}: no runs of arm {run['arm']!r} to compare with, only of {', '.join(arms)}")
    if difference := differing(run, arm.runs[0]):
        raise ValueError(f"{path}: other settings than the committed runs of arm {arm.name!r}: {difference}")
    count = len(arm.runs)
    mine = {point["step"]: point["held_out"]["fd"] for point in run["curve"] if "held_out" in point}
    shared = [step for step in arm.steps if step in mine]
    if not shared:
        raise ValueError(
            f"{path} was scored at steps {sorted(mine)}, the committed runs at {arm.steps}: none in common"
        )
    rows, inside, single = [], False, count == 1
    for step in shared:
        mean = arm.distances[arm.steps.index(step)].mean()
        reach = DEVIATIONS * deviation(arm, lent, step) * (2**0.5 if single else 1)  # of two single runs
        inside = bool(abs(mine[step] - mean) <= reach)
        rows.append({"steps": f"{step:,}", "FD": f"{mine[step]:.4g}"})
        rows[-1] |= {"the committed seed" if single else "mean of seeds": f"{mean:.4g}"}
        rows[-1] |= {"interval": f"{mean - reach:.4g} to {mean + reach:.4g}", "": "inside" if inside else "outside"}
    seeds = "one seed" if single else f"{count} seeds"
    of = f" of {whose}, as a share of FD," if single else ""
    verdict = f"{'inside' if inside else 'outside'} the spread{of} at step {shared[-1]:,}"
    print(f"{path}: {run['dataset']}, {arm.name}, against {seeds}\n\n{table(rows)}\n\n{verdict}\n")
    return inside


if __name__ == "__main__":
    execute(main)
