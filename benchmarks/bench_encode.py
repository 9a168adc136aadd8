"""How fast images become a store: the encode command on JPEGs of ImageNet's size, and random weights of real shapes.

    python -m benchmarks.bench_encode --profile --out benchmarks/results/encode.json

Before the networks are timed as the command runs them (bfloat16, compiled), they are compared on the same device with
plain float32. The parts alone are decoding on one core, the VAE's encoder, and DINOv2 ViT-B/14 at 224 px; then comes
`scripts.encode_dataset` itself with two views, from files to the finished store, its rate taken over the second half of
the images, when those that were decoded during its start are used up. Its TFLOP/s are those of the networks' work at
this rate. The ceiling is a bf16 product of random 8192×8192 matrices in the same run. Files are read from the page
cache. `--small` shrinks all for a CPU.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_train import ceiling, difference, operations, seconds_a_step
from benchmarks.path import make_encoder, make_vae
from memory.files import write_json
from memory.provenance import provenance
from models.autoencoder import Codec, load_codec
from models.encoder import Encoder, load_encoder
from scripts import encode_dataset
from scripts.images import square
from scripts.sources import open_source
from scripts.store import Writer

IMAGENET = 1_281_167
SIZES = ((500, 375), (375, 500), (500, 333), (500, 400))  # width and height of most of ImageNet's files
DISTINCT = 256  # images that differ; the others are further names of their files
NOISE, QUALITY = 26, 91  # together about 110 KB a file, ImageNet's mean
VIEWS = 2
CHECKED, TOLERANCE = 64, 0.05  # images that are compared; the largest relative error of bfloat16
TRAINING_BATCH = 256


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=8192, help="files to encode (default 8192)")
    add("--batch-size", type=int, default=64, help="images encoded at once (default 64)")
    add("--image-size", type=int, default=256, help="side of the square images (default 256)")
    add("--precision", choices=encode_dataset.PRECISIONS, help="of the networks (default: the command's)")
    add("--folder", help="where to work (default: the temporary directory)")
    add("--profile", action="store_true", help="print where a batch's time goes")
    add("--small", action="store_true", help="40 images of 32 px and tiny networks, for a CPU")
    add("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args(argv)
    if args.small:
        args.images, args.batch_size, args.image_size = 40, 4, 32
    return args


def make_jpegs(folder: Path, count: int) -> float:
    """JPEG files of smooth colours and noise in ten class folders; returns their mean size in bytes."""
    random, paths = np.random.default_rng(0), []
    for index in range(count):
        path = folder / f"class{index % 10}" / f"{index:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index >= DISTINCT:
            os.link(paths[index % DISTINCT], path)
            continue
        width, height = SIZES[index % len(SIZES)]
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + random.normal(0, NOISE, (height, width, 1))).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "jpeg", quality=QUALITY)
        path.write_bytes(stream.getvalue())
        paths.append(path)
    return float(np.mean([path.stat().st_size for path in paths]))


def decode(folder: Path, count: int, size: int) -> tuple[Tensor, float]:
    """The first images (count, 3, size, size) as the workers make them, and how many one core makes in a second."""
    source = open_source(folder)
    begin = time.perf_counter()
    images = np.stack([square(source.image(index), size, 3, on_black=False) for index in range(count)])
    return torch.from_numpy(images), count / (time.perf_counter() - begin)


def errors(given: Tensor, expected: Tensor) -> dict[str, float]:
    """The relative error, and the smallest cosine of an image's values."""
    cosine = F.cosine_similarity(given.flatten(1).double(), expected.flatten(1).double())
    return {"relative_error": difference([given], [expected]), "smallest_cosine": float(cosine.min())}


