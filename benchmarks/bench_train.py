"""How fast train.py trains: images/s, TFLOP/s, share of the matrix-product ceiling and memory, on random data.

    python -m benchmarks.bench_train --reference --profile --out benchmarks/results/train.json
    python -m benchmarks.bench_train --image-size 512 --batches 8 32 --out benchmarks/results/train-512.json
    python -m benchmarks.bench_train --memory --batches 16 32 --out benchmarks/results/train-memory.json
    torchrun --nproc-per-node 2 -m benchmarks.bench_train --batches 64 --profile --exchange 25 25:24:8 --out FILE

The steps are `train.Trainer`'s own, on a random store and bank. Before anything is timed, the loss and the gradients of
one step are compared with plain float32 on the same device. Floating-point operations are counted on the plain network,
three times a forward pass; the ceiling is a bf16 product of two random 8192×8192 matrices in the same run.
Batches come from train.py's own loader, out of files in the page cache; `--resident` also times them out of the GPU's
memory, which holds the random store and bank, not ones of ImageNet's size.
Batches are images a process. Under torchrun the steps are also timed without exchanging gradients, the slowest process
counts, and `--exchange` times buckets of so many MB, exchanged by at most so many of NCCL's blocks of threads, so many
of which, 8 at most, lie side by side on the GPU (as 24 blocks in clusters of 4, which is NCCL's choice on Hopper).
":bf16" rounds what is exchanged, which halves it; train.py does not. `--align` also times the alignment term, whose
encoder runs on the store's images.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.path import make_encoder
from dataset import FORMAT, META, layout
from loss import FlowMatchingLoss, draw
from memory.bank import MemoryBank
from memory.files import write_json
from memory.pairs import Pairs
from memory.provenance import provenance
from models.encoder import recipe_of
from models.kernels import fast_attention
from models.replay import WARM_STEPS, Replay
from models.sit import SiT_models

CHANNELS, PIXELS = 4, 8  # of a latent, and of an image for each of a latent's numbers in a row
SNIPPET_DIM, SNIPPETS = 768, 1024
LIMIT = 22 * 2**30  # bytes that --memory leaves to a run: a card of 24 GB
GROUPS = {  # kinds of kernels, by words in their names; the first that matches counts
    "communication": ("nccl",),
    "attention": ("flash", "sdpa", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam", "update"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "copies": ("memcpy", "memset"),
    "norm, pointwise": ("",),
}
EXCHANGE = r"\d+(\.\d+)?(:\d+){0,2}(:bf16)?"  # MB[:BLOCKS[:CLUSTER]][:bf16]


def make_data(folder: Path, images: int, image_size: int = 256, with_images: bool = False) -> None:
    """A store of random moments and features, on request also of images, and a random bank that was assigned to it."""
    side = [image_size // PIXELS] * 2
    codec = {"name": "random", "scale": 0.18215, "shift": 0.0, "latent_shape": [CHANNELS, *side]}
    codec |= {"moments_shape": [2 * CHANNELS, *side]}
    meta = {"format": FORMAT, "num_images": images, "num_views": 1, "views": ["original"], "image_size": image_size}
    meta |= {"codec": codec | {"dtype": "float16", "image_channels": 3, "sha256": None}, "image_channels": 3}
    meta |= {
        "encoders": {"random": {"dim": SNIPPET_DIM}},
        "patches": {},
        "has_images": with_images,
        "num_classes": 1000,
    }
    random = np.random.default_rng(0)
    for file, (shape, dtype) in layout(meta).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pixels = dtype == np.uint8
        np.save(
            folder / file,
            random.integers(256, size=shape, dtype=dtype) if pixels else random.random(shape, np.float32).astype(dtype),
        )
    write_json(folder / META, meta | {"fingerprint": "random", "complete": True})
    assignment = torch.from_numpy(random.integers(0, SNIPPETS, (images, 1)))
    snippets = torch.randn(SNIPPETS, SNIPPET_DIM, generator=torch.Generator().manual_seed(0))
    facts = {"encoder": "random", "store_fingerprint": "random"}
    MemoryBank(snippets, [1] * SNIPPETS, assignment, facts).save(folder / "bank" / "bank.pth")


def make_trainer(folder: Path, model: str, batch: int, more: list[str]) -> train.Trainer:
    """train.py's trainer, on the random data; the layers that start at zero get random weights."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    words = ["--store", folder, "--bank", folder / "bank", "--out", folder / "run", "--model", model]
    words += ["--batch-size", batch * world, "--steps", 1_000_000, "--sample-every", 0, "--eval-every", 0, *more]
    args = train.parse(list(map(str, words)))
    accelerator = train.launch(args)
    trainer = train.Trainer(args, accelerator, Pairs(args, accelerator.device))
    randomize(trainer.network)
    return trainer


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Gates and output away from zero, where gradients and kernels would be trivial."""
    modulations = [part.adaLN_modulation[1] for part in (*network.blocks, network.final_layer)]
    for module in (*modulations, network.final_layer.linear):
        nn.init.normal_(module.weight, std=0.02)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_a_step(step: Callable[[], None], steps: int) -> float:
    """Median over three parts of `steps` steps each, the device finished at the end of each part."""
    parts = []
    for _ in range(3):
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        parts.append((time.perf_counter() - begin) / steps)
    return statistics.median(parts)


def ceiling(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a product of random matrices; in bf16 no network exceeds it."""
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds_a_step(lambda: a @ b, 3)
    return 2 * size**3 / seconds_a_step(lambda: a @ b, 10) / 1e12


