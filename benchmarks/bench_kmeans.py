"""Time k-means on random features, by the command's own function.

python -m benchmarks.bench_kmeans --images 20000 --dim 768 --k 2000 --passes 10 --out benchmarks/results/kmeans.json
"""

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import torch

from memory.files import write_json
from memory.kmeans import kmeans


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time k-means on random features.")
    parser.add_argument("--images", type=int, default=20_000, help="N")
    parser.add_argument("--dim", type=int, default=768, help="F")
    parser.add_argument("--k", type=int, default=2_000, help="K")
    parser.add_argument("--passes", type=int, default=10, help="passes after the first assignment")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(args.k // 2 + 1, args.dim, generator=generator, device=device)
    chosen = torch.randint(len(centres), (args.images,), generator=generator, device=device)
    noise = torch.randn(args.images, args.dim, generator=generator, device=device)
    features = (centres[chosen] + noise).half()  # clumps, so that passes have something to move
    begin = time.perf_counter()
    inertia = kmeans(features, args.k, args.passes).inertia
    seconds = time.perf_counter() - begin
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    result = {
        "seconds": round(seconds, 2),
        "images": args.images,
        "dim": args.dim,
        "k": args.k,
        "passes": args.passes,
        "inertia": inertia,
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    print(result)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
