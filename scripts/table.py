"""Results of the evaluator as one table.

    python -m scripts.table metrics/*.json

A row for each file, named after the samples; a column for each metric that any of them has.
"""

import argparse
from pathlib import Path

from evaluations.card import table
from memory.command import execute
from memory.files import read_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print the evaluator's JSON files as one table.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of evaluations.evaluator")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    rows = []
    for path in parse(argv).results:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: evaluations.evaluator writes such files (--out)")
        if "metrics" not in read_json(path):
            raise ValueError(f"{path} is no result of evaluations.evaluator: it has no metrics")
        result = read_json(path, metrics={str: float}, num_samples=int)
        rows.append({"samples": path.stem, "N": f"{result['num_samples']:,}"})
        rows[-1] |= {name: f"{value:.4g}" for name, value in result["metrics"].items()}
    print(table(rows))


if __name__ == "__main__":
    execute(main)