@torch.no_grad()
def operations(network: Callable[..., object], *inputs: Tensor) -> int:
    """Floating-point operations of a forward pass: its products, and convolutions as the sums that define them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        network(*inputs)
    return counter.get_total_flops()


def training_flops(network: nn.Module, device: torch.device) -> int:
    """Operations of a training step for one image: a forward pass, with the alignment heads if there are any, and twice
    as many backward."""
    shapes = (network.latent_shape, (), (SNIPPET_DIM,))
    forward = partial(network, return_tokens=True) if network.projectors else network
    return 3 * operations(forward, *(torch.rand(1, *shape, device=device) for shape in shapes))


def difference(given: list[Tensor], expected: list[Tensor]) -> float:
    """‖given − expected‖ / ‖expected‖ over lists of tensors."""
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(given, expected, strict=True)]
    return float((sum(squares) / sum(b.double().square().sum() for b in expected)).sqrt())


def check(trainer: train.Trainer, plain: nn.Module) -> dict[str, float]:
    """Relative errors of one step's loss and gradients, of train.py's path and of the plain one in the same precision,
    against the plain network in float32 without tf32, at the first of --batches.

    Raises:
        AssertionError: train.py's path is further from float32 than the plain path by more than a quarter.
    """
    fast, batch = trainer.model, next(trainer.batches())
    precision = torch.bfloat16 if trainer.args.precision == "bf16" else None

    def step(model: nn.Module, network: nn.Module, calls: int = 1) -> tuple[float, list]:
        trainer.model = model
        network.zero_grad(set_to_none=True)
        for _ in range(calls):
            loss = float(trainer.accumulate(batch)[0])
        return loss, [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]

    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        loss, gradients = step(plain, plain)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    with torch.autocast(trainer.device.type, precision, enabled=precision is not None):
        paths = {"plain": step(plain, plain)}
    plain.zero_grad(set_to_none=True)
    with fast_attention(trainer.device, trainer.network.pos_embed.shape[1]):
        paths["train.py"] = step(fast, trainer.network, warm_steps(trainer))
    trainer.model, errors = fast, {}
    for name, (its_loss, its_gradients) in paths.items():
        errors[f"loss, {name}"] = abs(its_loss - loss) / loss
        errors[f"gradients, {name}"] = difference(its_gradients, gradients)
    assert errors["gradients, train.py"] <= 1.25 * errors["gradients, plain"] + 1e-6, errors
    return errors


def use(trainer: train.Trainer, model: nn.Module) -> None:
    """Train by `model`, the network with or without the exchange of gradients."""
    trainer.model = model
    if isinstance(trainer.run_micro_step, Replay):
        trainer.run_micro_step.forget()


@contextlib.contextmanager
def resident(trainer: train.Trainer) -> Iterator[None]:
    """Inside, the trainer's data lie on its device, as with `--resident` of train.py."""
    args = argparse.Namespace(**vars(trainer.args) | {"resident": True})
    with patch.object(trainer, "args", args), patch.object(trainer, "data", Pairs(args, trainer.device)):
        yield


