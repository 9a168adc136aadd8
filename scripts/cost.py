"""What a network took to make: floating-point operations, and GPU-hours, of encoding, bank and training.

Operations are counted from the networks: two for each multiply-add of a product, as in the papers' GMACs times two, and
three forwards for a step of training. Hours are those that the commands have noted, summed over processes.
"""

import functools
import json
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memory.files import check_form, read_json, reading
from models.autoencoder import read_config
from models.checkpoint import build_model

FORWARDS_OF_A_STEP = 3  # the forward, and twice as much to differentiate it
ONCE = ("t_embedder", "condition_projection", "adaLN_modulation")  # products of an image, not of each of its tokens


def network(model_config: dict) -> nn.Module:
    """The network of a checkpoint's `model_config`, with shapes and without weights."""
    with torch.device("meta"):
        return build_model(model_config)


def multiply_adds(model: nn.Module) -> int:
    """Of one image's forward: every matrix meets each token, or the image once, and attention every pair of tokens."""
    _, tokens, width = model.pos_embed.shape
    matrices = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name != "pos_embed" and "embedding_table" not in name
    }
    products = sum(n * (1 if any(part in name for part in ONCE) else tokens) for name, n in matrices.items())
    return products + len(model.blocks) * 2 * tokens**2 * width


def training_flop(model: nn.Module, images: int) -> int:
    """Of training on so many images, all passes counted."""
    return 2 * FORWARDS_OF_A_STEP * multiply_adds(model) * images


def encoding_flop(meta: dict, encoder: str) -> int | None:
    """Of a store's images in all views, given its meta.json, through codec and encoder; None for an unknown codec."""
    codec, network = codec_multiply_adds(meta["codec"]["name"], meta["image_size"]), encoder_of(meta, encoder)
    if codec is None:
        return None
    of_image = codec + encoder_multiply_adds(network["model"], network["input_size"])
    return 2 * meta["num_images"] * meta["num_views"] * of_image


def encoder_of(meta: dict, name: str) -> dict:
    """The model and input size behind a store's features, from which others may have been derived."""
    found = meta["encoders"][name]
    while isinstance(found, dict) and "derived_from" in found:
        found = found["derived_from"]
    check_form(found, {"model": str, "input_size": int}, f"encoder {name}")
    return found


@functools.cache
def codec_multiply_adds(name: str, size: int) -> int | None:
    """Of encoding one square image; the VAEs of Stable Diffusion by name, others by their folder's config.json."""
    from diffusers import AutoencoderKL

    if name == "pixels":
        return 0
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    if not name.startswith("sd-vae-ft-"):
        file = Path(name) / "config.json"
        if not file.is_file():
            return None
        config = read_config(file.parent)
    with reading(f"codec {name}"), torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(config)
        with FlopCounterMode(display=False) as counter:
            vae.encode(torch.zeros(1, vae.config.in_channels, size, size))
    return counter.get_total_flops() // 2


@functools.cache
def encoder_multiply_adds(name: str, side: int) -> int:
    """Of one image of this side, given the encoder's name in timm."""
    if not timm.is_model(name):
        raise ValueError(f"encoder {name!r} is no model of timm {timm.__version__}: there is nothing to count")
    with reading(f"encoder {name}"), torch.device("meta"), torch.no_grad():
        options = {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        model = timm.create_model(name, num_classes=0, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


def bank_flop(bank: dict, images: int) -> int | None:
    """Of exact k-means, given bank.json and the store's number of images: one assignment more than there are passes;
    None for a bank that others built, of which an export writes nothing but hashes."""
    if None in map(bank.get, ("rule", "k", "dim", "iterations")):
        return None
    assignments = 0 if bank["rule"] == "every feature" else bank["iterations"] + 1
    return 2 * images * bank["k"] * bank["dim"] * assignments


def encoding_hours(meta: dict) -> float | None:
    """GPU-hours of all commands that wrote to a store; None where they noted nothing."""
    return sum(run["process_seconds"] for run in meta["runs"]) / 3600 if meta.get("runs") else None


def bank_hours(bank: dict) -> float | None:
    """GPU-hours of the command that built a bank; None where it noted nothing."""
    return bank["run"]["seconds"] * bank["run"]["processes"] / 3600 if bank.get("run") else None


def training_hours(run: Path) -> float | None:
    """GPU-hours of a run's steps by the rates in its log, pauses for saving and sampling and lost steps not counted;
    None where the run did not note on how many processes."""
    forms = {"runs": ([{"from_step": int, "processes": int}], None), "args": {"batch_size": int}}
    config, seconds, before = read_json(run / "config.json", **forms), 0.0, 0
    if not config.get("runs"):
        return None
    with reading(run / "log.jsonl"):
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
            if "images_per_second" in line:
                processes = [part["processes"] for part in config["runs"] if part["from_step"] < line["step"]][-1]
                images = (line["step"] - before) * config["args"]["batch_size"]
                seconds += processes * images / line["images_per_second"]
                before = line["step"]
    return seconds / 3600
