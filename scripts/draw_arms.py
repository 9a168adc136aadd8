"""Figures of the miniature: distance over steps and seconds, over the size of the bank and over diversity; samples."""

from collections.abc import Iterable
from itertools import cycle, product
from pathlib import Path
from statistics import mode

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image
from scipy.optimize import isotonic_regression

from scripts.arms import (
    DIVERSE,
    FLOOR,
    LEAST,
    PRIMARY,
    SHARES,
    Arm,
    common_step,
    dataset,
    made,
    rates,
    ratio_of,
    reach,
    targets,
)

STEPS_TAKEN, SECONDS = "training steps", "seconds of training, at the speed of the fastest run"
# Okabe and Ito's colours, which colour-blind readers tell apart; arms with alignment are dashed, too
COLOURS = {"none": "#666666", "label": "#0072B2", "label-align": "#56B4E9"}
COLOURS |= {"nearest-10": "#D55E00", "nearest-10-align": "#E69F00", "own": "#009E73"}
GAP = 0.05  # between names at the lines' ends, of the panel's height
FURTHER = ("#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#000000")  # for other arms, in turn, with the next marker
MARKERS = ("o", "s", "^")


def draw(arms: dict[str, Arm], floor: float, by: str | None = None) -> Figure:
    """Distance over steps and over seconds of training, a line for each arm; other arms below, and the bank's size.

    `by` is the way that points were sampled, where it is not that of the curves.
    """
    first = {name: arm for name, arm in arms.items() if name in PRIMARY} or arms
    others = {name: arm for name, arm in arms.items() if name not in first}
    rows = 2 if others else 1
    figure = Figure(figsize=(9, 4 * rows), layout="constrained")
    figure.suptitle(f"{dataset(arms)}, sampled by {by}" if by else dataset(arms))
    panels = figure.subplots(rows, 2, squeeze=False)
    draw_curves(panels[0, 0], first, floor)
    draw_curves(panels[0, 1], first, floor, rates(arms))
    if others:
        beside = {name: arms[name] for name in ("label", "nearest-10") if name in arms}
        draw_curves(panels[1, 0], others | beside, floor)
        draw_sizes(panels[1, 1], arms, floor)
    sign(figure, arms.values())
    return figure


def sign(figure: Figure, arms: Iterable[Arm]) -> None:
    """At a figure's foot: days, devices and versions of its runs, as far as their logs have them."""
    if words := made(run for arm in arms for run in arm.runs):
        figure.supxlabel(words, x=0.99, ha="right", fontsize="xx-small", color=COLOURS["none"])