def timed(trainer: train.Trainer, batch: int, steps: int) -> dict:
    """Speed and memory of train.py's steps with `batch` images a process."""
    trainer.args.batch_size = batch * trainer.accelerator.num_processes
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    use(trainer, trainer.model)  # a recording made before holds memory that the peak would not show
    batches = trainer.batches()
    begin = time.perf_counter()
    trainer.train_step(next(batches))
    synchronize()
    first = time.perf_counter() - begin
    for _ in range(warm_steps(trainer)):
        trainer.train_step(next(batches))
    with no_waiting(trainer.device):
        trainer.train_step(next(batches))
    seconds = torch.tensor([seconds_a_step(lambda: trainer.train_step(next(batches)), steps)], device=trainer.device)
    trainer.check_finite()
    each = trainer.accelerator.gather(seconds).tolist()
    others = {"seconds_of_each": each} if len(each) > 1 else {}
    return {"seconds_a_step": max(each), "first_step_seconds": first, **others, **memory()}


def warm_steps(trainer: train.Trainer) -> int:
    """Steps until the trainer runs as it will go on to."""
    return WARM_STEPS + 1 if trainer.args.compile and trainer.device.type == "cuda" else 1


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise if the host waits for the GPU inside."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def memory() -> dict[str, float]:
    """Peak GPU memory in GB, of tensors and as reserved."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def peers(network: nn.Module, batch: int, steps: int, device: torch.device) -> dict:
    """The recipe of SiT's and REPA's scripts: eager fp16 autocast with a scaler, AdamW not fused, an average tensor by
    tensor, default attention, and the loss brought to the host in every step."""
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0.0)
    half, loss_of = torch.float16 if device.type == "cuda" else torch.bfloat16, FlowMatchingLoss()
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    shape = network.latent_shape
    latents, snippets = torch.randn(batch, *shape, device=device), torch.randn(batch, SNIPPET_DIM, device=device)

    def step() -> None:
        with torch.autocast(device.type, half):
            loss = loss_of(network, latents, snippets, draw(0, 0, batch, shape, device=device)).total.mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
                ours.mul_(0.9999).add_(theirs, alpha=1 - 0.9999)
        loss.item()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return {"seconds_a_step": seconds_a_step(step, steps), **memory()}


def where_time_goes(trainer: train.Trainer, batch: int) -> dict:
    """Milliseconds a step by kind of kernel, and the largest kernels, from three profiled steps."""
    trainer.args.batch_size, steps = batch * trainer.accelerator.num_processes, 3
    batches = trainer.batches()
    for _ in range(warm_steps(trainer)):
        trainer.train_step(next(batches))
    synchronize()
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            trainer.train_step(next(batches))
        synchronize()
    wall = (time.perf_counter() - begin) / steps * 1e3
    return {"batch": batch, **by_kind(record, steps, wall)}


def by_kind(record: profile, runs: int, wall: float) -> dict:
    """Milliseconds a run by kind of kernel, what is left of the `wall` ms of a run, and the largest kernels."""
    events = (event for event in record.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
    kernels = [event for event in events if "#" not in event.key]  # that marks a range of kernels
    groups, largest = dict.fromkeys(GROUPS, 0.0), []
    for event in kernels:
        name, milliseconds = event.key, event.self_device_time_total / 1e3 / runs
        group = next(kind for kind, words in GROUPS.items() if any(word in name.lower() for word in words))
        groups[group] += milliseconds
        largest.append({"kernel": name[:100], "group": group, "ms": milliseconds, "calls": event.count / runs})
    groups["idle (profiled)"] = max(0.0, wall - sum(groups.values()))
    return {"ms": groups, "largest": sorted(largest, key=lambda row: -row["ms"])[:40]}


def exchanges(trainer: train.Trainer, how: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The network wrapped for exchanging gradients in each of the ways MB[:BLOCKS[:CLUSTER]][:bf16], by name."""
    for words in how:
        megabytes, *numbers = words.removesuffix(":bf16").split(":")
        options, name = None, f"buckets of {megabytes} MB, NCCL chooses its blocks"
        if numbers:
            options = torch.distributed.ProcessGroupNCCL.Options()
            options.config.min_ctas, options.config.max_ctas = 1, int(numbers[0])
            name = f"buckets of {megabytes} MB, at most {numbers[0]} blocks"
        if numbers[1:]:
            options.config.cga_cluster_size = int(numbers[1])
            name += f" in clusters of {numbers[1]}"
        group = torch.distributed.new_group(pg_options=options)
        wrapped = DistributedDataParallel(
            trainer.network, process_group=group, bucket_cap_mb=float(megabytes), gradient_as_bucket_view=True
        )
        if words.endswith(":bf16"):
            wrapped.register_comm_hook(group, bf16_compress_hook)
            name += ", rounded to bf16"
        yield name, wrapped


