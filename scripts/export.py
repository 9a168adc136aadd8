"""Publish a trained network, or take over a published one: weights, configuration, bank and a model card in one folder.

    python -m scripts.export runs/gmem-xl --out exports/gmem-xl
    python -m scripts.export exports/gmem-xl --out runs/gmem-xl-again --format pt

Reads   any checkpoint: of train.py, exported, or published by the authors (then in this project's terms)
Writes  OUT/model.safetensors    the weights, with all else as JSON under "config" in the file's metadata; or, with
                                 --format pt, OUT/0000000.pt as train.py writes its snapshots, named by its steps
        OUT/bank.pth, bank.freq  the memory bank, for networks that are conditioned on it; with --half, in float16 in
                                 model.safetensors, which is then half the size and all there is
        OUT/README.md            the model card
`--checkpoint OUT` of sample_ddp.py and `--init OUT` of train.py read either.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from memory.bank import MemoryBank
from memory.command import Help, execute
from memory.files import atomic, sha256
from memory.provenance import code_version
from models.checkpoint import EXPORTED, MEMORY, WEIGHTS, load_model
from models.sit import SiT

PLACES = ("store", "holdout", "bank", "out", "init", "stage", "codec", "align_encoder_weights")  # of train.py


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, exported or published file, or the folder of a run or an export")
    add("--out", required=True, help="folder to make; it may exist if it is empty")
    add("--weights", default="ema", choices=WEIGHTS, help="averaged or last weights")
    add("--format", default="safetensors", choices=("safetensors", "pt"), help="of the weights")
    add("--half", action="store_true", help="weights and bank in float16, in one safetensors file")
    bank = parser.add_mutually_exclusive_group()
    bank.add_argument("--bank", help="bank.pth, or its folder, in place of the one that the checkpoint names")
    bank.add_argument("--no-bank", action="store_true", help="leave the bank out; sampling will need --bank")
    args = parser.parse_args(argv)
    if args.half and args.format == "pt":
        parser.error("--half goes with --format safetensors, because training continues in float32")
    return args


def main(argv: list[str] | None = None) -> None:
    """Load and check everything, then write the bank, the card and, last, the weights."""
    args = parse(argv)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there and not empty; choose a new folder")
    model, config, bank = load_model(args.checkpoint, args.weights, bank=False if args.no_bank else args.bank)
    source = config.pop("checkpoint")
    config |= without_folders(config)
    state = model.state_dict()
    card = model_card(model, config, bank, source)
    if args.format == "safetensors":
        card += elsewhere(model, bank, args.half)
    if bank and args.half:
        state |= dict(zip(MEMORY, (bank.snippets, bank.freq), strict=True))
    elif bank:
        config["bank"] = export_bank(bank, out / "bank.pth")
    if args.half:
        state = {name: halved(tensor, name) for name, tensor in state.items()}
    if config["bank"]:  # one that is left out is looked for in the same place
        config["bank"]["path"] = "bank.pth" if args.format == "safetensors" else str(out / "bank.pth")
    with atomic(out / "README.md") as temporary:
        temporary.write_text(card)
    if args.format == "safetensors":
        with atomic(out / EXPORTED) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, temporary, {"format": "pt", "config": json.dumps(config)})
            shutil.copymode(out / "README.md", temporary)  # else its maker alone may read it
    else:
        with atomic(out / f"{config['steps'] or 0:07d}.pt") as temporary:
            torch.save({"ema": state, **config}, temporary)
    print(card)


def without_folders(config: dict) -> dict:
    """`args`, `store` and `codec` of a checkpoint's facts with the names of files, without the maker's folders.

    A codec keeps a name that others find, a hub's or one in assets/. Whoever has another one's folder puts it into the
    weights folder under its name or passes it as --codec; the hash of its weights tells whether it is the same.
    """
    args = {
        key: Path(value).name if key in PLACES and isinstance(value, str) else value
        for key, value in config["args"].items()
    }
    store = config["store"] and config["store"] | {"path": Path(config["store"]["path"]).name}
    codec = Path(config["codec"]["name"])
    own = {"/", ".."} & set(codec.parts) or (codec.is_dir() and codec.parts[0] != "assets")
    codec = codec.name if own else str(codec)
    return {"args": args, "store": store, "codec": config["codec"] | {"name": codec}}


def halved(tensor: Tensor, name: str) -> Tensor:
    """A tensor in float16, whole numbers as they are; ValueError if it does not fit."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    if not half.isfinite().all():
        raise ValueError(f"--half: {name} has numbers beyond ±65,504, the range of float16; leave --half out")
    return half


