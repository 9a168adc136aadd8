"""Images to a store: what training, bank and evaluation read. The same command again continues where it stopped.

    python -m scripts.encode_dataset SOURCE --out data/NAME --codec sd-vae-ft-mse --encoder dinov2-vitb14 --holdout 0.05
    torchrun --nproc-per-node 8 -m scripts.encode_dataset …the same…
    python -m scripts.encode_dataset SOURCE --out data/NAME --add ENCODER

SOURCE is a folder of class folders (labels by their sorted names) or of images, a zip or tar of such (labels from
dataset.json where there is one; ImageNet's own ILSVRC2012_img_train.tar, a tar of tars, is one too), an npz (`arr_0` or
`images`, uint8 NHWC, with or without `labels`), or idx files as Fashion-MNIST's (a folder with
train-images-idx3-ubyte.gz, or one such file; labels are looked for beside it). Images are cropped and resized as ADM
does, which ignores EXIF orientations: --upright is for photos from phones and cameras. idx images that are a little
smaller than --image-size get a black frame instead (28 to 32).
A codec of one channel takes luminance; other grey images are repeated to three, except that `pixels` keeps idx and npz
images of one channel as they are.

An image that cannot be read is reported at once, and again, counted and named, as an error when all others are written.
The same command with --skip-broken then leaves such images out and finishes without encoding anything again.

On a GPU the networks run in bfloat16, on batches of one shape, while workers decode the next images and the last
results are written; benchmarks/bench_encode.py says how fast, what bounds it and what the rounding is. Batches are the
same for any number of processes, so the store is too: bit for bit on a CPU of one kind, up to rounding on a GPU.
"""

import argparse
import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import ExifTags
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import FORMAT, LABELS, META, NAMES, PROGRESS, holdout_path, layout, read_meta
from memory.claim import claimed
from memory.command import execute
from memory.files import free_space, read_json
from memory.processes import from_main, join, share
from memory.provenance import provenance
from models.autoencoder import Codec, load_codec
from models.encoder import Encoder, load_encoder
from models.kernels import default_precision, fitting
from scripts.images import UNREADABLE, square
from scripts.sources import Source, open_source
from scripts.store import PART, Job, Progress, Writer

