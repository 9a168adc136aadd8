"""Command: make what lies in assets/, the real images and the small VAE with which the demo runs offline.

    python -m scripts.make_assets images --source FOLDER
    python -m scripts.make_assets vae --source FOLDER

FOLDER holds the four idx files of Fashion-MNIST (`train-images-idx3-ubyte.gz` …). `images` keeps the first rows of each
under the same names. `vae` trains an AutoencoderKL on the 60,000 training images, framed in black to 32×32, and writes
it in diffusers' format with a report of its errors on the 10,000 test images; a GPU takes minutes, a CPU most of a day.
"""

import argparse
import gzip
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from memory.files import atomic, write_json
from models.autoencoder import latents_from_moments, load_codec, to_uint8
from scripts.sources import IDX_IMAGES, IDX_LABELS, read_idx

MAGIC = {"images-idx3": IDX_IMAGES, "labels-idx1": IDX_LABELS}
SIZE = 32  # the images' side after framing: the 28 pixels of Fashion-MNIST are no multiple of 8
LATENT_CHANNELS = 4


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    images = commands.add_parser("images", help="keep the first rows of Fashion-MNIST")
    images.set_defaults(run=make_images, out=Path("assets/fashion-mnist"))
    images.add_argument("--train", type=int, default=6000, help="training images to keep")
    images.add_argument("--test", type=int, default=1000, help="test images to keep")
    vae = commands.add_parser("vae", help="train the VAE")
    vae.set_defaults(run=make_vae, out=Path("assets/fashion-mnist-vae"))
    vae.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64], help="channels at each resolution")
    vae.add_argument("--kl", type=float, default=4e-3, help="weight of the KL term (nats per latent number)")
    vae.add_argument("--edges", type=float, default=1.0, help="weight of the error of neighbouring pixels' differences")
    vae.add_argument("--steps", type=int, default=6000, help="training steps")
    vae.add_argument("--batch-size", type=int, default=256, help="images per step")
    vae.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    vae.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    for command in (images, vae):
        command.add_argument("--source", type=Path, required=True, help="folder with Fashion-MNIST's four idx files")
        command.add_argument("--out", type=Path, help="folder to write")
    return parser.parse_args(argv)


def make_images(args: argparse.Namespace) -> None:
    """Write the first `--train` and `--test` rows of the four files under their own names."""
    contents = {}
    for flag, part, count in (("--train", "train", args.train), ("--test", "t10k", args.test)):
        for kind in MAGIC:
            values = rows(args.source, part, kind)
            if not 0 < count <= len(values):
                raise ValueError(f"{flag} is {count}, expected 1 to {len(values)}, the images in {args.source}")
            header = struct.pack(f">{1 + values.ndim}I", MAGIC[kind], count, *values.shape[1:])
            contents[f"{part}-{kind}-ubyte.gz"] = header + values[:count].tobytes()
    for name, content in contents.items():
        with atomic(args.out / name) as path:
            path.write_bytes(gzip.compress(content, mtime=0))  # no time stamp: the same bytes every time


def make_vae(args: argparse.Namespace) -> None:
    """Train, standardise, save in float16, and measure what was saved."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (framed(rows(args.source, part, "images-idx3")) for part in ("train", "t10k"))
    vae = trained(train.to(device), args)
    standardise(vae, *statistics(vae, train))
    mean, std = statistics(vae, train)
    scale = 1 / (std.square() + mean.square()).mean().sqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 5))
    vae.half().save_pretrained(args.out)  # half the size; the reader computes in its own precision
    report = measure(args.out, test, device)
    options = {key: value for key, value in vars(args).items() if key not in ("run", "source", "out")}
    write_json(args.out / "report.json", {"options": options, "torch": torch.__version__, **report})
    print(json.dumps(report, indent=2))


def rows(source: Path, part: str, kind: str) -> np.ndarray:
    """One of the four idx files: uint8 images (N, 28, 28) or labels (N,)."""
    path = source / f"{part}-{kind}-ubyte.gz"
    if not path.is_file():
        raise ValueError(f"--source: no {path.name} in {source}; it needs Fashion-MNIST's four idx files")
    return read_idx(path, MAGIC[kind])


def framed(images: np.ndarray) -> Tensor:
    """uint8 (N, 28, 28) in the middle of black 32×32: (N, 1, 32, 32)."""
    border = (SIZE - images.shape[-1]) // 2
    return F.pad(torch.from_numpy(images.copy())[:, None], (border,) * 4)


def trained(images: Tensor, args: argparse.Namespace) -> nn.Module:
    """An AutoencoderKL fitted to `images` (N, 1, 32, 32) uint8 and their mirror images; its weights are an exponential
    mean over about the last twentieth of the steps."""
    from diffusers import AutoencoderKL  # here, because copying images must work where diffusers is not installed

    torch.manual_seed(args.seed)
    levels = len(args.widths)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=args.widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,  # the convolutions already see all 8×8 positions
    ).to(images.device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=images.is_cuda
    )
    warmup = min(200, args.steps)

    def factor(step: int) -> float:
        """Of the learning rate: linear warm-up, then half a cosine to zero."""
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(max(0.0, 1 - 20 / args.steps)))
    bar = tqdm(range(args.steps), desc="training the VAE", mininterval=2)
    for step in bar:
        batch = images[torch.randint(len(images), (args.batch_size,), device=images.device)]
        mirrored = torch.rand(len(batch), 1, 1, 1, device=images.device) < 0.5
        batch = torch.where(mirrored, batch.flip(-1), batch).float() / 127.5 - 1  # (B, 1, 32, 32)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            mean, logvar = vae.quant_conv(vae.encoder(batch)).float().chunk(2, dim=1)  # (B, C, 8, 8) each
            latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            output = vae.decode(latents).sample.float()
        error = distortion(output, batch, args.edges)
        rate = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # KL to the standard normal per latent number
        optimizer.zero_grad()
        (error + args.kl * rate).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if step % 100 == 0:
            bar.set_postfix(error=f"{error.item():.4f}", nats=f"{rate.item():.3f}")
    return average.module.eval()


def distortion(output: Tensor, images: Tensor, edges: float) -> Tensor:
    """Mean absolute error, plus `edges` times that of neighbouring pixels' differences: a blurred seam costs twice."""
    error = output - images  # (B, 1, H, W)
    return error.abs().mean() + edges * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


