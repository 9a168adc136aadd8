"""How long saving a full training state takes, on the disk of a given folder; `Trainer.save` is what is timed.

    python -m benchmarks.bench_save --work DIR --out FILE

A scheduler must warn training by as many seconds before it ends a job, and one step more (`--signal` in
scripts/slurm.sh). The same bytes are also written plainly and flushed: what the disk itself takes of that.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench_train import make_data, make_trainer, synchronize
from memory.files import write_json
from memory.provenance import provenance
from models.kernels import fast_attention
from models.sit import SiT_models

CHUNK = 1 << 24  # bytes of a plain write


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds, the device idle before and after."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def write_plainly(path: Path, size: int) -> None:
    """Write and flush `size` bytes that no disk compresses, then remove them."""
    block = os.urandom(CHUNK)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    path.unlink()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the saving of a full training state.")
    parser.add_argument("--model", default="SiT-XL/2", choices=SiT_models, metavar="NAME", help="a preset")
    parser.add_argument("--times", type=int, default=3, help="how often, each time beside the state before")
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to write to")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        folder = Path(folder)
        make_data(folder, images=64)
        trainer = make_trainer(folder, args.model, 4, ["--no-compile", "--workers", "0", "--keep", "1"])
        trainer.prepare()
        with fast_attention(trainer.device):
            trainer.train_step(next(trainer.batches()))  # AdamW has no moments before
        saves = []
        for _ in range(args.times):
            saves.append(seconds(trainer.save))
            [saved] = trainer.folder.checkpoints
            size = saved.stat().st_size
            print(f"{args.model}: {size / 1e9:.2f} GB saved in {saves[-1]:.1f} s", flush=True)
            trainer.step += 1
        plain = seconds(lambda: write_plainly(folder / "plain", size))
    print(f"as many bytes written plainly: {plain:.1f} s")
    facts = {"model": args.model, "bytes": size, "save_seconds": saves, "plain_write_seconds": plain}
    write_json(args.out, facts | {"provenance": provenance(argv)})


if __name__ == "__main__":
    main()