SAVE_SECONDS = 30  # between two notes of what is written: the most that a killed run repeats
LOOKED_AT = 32  # images of a source that are looked at beforehand
LARGE_BYTES = 100e9  # patch tokens beyond this get a warning
COMPILE_FROM = 30_000  # images a process, from which a minute of compiling is worth it
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MADE = {"source_hash": str, "holdout": {"part": str, "fraction": float}, "precision": str, "upright": bool}
PATIENCE = datetime.timedelta(days=7)  # processes wait for each other this long: shares may differ by hours


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, zip, tar, npz or idx file of images")
    add("--out", required=True, type=Path, help="folder of the store; held-out images go to the same name + -holdout")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--codec", help="sd-vae-ft-mse, sd-vae-ft-ema, pixels, or a folder with an AutoencoderKL")
    what.add_argument("--add", metavar="ENCODER", help="add this encoder's features to the store and its held-out part")
    add("--encoder", help="whose features to store, such as dinov2-vitb14 (default: a store without features)")
    add("--encoder-weights", type=Path, help="local file with the encoder's weights")
    add("--image-size", type=int, default=256, help="side of the square images in pixels (default 256)")
    add("--views", type=int, default=1, choices=(1, 2), help="1: the original (default); 2: also its mirror image")
    add("--holdout", type=float, default=0.0, help="fraction held out, by the hash of the file name (default 0)")
    add("--keep-images", action="store_true", help="store the uint8 images, for an alignment encoder run online")
    add("--patches", action="store_true", help="store the encoder's patch tokens too (0.5 TB and more on ImageNet)")
    add("--upright", action="store_true", help="turn images as their EXIF orientation says (ADM does not)")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add("--precision", choices=PRECISIONS, help="of the networks (default: bf16 on a GPU that has it, else fp32)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"compile the networks (default: on a GPU, from {COMPILE_FROM:,} images a process on)",
    )
    add("--batch-size", type=int, default=64, help="images encoded at once by each process (default 64)")
    add(
        "--workers", type=int, help="processes that decode images ahead, for each process (default: its share of cores)"
    )
    args = parser.parse_args(argv)
    if args.add:
        fixed = ("encoder", "image_size", "views", "holdout", "keep_images", "upright", "skip_broken", "precision")
        given = [f"--{name.replace('_', '-')}" for name in fixed if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"--add takes everything but the encoder from the store: leave out {', '.join(given)}")
    elif not args.encoder and (args.patches or args.encoder_weights):
        parser.error("--patches and --encoder-weights need --encoder (or --add)")
    if args.image_size < 1 or args.batch_size < 1 or (args.workers or 0) < 0:
        parser.error("--image-size and --batch-size must be at least 1, --workers at least 0")
    if not 0 <= args.holdout < 1:
        parser.error(f"--holdout {args.holdout:g}: expected a fraction of at least 0 and below 1, as 0.05")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
        args.workers = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return args


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    args, state = parse(argv), join(PATIENCE)
    if args.add:
        made = read_made(args.out)
        args.precision, args.upright = made["precision"], made["upright"]
    args.precision = args.precision or default_precision()
    source = from_main(state, lambda: open_source(args.source))
    source.upright = args.upright
    with state.local_main_process_first():  # so that one process downloads what is not in the cache
        place = {"device": state.device, "dtype": PRECISIONS[args.precision]}
        codec = load_codec(args.codec, **place, channels=1 if source.grey else 3) if args.codec else None
        name = args.encoder or args.add
        encoder = load_encoder(name, args.encoder_weights, **place) if name else None

    jobs = jobs_to_add(args, source, encoder) if args.add else new_jobs(args, source, codec, encoder)
    with contextlib.ExitStack() as claims:
        for job in jobs:
            claims.enter_context(claimed("--out", job.path, state.is_main_process))
        begun = from_main(state, lambda: prepare(jobs, source))
        jobs = [(job, progress.done) for job, progress in zip(jobs, begun, strict=True) if progress]
        left = sum((~done).sum() for _, done in jobs) // state.num_processes
        speed_up(codec, encoder, args.compile, left, state.device)
        for job, done in jobs:
            encode_job(job, done, source, codec, encoder, args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            finish([job for job, _ in jobs], source, args.skip_broken, provenance(argv, state.num_processes))
    state.destroy_process_group()


def speed_up(
    codec: Codec | None, encoder: Encoder | None, compiled: bool | None, images: int, device: torch.device
) -> None:
    """Prepare the networks for `images` images in batches of one shape; `compiled` None: if it is worth it."""
    torch.backends.cudnn.allow_tf32 = False  # so that fp32 is what it says
    if compiled or (compiled is None and device.type == "cuda" and images >= COMPILE_FROM):
        if codec:
            codec.compile_encoder()
        if encoder:
            encoder.compile()


def new_jobs(args: argparse.Namespace, source: Source, codec: Codec, encoder: Encoder | None) -> list[Job]:
    """The store, and the held-out one, that a command line describes."""
    codec_meta = codec.meta(args.image_size)
    classes = None if source.labels is None else int(source.labels.max()) + 1
    meta = {
        "format": FORMAT,
        "num_views": args.views,
        "views": ["original", "mirrored"][: args.views],
        "image_size": args.image_size,
        "image_channels": codec_meta["image_channels"],
        "upright": args.upright,
        "precision": args.precision,
        "codec": codec_meta,
        "encoders": {encoder.name: encoder.meta()} if encoder else {},
        "patches": {encoder.name: token_shape(encoder)} if args.patches else {},
        "has_images": args.keep_images,
        "num_classes": classes,
        "class_names": source.class_names,
        "source": str(source.path),
        "source_hash": source.hash,
    }
    held = np.array([name_fraction(name) < args.holdout for name in source.names])  # (N,)
    jobs = []
    for part, path, chosen in (("training", args.out, ~held), ("holdout", holdout_path(args.out), held)):
        if part == "holdout" and args.holdout == 0:
            continue
        rows = np.flatnonzero(chosen)
        if len(rows) == 0:
            raise ValueError(
                f"--holdout {args.holdout} of {len(held)} images leaves no {part} image: change the fraction"
            )
        part_meta = meta | {"num_images": len(rows), "holdout": {"fraction": args.holdout, "part": part}}
        jobs.append(Job(path, rows, part_meta, [file for file in layout(part_meta) if file != LABELS]))
    return jobs


def jobs_to_add(args: argparse.Namespace, source: Source, encoder: Encoder) -> list[Job]:
    """What is missing of an encoder's features (and patch tokens) in a store and its held-out part."""
    meta = read_made(args.out)
    split = meta["holdout"]["part"] == "training" and meta["holdout"]["fraction"] > 0
    number, jobs = {name: i for i, name in enumerate(source.names)}, []
    for path in (args.out, holdout_path(args.out)) if split else (args.out,):
        meta = read_made(path)
        if meta["source_hash"] != source.hash:
            raise ValueError(f"{path} was made from other images than {source.path} now holds: name its own source")
        present = meta["encoders"].get(encoder.name, encoder.meta())
        if present != encoder.meta():
            raise ValueError(f"{path} has features of another {encoder.name!r}: {present}, not {encoder.meta()}")
        wanted = meta | {"encoders": meta["encoders"] | {encoder.name: encoder.meta()}}
        if args.patches:
            wanted["patches"] = meta["patches"] | {encoder.name: token_shape(encoder)}
        files = [file for file in layout(wanted) if file not in layout(meta)]
        if files:
            names = (path / NAMES).read_bytes().decode(errors="surrogateescape").rstrip("\n").split("\n")
            jobs.append(Job(path, np.array([number[name] for name in names]), wanted, files, extends=True))
    return jobs


def read_made(path: Path) -> dict:
    """A store's meta.json with what --add reads of how it was made."""
    return read_meta(path) | read_json(path / META, **MADE)


def name_fraction(name: str) -> float:
    """A name's place in [0, 1), by its SHA-256: the same whatever else is in the source."""
    return int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:13], 16) / 16**13


