"""How a run's samples improve with training: results of the evaluator over training steps, as a table and a figure.

    python -m scripts.curve runs/NAME/quick

Reads every result of the evaluator in the folder (`bash scripts/evaluate.sh RUN --quick` writes such), prints a table
for each protocol (number of images, sampler, reference, network) and draws FOLDER/curve.png, a line for each, because
results of different protocols do not compare.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from evaluations.card import table
from memory.command import execute
from memory.files import atomic, read_json

# What is read of a result; see `check_form`. Other commands' results, in the same folder, have none of OWN.
RESULT = {
    "metrics": {str: float},
    "protocol": str,
    "reference": {"path": str, "sha256": str},
    "network": {"name": str},
    "same_family_as_snippets": bool,
    "samples": [{"made": {"settings": ({"training_steps": (int, None)}, None)}}],
}
OWN = {"metrics", "protocol", "reference"}
Curve = list[tuple[int, dict[str, float]]]  # training steps and the metrics at them, ascending


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Results of the evaluator over training steps.")
    parser.add_argument("folder", type=Path, help="folder with JSON files of evaluations.evaluator")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the tables and draw the figure."""
    folder = parse(argv).folder
    curves = read_curves(folder)
    for protocol, curve in curves.items():
        rows = [
            {"training steps": f"{step:,}"} | {k: f"{v:.4g}" for k, v in metrics.items()} for step, metrics in curve
        ]
        print(f"{protocol}\n\n{table(rows)}\n")
    draw(curves, folder / "curve.png")
    print(f"wrote {folder / 'curve.png'}")


def read_curves(folder: Path) -> dict[str, Curve]:
    """The results in a folder by protocol; ValueError if there is none, or one is damaged."""
    curves = {}
    for path in sorted(folder.glob("*.json")):
        if not read_json(path).keys() & OWN:
            continue
        result = read_json(path, **RESULT)
        if not (result["samples"] and any(map(is_distance, result["metrics"]))):
            raise ValueError(f"{path}: it has no samples or no distance; restore or remove it")
        steps = (result["samples"][0]["made"].get("settings") or {}).get("training_steps")
        if steps is not None:
            curves.setdefault(protocol(result), []).append((steps, result["metrics"]))
    if not curves:
        raise ValueError(
            f"{folder}: no results of samples that say how long their network was trained; first run "
            "`bash scripts/evaluate.sh RUN --quick`"
        )
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items()}


def is_distance(metric: str) -> bool:
    """Whether a metric is a Fréchet distance, by its name."""
    return metric.startswith(("FID", "FD"))


def protocol(result: dict) -> str:
    """What must agree for two results to compare, in words."""
    reference, network = result["reference"], result["network"]
    family = ", of the family of the snippets: not for comparison" if result["same_family_as_snippets"] else ""
    return (
        f"{result['protocol']}, against {Path(reference['path']).name} (sha256 {reference['sha256'][:12]}), "
        f"{network['name']}{family}"
    )


def draw(curves: dict[str, Curve], path: Path) -> None:
    """The first distance of each protocol over training steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        distances = [next(filter(is_distance, metrics)) for _, metrics in curve]  # the same of all, or they are damaged
        values = [metrics[distance] for distance, (_, metrics) in zip(distances, curve, strict=True)]
        axes.plot([step for step, _ in curve], values, marker="o", label=f"{distances[0]}: {name}")
    axes.set(xlabel="training steps", ylabel="distance")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    execute(main)
