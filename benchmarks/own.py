"""Does own-photos.sh fit a card of 24 GB? The whole script at real shapes, every process held to 22 GiB of GPU memory.

    python -m benchmarks.own --work /tmp/own --out benchmarks/results/own.json

Random photos and random weights in their real formats (a VAE of Stable Diffusion's shape, DINOv2 ViT-B/14, GMem's
SiT-XL/2); a SiT-B/2 from scratch and, at the same time on the same GPU, the XL by `INIT`. Batches, views and sizes are
the script's own; only the numbers of photos, steps, samples and evaluations are small, on which memory does not depend.
PyTorch refuses what exceeds the limit, as a smaller card would. `--small` shrinks every size, for a machine without a
GPU.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.path import facts, make_encoder, make_images, make_vae, parser
from benchmarks.recipes import GMEM, make_gmem
from memory.files import write_json

LIMIT = 22  # GiB: what a card of 24 leaves beside the CUDA context and a desktop
STEPS = 24  # beyond the twelve after which a step is recorded as a CUDA graph
FLAGS = ["--log-every", "4", "--eval-every", "12"]
AUDIT = "tf_efficientnet_lite0"  # as efficientnet-lite0, but its weights are looked for in the weights folder


def limited(folder: Path, variables: dict[str, object]) -> tuple[dict[str, str], Path]:
    """The environment of a shell whose `python`, in `folder`, is held to LIMIT, and the file of what commands took."""
    python, notes = folder / "bin" / "python", folder / "notes.jsonl"
    python.parent.mkdir(parents=True)
    program = Path(__file__).with_name("limited.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" {LIMIT} "{notes}" "$@"\n')
    python.chmod(0o755)
    notes.touch()
    given = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHON_EXEC": python}
    given |= {"VIRTUAL_ENV": sys.prefix, **variables}  # or the recipes would activate .venv, whose `python` is another
    return {**os.environ, **{name: str(value) for name, value in given.items()}}, notes


def run(work: Path, name: str, small: bool, end: float, **variables: object) -> dict:
    """Run own-photos.sh into `work`/NAME until it ends or the clock says `end`; status, seconds, what commands took."""
    given = {"OUT": work / name / "photos", "STEPS": STEPS, "IMAGES": 64, "EVALUATIONS": 10, "AUDIT": AUDIT}
    if small:
        given |= {"STEPS": 2, "BATCH": 4, "SIZE": 64, "HOLDOUT": 0.2, "IMAGES": 6, "EVALUATIONS": 4}
        given |= {"MODEL": "SiT-Ti/2", "ENCODER": "test_vit@64", "AUDIT": "test_vit"}
    environment, notes = limited(work / name, given | variables)
    begin = time.perf_counter()
    with open(work / f"{name}.log", "wb") as log:
        words = ["bash", "scripts/own-photos.sh", work / "images", *FLAGS]
        script = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = script.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            script.terminate()  # which stops its command too
            status = script.wait()
    commands = [json.loads(line) for line in notes.read_text().splitlines()]
    return {"status": status, "seconds": round(time.perf_counter() - begin, 1), "commands": commands}


def main(argv: list[str] | None = None) -> None:
    """Make the data, run the script twice, write and show what its commands took."""
    command = parser("Run own-photos.sh on random photos within the memory of a card of 24 GB.")
    command.add_argument("--seconds", type=float, default=3600, help="after which what still runs is stopped")
    args = command.parse_args(argv)
    work, small, end = args.work.resolve(), args.small, time.perf_counter() + args.seconds
    weights = work / "weights"
    make_images(work / "images", *((60, 64) if small else (240, 384)))
    make_vae(weights / "sd-vae-ft-mse", small)
    for encoder in ["test_vit"] if small else ["vit_base_patch14_dinov2.lvd142m", AUDIT]:
        make_encoder(weights / f"{encoder}.safetensors", encoder)
    variables, results = {"NPROC": args.gpus, "GMEM_WEIGHTS": weights}, {}

    def from_scratch() -> None:
        results["from scratch"] = run(work, "scratch", small, end, **variables)

    def from_gmem() -> None:
        published = weights / GMEM
        make_gmem(published, "SiT-Ti/2" if small else "SiT-XL/2", 8 if small else 32, 64 if small else 768, 1000)
        results[f"INIT={GMEM}"] = run(work, "init", small, end, INIT=published, **variables)

    with ThreadPoolExecutor() as threads:
        for job in [threads.submit(from_scratch), threads.submit(from_gmem)]:
            job.result()
            write_json(args.out, {**facts(args, "own"), "limit_gib": LIMIT, "steps": STEPS, "runs": results})
    for what, result in results.items():
        print(f"\n{what}: status {result['status']} after {result['seconds']} s, {LIMIT} GiB a process")
        print(f"{'peak GB':>8}  {'reserved':>8}  {'seconds':>7}  command")
        for row in result["commands"]:
            peak, reserved = row.get("peak_gb", 0), row.get("reserved_gb", 0)
            print(f"{peak:8.2f}  {reserved:8.2f}  {row['seconds']:7.1f}  {row['command']}")
    if any(result["status"] for result in results.values()):
        sys.exit(f"own-photos.sh failed; the end of {work}/*.log says why")


if __name__ == "__main__":
    main()
