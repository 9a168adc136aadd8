"""Does training in bfloat16 learn what training in float32 learns?

    python -m benchmarks.precision --work DIR --out FILE

Trains one network on real images (Fashion-MNIST's in assets/, as pixels, with labels) by train.py, for each seed from
the same weights, with the same data and noise: in float32, in bfloat16, and in float32 from weights that were nudged
once, each by a random share of 2^-9, which is how finely bfloat16 tells numbers apart. Where the losses go after a
nudge in the first steps is a matter of chance, of either sign; what bfloat16 lost by its arithmetic would have one.

So the differences of the held-out losses over the last quarter are compared: their mean over the seeds must lie within
`--bound`, and none may be further off than `--spread` times the nudged runs are (root of their mean square). Exit
status 0 only if both hold.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.chaos import ROOT, copy_images
from dataset import read_meta
from memory.files import write_json
from memory.provenance import provenance
from models.sit import SiT_models
from scripts import encode_dataset

NUDGE = 2**-9
KINDS = {"fp32": ["fp32"], "nudged": ["fp32"], "bf16": ["bf16"], "plain": ["bf16", "--no-compile"]}


def losses(run: Path, name: str) -> dict[int, float]:
    """A loss of the log by step."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def write_start(path: Path, model: str, store: Path, seed: int, nudge: float) -> None:
    """Weights to start from: the seed's own, every one multiplied by 1 + nudge·ε, ε standard normal."""
    meta = read_meta(store)
    channels, size, _ = meta["codec"]["latent_shape"]
    torch.manual_seed(seed)
    network = SiT_models[model](
        input_size=size, in_channels=channels, condition="label", num_classes=meta["num_classes"]
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1 + nudge * torch.randn_like(parameter) * parameter.requires_grad
    torch.save({"model_config": network.config, "ema": network.state_dict()}, path)


def train(args: argparse.Namespace, work: Path, kind: str, seed: int) -> dict[str, dict[int, float]]:
    """The losses of a run by their names and steps."""
    run, every = work / f"{kind}-{seed}", max(1, args.steps // 20)
    shutil.rmtree(run, ignore_errors=True)
    words = ["--store", work / "store", "--out", run, "--model", args.model, "--condition", "label"]
    words += ["--init", work / f"{kind}-{seed}.pt"]
    words += ["--steps", args.steps, "--batch-size", 64, "--lr", 1e-3, "--ema-decay", 0.99, "--seed", seed]
    words += ["--log-every", every, "--eval-every", every, "--save-every", args.steps, "--keep", 1, "--sample-every", 0]
    words += ["--workers", 0, "--resident", "--precision", *KINDS[kind]]
    with open(work / f"{run.name}.log", "w") as log:
        command = [sys.executable, "train.py", *map(str, words)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return {name: losses(run, name) for name in ("loss", "holdout_loss")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare training in bfloat16 with training in float32.")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--seeds", type=int, default=4, help="each of a run in float32, a nudged one, and one in bf16")
    parser.add_argument("--plain", action="store_true", help="also bf16 without what is compiled, our kernels included")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--model", default="SiT-S/2", help="preset")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--images", type=int, default=6000, help="of Fashion-MNIST, a tenth of them held out")
    parser.add_argument("--bound", type=float, default=0.01, help="relative, on the mean of the held-out losses")
    parser.add_argument("--spread", type=float, default=3, help="most of a single difference, in those of nudged runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--out", type=Path, help="JSON file of the outcome")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    work = args.work.resolve()
    copy_images(work, args.images)
    encode = [work / "images", "--out", work / "store", "--codec", "pixels", "--image-size", args.image_size]
    encode_dataset.main([*map(str, encode), "--holdout", "0.1", "--workers", "0"])
    kinds = list(KINDS) if args.plain else list(KINDS)[:3]
    runs = list(itertools.product(range(args.seeds), kinds))
    for seed, kind in runs:
        write_start(work / f"{kind}-{seed}.pt", args.model, work / "store", seed, NUDGE * (kind == "nudged"))
    with ThreadPoolExecutor(args.parallel) as pool:
        curves = dict(zip(runs, pool.map(lambda run: train(args, work, run[1], run[0]), runs), strict=True))

    rows = []
    for seed, kind in runs:
        base, found = (curves[seed, name]["holdout_loss"] for name in ("fp32", kind))
        by_step = [found[step] / base[step] - 1 for step in base]
        last = statistics.fmean(by_step[-max(1, len(by_step) // 4) :])
        rows.append({"seed": seed, "kind": kind, **curves[seed, kind], "difference": by_step, "last_quarter": last})
        share = " ".join(f"{value:+.2%}" for value in by_step[:: max(1, len(by_step) // 5)])
        print(f"seed {seed} {kind:6} held out {list(found.values())[-1]:.5f}, difference {share}, mean {last:+.3%}")
    of = {kind: [row["last_quarter"] for row in rows if row["kind"] == kind] for kind in kinds}
    mean, spread = statistics.fmean(of["bf16"]), statistics.fmean(value**2 for value in of["nudged"]) ** 0.5
    largest = max(map(abs, of["bf16"]))
    print(f"bf16 differs from fp32 by {mean:+.3%} in the mean of {args.seeds} seeds, the bound is {args.bound:.2%},")
    print(f"and by at most {largest:.3%} in one; nudged runs by {spread:.3%}, {args.spread:g} times that is allowed")
    if args.out:
        facts = {"mean_difference": mean, "largest_difference": largest, "spread_of_nudged": spread, "nudge": NUDGE}
        write_json(args.out, {**facts, "bound": args.bound, "rows": rows, "provenance": provenance(argv)})
    if not (abs(mean) <= args.bound and largest <= args.spread * spread):
        sys.exit("bfloat16 does not learn what float32 learns")


if __name__ == "__main__":
    main()