def export_bank(bank: MemoryBank, path: Path) -> dict:
    """Write the bank to `path`, without its maker's folders and command; returns what a checkpoint says of it."""
    meta = {key: Path(value).name if key == "store" else value for key, value in bank.meta.items()}
    if "run" in meta:
        meta["run"] = {key: value for key, value in meta["run"].items() if key != "command"}
    MemoryBank(bank.snippets, bank.freq, bank.assignment, meta).save(path)
    hashes = {"sha256": sha256(path), "freq_sha256": sha256(path.with_suffix(".freq"))}
    return {"path": str(path), "k": len(bank), "dim": bank.dim, **hashes}


def model_card(model: SiT, config: dict, bank: MemoryBank | None, source: dict) -> str:
    """What a stranger needs to know of the weights, in Markdown; what is not known is said to be."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    options = ", ".join(f"{key} {value}" for key, value in model.config.items() if key != "model")
    codec = config["codec"]
    held = "none in this folder; sampling needs --bank" if "snippet" in model.reads else "none needed"
    if bank:
        held = (
            f"{len(bank):,} snippets of {bank.dim} numbers, drawn by frequencies that sum to {int(bank.freq.sum()):,}"
        )
    rows = {
        "network": f"{model.config['model']}, {parameters:,} parameters",
        "options": options,
        "predicts": f"the velocity of the {config['args'].get('interpolant')} path, data at t = 0 and noise at t = 1",
        "training steps": config["steps"],
        "images": f"{config['image_size']}×{config['image_size']} pixels, latents {list(model.latent_shape)}",
        "codec": f"{codec['name']}, scale {codec.get('scale')}, shift {codec.get('shift')}, "
        f"SHA-256 {codec.get('sha256') or 'none'}",
        "encoder of the snippets": config["encoder"],
        "memory bank": held,
        "trained on": config["store"] and f"{config['store']['path']}, fingerprint {config['store']['fingerprint']}",
        "made from": f"{Path(source['path']).name}, its {source['weights']} weights, SHA-256 {source['sha256']}",
        "its format": config.get("format", "this project's"),
        "exported by code": code_version(),
    }
    table = "\n".join(f"| {name} | {'not known' if value is None else value} |" for name, value in rows.items())
    return (
        f"# {model.config['model']} conditioned on {model.condition}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        "Sample it with `python sample_ddp.py --checkpoint FOLDER --out samples`, FOLDER being this one. Weights that "
        "others trained stay under the licence they were published with.\n"
    )


def elsewhere(model: SiT, bank: MemoryBank | None, half: bool) -> str:
    """The part of the card for other programs: how to load model.safetensors with one file of this project, and use it.

    The network must be one of models/sit.py as it is, without a condition of the user's own.
    """
    lines = [
        "import json",
        "import torch",
        "from safetensors import safe_open",
        "from sit import SiT_models  # a copy of this project's models/sit.py, which needs torch and timm alone",
        "",
        'with safe_open("model.safetensors", "pt") as file:',
        '    config = json.loads(file.metadata()["config"])',
        "    tensors = {name: file.get_tensor(name) for name in file.keys()}",
    ]
    if bank and half:
        lines.append(f'snippets, freq = (tensors.pop(name) for name in ("{MEMORY[0]}", "{MEMORY[1]}"))')
    elif bank:
        lines.append('snippets, freq = (torch.load(f"bank.{part}", weights_only=True) for part in ("pth", "freq"))')
    lines += [
        'options = config["model_config"]',
        'network = SiT_models[options.pop("model")](**options).eval()',
        "network.load_state_dict(tensors)",
    ]
    size, kinds = ", ".join(map(str, model.latent_shape)), {"label": "labels (B,)"}
    if "snippet" in model.reads:
        kinds["snippet"] = f"snippets (B, {model.config['snippet_dim']}), rows of the bank drawn by its frequencies"
    cond = " and ".join(kinds[kind] for kind in model.reads) or "None"
    return (
        "\n## In other programs\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
        f"`network(x, t, cond)` is the velocity at latents x (B, {size}) and times t (B,) from 1, noise, to 0, data; "
        f"`x + (s - t) * network(x, t, cond)` is a step of Euler's from t to s. `cond` is {cond}"
        f"{', as a pair' if len(model.reads) > 1 else ''}. The codec decodes `x / scale + shift`.\n"
    )


if __name__ == "__main__":
    execute(main)
