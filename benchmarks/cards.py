"""Do the ImageNet recipes fit a card of 24 GB? Each at real shapes on random data, held to 22 GiB of GPU memory.

    python -m benchmarks.cards --work /tmp/cards --out benchmarks/results/cards.json   # --at-once 3 on a GPU of 80 GB
    python -m benchmarks.cards --stages bank train --work /tmp/cards --out FILE

Runs the scripts and the evaluator with the variables that a small card needs: 512 JPEG files encoded at 256 px; a bank
of 640,000 snippets from 99% of 1,281,167 images, ImageNet's own numbers, on which that memory depends; SiT-XL/2 with
alignment online, 16 images at once accumulated to 256, also with activations computed twice; SiT-B/2; 256 images of
GMem's published file; and 10,000 images scored. Training goes beyond the twelve steps after which one is recorded as a
CUDA graph, evaluates on held-out images, draws its grid and saves; networks are compiled as they are at ImageNet's
size. Only steps, images and evaluations are few, on which memory does not depend, but for the evaluator's, which keeps
12 kB of each image. No stage reads what another wrote, so that one that fails stops no other; latents that no stage
reads are holes in their file. A checkpoint takes 11 GB of disk. PyTorch refuses what exceeds the limit, as a smaller
card would. `--small` shrinks every size, for a machine without a GPU.
"""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import bench_evaluate
from benchmarks.own import LIMIT, limited
from benchmarks.path import facts, make_encoder, make_images, make_vae, parser
from benchmarks.recipes import GMEM, make_gmem
from dataset import FORMAT, META, holdout_path, layout
from evaluations.inception import WEIGHTS
from memory.bank import MemoryBank
from memory.files import write_json
from models.autoencoder import load_codec

STAGES = ("encode", "bank", "train", "train-checkpointed", "train-b", "sample", "evaluate")
STEPS = 16  # beyond the twelve after which a step is recorded
ROWS = 65536  # of an array that are drawn at once
SCALES = {"images.npy": 256, "labels.npy": 1000}  # of uniform numbers, where it is not 1
CODEC = "sd-vae-ft-mse"