def small_cards(folder: Path, model: str, batches: list[int], steps: int, accumulated: int) -> Iterator[dict]:
    """Peak memory and speed of micro-batches within 22 GiB, accumulated to so many images, or twice where that is 0."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total))
    for micro, more in itertools.product(batches, ([], ["--checkpoint-activations"])):
        row = {"model": model, "micro_batch": micro, "checkpoint_activations": bool(more), "images_per_second": None}
        try:
            images = accumulated or 2 * micro
            trainer = make_trainer(folder, model, images, ["--micro-batch", str(micro), *more])
            trainer.prepare()
            with fast_attention(trainer.device, trainer.network.pos_embed.shape[1]):
                row |= timed(trainer, images, steps)
            row["images_per_second"] = images / row["seconds_a_step"]
        except torch.OutOfMemoryError:
            print(f"{micro} images do not fit")
        print(json.dumps(row), flush=True)
        yield row
        trainer = None
        gc.collect()
        torch.cuda.empty_cache()


def aligned(args: argparse.Namespace, folder: Path) -> Iterator[tuple[int, int, dict]]:
    """Operations an image, batch, and speed and memory, of train.py with the alignment term, whose frozen encoder (of
    random weights) runs on the store's images in every step."""
    weights, batches = folder / "encoder.safetensors", args.batches
    make_encoder(weights, recipe_of(args.align).model)
    flags = ["--align-coeff", "0.5", "--align-encoder", args.align, "--align-encoder-weights", str(weights)]
    trainer = make_trainer(folder, args.model, batches[0], [*args.train_args, *flags])
    encoder, size = trainer.data.align_encoder, args.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    flops = training_flops(trainer.network, trainer.device) + operations(lambda images: encoder(images, True), image)
    trainer.prepare()
    with fast_attention(trainer.device, trainer.network.pos_embed.shape[1]):
        for batch in batches:
            yield flops, batch, timed(trainer, batch, args.steps)


def show(rows: list[dict], columns: dict[str, str]) -> None:
    """Print a table; `columns` maps keys of the rows to formats."""
    print("  ".join(f"{key:>17}" for key in columns))
    for row in rows:
        cells = ["-" if row.get(key) is None else format(row[key], how) for key, how in columns.items()]
        print("  ".join(f"{cell:>17}" for cell in cells))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time train.py's steps on random data.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="SiT-XL/2", choices=SiT_models, metavar="NAME", help="a preset of models/sit.py")
    add("--batches", type=int, nargs="+", default=[32, 128], help="images a process, one row each")
    add("--images", type=int, default=4096, help="of the random store")
    add("--steps", type=int, default=10, help="steps in each of three timed parts")
    add("--image-size", type=int, default=256, help="pixels of the images that the latents stand for")
    add("--reference", type=int, nargs="*", metavar="BATCH", help="also time the peers' plain recipe; at all --batches")
    add(
        "--profile",
        type=int,
        nargs="*",
        metavar="BATCH",
        help="also show where the time goes; at the last of --batches",
    )
    add("--resident", action="store_true", help="also time train.py --resident, at all --batches")
    how = "also time the alignment term, at all --batches; the encoder, of random weights, runs on the store's images"
    add("--align", nargs="?", const="dinov2-vitb14", metavar="ENCODER", help=how)
    add("--exchange", nargs="+", default=[], metavar="MB[:BLOCKS[:CLUSTER]][:bf16]", help="ways to exchange gradients")
    add("--memory", action="store_true", help="only memory within 22 GiB; --batches are micro-batches of --accumulated")
    add("--accumulated", type=int, default=256, help="images of a step of --memory; 0 for two micro-batches")
    add("--train-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to train.py")
    add("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    others = {"--resident": args.resident, "--align": args.align, "--exchange": args.exchange}
    if args.memory and (given := [flag for flag, value in others.items() if value]):
        raise ValueError(f"--memory with {given[0]}: it times no such steps; leave one of them out")
    if args.memory and not torch.cuda.is_available():
        raise ValueError("--memory measures a GPU's memory, and no GPU is here: leave it out, or run it where one is")
    if args.exchange and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError(f"--exchange {args.exchange[0]}: there is one process; start several by torchrun")
    if unread := [words for words in args.exchange if not re.fullmatch(EXCHANGE, words)]:
        raise ValueError(f"--exchange {unread[0]}: expected MB[:BLOCKS[:CLUSTER]][:bf16], as 25, 25:bf16 or 25:24:4")
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.images, args.image_size, with_images=bool(args.align))
        for result in small_table(args, Path(folder)) if args.memory else speed_table(args, Path(folder)):
            save(args.out, argv, result)


