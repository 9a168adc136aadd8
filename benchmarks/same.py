"""The same result on any number of processes, at any batch size, with any accumulation: how nearly?

    python -m benchmarks.same --work DIR --out FILE

Runs every stage of the path at small size on the CPU, with 1, 2 and 4 processes and several batch sizes, and compares
with one process. Bank, latents and features must be equal bit for bit. Matrix products of other sizes add in another
order, so images may differ by one level of 255 on few pixels, and metrics, losses and weights by a millionth. Exit
status 0 only if all bounds hold.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.chaos import PATIENCE, Job, clear, commands, content, copy_images, files_of, load_libraries
from memory.files import write_json
from memory.provenance import provenance

PROCESSES = (1, 2, 4)
NO_DROPOUT = ["--model-options", "snippet_dropout=0"]  # its masks follow process and micro-batch, as documented
VARIANTS = {  # flags of a stage, tried with every number of processes; the first with one process is the reference
    "encode": ([], ["--workers", "0"]),
    "bank": ([],),
    "train": tuple([*NO_DROPOUT, "--micro-batch", size] for size in ("4", "2", "1")),
    "sample": ([], ["--batch-size", "7"], ["--batch-size", "48"]),
    "evaluate": ([], ["--batch-size", "5"]),
}
BOUNDS = {
    "encode": {"files that differ": 0},
    "bank": {"files that differ": 0},
    "train": {"first loss, relative": 1e-6, "last loss, relative": 1e-6, "weights, relative": 1e-6},
    "sample": {"largest difference in levels": 1, "share of pixels that differ": 0.01},
    "evaluate": {"metrics, relative": 1e-6},
}


def kept(folder: Path) -> dict[str, object]:
    """Contents of the files below a folder, by name."""
    return {name: content(path) for name, path in files_of(folder).items()}


def compare(stage: str, reference: Path, other: Path) -> dict[str, float]:
    """By how much another run's results differ from the reference's."""
    if stage in ("encode", "bank"):
        first, second = kept(reference), kept(other)
        return {"files that differ": sum(first.get(name) != second.get(name) for name in first | second)}
    if stage == "sample":
        first, second = (
            np.load(folder / "samples" / "samples.npz")["arr_0"].astype(int) for folder in (reference, other)
        )
        return {
            "largest difference in levels": int(np.abs(first - second).max()),
            "share of pixels that differ": float((first != second).mean()),
        }
    if stage == "evaluate":
        first, second = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (reference, other))
        return {"metrics, relative": max(abs(second[name] / value - 1) for name, value in first.items() if value)}
    logs = [
        [line["loss"] for line in map(json.loads, (folder / "run" / "log.jsonl").open()) if "loss" in line]
        for folder in (reference, other)
    ]
    weights = [
        torch.load(next(folder.glob("run/checkpoints/*24.pt")), weights_only=True)["model"]
        for folder in (reference, other)
    ]
    moved = sum((weights[1][name] - tensor).double().square().sum() for name, tensor in weights[0].items())
    total = sum(tensor.double().square().sum() for tensor in weights[0].values())
    return {
        "first loss, relative": abs(logs[1][0] / logs[0][0] - 1),
        "last loss, relative": abs(logs[1][-1] / logs[0][-1] - 1),
        "weights, relative": float((moved / total).sqrt()),
    }


def run(work: Path, stage: str, processes: int, flags: list[str], folder: Path) -> None:
    """Run a stage, and move what it wrote to a folder."""
    main, words = commands(work)[stage]
    log = work / f"{stage}.log"
    clear(work)
    statuses = Job(main, [*words, *flags], processes, log).wait(time.monotonic() + PATIENCE)
    if statuses is None or any(statuses):
        sys.exit(f"{stage} with {processes} processes and {flags} ended with {statuses}: see {log}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(work / "out", folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare results over process counts and batch sizes.")
    parser.add_argument("--stages", nargs="+", default=list(VARIANTS), help="which; each needs those before it")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, help="compared with one")
    parser.add_argument("--images", type=int, default=400, help="images of Fashion-MNIST to work on")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--out", type=Path, help="JSON file of the outcome")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    load_libraries()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    copy_images(work, args.images)
    rows, held = [], True
    for stage in args.stages:
        run(work, stage, 1, VARIANTS[stage][0], work / stage)
        for processes in args.processes:
            for flags in VARIANTS[stage]:
                run(work, stage, processes, flags, work / "other")
                found = compare(stage, work / stage, work / "other")
                ok = all(found[name] <= bound for name, bound in BOUNDS[stage].items())
                held &= ok
                rows.append({"stage": stage, "processes": processes, "flags": flags, **found})
                values = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
                print(
                    f"{'' if ok else 'BEYOND ITS BOUND '}{stage:9} {processes} × {' '.join(flags):17} {values}",
                    flush=True,
                )
    if args.out:
        write_json(args.out, {"bounds": BOUNDS, "rows": rows, "provenance": provenance(argv)})
    if not held:
        sys.exit("not all results are the same")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