@torch.no_grad()
def statistics(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of sampled latents over `images` (N, 1, 32, 32) and their positions."""
    generator = torch.Generator(vae.device).manual_seed(0)
    sums = torch.zeros(2, LATENT_CHANNELS, dtype=torch.float64, device=vae.device)
    for batch in images.split(1000):
        posterior = vae.encode(batch.to(vae.device) / 127.5 - 1).latent_dist
        latents = posterior.sample(generator).double()  # (B, C, 8, 8)
        sums += torch.stack([latents.mean((0, 2, 3)), latents.square().mean((0, 2, 3))]) * len(batch) / len(images)
    return sums[0], (sums[1] - sums[0].square()).sqrt()


@torch.no_grad()
def standardise(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1 without changing any reconstruction, by moving `mean`
    and `std` (C,) into the 1×1 convolutions on both sides of the latents."""
    into, out = vae.quant_conv, vae.post_quant_conv  # (2C, 2C, 1, 1) to mean and log-variance; (C, C, 1, 1) back
    mean, std = mean.float(), std.float()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std.view(1, -1, 1, 1)
    into.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1)
    into.bias[:LATENT_CHANNELS] = (into.bias[:LATENT_CHANNELS] - mean) / std
    into.bias[LATENT_CHANNELS:] -= 2 * std.log()


def measure(folder: Path, images: Tensor, device: str = "cpu") -> dict[str, float | list[float]]:
    """Errors of the VAE in `folder` on `images` (N, 1, 32, 32) uint8, over their central 28×28 pixels in grey levels.

    `mae` and `psnr` (dB, of the mean squared error) decode the posterior mean, `mae_sampled` a posterior sample;
    `latent_std` is that of the sampled latents, channel by channel, `posterior_std` its part that is noise.
    """
    codec = load_codec(str(folder), device)
    meta, generator = codec.meta(SIZE), torch.Generator().manual_seed(0)
    inner = slice(2, SIZE - 2)
    parts = []
    for batch in images.split(500):
        moments = codec.encode(batch)
        noise = torch.randn(len(batch), *meta["latent_shape"], generator=generator).to(moments.device)
        mean, sample = (latents_from_moments(moments, meta, drawn) for drawn in (None, noise))
        errors = [
            (to_uint8(codec.decode(latents)).cpu().double() - batch)[:, :, inner, inner] for latents in (mean, sample)
        ]
        parts.append((errors, sample.double().cpu(), moments[:, LATENT_CHANNELS:].double().cpu() * meta["scale"]))
    errors, latents, noise = zip(*parts, strict=True)
    of_mean, of_sample = (torch.cat(error) for error in zip(*errors, strict=True))
    latents = torch.cat(latents).transpose(0, 1).flatten(1)  # (C, N·64)
    return {
        "images": len(images),
        "mae": round(of_mean.abs().mean().item(), 3),
        "psnr": round(20 * math.log10(255) - 10 * math.log10(of_mean.square().mean().item()), 2),
        "mae_sampled": round(of_sample.abs().mean().item(), 3),
        "latent_std": [round(std, 4) for std in latents.std(1).tolist()],
        "posterior_std": [round(std, 4) for std in torch.cat(noise).square().mean((0, 2, 3)).sqrt().tolist()],
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    main()