def save(out: Path, argv: list[str] | None, result: dict) -> None:
    """Write the table as far as it is, with what it was measured on."""
    if int(os.environ.get("RANK", 0)) == 0:
        made = provenance(argv, int(os.environ.get("WORLD_SIZE", 1)))
        made["versions"]["cuda"] = torch.version.cuda
        write_json(out, made | result)


def small_table(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """The table of --memory, as it grows."""
    rows = []
    for row in small_cards(folder, args.model, args.batches, args.steps, args.accumulated):
        rows.append(row)
        yield {"limit_gib": LIMIT / 2**30, "rows": rows}
    columns = {"model": "", "micro_batch": "", "checkpoint_activations": "", "images_per_second": ".1f"}
    show(rows, columns | {"peak_gb": ".1f"})


def speed_table(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """The table of speeds as it grows, after the comparison with float32."""
    begin = time.perf_counter()
    trainer = make_trainer(folder, args.model, args.batches[0], args.train_args)
    device, world = trainer.device, trainer.accelerator.num_processes
    plain = copy.deepcopy(trainer.network)
    trainer.prepare()
    result = {"start_seconds": time.perf_counter() - begin, "ceiling_tflops": ceiling(device)}
    flops = training_flops(plain, device)
    exchanging = trainer.model
    alone = trainer.accelerator.prepare_model(trainer.network, evaluation_mode=True) if world > 1 else exchanging
    use(trainer, alone)
    result["errors against float32"] = check(trainer, plain)
    trainer.accelerator.print(json.dumps(result))
    rows, linear = [], {}  # and images/s of all processes, if none waited for another, by batch
    result |= {"operations_an_image": flops, "rows": rows, "profiles": []}

    def add_row(what: str, batch: int, processes: int, numbers: dict, flops: int = flops) -> None:
        rate = batch * processes / numbers["seconds_a_step"]
        tflops = rate / processes * flops / 1e12
        row = {"what": what, "batch": batch, "images_per_second": rate, "tflops": tflops}
        rows.append(row | {"share_of_ceiling": tflops / result["ceiling_tflops"], **numbers})
        trainer.accelerator.print(json.dumps(rows[-1]), flush=True)

    def add_way(what: str, model: nn.Module, batch: int) -> None:
        use(trainer, model)
        add_row(what, batch, world, timed(trainer, batch, args.steps))
        if batch in linear:
            rows[-1]["share_of_linear"] = rows[-1]["images_per_second"] / linear[batch]

    with fast_attention(device, plain.pos_embed.shape[1]):
        for batch in args.batches:
            if world > 1:
                use(trainer, alone)
                add_row("one process alone", batch, 1, timed(trainer, batch, args.steps))
                linear[batch] = world * rows[-1]["images_per_second"]
            add_way("train.py", exchanging, batch)
            yield result
            if args.resident:
                with resident(trainer):
                    add_way("train.py resident", exchanging, batch)
                yield result
        for batch in () if args.profile is None else args.profile or args.batches[-1:]:
            use(trainer, exchanging)
            result["profiles"].append({"what": "train.py", **where_time_goes(trainer, batch)})
            if world > 1:
                use(trainer, alone)
                result["profiles"].append({"what": "one process alone", **where_time_goes(trainer, batch)})
            yield result
        for what, model in exchanges(trainer, args.exchange):
            for batch in args.batches:
                add_way(what, model, batch)
                yield result
    trainer.network = trainer.model = trainer.update = trainer.ema = trainer.optimizer = trainer.run_micro_step = None
    exchanging = alone = model = None
    trainer.accelerator.free_memory()  # it keeps what it prepared
    if args.align:
        for more, batch, numbers in aligned(args, folder):
            result["operations_an_image_aligned"] = more
            add_row("train.py aligned", batch, world, numbers, more)
            yield result
        gc.collect()  # its trainer
    if args.reference is not None:
        for batch in args.reference or args.batches:
            add_row("peers' recipe", batch, 1, peers(plain, batch, max(1, args.steps // 3), device))
            yield result
    columns = {"what": "", "batch": "", "images_per_second": ".1f", "tflops": ".0f", "share_of_ceiling": ".1%"}
    columns |= {"peak_gb": ".1f", "first_step_seconds": ".1f", "share_of_linear": ".1%"}
    if trainer.accelerator.is_main_process:
        show(rows, columns)
        for profiled in result["profiles"]:
            print(profiled["what"], profiled["batch"])
            for group, milliseconds in profiled["ms"].items():
                print(f"{milliseconds:9.2f} ms  {group}")


if __name__ == "__main__":
    main()
