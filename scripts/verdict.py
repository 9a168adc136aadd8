"""What the runs of the miniature say: the checks before any result is believed, and the conditions of the claim.

The rules are those of evaluations/miniature.md under "Reading it". What it leaves open is decided here, once:
`class-mean` resembles `label` if their distances at the last step of both differ by less than a factor of 1.5; the arms
whose order is compared are the primary ones and the one that is judged; copies have to be few in each space of the
audit. A condition whose runs are missing or stop early is open, not failed. Two checks are added, because broken runs
must not decide: settings are the same in every arm, and no curve jumps up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from scripts.arms import (
    FLOOR,
    PRIMARY,
    SEEDS,
    Arm,
    Reach,
    audits,
    dataset,
    differing,
    dig,
    ratio_of,
    reach,
    targets,
    whole_steps,
)

RATIO = 2  # over `label`, at which the claim holds
COPIES = 0.01  # excess of near copies, below which it does
FLATTENED = 0.2  # of its FD that a finished baseline loses at most in the last half of its steps, or that may come back
TWO_DRAWS = 2 * 2**0.5  # standard deviations of one draw: two of the difference of two draws
ALIKE = 1.5  # largest quotient of two distances that resemble each other
OWN = ("lr", "scale", "k")  # settings in which arms may differ


@dataclass(frozen=True)
class Finding:
    """A condition, whether it is met, None if the runs cannot say, and the figures that do."""

    what: str
    passed: bool | None
    figures: str


def flattening(arm: Arm) -> Finding:
    """Whether a baseline is finished: its distance changed by less than a fifth in the last half of its steps."""
    what, half = f"baseline {arm.name} has flattened", arm.steps[-1] / 2
    if half not in arm.steps:
        return Finding(what, None, f"not scored at {half:,.0f} steps, half of its last")
    fall = 1 - arm.final / arm.distances[arm.steps.index(int(half))].mean()
    changes = f"{'falls' if fall >= 0 else 'rises'} by {abs(fall):.0%}"
    return Finding(what, bool(abs(fall) < FLATTENED), f"FD {changes} from {half:,.0f} to {arm.steps[-1]:,} steps")


def together(arms: dict[str, Arm], names: Iterable[str], *figure: str) -> tuple[int, list[float]] | None:
    """The last step that several arms have in common, and a figure of each at it; None if one has none."""
    if any(name not in arms for name in names):
        return None
    common = set.intersection(*(set(arms[name].steps) for name in names))
    if not common:
        return None
    rows = [arms[name].values(*figure)[arms[name].steps.index(max(common))].mean() for name in names]
    return None if np.isnan(rows).any() else (max(common), rows)


def sanity(arms: dict[str, Arm], rows: dict[str, dict]) -> list[Finding]:
    """What has to be so before any result is believed; `rows` are those of the real images."""

    def compared(what: str, names: Sequence[str], figure: Sequence[str], good: Callable) -> Finding:
        """A figure of several arms, given to `good` in their order."""
        found = together(arms, names, *figure)
        if found is None:
            return Finding(what, None, f"takes {', '.join(names)} at one step")
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, found[1], strict=True))
        return Finding(what, bool(good(found[1])), f"{values} at {found[0]:,} steps")

    loss = ("holdout_loss",)
    return [
        compared("own beats random in held-out loss", ("own", "random"), loss, rising),
        compared("class-mean resembles label in FD", ("class-mean", "label"), ("held_out", "fd"), alike),
        lowest(arms, rows),
        compared("nearest-10's loss lies between own's and none's", ("own", "nearest-10", "none"), loss, rising),
        same_settings(arms),
        steady(arms),
    ]


def steady(arms: dict[str, Arm]) -> Finding:
    """Whether no run's distance comes back by a fifth from one point to the next, as after a jump of the loss."""
    jumps = []
    for arm in arms.values():
        for run, curve in zip(arm.runs, arm.distances.T, strict=True):
            for i, (before, after) in enumerate(pairwise(curve)):
                if after > (1 + FLATTENED) * before:
                    at = f"{before:.3g} to {after:.3g} at {arm.steps[i + 1]:,} steps"
                    jumps.append(f"{arm.name}, seed {run['seed']}, from {at}")
    return Finding("no curve jumps up", not jumps, "; ".join(jumps))


def same_settings(arms: dict[str, Arm]) -> Finding:
    """Whether all else than rate, scale and bank is the same in every arm; if not, whose differs from most arms'."""
    runs = [arm.runs[0] for arm in arms.values()]
    kept = [run | {"settings": {key: run["settings"][key] for key in run["settings"].keys() - OWN}} for run in runs]
    both = [(one["dataset"], one["settings"]) for one in kept]
    usual = kept[both.index(max(both, key=both.count))]
    unlike = [f"{run['arm']} has {difference}" for run in kept if (difference := differing(run, usual))]
    return Finding("the same settings in every arm", not unlike, "; ".join(unlike))


def rising(values: list[float]) -> bool:
    """Whether each value is above the one before."""
    return all(low < high for low, high in pairwise(values))


