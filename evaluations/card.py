"""Command: one page on a set of samples, from the results of the other commands.

    python -m evaluations.card --controls controls.json --copies copies.json --bank banks/NAME --out card.md

Metrics of samples and control rows against training and held-out images, copies, what the bank remembers of single
images, and cost. What a network of the snippets' family says stays out of the tables that invite comparison.
"""

import argparse
from pathlib import Path

from memory.command import execute
from memory.files import atomic, read_json

RESULTS = {"controls": ("samples", "references", "rows"), "copies": ("samples", "spaces")}  # keys of their JSON files


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="evaluations.card", description="One page on a set of samples.")
    add = parser.add_argument
    add("--controls", metavar="FILE", type=Path, required=True, help="JSON of evaluations.controls")
    add("--copies", metavar="FILE", type=Path, required=True, help="JSON of evaluations.copies for the same samples")
    add("--bank", type=Path, required=True, help="folder of the bank, with its bank.json")
    add("--out", metavar="FILE", type=Path, required=True, help="Markdown file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the page and print it."""
    args = parse(argv)
    controls, copies = read_result("controls", args.controls), read_result("copies", args.copies)
    if controls["samples"]["made"] != copies["samples"]["made"]:
        raise ValueError(f"{args.controls} and {args.copies} are about different samples; run both for the same ones")
    bank = read_json(args.bank / "bank.json")
    page = "\n\n".join(
        [
            f"# {controls['samples']['path']}",
            score_tables(controls),
            copy_table(copies),
            bank_lines(bank),
            cost_lines(controls["samples"]["made"]),
            origin_lines(controls),
            "\n".join(f"- {warning}" for warning in dict.fromkeys(controls["warnings"] + copies["warnings"])),
        ]
    )
    with atomic(args.out) as temporary:
        temporary.write_text(page.rstrip() + "\n")
    print(page)


def read_result(command: str, path: Path) -> dict:
    """What a command of evaluations wrote; ValueError if the file is another's."""
    result = read_json(path)
    lacking = [key for key in RESULTS[command] if key not in result]
    if lacking:
        raise ValueError(f"--{command} {path} is no result of evaluations.{command}: it has no {', '.join(lacking)}")
    return result


def table(rows: list[dict[str, str]]) -> str:
    """Rows of one set of columns as a Markdown table; an entry that a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    )


def score_tables(controls: dict) -> str:
    """Metrics of samples and control rows, a table for each reference."""
    parts = []
    if controls["same_family_as_snippets"]:
        parts.append("## Not for comparison: the network is of the family of the snippet encoder")
    for name, reference in controls["references"].items():
        rows = [
            {"": title, "N": f"{row['num_images']:,}"}
            | {metric: with_deviation(value, metric, row, name) for metric, value in row["metrics"][name].items()}
            for title, row in controls["rows"].items()
            if name in row["metrics"]
        ]
        parts.append(f"Against {name} images, {reference['path']} (sha256 {reference['sha256'][:12]}):")
        parts.append(table(rows))
    return "\n\n".join(parts)


def with_deviation(value: float, metric: str, row: dict, reference: str) -> str:
    """A figure, with the standard deviation over several draws of the row's images where it is known."""
    known = row.get("deviation", {}).get(reference, {})
    return f"{value:.4g}" + (f" ± {known[metric]:.2g}" if metric in known else "")


def copy_table(copies: dict) -> str:
    """The audit's figures, first those that may be quoted."""
    spaces = sorted(copies["spaces"].items(), key=lambda item: item[1]["same_family_as_snippets"])
    rows = [
        {
            "copies, compared by": name
            + (" (family of the snippets: proves nothing)" * space["same_family_as_snippets"]),
            **copy_figures(space),
        }
        for name, space in spaces
    ]
    return table(rows)


def copy_figures(space: dict) -> dict[str, str]:
    """The audit's figures in one space as text."""
    return {
        "near copies": f"{space['near_copies']:.2%}",
        "of held-out": f"{space['near_copies_held_out']:.2%}",
        "excess": f"{space['excess']:+.2%} ± {space['standard_error']:.2%}",
        "authentic": f"{space['authenticity']:.1%}",
        "held-out authentic": f"{space['authenticity_held_out']:.1%}",
    }


def bank_lines(bank: dict) -> str:
    """How much of the bank is single images."""
    auc = bank["auc_train_vs_holdout"]
    told = "not measured" if auc is None else f"{auc:.3f} (0.5: cannot be told apart)"
    return (
        f"Bank of {bank['k']:,} snippets ({bank['encoder']}): {bank['rows_of_one_image']:.1%} of rows and "
        f"{bank['draws_of_one_image']:.1%} of draws stand for one single image; "
        f"AUC of telling training from held-out images: {told}."
    )


def cost_lines(made: dict) -> str:
    """What the samples cost, as their samples.json says."""
    settings, run = made["settings"], made["run"]
    guided = "no guidance" if settings["guidance"] is None else f"guidance {settings['guidance']['scale']}"
    rate = f"{run['images_per_second']:.2f} images/s on {run['processes']} × {run['device']}"
    return (
        f"Cost: {settings['training_steps']:,} training steps; {settings['sampler']} with {settings['evaluations']} "
        f"evaluations an image, {guided}; {rate}."
    )


def origin_lines(controls: dict) -> str:
    """Which files the figures are about, by the start of their hashes, and which code made samples and figures."""
    settings, run = controls["samples"]["made"]["settings"], controls["samples"]["made"]["run"]
    hashes = {
        "weights": settings.get("checkpoint"),
        "bank": (settings.get("bank") or {}).get("bank.pth"),
        "store": ((run.get("trained") or {}).get("store") or {}).get("fingerprint"),
        "sampled by code": run.get("code"),
        "scored by code": controls["run"]["code"],
    }
    known = ", ".join(f"{name} {value[:12]}" for name, value in hashes.items() if value)
    return (
        f"Made from: {known}; {controls['run']['date']}, {controls['run']['processes']} × {controls['run']['device']}."
    )


if __name__ == "__main__":
    execute(main)
