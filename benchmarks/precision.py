"""Does training in bfloat16 learn what training in float32 learns?

    python -m benchmarks.precision --work DIR --out FILE

Trains the same network twice on real images (Fashion-MNIST's in assets/, as pixels, with labels) by train.py, once in
each precision, with the same data, noise and start, and compares the losses of training and on held-out images. Exit
status 0 only if the held-out losses of the last quarter agree within `--bound`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.chaos import ROOT, copy_images
from memory.files import write_json
from memory.provenance import provenance
from scripts import encode_dataset


def losses(run: Path, name: str) -> dict[int, float]:
    """A loss of the log by step."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare training in bfloat16 with training in float32.")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--model", default="SiT-S/2", help="preset")
    parser.add_argument("--images", type=int, default=6000, help="of Fashion-MNIST, a tenth of them held out")
    parser.add_argument("--bound", type=float, default=0.01, help="relative, on the held-out losses")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--out", type=Path, help="JSON file of the outcome")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    work = args.work.resolve()
    copy_images(work, args.images)
    encode = [str(work / "images"), "--out", str(work / "store"), "--codec", "pixels", "--image-size", "32"]
    encode_dataset.main([*encode, "--holdout", "0.1", "--workers", "0"])
    every = max(1, args.steps // 20)
    found = {}
    for precision in ("fp32", "bf16"):
        run = work / precision
        shutil.rmtree(run, ignore_errors=True)
        words = ["--store", work / "store", "--out", run, "--model", args.model, "--condition", "label", "--lr", 1e-3]
        words += ["--steps", args.steps, "--batch-size", 64, "--ema-decay", 0.99, "--sample-every", 0, "--workers", 0]
        words += ["--log-every", every, "--eval-every", every, "--save-every", args.steps, "--precision", precision]
        subprocess.run([sys.executable, "train.py", *map(str, words)], check=True, cwd=ROOT)
        found[precision] = {name: losses(run, name) for name in ("loss", "holdout_loss")}
    rows = []
    print(f"{'step':>6}  {'loss fp32':>10}  {'bf16':>10}  {'held-out fp32':>13}  {'bf16':>10}  {'difference':>10}")
    for step, full in found["fp32"]["holdout_loss"].items():
        half = found["bf16"]["holdout_loss"][step]
        training = [found[precision]["loss"][step] for precision in ("fp32", "bf16")]
        rows.append({"step": step, "loss": training, "holdout_loss": [full, half], "difference": half / full - 1})
        print(
            f"{step:6}  {training[0]:10.5f}  {training[1]:10.5f}  {full:13.5f}  {half:10.5f}  {half / full - 1:+10.2%}"
        )
    largest = max(abs(row["difference"]) for row in rows[-max(1, len(rows) // 4) :])
    print(f"held-out losses of the last quarter differ by at most {largest:.2%}, the bound is {args.bound:.2%}")
    if args.out:
        facts = {"columns": ["fp32", "bf16"], "largest_difference_of_last_quarter": largest, "bound": args.bound}
        write_json(args.out, {**facts, "rows": rows, "provenance": provenance(argv)})
    if not largest <= args.bound:
        sys.exit("bfloat16 does not learn what float32 learns")


if __name__ == "__main__":
    main()