def token_shape(encoder: Encoder) -> list[int]:
    """[T, F] of an encoder's patch tokens."""
    image = torch.zeros(1, 3, encoder.input_size, encoder.input_size, dtype=torch.uint8)
    return list(encoder(image, return_patches=True)[1].shape[1:])


def prepare(jobs: list[Job], source: Source) -> list[Progress | None]:
    """Check the folders, print what will be written, reserve the disk; what earlier runs have done of each job, or None
    where nothing is left to do."""
    begun = [job.begun() for job in jobs]
    pending = [job for job, progress in zip(jobs, begun, strict=True) if progress]
    classes = "no labels" if source.labels is None else f"{source.labels.max() + 1} classes"
    print(f"{source.path}: {len(source.names):,} images, {classes}")
    sides, turned = look(source)
    if turned:
        print(
            f"note: EXIF turns {turned} of {LOOKED_AT} images looked at, which ADM ignores; add --upright to turn them"
        )
    if not pending:
        print("the store is complete: nothing to do")
        return begun
    size = pending[0].meta["image_size"]
    width, height = max(sides, key=max, default=(size, size))
    if 2 * max(width, height) < size and not pending[0].extends:  # --add takes the size that there is
        fits = -(-max(width, height) // 8) * 8
        enlarged = f"images are {width}×{height} and are enlarged to --image-size {size}"
        print(f"warning: {enlarged}; --image-size {fits} would be cheaper")
    sizes = {job.path / file: size for job in pending for file, size in job.sizes().items()}
    for path, size in sizes.items():
        print(f"  {path}: {size / 1e9:.3f} GB")
    missing = sum(size for path, size in sizes.items() if not path.exists())
    free = free_space(pending[0].path)
    print(f"disk needed: {missing / 1e9:.3f} GB, free: {free / 1e9:.3f} GB", flush=True)
    tokens = sum(size for path, size in sizes.items() if path.parent.name == "patches")
    if tokens > LARGE_BYTES:
        print(f"warning: patch tokens alone take {tokens / 1e12:.2f} TB; --keep-images takes less and runs them online")
    if missing > free:
        raise ValueError(
            f"--out {pending[0].path} needs {missing / 1e9:.3f} GB more, its disk has {free / 1e9:.3f} GB free: "
            "make room or choose another folder"
        )
    for job, progress in zip(jobs, begun, strict=True):
        if progress:
            job.reserve()
            if progress.done.any():
                print(f"{job.path}: continuing, {progress.done.sum():,} of {len(job.rows):,} images are written")
    return begun


def look(source: Source) -> tuple[list[tuple[int, int]], int]:
    """Width and height of LOOKED_AT images, evenly spread, and how many of them their EXIF orientation would turn or
    mirror."""
    sides, turned = [], 0
    for index in np.linspace(0, len(source.names) - 1, LOOKED_AT).astype(int):
        with contextlib.suppress(*UNREADABLE):  # they are reported when they are encoded
            image = source.image(index)
            sides.append(image.size)
            turned += image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return sides, turned


class Blocks(Dataset):
    """Blocks of consecutive rows of a job as uint8 images: (first row, (B, c, size, size), {row: reason} of those that
    cannot be read and are zeros). What the decoding processes run."""

    def __init__(self, source: Source, job: Job, blocks: list[tuple[int, int]]):
        self.source, self.rows, self.blocks = source, job.rows, blocks
        self.channels, self.size = job.meta["image_channels"], job.meta["image_size"]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> tuple[int, Tensor, dict[int, str]]:
        begin, end = self.blocks[number]
        images = np.zeros((end - begin, self.channels, self.size, self.size), np.uint8)
        broken = {}
        for row in range(begin, end):
            try:
                image = self.source.image(self.rows[row])
            except UNREADABLE as error:
                broken[row] = f"{type(error).__name__}: {error}"
                continue
            images[row - begin] = square(image, self.size, self.channels, self.source.on_black)
        return begin, torch.from_numpy(images), broken


def blocks_to_do(done: np.ndarray, batch_size: int) -> list[tuple[int, int]]:
    """Half-open intervals of rows not yet done, cut at multiples of the batch size: the same batches for any number of
    processes and any point at which a run was stopped, so that rounding in the networks is the same too."""
    rows = np.flatnonzero(~done)
    cuts = np.flatnonzero((np.diff(rows) > 1) | (np.diff(rows // batch_size) > 0)) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, cuts) if len(part)]


def encode_job(
    job: Job,
    done: np.ndarray,
    source: Source,
    codec: Codec | None,
    encoder: Encoder | None,
    args: argparse.Namespace,
    state: PartialState,
) -> None:
    """Encode and write this process's share of the rows that are not done, noting progress now and then."""
    blocks = blocks_to_do(done, args.batch_size)
    blocks = [blocks[number] for number in share(len(blocks), state)]
    cuda = state.device.type == "cuda"
    loader = DataLoader(Blocks(source, job, blocks), batch_size=None, num_workers=args.workers, pin_memory=cuda)
    results = encoded(loader, job, codec, encoder, args.batch_size, state.device)
    progress, note = Progress(np.zeros_like(done)), job.path / PROGRESS / PART.format(state.process_index)
    writer, begun = Writer(job), time.monotonic()
    saved = begun
    total = sum(end - begin for begin, end in blocks)
    label = f"{job.path.name}, process {state.process_index + 1} of {state.num_processes}"
    with tqdm(total=total, unit="img", desc=label, disable=not state.is_main_process) as bar:
        for begin, arrays, whole, broken in results:
            count = len(next(iter(arrays.values())))
            names = [source.names[row] for row in job.rows[begin : begin + count]]
            check_finite(whole, names)
            writer.write(begin, {file: values.numpy() for file, values in arrays.items()})
            progress.done[begin : begin + count] = True
            progress.broken |= broken
            for row, reason in broken.items():
                tqdm.write(f"cannot read {names[row - begin]} ({reason})")
            bar.update(count)
            if time.monotonic() - saved > SAVE_SECONDS:
                writer.flush()
                saved = time.monotonic()
                progress.seconds = saved - begun
                progress.save(note)
    writer.close()
    progress.seconds = time.monotonic() - begun
    progress.save(note)


Encoded = tuple[int, dict[str, Tensor], dict[str, Tensor], dict[int, str]]


def encoded(
    loader: DataLoader, job: Job, codec: Codec | None, encoder: Encoder | None, batch_size: int, device: torch.device
) -> Iterator[Encoded]:
    """(first row, arrays (B, V, …) by file name, (B,) whether each is finite, broken rows) of every block, on the CPU.

    A GPU is never waited for: while it works on a block, the one before is copied and handed out. There every block is
    filled up to `batch_size`, so that the networks see one shape.
    """
    before = None
    for begin, images, broken in loader:
        count, cuda = len(images), device.type == "cuda"
        images = images.to(device, non_blocking=True)
        if cuda and count < batch_size:
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
        arrays = {file: values[:count] for file, values in encode(images, job, codec, encoder).items()}
        whole = {file: finite(values) for file, values in arrays.items()}
        arrays, whole = (
            {file: values.to("cpu", non_blocking=True) for file, values in group.items()} for group in (arrays, whole)
        )
        copied = torch.cuda.Event(blocking=True) if cuda else None
        if copied:
            copied.record()
        if before:
            yield arrived(*before)
        before = copied, (begin, arrays, whole, broken)
    if before:
        yield arrived(*before)


def arrived(copied: torch.cuda.Event | None, result: Encoded) -> Encoded:
    """The result, once its copy to the CPU is complete."""
    if copied:
        copied.synchronize()
    return result


def finite(values: Tensor) -> Tensor:
    """(B,) bool: whether all values of an image are finite."""
    return torch.isfinite(values).flatten(1).all(1)


@torch.no_grad()
def encode(images: Tensor, job: Job, codec: Codec | None, encoder: Encoder | None) -> dict[str, Tensor]:
    """The arrays of a job for uint8 images (B, c, H, W): (B, V, …) by file name. All views go through the networks
    together, and a mirrored view is the mirrored pixels for both of them."""
    views = [images, images.flip(-1)][: job.meta["num_views"]]
    pixels = torch.stack(views, 1).flatten(0, 1)  # (B·V, c, H, W)
    outputs = {}
    if codec:
        outputs["latents.npy"] = codec.encode(pixels)
    if encoder:
        tokens = f"patches/{encoder.name}.npy"
        features = encoder(pixels, return_patches=tokens in job.files)
        if tokens in job.files:
            features, outputs[tokens] = features[0], features[1].half().contiguous()  # not on the host
        outputs[f"features/{encoder.name}.npy"] = features.half()
    outputs = {file: values.unflatten(0, (len(images), -1)) for file, values in outputs.items()}  # (B, V, …)
    outputs["images.npy"] = images
    return {file: outputs[file] for file in job.files}


def check_finite(whole: dict[str, Tensor], names: list[str]) -> None:
    """Raise ValueError, naming the images, where `finite` found a value that is NaN, infinite, or beyond float16."""
    for file, good in whole.items():
        wrong = (~good).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{file}: NaN, infinity or a value beyond float16 for {listed([names[i] for i in wrong])}. "
                "Look at these images and at the weights of the network that made them, or change --precision"
            )


def listed(items: list[str]) -> str:
    """The first ten of a list, and how many more there are."""
    return ", ".join(items[:10]) + (f" and {len(items) - 10:,} more" if len(items) > 10 else "")


def finish(jobs: list[Job], source: Source, skip_broken: bool, made: dict) -> None:
    """Complete the stores, or raise ValueError naming the images that could not be read."""
    progress = [Progress.merged(job.path / PROGRESS, len(job.rows)) for job in jobs]
    broken = [
        f"{source.names[job.rows[row]]} ({reason})"
        for job, part in zip(jobs, progress, strict=True)
        for row, reason in sorted(part.broken.items())
    ]
    if broken and not skip_broken:
        remedy = "restore them" if any(job.extends for job in jobs) else "add --skip-broken to leave them out"
        raise ValueError(
            f"{len(broken)} of {sum(len(job.rows) for job in jobs):,} images of {source.path} cannot be read: "
            f"{listed(broken)}. The others are encoded; {remedy}, and run the same command again to finish"
        )
    for job, part in zip(jobs, progress, strict=True):
        if len(part.broken) == len(job.rows):
            raise ValueError(f"no image for {job.path} can be read: {listed(broken)}")
        job.finish(part, source, made)
        print(f"{job.path}: {len(job.rows) - len(part.broken):,} images, complete")


if __name__ == "__main__":
    execute(main)
