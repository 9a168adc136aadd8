"""How fast sample_ddp.py samples: images/s of the whole command, and where time and memory go, on random weights.

    python -m benchmarks.bench_sample --reference --profile --memory-gib 22 --out benchmarks/results/sample.json
    python -m benchmarks.bench_sample --num-images 0 --image-size 512 --batches 64 --out benchmarks/results/512.json

Writes a checkpoint of the real shapes, its bank and a VAE of Stable Diffusion's shape. The command runs twice in fresh
processes: first with nothing compiled before, then with the first run's cache, in little memory if asked. Start-up is
everything before the first evaluation that counts, images/s everything after it: decoding, PNGs and the npz included.
The rows by batch size are timed over a few evaluations of the command's own `Generator`; their images/s at 250
evaluations follow by arithmetic.
Before the rows are timed, velocities and images are compared with the plain path in float32 on the same device; the
command comes first, because its first run must find nothing compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import sample_ddp
from benchmarks.bench_train import by_kind, ceiling, difference, operations, randomize, show, synchronize
from benchmarks.path import make_vae
from memory.bank import MemoryBank
from memory.files import write_json
from memory.provenance import provenance
from models.autoencoder import load_codec
from models.sit import SiT, SiT_models
from sample_ddp import Generator
from samplers import euler_maruyama_sampler

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = 250  # of the published sampler
COMPARED, COMPARED_STEPS = 32, 10  # images, and evaluations of each, that are compared with float32
REFERENCE_BATCH = 64


@torch.no_grad()
def make_checkpoint(work: Path, model: str, image_size: int, snippets: int, small: bool) -> Path:
    """A snapshot as train.py writes it, of random weights that give velocities of a trained network's size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (work / "vae").exists():
        make_vae(work / "vae", small)
    if not (work / "bank").exists():
        rows = torch.randn(snippets, 768, device=device).cpu()
        MemoryBank(rows, [2] * snippets, meta={"encoder": "random"}).save(work / "bank" / "bank.pth")
    codec = load_codec(str(work / "vae")).meta(image_size)
    torch.manual_seed(0)
    with torch.device(device):
        network = SiT_models[model](input_size=codec["latent_shape"][1])
    randomize(network)
    hashes = json.loads((work / "bank" / "bank.json").read_text())["sha256"]
    checkpoint = {
        "ema": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
        "args": {"interpolant": "linear", "snippet_from": "nearest"},
        "model_config": network.config,
        "steps": 0,
        "codec": codec,
        "encoder": "random",
        "bank": {"path": str(work / "bank" / "bank.pth"), "sha256": hashes["bank.pth"], "k": snippets, "dim": 768},
        "store": {"path": "random", "fingerprint": "random", "num_images": 2 * snippets, "image_size": image_size},
        "image_size": image_size,
        "num_classes": None,
    }
    path = work / f"{image_size}.pt"
    torch.save(checkpoint, path)
    return path


def words_of(checkpoint: Path, out: Path, *more: object) -> list[str]:
    """Arguments of the command."""
    return [str(word) for word in ("--checkpoint", checkpoint, "--out", out, *more)]


def run_command(words: list[str], memory_gib: float | None) -> bool:
    """Run the command as users do, with the GPU's memory limited where asked for; returns whether it succeeded."""
    program = ["sample_ddp.py"]
    if memory_gib:
        share = memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        limit = f"import sys, torch; torch.cuda.set_per_process_memory_fraction({share}, 0)"
        program = ["-c", f"{limit}; import sample_ddp; sample_ddp.main(sys.argv[1:])"]
    return subprocess.run([sys.executable, *program, *words], cwd=ROOT).returncode == 0


def time_command(work: Path, checkpoint: Path, args: argparse.Namespace, first: bool) -> dict:
    """Start-up, and images/s after it, of one run of the command; the second makes one batch in two evaluations, within
    the limit of memory."""
    batch, name, limit = args.batches[0], "first" if first else "second", None if first else args.memory_gib
    count, steps = (args.num_images, args.steps) if first else (min(batch, args.num_images), 2)
    words = words_of(checkpoint, work / name, "--num-images", count, "--steps", steps, "--batch-size", batch)
    begin = time.perf_counter()
    succeeded = run_command([*words, *compiling(args)], limit)
    wall = time.perf_counter() - begin
    row = {"run": name, "images": count, "batch": batch, "evaluations": steps, "memory_gib": limit}
    if not succeeded:
        return row
    run = json.loads((work / name / "samples.json").read_text())["run"]
    seconds = run["generated"] / run["images_per_second"]
    row |= {"startup_seconds": wall - seconds, "peak_gb": run["peak_bytes"]["gpu"] / 1e9}
    if first:
        first_batch = wall - seconds * (1 - batch / count)
        row |= {"images_per_second": run["images_per_second"], "first_images_seconds": first_batch}
    return row


