"""Time k-means at the size of a memory bank, by the command's own function, beside flash-kmeans and exact float32.

    python -m benchmarks.bench_kmeans --out benchmarks/results/kmeans.json                # 640,000 × 1,281,167 × 768
    torchrun --nproc-per-node 2 -m benchmarks.bench_kmeans …                               # rows shared by 2 GPUs
    python -m benchmarks.bench_kmeans --images 20000 --k 2000 --passes 10 --subset 2000    # on a CPU

Two kinds of random features, because what a pass can skip depends on the data: `noise` is isotropic; `mixture` has
classes and groups in it, with cosines of about 0.5 and 0.8 inside. A run is a first assignment and then passes, each an
update of the centroids and an assignment. In the table, in seconds: `first` is the first assignment and update, `pass`
all assignments and updates over the number of passes, `total` the whole function with its preparation, `search` one
assignment of this process's rows with nothing known beforehand, its rows (images) a second, its TFLOP/s for 2·N·K·F
operations and their share of what a float16 product of 8192³ reaches in the same run; `equal` is the share of rows of a
subset whose label is that of the plain float32 path, `inertia` their inertia over the plain path's. Before anything is
timed, labels of as many rows must be the plain path's. An iteration of flash-kmeans (PyPI) is timed where that is
installed. `--growth-k` and `--growth-images` repeat the run on `noise` at other sizes.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from memory.files import write_json
from memory.kmeans import assign, assign_plain, cosines, fused, kmeans, normalised
from memory.processes import share
from memory.provenance import provenance

BLOCK = 65536  # rows drawn at once, each block from a seed of its own
CLASSES = 1000


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167, help="N")
    parser.add_argument("--dim", type=int, default=768, help="F")
    parser.add_argument("--k", type=int, default=640_000, help="K")
    parser.add_argument("--passes", type=int, default=5, help="passes after the first assignment")
    parser.add_argument("--data", nargs="+", choices=["noise", "mixture"], default=["noise", "mixture"])
    parser.add_argument("--subset", type=int, default=65_536, help="rows compared with the plain path")
    parser.add_argument("--growth-k", type=int, nargs="*", default=[], help="other numbers of centroids to time")
    parser.add_argument("--growth-images", type=int, nargs="*", default=[], help="other numbers of rows to time")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args(argv)


def draw(kind: str, rows: range, dim: int, device: torch.device) -> torch.Tensor:
    """Rows (n, F) float16 of the endless data set of this kind, the same on any number of processes."""
    parts = []
    for block in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        generator = torch.Generator(device).manual_seed(block)
        part = torch.randn(BLOCK, dim, generator=generator, device=device)
        if kind == "mixture":  # groups of 8 rows on average, spread over all blocks
            shared = torch.Generator(device).manual_seed(10**6 + block // 8)
            groups = 0.8 * torch.randn(BLOCK, dim, generator=shared, device=device)
            classes = torch.randn(CLASSES, dim, generator=torch.Generator(device).manual_seed(2), device=device)
            chosen = torch.randint(BLOCK, (BLOCK,), generator=generator, device=device)
            part = classes[chosen % CLASSES] + groups[chosen] + 0.7 * part
        low, high = max(rows.start - block * BLOCK, 0), min(rows.stop - block * BLOCK, BLOCK)
        parts.append(part[low:high].half())
    return torch.cat(parts)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = now(device)
    work()
    return now(device) - begin


def ceiling(device: torch.device) -> float:
    """TFLOP/s of a product of two random matrices, 8192³ in float16 on a GPU, 1024³ in float32 on a CPU."""
    size, dtype, repeats = (8192, torch.float16, 100) if device.type == "cuda" else (1024, torch.float32, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(left, right)

    return 2 * size**3 * repeats / min(seconds(multiply, device) for _ in range(3)) / 1e12


def check(subset: int, k: int, dim: int, device: torch.device) -> None:
    """AssertionError unless the search that will be timed gives the plain path's labels; compiles it on the way."""
    kmeans(torch.randn(4096, dim, device=device), 64, 1)
    rows, centroids = (
        normalised(draw("noise", part, dim, device)) for part in (range(subset), range(subset, subset + k))
    )
    labels, plain = assign(rows, centroids), assign_plain(rows, centroids)
    assert torch.equal(labels, plain), f"{(labels != plain).sum()} labels of {subset} differ from the plain path's"


