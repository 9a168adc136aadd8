"""How fast a store is read: ImageNet-shaped moments and features, in batches, from the page cache.

    taskset -c 0,1 python -m benchmarks.bench_data --out benchmarks/results/data.json

Makes a store of random moments (8×32×32 float16) and 768 float16 features, which leaves it in the page cache, then
takes seeded batches through `LatentDataset` as training does: by direct calls and by a DataLoader with 0, 1 and 2
workers, the tensors arriving in the training process. Before each is timed, some batches are compared with the same
rows of the files. The target is 30,000 samples/s on two cores.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset import FORMAT, LABELS, META, LatentDataset, StepSampler, layout
from memory.files import write_json
from memory.provenance import peak_memory, provenance

FEATURES = "random"
FILES = {"moments": "latents.npy", "feature": f"features/{FEATURES}.npy", "label": LABELS}  # of a batch's tensors
READERS = {"direct calls": None} | {f"DataLoader, {workers} workers": workers for workers in range(3)}
COMPARED = 3  # batches of each reader


def make_store(folder: Path, num_images: int) -> None:
    """Write a complete store of random finite moments and features; the content does not change the speed."""
    meta = {"format": FORMAT, "num_images": num_images, "num_views": 1, "image_size": 256, "image_channels": 3}
    meta["codec"] = {"name": "random", "moments_shape": [8, 32, 32], "dtype": "float16"}
    meta |= {"encoders": {FEATURES: {"dim": 768}}, "patches": {}, "has_images": False, "complete": True}
    meta |= {"views": ["original"], "fingerprint": "random"}
    rng = np.random.default_rng(0)
    for file, (shape, dtype) in layout(meta).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(folder / file, "w+", dtype, shape)
        for row in range(0, num_images, 4096):
            array[row : row + 4096] = 1000 * rng.random(array[row : row + 4096].shape, np.float32)  # labels differ, too
    write_json(folder / META, meta)


def read(folder: Path, sampler: StepSampler, workers: int | None) -> Iterable[dict]:
    """Batches at the sampler's addresses, by direct calls or by a DataLoader with `workers`."""
    dataset = LatentDataset(folder, FEATURES)
    if workers is None:
        return (dataset[address] for address in sampler)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)


def compare(batches: Iterable[dict], sampler: StepSampler, folder: Path) -> None:
    """AssertionError unless the batches are, bit for bit, what numpy reads of the same rows, one after the other."""
    files = {key: np.load(folder / file, mmap_mode="r") for key, file in FILES.items()}
    for batch, (step, rows, views) in zip(batches, sampler, strict=True):
        assert batch["step"] == step
        for key, file in files.items():
            expected = [file[row, view] if file.ndim > 1 else file[row] for row, view in zip(rows, views, strict=True)]
            assert np.array_equal(batch[key].numpy(), np.stack(expected)), f"step {step}: {key} is not what is stored"


def samples_per_second(batches: Iterable[dict], warm_up: int) -> float:
    """Rate of all batches after the first `warm_up`."""
    samples = 0
    for step, batch in enumerate(batches):
        if step == warm_up:
            begin = time.perf_counter()
        elif step > warm_up:
            samples += len(batch["moments"])
    return samples / (time.perf_counter() - begin)


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=131072, help="rows of the random store (18 KB each)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a batch")
    parser.add_argument("--steps", type=int, default=2048, help="batches to take; the first quarter is not timed")
    parser.add_argument("--folder", help="where to put the random store (default: the temporary directory)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    def addresses(stop: int) -> StepSampler:
        return StepSampler(arguments.num_images, arguments.batch_size, 1, seed=0, start=0, stop=stop)

    folder, rates = Path(tempfile.mkdtemp(dir=arguments.folder)), {}
    try:
        make_store(folder, arguments.num_images)
        for reader, workers in READERS.items():
            compare(read(folder, addresses(COMPARED), workers), addresses(COMPARED), folder)
            batches = read(folder, addresses(arguments.steps), workers)
            rates[reader] = round(samples_per_second(batches, arguments.steps // 4))
            print(f"{reader:24s} {rates[reader]:10,d} samples/s")
    finally:
        shutil.rmtree(folder)
    result = {
        "samples_per_second": rates,
        "batch_size": arguments.batch_size,
        "num_images": arguments.num_images,
        "peak_host_bytes": peak_memory()["host"],  # of this process, with the pages of the store that it maps
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
    }
    write_json(arguments.out, provenance(argv) | result)


if __name__ == "__main__":
    main()
