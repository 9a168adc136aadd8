"""What a training run needs, said before it starts: files, parameters, memory, disk."""

import argparse
import json
from pathlib import Path

from memory.files import free_space
from models.checkpoint import REMEDY
from models.sit import SiT

ENCODE, BUILD = (f"`python -m {maker}` makes it" for maker in ("scripts.encode_dataset", "memory.build_bank"))
REMEDIES = {"store": ENCODE, "holdout": ENCODE, "bank": BUILD, "align_encoder_weights": "give a file", "init": REMEDY}


def missing(args: argparse.Namespace) -> list[str]:
    """What the command names that is not there, a line each."""
    lines, begun = [], any(Path(args.out, "checkpoints").glob("*.pt"))
    for flag, remedy in REMEDIES.items():
        path = getattr(args, flag) and Path(getattr(args, flag))  # what a folder is that is no store, its reader says
        if flag == "init" and (begun or (args.init or "").startswith("hf:")):
            continue  # it has served, or is looked for on the hub
        if path and not path.exists():
            lines.append(f"--{flag.replace('_', '-')}: {path} does not exist; {remedy}")
    return lines


def extent(args: argparse.Namespace, network: SiT, processes: int, facts: dict) -> dict[str, str]:
    """Parameters, images and batch of a whole run, in words."""
    count = sum(parameter.numel() for parameter in network.parameters())
    images, local = args.steps * args.batch_size, args.batch_size // processes
    micro = args.micro_batch or local
    epochs = ""
    if "store" in facts:
        stored = facts["store"]["num_images"]
        epochs = f", that is {images / stored:,.1f} epochs of the store's {stored:,}"
    return {
        "parameters": f"{count:,}",
        "images": f"{images:,}{epochs}",
        "batch": f"{args.batch_size} = {processes} processes × {local // micro} micro-batches × {micro} images",
    }


def describe(args: argparse.Namespace, network: SiT, processes: int, facts: dict) -> str:
    """The configuration with its parameters, memory and disk, for --dry-run."""
    count = sum(parameter.numel() for parameter in network.parameters())
    depth, (_, tokens, width) = len(network.blocks), network.pos_embed.shape
    micro = args.micro_batch or args.batch_size // processes
    # In bytes of bf16 training, within 3% of what four presets took (benchmarks/results/train-memory.json): 41 a block,
    # 20 around them, and bf16 copies of the weights until the backward pass; checkpointed, 6 a block, one block whole.
    kept = (6 * depth + 41 if args.checkpoint_activations else 41 * depth) + 20
    activations = kept * tokens * width * micro
    bytes_a_weight = 20 if args.checkpoint_activations else 22
    lines = [
        json.dumps({**vars(args), **facts, "model_config": network.config}, indent=2),
        *(f"{name:<17} {words}" for name, words in extent(args, network, processes, facts).items()),
        f"memory a process  {bytes_a_weight * count / 1e9:.2f} GB (weights, gradients, two moments, EMA) + about "
        f"{activations / 1e9:.2f} GB of activations (estimate)",
        f"disk              {16 * count / 1e9:.2f} GB a checkpoint, {args.keep + 1} at a time; "
        f"{4 * count / 1e9:.2f} GB a snapshot; {free_space(args.out) / 1e9:.1f} GB are free",
    ]
    return "\n".join(lines)