def alike(values: list[float]) -> bool:
    """Whether values resemble each other."""
    return max(values) < ALIKE * min(values)


def lowest(arms: dict[str, Arm], rows: dict[str, dict]) -> Finding:
    """Whether random training images have the lowest distance of all rows; a row of other real images may lie lower by
    two standard deviations of the difference of two independent draws."""
    what = f"{FLOOR} have the lowest FD"
    found = {name: dig(row, ("held_out", "fd")) for name, row in rows.items() if "held_out" in row}
    if FLOOR not in found:
        return Finding(what, None, "takes controls.json")
    floor, sampled = found.pop(FLOOR), {name: arm.final for name, arm in arms.items()}
    deviation = np.nan_to_num(dig(rows[FLOOR], ("deviation", "held_out", "fd")))
    others = found | sampled
    next_one = min(others, key=others.get)
    passed = all(floor < value + TWO_DRAWS * deviation * (name in found) for name, value in others.items())
    spread = f" ± {deviation:.2g}" if deviation else ""
    return Finding(what, bool(passed), f"{floor:.3g}{spread}; the next, {next_one}, {others[next_one]:.3g}")


def conditions(arms: dict[str, Arm], name: str) -> list[Finding]:
    """What the claim asks of an arm: first that it comes to `label`'s last distance at all."""
    what = ["passes label", f"ratio at least {RATIO}", "ratio above 1 for each seed"]
    whole = whole_steps(dataset(arms))
    if "label" not in arms or arms["label"].steps[-1] < whole:
        found = [Finding(text, None, f"takes label at {whole:,} steps") for text in what]
    else:
        mean, seeds = reach(arms[name], targets(arms)["label"])
        going_on = arms[name].steps[-1] < whole  # and may still come to it

        def met(of: list[Reach], good: Callable) -> bool | None:
            """Whether all ratios are good. None if none is known not to be, but one is a bound, or may yet come."""
            opened = [one.at_once or math.isnan(one.ratio) or (going_on and not one.steps) for one in of]
            states = [good(one.ratio) or (None if may else False) for one, may in zip(of, opened, strict=True)]
            return False if False in states else None if None in states else True

        passed = met([mean], bool), met([mean], lambda ratio: ratio >= RATIO), met(seeds, lambda ratio: ratio > 1)
        figures = ratio_of(mean), ratio_of(mean), ", ".join(map(ratio_of, seeds))
        found = [Finding(*row) for row in zip(what, passed, figures, strict=True)]
    return [*found, same_order(arms, name), few_copies(arms[name]), all_seeds(arms, name)]


def same_order(arms: dict[str, Arm], name: str) -> Finding:
    """Whether distances to training images put the primary arms and this one in the order of those to held-out ones."""
    what = "same order by FD to training images"
    whole = whole_steps(dataset(arms))
    names = [other for other in arms if other in (*PRIMARY, name) and arms[other].steps[-1] >= whole]
    both = {other: [arms[other].values(to, "fd")[-1].mean() for to in ("held_out", "training")] for other in names}
    both = {other: pair for other, pair in both.items() if not np.isnan(pair).any()}
    if name not in both or "label" not in both:
        return Finding(what, None, f"takes label and {name} at {whole:,} steps")
    swapped = [
        f"{one} and {two} swap"
        for one, two in combinations(both, 2)
        if (both[one][0] < both[two][0]) != (both[one][1] < both[two][1])
    ]
    return Finding(what, not swapped, "; ".join(swapped) or f"the same for {len(both)} arms")


def few_copies(arm: Arm) -> Finding:
    """Whether near copies exceed those among held-out images by less than a hundredth."""
    found = audits(arm).values()
    figures = "; ".join(f"{one['excess']:+.2%} ± {one['standard_error']:.2%}" for one in found)
    what = f"excess of near copies below {COPIES:.0%}"
    return Finding(what, all(one["excess"] < COPIES for one in found) if found else None, figures or "not audited")


def all_seeds(arms: dict[str, Arm], name: str) -> Finding:
    """Whether `label` and the arm have the seeds that a verdict takes."""
    counts = {one: len(arms[one].runs) if one in arms else 0 for one in dict.fromkeys(("label", name))}
    enough = all(count >= SEEDS for count in counts.values())
    return Finding("all seeds", enough or None, ", ".join(f"{one} {count}" for one, count in counts.items()))


def verdict(found: list[Finding]) -> str:
    """What the conditions come to: holds, fails (does not come to `label`'s distance), or which are not met, so far if
    seeds are missing; and which the runs cannot tell yet."""
    failed = [one.what for one in found if one.passed is False]
    unknown = [one.what for one in found if one.passed is None]
    if found[0].passed is False:
        word = "fails, FD does not come down to label's"
    elif failed:
        word = f"does not hold, not met: {', '.join(failed)}"
    else:
        word = "open" if unknown else "holds"
    if word != "open" and "all seeds" in unknown:
        word = f"open, so far it {word}"
    return f"{word}; not known: {', '.join(unknown)}" if unknown else word
