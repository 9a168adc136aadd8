"""Command: make what lies in assets/, real images, a small VAE and a small GMem, so that the demo runs offline.

    python -m scripts.make_assets images --source FOLDER
    python -m scripts.make_assets vae --source FOLDER
    python -m scripts.make_assets model --source OUT
    python -m scripts.make_assets candidates --source OUT OUT OUT

FOLDER holds the four idx files of Fashion-MNIST (`train-images-idx3-ubyte.gz` …). `images` keeps the first rows of each
under the same names. `vae` trains an AutoencoderKL on the 60,000 training images, framed in black to 32×32, and writes
it in diffusers' format with a report of its errors on the 10,000 test images; a GPU takes minutes, a CPU most of a day.
OUT is what `bash scripts/fashion-mnist.sh FOLDER` left: `model` takes its export and writes its model card, and
`candidates` lists what several of them score, the one to ship first.
"""

import argparse
import gzip
import json
import math
import shlex
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from evaluations.card import bank_lines, copy_table, table
from memory.command import execute
from memory.files import atomic, read_json, sha256, write_json
from models.autoencoder import latents_from_moments, load_codec, to_uint8
from models.checkpoint import EXPORTED
from scripts.cost import training_hours
from scripts.export import without_folders
from scripts.sources import IDX_IMAGES, IDX_LABELS, read_idx

MAGIC = {"images-idx3": IDX_IMAGES, "labels-idx1": IDX_LABELS}
SIZE = 32  # the images' side after framing: the 28 pixels of Fashion-MNIST are no multiple of 8
LATENT_CHANNELS = 4
LAST = "--resident"  # of the words that scripts/fashion-mnist.sh itself gives to train.py
COMPARED = ("samples", "random training images")  # rows of evaluations.controls that candidates are listed with


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
    model = commands.add_parser("model", help="pack what scripts/fashion-mnist.sh trained")
    model.set_defaults(run=make_model, out=Path("assets/gmem-fashion-mnist"))
    candidates = commands.add_parser("candidates", help="list what several such models score")
    candidates.set_defaults(run=make_candidates, out=Path("assets/gmem-fashion-mnist"))
    given, wrote = "folder with Fashion-MNIST's four idx files", "that scripts/fashion-mnist.sh wrote"
    sources = {images: given, vae: given, model: f"folder {wrote}", candidates: f"folders {wrote}"}
    for command, source in sources.items():
        several = {"nargs": "+"} if command is candidates else {}
        command.add_argument("--source", type=Path, required=True, help=source, **several)
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


def make_model(args: argparse.Namespace) -> None:
    """Copy the export, and write what it scores as `report.json` and as a model card."""
    source, report = args.source, describe(args.source)
    with atomic(args.out / EXPORTED) as path:
        shutil.copyfile(source / "export" / EXPORTED, path)
    write_json(args.out / "report.json", report)
    with atomic(args.out / "README.md") as path:
        path.write_text(model_card((source / "export" / "README.md").read_text(), report))
    print((args.out / "README.md").read_text())


def make_candidates(args: argparse.Namespace) -> None:
    """Write `candidates.json`: how each model was trained, and its scores and copies beside those of real images."""
    found = []
    for report in map(describe, args.source):
        kept = {name: report[name] for name in ("training", "sampling", "judge")}
        scores = {title: row["metrics"]["held-out"] for title, row in report["rows"].items() if title in COMPARED}
        figures = ("near_copies", "near_copies_held_out", "excess", "standard_error")
        spaces = {name: {figure: space[figure] for figure in figures} for name, space in report["spaces"].items()}
        found.append({"sha256": report["file"]["sha256"], **kept, "scores": scores, "spaces": spaces})
    write_json(args.out / "candidates.json", found)
    print(json.dumps(found, indent=2))


