"""The whole path at ImageNet's shapes on random images and weights: does every command work, and how fast?

    python -m benchmarks.path --gpus 1 --work /tmp/path --out benchmarks/results/path.json

Runs the real commands, one after the other, from a folder of JPEG files to an npz: encode through a VAE of Stable
Diffusion's shape and DINOv2 ViT-B/14 (random weights, in their real file formats), bank, 20 training steps of SiT-XL/2
at batch 32, a continuation to step 24, and 64 images of 256×256 by the published sampler. With several GPUs the images
are sampled on one as well and compared. `--small` shrinks every size for a machine without a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from memory.files import write_json
from memory.provenance import provenance


def make_images(folder: Path, count: int, size: int) -> None:
    """Smooth random JPEG files in four class folders."""
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / f"class{index % 4}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((size + index % 40, size), Image.BICUBIC).save(path, quality=90)


def make_vae(folder: Path, small: bool) -> None:
    """An AutoencoderKL of Stable Diffusion's shape with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    widths = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1 if small else 2,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(folder)


def make_encoder(path: Path, name: str) -> None:
    """Random weights of the encoder in a local file."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)


def parser(description: str) -> argparse.ArgumentParser:
    """For the command line of a benchmark that runs whole commands."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--gpus", type=int, default=1, help="processes of every command")
    found.add_argument("--work", type=Path, required=True, help="empty folder for what the commands write")
    found.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    found.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    return found


def facts(args: argparse.Namespace, name: str, *more: str) -> dict:
    """How, when and on what the results of `benchmarks.NAME` came about, without this machine's folders; `more` are
    flags besides those of `parser`."""
    words = [f"python -m benchmarks.{name} --gpus {args.gpus}", *more, *["--small"] * args.small]
    return provenance(processes=args.gpus) | {"command": " ".join([*words, "--work DIR --out FILE"])}


def main(argv: list[str] | None = None) -> None:
    args = parser("Run the whole path at ImageNet's shapes on random data.").parse_args(argv)
    work, small = args.work, args.small
    size, images, steps, drawn = (64, 80, 4, 4) if small else (256, 2048, 20, 64)
    model, batch, nfe = ("SiT-Ti/2", 4, 4) if small else ("SiT-XL/2", 32, 250)
    encoder = "vit_tiny_patch16_224" if small else "vit_base_patch14_dinov2.lvd142m"
    name = encoder if small else "dinov2-vitb14"
    weights = work / "encoder.safetensors"
    make_images(work / "images", images, size)
    make_vae(work / "vae", small)
    make_encoder(weights, encoder)

    rows = []

    def launch(title: str, module: list[object], *words: object, gpus: int = args.gpus) -> None:
        """Run one command under torchrun, and note its seconds."""
        port = str(29700 + len(rows))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "--master-port", port]
        command += map(str, [*module, *words])
        print("+", *command[1:], flush=True)
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        rows.append({"what": title, "processes": gpus, "seconds": round(time.perf_counter() - begin, 1)})

    store, bank, run = work / "store", work / "bank", work / "run"
    encode = [work / "images", "--out", store, "--codec", work / "vae", "--encoder", name, "--encoder-weights", weights]
    encode += ["--image-size", size, "--views", 2, "--holdout", 0.1, "--batch-size", 8 if small else 64]
    launch(f"encode {images} images, 2 views", ["-m", "scripts.encode_dataset"], *encode)
    build = ["--store", store, "--encoder", name, "--out", bank, "--k", 8 if small else 512, "--passes", 5]
    launch("bank", ["-m", "memory.build_bank"], *build)
    train = ["--store", store, "--bank", bank, "--out", run, "--model", model, "--batch-size", batch, "--log-every", 2]
    train += ["--save-every", 10, "--eval-every", 10, "--sample-every", 0]
    launch(f"train {steps} steps of {model}, batch {batch}", ["train.py"], *train, "--steps", steps)
    launch(f"continue to step {steps + 4}", ["train.py"], *train, "--steps", steps + 4)
    sample = ["sample_ddp.py", "--checkpoint", run, "--num-images", drawn, "--steps", nfe]
    launch(
        f"sample {drawn} images, {nfe} evaluations",
        sample,
        "--out",
        work / "samples",
        "--batch-size",
        2 if small else 32,
    )
    differences = {}
    if args.gpus > 1:
        launch("the same on one", sample, "--out", work / "samples-alone", "--batch-size", 4 if small else 64, gpus=1)
        one, many = (
            np.load(work / folder / "samples.npz")["arr_0"].astype(int) for folder in ("samples-alone", "samples")
        )
        differences["largest pixel difference of the images"] = int(np.abs(one - many).max())
        differences["mean pixel difference of the images"] = float(np.abs(one - many).mean())
    array = np.load(work / "samples" / "samples.npz")["arr_0"]
    assert array.shape == (drawn, size, size, 3), array.shape
    assert array.dtype == np.uint8
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    sampled = json.loads((work / "samples" / "samples.json").read_text())
    result = {
        **facts(args, "path"),
        "commands": rows,
        "training images_per_second": [line["images_per_second"] for line in log if "images_per_second" in line],
        "training losses": [line["loss"] for line in log if "loss" in line],
        "sampling images_per_second": sampled["run"]["images_per_second"],
        "sampling settings": sampled["settings"],
        **differences,
    }
    write_json(args.out, result)
    print(f"\n{'seconds':>9}  {'processes':>9}  command (start-up and compilation included)")
    for row in rows:
        print(f"{row['seconds']:9.1f}  {row['processes']:9}  {row['what']}")
    for key, value in differences.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