def time_kmeans(features: torch.Tensor, k: int, passes: int) -> tuple[dict, torch.Tensor]:
    """Seconds of each stage of one run, and its centroids (K, F)."""
    device = features.device
    stages: list[tuple[str, float]] = [("start", now(device))]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = kmeans(features, k, passes, on_stage=lambda stage: stages.append((stage, now(device))))
    took = [(stage, end - before[1]) for before, (stage, end) in itertools.pairwise(stages)]
    of = {name: [round(s, 3) for stage, s in took if stage == name] for name in ("assignment", "update")}
    row = {
        "preparation": round(took[0][1], 3),
        "assignments": of["assignment"],
        "updates": of["update"],
        "first_pass": round(of["assignment"][0] + sum(of["update"][:1]), 3),
        "mean_pass": round((sum(of["assignment"]) + sum(of["update"])) / max(passes, 1), 3),
        "total": round(now(device) - stages[0][1], 3),
        "inertia": result.inertia,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
    }
    return row, result.centroids


def compare(unit: torch.Tensor, centroids: torch.Tensor, subset: int, peak: float) -> dict:
    """One search of all rows with nothing known beforehand, and its labels against the plain path's on some rows."""
    device, some = unit.device, unit[:subset]
    assign(some, centroids)
    search = seconds(lambda: assign(unit, centroids), device)
    begin = now(device)
    plain = assign_plain(some, centroids)
    plain_seconds = now(device) - begin
    ours = assign(some, centroids)
    inertia = [(2 - 2 * cosines(some, centroids, label)).sum().item() for label in (ours, plain)]
    rate = 2 * len(unit) * len(centroids) * unit.shape[1] / search / 1e12
    return {
        "search": round(search, 3),
        "search_images_per_second": round(len(unit) / search, 1),
        "search_tflops": round(rate, 1),
        "search_share": round(rate / peak, 3),
        "subset_labels_equal": (ours == plain).double().mean().item(),
        "subset_inertia_ratio": inertia[0] / inertia[1] if inertia[1] else 1.0,
        "plain_search": round(plain_seconds * len(unit) / len(some), 3),
    }


def time_flash_kmeans(unit: torch.Tensor, centroids: torch.Tensor) -> float | None:
    """Seconds of one iteration of flash-kmeans in float16 on unit rows, where Euclidean and cosine order agree."""
    if unit.device.type != "cuda" or importlib.util.find_spec("flash_kmeans") is None:
        print("flash-kmeans is not timed: it needs a GPU and `pip install flash-kmeans`")
        return None
    from flash_kmeans import batch_kmeans_Euclid

    rows, start = unit.half()[None], centroids.half()[None]

    def iterate() -> None:
        batch_kmeans_Euclid(rows, len(centroids), max_iters=1, tol=-1.0, init_centroids=start)

    took = round(min(seconds(iterate, unit.device) for _ in range(2)), 3)  # the first one compiles for this size
    print(f"flash-kmeans: {took:.3f} s an iteration")
    return took


def main(argv: list[str] | None = None) -> None:
    """Time what the command line asks for, print a table and write JSON."""
    args = parse(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    device = state.device
    peak = ceiling(device)
    sizes = [(kind, args.images, args.k) for kind in args.data]
    sizes += [("noise", args.images, k) for k in args.growth_k] + [("noise", n, args.k) for n in args.growth_images]
    check(args.subset, args.k, args.dim, device)
    results = []
    say = print if state.is_main_process else lambda line: None
    say(f"{peak:.0f} TFLOP/s in a product of {'8192³' if device.type == 'cuda' else '1024³'}")
    say(
        "data          images       k   first    pass   total  search   images/s  TFLOP/s  share   GB   equal"
        "     inertia"
    )
    for place, (kind, images, k) in enumerate(sizes):
        features = draw(kind, share(images, state), args.dim, device)
        row, centroids = time_kmeans(features, k, args.passes)
        row = {"data": kind, "images": images, "dim": args.dim, "k": k, "passes": args.passes} | row
        unit = normalised(features)
        row |= compare(unit, centroids, args.subset, peak)
        if place == 0 and state.num_processes == 1:
            row["flash_kmeans_iteration"] = time_flash_kmeans(unit, centroids)
        results.append(row)
        say(
            f"{kind:8s} {images:11,d} {k:7,d} {row['first_pass']:7.3f} {row['mean_pass']:7.3f} {row['total']:7.3f} "
            f"{row['search']:7.3f} {row['search_images_per_second']:10,.0f} {row['search_tflops']:8.1f} "
            f"{row['search_share']:6.1%} {row['peak_gb'] or 0:4.1f} "
            f"{row['subset_labels_equal']:.5f} {row['subset_inertia_ratio']:.9f}"
        )
        del features, unit, centroids
    if args.out and state.is_main_process:
        result = {"rows": results, "path": "fused" if fused(device) else "plain", "ceiling_tflops": round(peak, 1)}
        made = provenance(argv, state.num_processes)
        if importlib.util.find_spec("flash_kmeans"):
            made["versions"]["flash-kmeans"] = importlib.metadata.version("flash-kmeans")
        write_json(args.out, {**result, **made})
    state.destroy_process_group()


if __name__ == "__main__":
    main()
