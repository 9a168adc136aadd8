"""How long the evaluation of 50,000 images takes, and in how much memory: the real command, on random data.

    python -m benchmarks.bench_evaluate --gpus 1 2 --work DIR --out benchmarks/results/evaluate-h200.json
    taskset -c 0,1 python -m benchmarks.bench_evaluate --cpu-images 1000 --work DIR --out FILE

Makes random weights in the layout of the published Inception file, smooth random images of 256×256 (an npz of 9.8 GB
for 50,000), and a reference in ADM's layout, statistics with images; then runs `evaluations.evaluator` for the five
metrics and KID: on each number of GPUs without the reference's features from an earlier run, or on the CPU
(`--cpu-images`) both without and with. Before anything is timed, a GPU's features of some images are compared with the
CPU's. Seconds are those of the whole command, start-up included, and of its work alone; memory is that of the first
process.

Embedding is also timed by itself: the command's network on one batch of its size that lies on the device. TFLOP/s count
this network alone, each convolution as the sums that define it. Ceilings are products of random matrices in the same
run, 8192×8192 on a GPU and 256×256 on a CPU: in bf16, as for the other benchmarks, and in float32 without tf32, in
which this network computes. `embedding_share` is the part of the command's work that embedding would take at this rate,
of the samples and, unless its features were kept, of the reference.

All runs must agree: distances and score to 1e-6 of their value, shares and KID to 1e-4, since one image at the rim of a
manifold may fall on its other side. Targets: 60 s and 3 GB of main memory on one H100, and five minutes for 1,000
images on two CPU cores.
"""

import argparse
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.bench_train import ceiling, difference, operations, seconds_a_step, show
from evaluations import evaluator
from evaluations.card import table
from evaluations.inception import WEIGHTS, Features, Inception
from evaluations.reference import MOMENTS
from memory.files import read_json, write_json
from memory.kmeans import full_precision
from memory.provenance import provenance

SIDE = 256
CHECKED, TOLERANCE = 16, 1e-3  # images, and the largest relative error of a GPU's features
BATCH = 500  # images made at once
AGREE = {"FID": 1e-6, "sFID": 1e-6, "Inception Score": 1e-6, "Precision": 1e-4, "Recall": 1e-4, "KID": 1e-4}


def make_weights(path: Path) -> None:
    """Random weights by the names and shapes of the published file, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    loading = mock.patch.object(torch, "load", return_value={})
    taking = mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict")
    with torch.device("meta"), loading, taking:
        state = FeatureExtractorInceptionV3("any", ["2048"], "none").state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            scale = (2 / value[0].numel()) ** 0.5 * (10 if name == "fc.weight" else 1)
            state[name] = torch.randn(value.shape, generator=generator) * scale
        else:
            filled = torch.zeros if name.endswith(("mean", "tracked", "bn.bias")) else torch.ones
            state[name] = filled(value.shape, dtype=value.dtype)
    state["fc.bias"] = torch.randn(1008, generator=generator)
    torch.save(state, path)


def make_images(path: Path, count: int, seed: int, moments: bool) -> None:
    """An npz of smooth random images, written as they are made, with random statistics in ADM's layout if asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in MOMENTS.items() if moments else ():
            points = random.standard_normal((2 * shape[0], shape[0]), np.float32)
            with archive.open(f"{name}.npy", "w") as file:
                value = points.mean(0) if len(shape) == 1 else points.T @ points / len(points)
                np.lib.format.write_array(file, value.astype(np.float64), allow_pickle=False)
        with archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor(1) as thread:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            writing = None  # the batch before, its checksum and the disk
            for start in range(0, count, BATCH):
                shape = (min(BATCH, count - start), 3, 8, 8)
                coarse = torch.randint(256, shape, generator=generator, device=device).float()
                images = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
                images = images.clamp(0, 255).byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
                pixels = images.contiguous().cpu().numpy()
                if writing:
                    writing.result()
                writing = thread.submit(file.write, pixels)
            writing.result()