def compiling(args: argparse.Namespace) -> list[str]:
    return ["--compile" if args.compile else "--no-compile"]


def levels(images: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How uint8 images differ: the largest and the mean difference, and the shares of values beyond 0, 1 and 2."""
    apart = np.abs(images.astype(int) - expected)
    shares = {f"share_beyond_{limit}": float((apart > limit).mean()) for limit in (0, 1, 2)}
    return {"largest": int(apart.max()), "mean": float(apart.mean()), **shares}


@torch.no_grad()
def compare(fast: Generator, plain: Generator) -> dict:
    """Velocities, images and decoding of the fast generator against the plain one in float32 without tf32.

    Raises:
        AssertionError: the velocity is further from float32 than bf16 autocast of the plain network by a quarter.
    """
    images, batch = torch.arange(COMPARED), fast.padded_to or COMPARED
    x = torch.randn(batch, *fast.model.latent_shape, device=fast.device, dtype=torch.float64)
    t = torch.linspace(0.04, 1, batch, device=fast.device, dtype=torch.float64)
    cond = fast.bank[torch.arange(batch) % len(fast.bank)].to(fast.device)
    some = slice(0, COMPARED)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        exact = plain.model(x[some].float(), t[some].float(), cond[some])
    half = torch.autocast(fast.device.type, torch.bfloat16, enabled=fast.args.precision == "bf16")
    with half:
        autocast = plain.model(x[some].float(), t[some].float(), cond[some])
    with half, sample_ddp.fast_attention(fast.device):
        given = fast._velocity(fast.model, cond, batch)(x, t)[some]
    errors = {"velocity": difference([given], [exact]), "velocity, plain autocast": difference([autocast], [exact])}
    assert errors["velocity"] <= 1.25 * errors["velocity, plain autocast"] + 1e-5, errors
    latents = plain.latents(images, COMPARED_STEPS)
    expected = plain.decode(latents)
    torch.backends.cudnn.allow_tf32 = tf32
    made = fast.latents(images.repeat(-(-batch // COMPARED))[:batch], COMPARED_STEPS)[some]
    errors |= {"latents": difference([made], [latents]), "images": levels(plain.decode(made), expected)}
    errors["decoding"] = levels(fast.decode(latents), expected)
    return errors


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, the device idle before and after."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def make_ready(generator: Generator, batch: int, compiled: bool) -> float:
    """Seconds of `generator.compile`, or of a first short run without it."""
    if compiled:
        return timed(lambda: generator.compile(batch))
    return timed(lambda: generator.decode(generator.latents(torch.arange(batch), 2)))


@torch.no_grad()
def time_batch(generator: Generator, batch: int, few: int) -> dict:
    """Evaluations and decoded images a second of batches of one size, once the generator is ready for them."""
    images = torch.arange(batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    generator.latents(images, 3)  # the last of them as it will be from then on
    sampling = timed(lambda: generator.latents(images, few)) / few
    latents = generator.latents(images, 2)
    decoding = timed(lambda: generator.decode(latents))
    return {
        "evaluations_per_second": batch / sampling,
        "decoded_per_second": batch / decoding,
        "images_per_second_at_250": batch / (EVALUATIONS * sampling + decoding),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }


@torch.no_grad()
def reference(plain: Generator, few: int, work: Path) -> dict:
    """The recipe of GMem's first release: float32 weights with tf32, attention not fused, eager, batch 64, then each
    PNG in turn, all read again for the npz. A few evaluations are timed and scaled to 250."""
    batch = REFERENCE_BATCH if plain.device.type == "cuda" else 2
    network = plain.model
    for block in network.blocks:
        block.attn.fused_attn = False
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    z = torch.randn(batch, *network.latent_shape, device=plain.device)
    cond = plain.bank[torch.arange(batch) % len(plain.bank)].to(plain.device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(x.float(), t.float(), cond)

    def finish() -> None:
        for index, image in enumerate(plain.decode(z)):
            Image.fromarray(image).save(work / f"{index}.png")
        np.savez(work / "reference.npz", np.stack([np.asarray(Image.open(work / f"{i}.png")) for i in range(batch)]))

    euler_maruyama_sampler(velocity, z, 2)
    finish()
    sampling = timed(lambda: euler_maruyama_sampler(velocity, z, few)) / few
    rate = batch / (EVALUATIONS * sampling + timed(finish))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return {"batch": batch, "evaluations_per_second": batch / sampling, "images_per_second_at_250": rate}


@torch.no_grad()
def where_time_goes(generator: Generator, batch: int, few: int) -> dict:
    """Milliseconds an evaluation by kind of kernel, and the largest kernels."""
    images = torch.arange(batch)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        wall = timed(lambda: generator.latents(images, few)) / few * 1e3
    return {"batch": batch, **by_kind(record, few, wall)}


def forward_flops(network: SiT) -> int:
    """Operations of one evaluation for one image."""
    one = torch.zeros(1, *network.latent_shape, device=network.pos_embed.device)
    return operations(network, one, one.new_zeros(1), one.new_ones(1, network.config["snippet_dim"]))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time sample_ddp.py on random weights.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="SiT-XL/2", choices=SiT_models, metavar="NAME", help="a preset of models/sit.py")
    add("--image-size", type=int, default=256, help="pixels")
    add("--bank-rows", type=int, default=640_000, help="K")
    add("--num-images", type=int, default=512, help="images of the command's first run; 0 leaves the command out")
    add("--runs", type=int, choices=(1, 2), default=2, help="of the command")
    add("--steps", type=int, default=EVALUATIONS, help="evaluations of an image in the command's first run")
    add("--batches", type=int, nargs="+", default=[256, 64, 512], help="a row each; the command takes the first")
    add("--few", type=int, default=10, help="evaluations timed for each row")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="as in sample_ddp.py")
    add("--reference", action="store_true", help="also time the peers' recipe")
    add("--profile", action="store_true", help="also show where the time of the first row goes")
    add("--memory-gib", type=float, help="memory of the GPU for the command's second run, as on a smaller card")
    add("--small", action="store_true", help="tiny VAE, for a machine without a GPU")
    add("--work", type=Path, help="folder for what is written, kept; a temporary one otherwise")
    add("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        for result in measure(args, args.work or Path(folder)):
            write_json(args.out, {**provenance(argv), **result})


def measure(args: argparse.Namespace, work: Path) -> Iterator[dict]:
    """All tables, printed and yielded as they grow."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")  # empty, and of all processes here
    os.environ["TRITON_CACHE_DIR"] = str(work / "compiled" / "triton")  # also of kernels that are launched without it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = make_checkpoint(work, args.model, args.image_size, args.bank_rows, args.small)
    result = {"model": args.model, "image_size": args.image_size, "bank_rows": args.bank_rows, "commands": []}
    if args.num_images:
        result["commands"] = [time_command(work, checkpoint, args, first) for first in (True, False)[: args.runs]]
        columns = {"run": "", "images": "", "evaluations": "", "startup_seconds": ".1f", "images_per_second": ".2f"}
        show(result["commands"], columns | {"first_images_seconds": ".1f", "peak_gb": ".1f"})
        yield result

    def generator(*more: str) -> Generator:
        return Generator(sample_ddp.parse(words_of(checkpoint, work / "unused", *more)), device)

    fast, plain = generator(), generator("--precision", "fp32")
    flops = forward_flops(plain.model)
    result |= {"operations_an_evaluation": flops, "ceiling_tflops": ceiling(device), "rows": []}
    for batch in args.batches:
        row = {"batch": batch, "compile_seconds": make_ready(fast, batch, args.compile)}
        if "errors" not in result:
            result["errors"] = compare(fast, plain)
            print(json.dumps(result["errors"], indent=1), flush=True)
        row |= time_batch(fast, batch, args.few)
        if args.profile and not result["rows"]:
            result["profile"] = where_time_goes(fast, batch, args.few)
        row["tflops"] = row["evaluations_per_second"] * flops / 1e12
        row["share_of_ceiling"] = row["tflops"] / result["ceiling_tflops"]
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        yield result
    if args.reference:
        result["reference"] = reference(plain, args.few, work)
        print(json.dumps(result["reference"]))
    columns = {"batch": "", "evaluations_per_second": ".0f", "tflops": ".0f", "share_of_ceiling": ".1%"}
    columns |= {"decoded_per_second": ".0f", "images_per_second_at_250": ".2f", "peak_gb": ".1f"}
    show(result["rows"], columns | {"compile_seconds": ".1f"})
    for group, milliseconds in result.get("profile", {}).get("ms", {}).items():
        print(f"{milliseconds:9.2f} ms  {group}")
    yield result


if __name__ == "__main__":
    main()