def describe(source: Path) -> dict:
    """What the results of scripts/fashion-mnist.sh say of the model, without the folders that it was made in.

    Raises:
        ValueError: there is no export, or the samples were not made by it.
    """
    weights = source / "export" / EXPORTED
    if not weights.is_file():
        raise ValueError(f"--source {source}: no export/{EXPORTED}; run `bash scripts/fashion-mnist.sh` first")
    parts = ("run/config", "samples/samples", "controls", "copies", "bank/bank")
    config, samples, controls, copies, bank = (read_json(source / f"{part}.json") for part in parts)
    file = {"bytes": weights.stat().st_size, "sha256": sha256(weights)}
    if samples["settings"]["checkpoint"] != file["sha256"]:
        raise ValueError(f"--source {source}: its samples are of another network than its export; sample again")
    lines = [json.loads(line) for line in (source / "run" / "log.jsonl").read_text().splitlines()]
    made = config["runs"][-1]
    options = dict(option.split("=") for option in config["args"]["model_options"])
    scale = options.get("snippet_scale", "1")  # models/sit.py's own, where flags of train.py took the recipe's place
    held_out = [line for line in lines if "holdout_loss" in line][-1]
    names = ("steps", "batch_size", "lr", "ema_decay", "model_options", "precision", "seed")
    training = {name: config["args"][name] for name in names} | {"steps": samples["settings"]["training_steps"]}
    variables = {"CODEC": without_folders(config)["codec"]["name"], "MODEL": config["args"]["model"], "SCALE": scale}
    variables |= {"STEPS": training["steps"], "BATCH": training["batch_size"], "LR": training["lr"], "K": bank["k"]}
    training |= {
        "variables": {name: str(value) for name, value in variables.items()},  # of scripts/fashion-mnist.sh
        "flags": made["command"][made["command"].index(LAST) + 1 :],  # behind its FOLDER
        "images_trained_on": config["store"]["num_images"],
        "seconds": round(training_hours(source / "run") * 3600),
    }
    training |= {name: made[name] for name in ("device", "date", "code", "versions")}
    kept = ("sampler", "evaluations", "seed", "snippets", "guidance", "precision")
    of_bank = ("k", "dim", "encoder", "rows_of_one_image", "draws_of_one_image", "auc_train_vs_holdout")
    return {
        "file": file,
        "training": training,
        "holdout_loss": {"step": held_out["step"], "loss": held_out["holdout_loss"]},
        "bank": {name: bank[name] for name in of_bank},
        "sampling": {name: samples["settings"][name] for name in kept},
        "judge": {name: controls["network"][name] for name in ("name", "sha256")},
        "rows": controls["rows"],
        "spaces": {
            name: {key: value for key, value in space.items() if key != "suspicious"}
            for name, space in copies["spaces"].items()
        },
    }


def model_card(exported: str, report: dict) -> str:
    """The export's card, how the network was trained, and what was measured."""
    training, sampling, judge = report["training"], report["sampling"], report["judge"]["name"]
    images = training["steps"] * training["batch_size"]
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in training["variables"].items())
    given = shlex.join(["FOLDER", *training["flags"]])
    held_out, size = report["holdout_loss"], report["file"]["bytes"] / 1e6
    drawn = "the pixels" if training["variables"]["CODEC"] == "pixels" else "the codec's latents"
    rows = [
        {"": title, "N": f"{row['num_images']:,}"}
        | {name.removesuffix(f"-{judge}"): f"{value:.4g}" for name, value in row["metrics"]["held-out"].items()}
        for title, row in report["rows"].items()
        if "held-out" in row["metrics"]
    ]
    sections = [
        exported.rstrip(),
        "## Training",
        f"`{variables} bash scripts/fashion-mnist.sh {given}`, by code {training['code']}: "
        f"{training['images_trained_on']:,} of Fashion-MNIST's 60,000 training images, the others held out of "
        f"everything. {training['steps']:,} steps of {training['batch_size']} images, "
        f"{images / training['images_trained_on']:,.0f} epochs, in {training['seconds']} seconds on one "
        f"{training['device']} ({training['date'][:10]}, torch {training['versions']['torch']}, "
        f"{training['precision']}), AdamW at {training['lr']:g}, EMA {training['ema_decay']}, "
        f"{', '.join(training['model_options'])}. Loss on held-out images at step {held_out['step']:,}: "
        f"{held_out['loss']:.4f}. Weights and bank are in float16 in one file of {size:.1f} MB.",
        "## What it scores",
        f"Sampled with these weights and the bank before its rounding, by {sampling['sampler']} with "
        f"{sampling['evaluations']} evaluations an image in {sampling['precision']}. FD, precision, recall and KD are "
        f"against the held-out images, in the features of a {judge} that was trained on the training images without "
        "labels (`scripts/train_metric_encoder.py`) and is unrelated to the encoder of the snippets; its weights have "
        f"SHA-256 {report['judge']['sha256']}. They compare with rows of as many samples by the same judge and "
        "images. Scores of fewer samples, to repeat on a CPU, stand in `scores.json` and in "
        "[assets/README.md](../README.md#scores-to-repeat).",
        table(rows),
        f"Are these copies? Searched among all images it was trained on (latent: {drawn} that the network draws):",
        copy_table(report),
        bank_lines(report["bank"]),
        "## Licence",
        "MIT, as this repository; Fashion-MNIST is © Zalando SE, MIT licence.",
    ]
    return "\n\n".join(sections) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    execute(main)