def check(weights: Path) -> dict[str, float]:
    """Relative errors of a GPU's features of random images, against the CPU's; AssertionError beyond TOLERANCE."""
    images = torch.randint(256, (CHECKED, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here, there = (Inception(weights, device)(images.to(device)) for device in ("cpu", "cuda"))
    errors = {}
    for name, plain, given in zip(Features._fields, here, there, strict=True):
        errors[name] = difference([given.cpu()], [plain])
        assert errors[name] < TOLERANCE, (name, errors[name])
    return errors


def embedding(weights: Path, count: int, device: torch.device) -> dict[str, float]:
    """Speed and memory of the command's network alone, on a batch of its size, or of `count` if that is less."""
    peak = ceiling(device)
    with full_precision():
        float32_peak = ceiling(device, torch.float32)
    network = Inception(weights, device)
    batch = min(count, evaluator.batch_size_of(argparse.Namespace(batch_size=None), device))
    images = torch.randint(256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    flops = operations(network, images[:1])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    network(images)
    speed = batch / seconds_a_step(lambda: network(images), 10 if on_gpu else 1)
    tflops = speed * flops / 1e12
    return {
        "batch": batch,
        "images_per_second": speed,
        "operations_an_image": flops,
        "tflops": tflops,
        "ceiling_tflops": peak,
        "share_of_ceiling": tflops / peak,
        "float32_ceiling_tflops": float32_peak,
        "share_of_float32_ceiling": tflops / float32_peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the evaluation of many images.")
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for images and weights (12 GB for 50,000 images)")
    add("--out", type=Path, required=True, help="JSON file of the results")
    add("--images", type=int, default=50_000, help="samples to score on GPUs")
    add("--reference-images", type=int, default=10_000, help="images of the reference")
    add("--gpus", type=int, nargs="+", default=[1], help="numbers of processes, one run each")
    add("--cpu-images", type=int, metavar="N", help="score N images on the CPU instead, against a reference of N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the data, run the command, print a table."""
    args = parse(argv)
    on_cpu = args.cpu_images is not None
    count, references = (args.cpu_images,) * 2 if on_cpu else (args.images, args.reference_images)
    args.work.mkdir(parents=True, exist_ok=True)
    weights, samples, reference = (args.work / name for name in (WEIGHTS, "samples.npz", "reference.npz"))
    make_weights(weights)
    with ThreadPoolExecutor(2) as threads:  # the checksums of both files take seconds
        made = [threads.submit(make_images, samples, count, 0, False)]
        made.append(threads.submit(make_images, reference, references, 1, True))
        for done in made:
            done.result()

    rows, metrics = [], []
    device = torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    errors = check(weights) if device.type == "cuda" else {}
    alone = embedding(weights, count, device)
    torch.cuda.empty_cache()  # the commands share the GPU with this process

    def run(title: str, embedded: int, processes: int, *options: str) -> None:
        """Run the command, which embeds so many images, and note its time, its memory and its metrics."""
        out = args.work / "result.json"
        command = [sys.executable, "-m", "evaluations.evaluator"]
        if processes > 1:
            launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
            command = [sys.executable, "-m", *launcher, "-m", "evaluations.evaluator"]
        command += map(str, (reference, samples, "--inception", weights, "--out", out, *options))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        print("+", *command[1:], flush=True)
        begin = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | hidden)
        seconds = time.perf_counter() - begin
        result = read_json(out)
        metrics.append(result["metrics"])
        work = result["run"]["seconds"]
        cpus = len(os.sched_getaffinity(0))
        peak = result["run"]["peak_memory"]
        rows.append(
            {
                "what": title,
                "processes": processes,
                "images": count,
                "seconds": round(seconds, 2),
                "seconds_of_work": work,
                "images_per_second": round(count / seconds, 1),
                "embedding_share": round(embedded / processes / alone["images_per_second"] / work, 3),
                "host_memory_gb": round(peak["host"] / 1e9, 2),
                "gpu_memory_gb": round(peak["gpu"] / 1e9, 2),
            }
        )
        facts = {"rows": rows, "embedding": alone, "metrics": metrics, "errors": errors}
        write_json(args.out, facts | {"reference_images": references, "cpus": cpus} | provenance(argv, processes))

    if on_cpu:
        run("reference and samples", references + count, 1)
        run("the reference's features kept", count, 1)
    for processes in () if on_cpu else args.gpus:
        run("reference and samples", references + count, processes, "--no-cache")
    columns = {"batch": "", "images_per_second": ".1f", "tflops": ".1f", "share_of_ceiling": ".1%"}
    print("embedding alone")
    show([alone], columns | {"share_of_float32_ceiling": ".1%", "peak_gb": ".2f"})
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))
    for other in metrics[1:]:
        for name, most in AGREE.items():
            one, two = metrics[0][name], other[name]
            assert abs(one - two) <= most * max(1.0, abs(one)), f"{name}: {one}, and {two} on another number of GPUs"


if __name__ == "__main__":
    main()