def check(codec: Codec, encoder: Encoder, plain: tuple[Codec, Encoder], pixels: Tensor) -> dict[str, dict[str, float]]:
    """Errors of moments and features against plain float32; AssertionError beyond TOLERANCE."""
    given, expected = (network.encode(pixels)[:CHECKED].float().chunk(2, dim=1) for network in (codec, plain[0]))
    found = {
        "posterior mean": errors(given[0], expected[0]),
        "posterior std": errors(given[1], expected[1]),
        "class token": errors(encoder(pixels)[:CHECKED], plain[1](pixels)[:CHECKED]),
    }
    for name, error in found.items():
        assert error["relative_error"] < TOLERANCE, (name, error)
    return found


def rate(network: Callable[[Tensor], object], pixels: Tensor) -> float:
    """Images a second through a network, from and to the device's memory."""
    network(pixels)
    return len(pixels) / seconds_a_step(lambda: network(pixels), 3)


def networks_alone(args: argparse.Namespace, work: Path, device: torch.device) -> dict:
    """Compare, then time both networks as the command runs them, and before they are compiled."""
    images, per_core = decode(work / "images", args.batch_size, args.image_size)
    pixels = torch.stack([images, images.flip(-1)], 1).flatten(0, 1).to(device)  # (B·V, 3, H, W) as in the command
    codec, encoder = load_networks(args, work, device, args.precision)
    plain = load_networks(args, work, device, "fp32")
    gflop = [operations(network, pixels[:1]) / 1e9 for network in (plain[0].encode, plain[1])]  # for one image
    eager = [rate(codec.encode, pixels), rate(encoder, pixels)]
    encode_dataset.speed_up(codec, encoder, None, encode_dataset.COMPILE_FROM, device)
    found = check(codec, encoder, plain, pixels)
    rates = [rate(codec.encode, pixels), rate(encoder, pixels)]
    peak = ceiling(device)
    if args.profile:
        print_profile(lambda: (codec.encode(pixels), encoder(pixels)), device)
    tflops = [value * work / 1e3 for value, work in zip(rates, gflop, strict=True)]
    return {
        "errors": found,
        "decode_per_core": per_core,
        "networks": {
            name: {
                "per_second": rates[i],
                "not_compiled": eager[i],
                "gflop": gflop[i],
                "tflops": tflops[i],
                "share_of_ceiling": tflops[i] / peak,
            }
            for i, name in enumerate(("VAE encoder", "vision encoder, class token"))
        },
        "patch_tokens_per_second": rate(lambda pixels: encoder(pixels, return_patches=True)[1], pixels),
        "patch_shape": [encoder.num_patches, encoder.dim],
        "ceiling_tflops": peak,
    }


def load_networks(args: argparse.Namespace, work: Path, device: torch.device, precision: str) -> tuple[Codec, Encoder]:
    """The codec and the encoder that the command will load."""
    dtype = encode_dataset.PRECISIONS[precision]
    weights = work / "encoder.safetensors"
    return load_codec(str(work / "vae"), device, dtype), load_encoder(encoder_name(args), weights, device, dtype)


def encoder_name(args: argparse.Namespace) -> str:
    return "test_vit@32" if args.small else "dinov2-vitb14"