def make_store(path: Path, images: int, codec: dict, encoder: str, dim: int, complete: bool) -> None:
    """A store of random moments, features, labels and pixels; without `complete` of features, the rest being holes."""
    size = codec["latent_shape"][1] * 8
    meta = {"format": FORMAT, "num_images": images, "num_views": 1, "views": ["original"], "image_size": size}
    meta |= {"image_channels": 3, "codec": codec, "encoders": {encoder: {"dim": dim}}, "patches": {}}
    meta |= {"has_images": complete, "num_classes": 1000, "fingerprint": path.name, "complete": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(images)
    for file, (shape, dtype) in layout(meta).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        array, features = np.lib.format.open_memmap(path / file, "w+", dtype, shape), file.startswith("features")
        for start in range(0, images if complete or features else 0, ROWS):
            rows = array[start : start + ROWS]
            drawn = torch.rand(rows.shape, generator=generator, device=device) - 0.5 * features
            rows[:] = (drawn * SCALES.get(file, 1)).cpu().numpy().astype(dtype)
    write_json(path / META, meta)


def make_bank(path: Path, snippets: int, dim: int, store: Path, images: int, encoder: str) -> None:
    """A bank of random snippets, assigned to a store."""
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(snippets, (images, 1), generator=generator)
    meta = {"encoder": encoder, "store_fingerprint": store.name}
    rows = torch.randn(snippets, dim, generator=generator)
    MemoryBank(rows, [2] * snippets, assignment, meta).save(path / "bank.pth")


def make_data(data: Path, stages: list[str], small: bool, encoder: str) -> None:
    """What the stages read, below `data`."""
    size, dim, snippets, all_images = (64, 64, 16, 100) if small else (256, 768, 640_000, 1_281_167)
    weights = data / "weights"
    make_vae(weights / CODEC, small)
    make_encoder(weights / "encoder.safetensors", "test_vit" if small else "vit_base_patch14_dinov2.lvd142m")
    codec = load_codec(str(weights / CODEC)).meta(size) | {"name": CODEC}
    if "encode" in stages:
        make_images(data / "imagenet", *((40, size) if small else (512, 384)))
    if "bank" in stages:
        held = all_images // 100
        for path, images in ((data / "all", all_images - held), (holdout_path(data / "all"), held)):
            make_store(path, images, codec, encoder, dim, complete=False)
    if any(stage.startswith("train") for stage in stages):
        images = 8 if small else 512
        for path in (data / "some", holdout_path(data / "some")):
            make_store(path, images, codec, encoder, dim, complete=True)
        make_bank(data / "bank", snippets, dim, data / "some", images, encoder)
    if "sample" in stages:
        make_gmem(weights / GMEM, "SiT-Ti/2" if small else "SiT-XL/2", size // 8, dim, snippets)
    if "evaluate" in stages:
        bench_evaluate.make_weights(weights / WEIGHTS)
        bench_evaluate.make_images(data / "samples.npz", 10 if small else 10_000, 0, moments=False)
        bench_evaluate.make_images(data / "reference.npz", 10 if small else 2_000, 1, moments=True)


def command_of(stage: str, data: Path, out: Path, small: bool) -> tuple[dict[str, object], list[object]]:
    """The variables and the words of a stage that writes into `out`."""
    compiled = [] if small else ["--compile"]
    if stage == "encode":
        variables = {"IMAGENET": data / "imagenet", "STORE": out / "store", "HOLDOUT": 0.1}
        return variables, ["bash", "scripts/encode-imagenet.sh", *compiled]
    if stage == "bank":
        variables = {"STORE": data / "all", "BANK": out} | ({"K": 16} if small else {})
        return variables, ["bash", "scripts/build-bank-imagenet.sh"]
    if stage == "sample":
        variables = {"OUT": out, "IMAGES": 4 if small else 256}
        return variables, ["bash", "scripts/sample-gmem-xl.sh", "--steps", 4 if small else 10, *compiled]
    if stage == "evaluate":
        words = ["python", "-m", "evaluations.evaluator", data / "reference.npz", data / "samples.npz"]
        return {}, [*words, "--inception", data / "weights" / WEIGHTS, "--no-cache", "--out", out / "metrics.json"]
    steps = 2 if small else STEPS
    variables = {"STORE": data / "some", "BANK": data / "bank", "OUT": out, "STEPS": steps}
    flags = ["--log-every", steps // 2, "--eval-every", steps]
    flags += ["--checkpoint-activations"] if stage == "train-checkpointed" else []
    if small:
        variables |= {"MODEL": "SiT-Ti/2", "BATCH": 4, "MICRO_BATCH": 2}
        flags += ["--model-options", "align_depth=2"]
    elif stage != "train-b":  # which takes the script's own, 128
        variables |= {"MICRO_BATCH": 16}
    return variables, ["bash", "scripts/train-gmem-b.sh" if stage == "train-b" else "scripts/train-gmem-xl.sh", *flags]


def run(stage: str, work: Path, small: bool, variables: dict[str, object]) -> dict:
    """Run a stage: its command without this machine's folders, its status, its seconds, and its memory on a GPU."""
    out, log = work / stage, work / f"{stage}.log"
    its_own, words = command_of(stage, work / "data", out, small)
    shown = [f"{name}={value}" for name, value in its_own.items() if not isinstance(value, Path)]
    shown += [word.name if isinstance(word, Path) else str(word) for word in words]
    environment, notes = limited(out / "limited", variables | its_own)
    print("+", *shown, flush=True)
    begin = time.perf_counter()
    with open(log, "wb") as file:
        status = subprocess.run(list(map(str, words)), env=environment, stdout=file, stderr=file).returncode
    row = {"stage": stage, "command": " ".join(shown), "status": status}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert noted or status, f"{stage} has run a python that is not held to the limit"
    row |= {key: max(note[key] for note in noted) for key in ("peak_gb", "reserved_gb") if noted and key in noted[0]}
    if stage.startswith("train"):
        row["grids"] = len(list(out.glob("samples/*.png")))  # none where the memory left no room for one
    if status:
        print(f"{stage} ended with status {status}:\n{log.read_text(errors='replace')[-2000:]}", flush=True)
    shutil.rmtree(out)  # 11 GB of a checkpoint
    return row


def main(argv: list[str] | None = None) -> None:
    """Make the data, run the stages, write and show what they took."""
    command = parser("Run the ImageNet recipes on random data within the memory of a card of 24 GB.")
    command.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run")
    command.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="stages beside each other on the GPU, each with its own limit; their seconds are then longer",
    )
    args = command.parse_args(argv)
    if args.work.exists() and any(args.work.iterdir()):
        raise ValueError(f"--work {args.work}: expected an empty folder; name another, or remove what is in it")
    work, encoder = args.work.resolve(), "test_vit@64" if args.small else "dinov2-vitb14"
    weights = work / "data" / "weights"
    begin = time.perf_counter()
    make_data(work / "data", args.stages, args.small, encoder)
    print(f"made the data in {time.perf_counter() - begin:.0f} s", flush=True)
    variables = {"NPROC": args.gpus, "GMEM_WEIGHTS": weights, "ENCODER": encoder}
    variables |= {"ENCODER_WEIGHTS": weights / "encoder.safetensors"} | ({"SIZE": 64} if args.small else {})
    made = facts(args, "cards", f"--stages {' '.join(args.stages)}", f"--at-once {args.at_once}")
    rows = []
    with ThreadPoolExecutor(args.at_once) as threads:
        for row in threads.map(lambda stage: run(stage, work, args.small, variables), args.stages):
            rows.append(row)
            write_json(args.out, {**made, "limit_gib": LIMIT, "stages": rows})
    print(f"\n{'peak GB':>8}  {'reserved':>8}  {'seconds':>7}  {'status':>6}  stage, {LIMIT} GiB a process")
    for row in rows:
        peak, reserved = row.get("peak_gb", 0), row.get("reserved_gb", 0)
        grid = "" if row["status"] or row.get("grids", 1) else ", without its grid of samples"
        print(f"{peak:8.2f}  {reserved:8.2f}  {row['seconds']:7.1f}  {row['status']:6}  {row['stage']}{grid}")
    if any(row["status"] for row in rows):
        sys.exit(f"not every stage ended well; {work}/*.log say why")


if __name__ == "__main__":
    main()