def draw_samples(folder: Path, arms: dict[str, Arm]) -> Figure | None:
    """The first samples of each primary arm after its last step, all of the first seed whose previews are beside the
    logs; None if there is no such seed."""
    names = [name for name in PRIMARY if name in arms]
    seeds = sorted(run["seed"] for run in arms[names[0]].runs) if names else []
    seed = next((one for one in seeds if all((folder / f"{name}-{one}.png").is_file() for name in names)), None)
    if seed is None:
        return None
    figure = Figure(figsize=(9, 1.9 * -(-len(names) // 3)), layout="constrained")
    for panel, name in zip(figure.subplots(-(-len(names) // 3), 3, squeeze=False).flat, names, strict=False):
        with Image.open(folder / f"{name}-{seed}.png") as preview:
            panel.imshow(np.asarray(preview)[: preview.height // 2], cmap="gray")
        panel.set_title(f"{name}, {arms[name].final:.3g}", fontsize="small")
    for panel in figure.axes:
        panel.set_axis_off()
    sign(figure, (arms[name] for name in names))
    return figure


def draw_curves(panel: Axes, arms: dict[str, Arm], floor: float, speed: dict[bool, float] | None = None) -> None:
    """Mean and range of each arm's seeds, its name at the line's end; over seconds, if `speed` is given."""
    ends, further = [], cycle(product(MARKERS, FURTHER))
    usual = mode(len(arm.runs) for arm in arms.values())
    for arm in arms.values():
        places = arm.seconds(speed[arm.aligned]) if speed else np.array(arm.steps)
        marker, colour = (MARKERS[0], COLOURS[arm.name]) if arm.name in COLOURS else next(further)
        count = len(arm.runs)
        panel.plot(places, arm.distances.mean(1), style(arm.name), color=colour, marker=marker, markersize=3)
        panel.fill_between(places, arm.distances.min(1), arm.distances.max(1), color=colour, alpha=0.2, linewidth=0)
        name = arm.name if count == usual else f"{arm.name} ({count})"
        ends.append((places[-1], arm.final, name, colour))
    steps = sorted({step for arm in arms.values() for step in arm.steps})
    decorate(panel, floor, SECONDS if speed else STEPS_TAKEN, None if speed else steps)
    seeds = f"mean and range of {usual} seeds" if usual > 1 else "one seed"
    if any(len(arm.runs) != usual for arm in arms.values()):
        seeds += ", or as in brackets"
    panel.set_title(seeds, fontsize="small")
    name_ends(panel, ends)


def style(name: str) -> str:
    """Kind of line of an arm, or of the floor."""
    return ":" if name == FLOOR else "--" if name.endswith("-align") else "-"


def decorate(panel: Axes, floor: float, label: str, ticks: list[float] | None) -> None:
    """Logarithmic axes with plain numbers, and the floor."""
    panel.set(xlabel=label, xscale="log", yscale="log", ylabel="FD to held-out images")
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis, places in ((panel.xaxis, ticks), (panel.yaxis, None)):
        axis.set(major_locator=FixedLocator(places) if places else LogLocator(subs=(1, 2, 5)), major_formatter=plain)
        axis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if not np.isnan(floor):
        panel.axhline(floor, color="black", linewidth=1, linestyle=":")
        panel.annotate(f"{FLOOR} {floor:.3g}", (0.02, floor), (0, 3), panel.get_yaxis_transform(), "offset points")
        panel.texts[-1].set_fontsize("small")


def name_ends(panel: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names right of the panel at the height of the lines' ends (x, y, name, colour), moved apart where they touch."""
    ends = sorted(ends, key=lambda end: end[1])
    panel.get_ylim()  # settles the limits
    places = panel.transData.transform([end[:2] for end in ends])
    steps = GAP * np.arange(len(ends))
    heights = isotonic_regression(panel.transAxes.inverted().transform(places)[:, 1] - steps).x + steps
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        panel.annotate(
            name,
            (x, y),
            (1.05, height),
            textcoords="axes fraction",
            color=colour,
            fontsize="small",
            va="center",
            arrowprops=line,
        )


def draw_sizes(panel: Axes, arms: dict[str, Arm], floor: float) -> None:
    """Distance over the share of the bank's rows at the last step that all have, labels' as lines; and the ratio of
    steps over `label`."""
    furthest = max(arm.steps[-1] for arm in arms.values())
    come = {name for name, arm in arms.items() if arm.steps[-1] >= min(LEAST, furthest)}
    sizes, labels = ([name for name in names if name in come] for names in (SHARES, ("label", "label-align")))
    step = common_step(arms[name] for name in (*sizes, *labels)) if len(sizes) > 1 else None
    if not step:
        panel.set_axis_off()
        return
    shown = {100 * SHARES[name]: arms[name].until(step) for name in sizes}
    panel.plot([*shown], [arm.final for arm in shown.values()], color=COLOURS["nearest-10"], marker="o", markersize=4)
    panel.set_xlim(0.5, 200)
    ends = [(200, arms[name].until(step).final, name, COLOURS[name]) for name in labels]
    for _, distance, name, colour in ends:
        panel.axhline(distance, color=colour, linewidth=1, linestyle=style(name))
    if "label" in arms:
        for name, (share, arm), above in zip(sizes, shown.items(), cycle((True, False))):  # so that they do not touch
            ratio = ratio_of(reach(arms[name], targets(arms)["label"])[0])
            place = (4, 4 if above else -11)
            panel.annotate(ratio, (share, arm.final), place, textcoords="offset points", fontsize="small")
    decorate(panel, floor, "rows of the bank, % of the images", [1, 10, 50, 100])
    panel.set_title(f"FD after {step:,} steps; beside it the ratio of steps to label's last FD", fontsize="small")
    if ends:
        name_ends(panel, ends)


def draw_diversity(sets: dict[int, tuple[dict[str, Arm], float]], step: int) -> Figure:
    """Distance over the number of characters, and the ratio over `label` where its distance is reached; after so many
    steps, at which the arms end."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(f"after {step:,} steps", fontsize="medium")
    left, right = figure.subplots(1, 2)
    distances = {name: {} for name in (*DIVERSE, FLOOR)}  # of each line, by the number of characters
    ratios = {name: {} for name in DIVERSE if name in SHARES}
    for characters, (arms, floor) in sets.items():
        for name in DIVERSE:
            if name in arms:
                distances[name][characters] = arms[name].final
        if not np.isnan(floor):
            distances[FLOOR][characters] = floor
        for name in ratios:
            if name in arms and "label" in arms:
                ratios[name][characters] = reach(arms[name], targets(arms)["label"])[0].ratio
    for panel, lines in ((left, distances), (right, ratios)):
        ends = []
        for name, line in lines.items():
            points = [(n, value) for n, value in line.items() if value]
            if points:
                colour = COLOURS.get(name, "black")
                panel.plot(*zip(*points, strict=True), style(name), color=colour, marker="o", markersize=4)
                ends.append((*points[-1], name, colour))
        decorate(panel, np.nan, "characters", [*sets])
        if panel is right:
            panel.axhline(1, color=COLOURS["label"], linewidth=1)
            panel.set(yscale="linear", ylim=(0, None), ylabel="ratio of steps over label, where reached")
            ends.append((max(sets), 1, "label", COLOURS["label"]))
        name_ends(panel, ends)
    sign(figure, (arms[name] for arms, _ in sets.values() for name in DIVERSE if name in arms))
    return figure