def print_profile(work: Callable[[], object], device: torch.device) -> None:
    """Where the time of one call goes, by kernel."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + cuda]) as trace:
        work()
    table = trace.key_averages()
    print(table.table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=16, max_name_column_width=80))


def run_command(args: argparse.Namespace, work: Path, device: torch.device) -> dict:
    """Time the encode command from files to the finished store."""
    written = []

    class Timed(Writer):
        """Notes when rows are written."""

        def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
            super().write(first, arrays)
            written.append((time.perf_counter(), len(arrays["latents.npy"])))

    words = [work / "images", "--out", work / "store", "--codec", work / "vae", "--encoder", encoder_name(args)]
    words += ["--encoder-weights", work / "encoder.safetensors", "--image-size", args.image_size, "--views", VIEWS]
    words += ["--batch-size", args.batch_size, "--compile" if device.type == "cuda" else "--no-compile"]
    words += ["--precision", args.precision]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with patch.object(encode_dataset, "Writer", Timed):
        encode_dataset.main(list(map(str, words)))
    half = len(written) // 2
    seconds = written[-1][0] - written[half - 1][0]
    return {
        "images_per_second": sum(count for _, count in written[half:]) / seconds,
        "seconds_to_first_images": written[0][0] - begin,
        "seconds_in_all": time.perf_counter() - begin,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or encode_dataset.default_precision()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        make_vae(work / "vae", args.small)
        make_encoder(work / "encoder.safetensors", "test_vit" if args.small else "vit_base_patch14_dinov2.lvd142m")
        file_bytes = make_jpegs(work / "images", args.images)
        alone = networks_alone(args, work, device)
        command = run_command(args, work, device)
    cores = len(os.sched_getaffinity(0))
    passes = [network["per_second"] for network in alone["networks"].values()]
    bounds = {
        f"decoding on {cores} cores": alone["decode_per_core"] * cores,
        "both networks": 1 / sum(VIEWS / value for value in passes),
    }
    gflop = VIEWS * sum(network["gflop"] for network in alone["networks"].values())
    command["tflops"] = command["images_per_second"] * gflop / 1e3
    command["share_of_ceiling"] = command["tflops"] / alone["ceiling_tflops"]
    tokens, dim = alone["patch_shape"]
    on_imagenet = {
        "hours of encoding": IMAGENET / command["images_per_second"] / 3600,
        "GB of patch tokens in the store, a view": IMAGENET * tokens * dim * 2 / 1e9,
        "GB of images in the store, for patch tokens online": IMAGENET * 3 * args.image_size**2 / 1e9,
        f"seconds of patch tokens online, {TRAINING_BATCH} images": TRAINING_BATCH / alone["patch_tokens_per_second"],
    }
    settings = {key: getattr(args, key) for key in ("images", "batch_size", "image_size", "precision")}
    result = command | alone | {"bounds": bounds, "on_imagenet": on_imagenet, "file_bytes": file_bytes, "cores": cores}
    result = {**rounded(result | settings | {"views": VIEWS}), **provenance(argv)}
    print_table(result)
    if args.out:
        write_json(args.out, result)


def rounded(value: object) -> object:
    """Floats to four digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def speed(part: dict) -> str:
    """Two columns of the table."""
    return f"{part['tflops']:8.1f} {part['share_of_ceiling']:6.1%}"


def print_table(result: dict) -> None:
    """The result in words and columns."""
    print(f"\n{result['device']}, {result['cores']} cores, {result['precision']}, ", end="")
    print(f"{result['batch_size']} images at a time in {VIEWS} views")
    for name, error in result["errors"].items():
        print(f"{name}: relative error {error['relative_error']}, smallest cosine {error['smallest_cosine']}")
    print(f"{'images a second':42} {'':>9}  {'eager':>9} {'GFLOP':>7} {'TFLOP/s':>8} {'share':>6}")
    print(
        f"{'decode and crop, one core':42} {result['decode_per_core']:9,.0f}  (files of {result['file_bytes']:,.0f} B)"
    )
    for name, part in result["networks"].items():
        columns = f"{part['not_compiled']:9,.0f} {part['gflop']:7.1f} {speed(part)}"
        print(f"{name:42} {part['per_second']:9,.0f}  {columns}")
    print(f"{'vision encoder, patch tokens':42} {result['patch_tokens_per_second']:9,.0f}")
    print(f"{'THE COMMAND, files to store, 2 views':42} {result['images_per_second']:9,.0f}  {'':17} {speed(result)}")
    lowest = min(result["bounds"].values())
    for name, value in result["bounds"].items():
        print(f"{'  bound of ' + name:42} {value:9,.0f}{'  <- the lower one' * (value == lowest)}")
    print(
        f"first images after {result['seconds_to_first_images']} s, all {result['images']:,} after "
        f"{result['seconds_in_all']} s; peak GPU memory {result['peak_gpu_gb']} GB; "
        f"ceiling {result['ceiling_tflops']} TFLOP/s"
    )
    for name, value in result["on_imagenet"].items():
        print(f"ImageNet: {value:,} {name}")


if __name__ == "__main__":
    main()
