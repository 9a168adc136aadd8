"""Reading checkpoints: a file becomes a network, the facts that belong to it, and its memory bank.

A checkpoint is a `torch.save` dictionary of tensors and plain values, read with `weights_only=True`:

    model, ema, opt     state dicts (a snapshot holds `ema` alone)
    model_config        arguments of `SiT_models[...]`, the name under "model"
    steps, args         training steps done; the command line of train.py as a dict
    codec, encoder      the codec's description and the name of the snippets' encoder
    bank, store         path and hash of the bank and of the store; neither is contained
    image_size          height and width of the images in pixels

The same in safetensors (`scripts/export.py`): the weights as tensors, all the rest as JSON under "config" in the
file's metadata, the bank among the tensors or its path relative to the file. Published weights are turned into such a
dictionary by `models/published.py`; what their files do not say is None. A bank inside a file is under `memory`.
"""

import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from memory.bank import MemoryBank
from memory.files import check_form, reading, sha256
from models.published import MARKS, convert, hub_file, read_file
from models.sit import SiT, SiT_models

WEIGHTS = ("ema", "model")
OURS = {"model_config", "ema"}  # keys of a checkpoint of train.py
EXPORTED = "model.safetensors"  # an export's file of weights
MEMORY = ("memorybank", "memoryfreq")  # names of a bank inside it, as in GMem's published file
FACTS = {  # that readers rely on, in the terms of `check_form`: (FORM, None) may be None
    "args": dict,
    "steps": (int, None),
    "codec": (dict, None),
    "encoder": (str, None),
    "bank": ({"path": str, "sha256": (str, None)}, None),
    "store": (dict, None),
    "image_size": (int, None),
}
REMEDY = "give the --out of train.py (which saves every --save-every steps) or of scripts.export, a file in one, or "
REMEDY += "published weights, which `bash scripts/fetch.sh gmem` gets"
LISTED = 8  # names, or differences of a kind, that a message lists


def build_model(config: dict) -> SiT:
    """The network that `model.config` describes, untrained."""
    options = {key: value for key, value in config.items() if key != "model"}
    if config.get("model") not in SiT_models:
        raise ValueError(f"model {config.get('model')!r}: expected one of {', '.join(SiT_models)}")
    return SiT_models[config["model"]](**options)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint file, given itself, its folder, a run's folder (then the one of most steps), or its name on the hub
    (`hf:ORGANISATION/REPOSITORY/FILE@REVISION`).

    Raises:
        ValueError: there is none.
    """
    if str(path).startswith("hf:"):
        return hub_file(str(path))
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        named = ((re.fullmatch(r"(\d+)(-.*)?", file.stem), file) for file in folder.glob("*.pt"))
        if found := sorted((int(name[1]), not name[2], file) for name, file in named if name):
            return found[-1][-1]
    if (path / EXPORTED).is_file():
        return path / EXPORTED
    wanted = f"no such file, nor a folder with checkpoints/0000000.pt files or {EXPORTED}"
    if path.parent.name == "checkpoints" and (there := sorted(file.name for file in path.parent.glob("*.pt"))):
        wanted += f" ({path.parent} has {', '.join(there[-LISTED:])})"
    elif runs := sorted(folder.parent.name for folder in path.glob("*/checkpoints")):
        wanted += f" (a folder of runs: name one of {', '.join(runs[:LISTED])})"
    raise ValueError(f"checkpoint {path}: {wanted}; {REMEDY}")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in a checkpoint file of train.py, its tensors mapped from disk and read only when used.

    Raises:
        ValueError: the file is missing, is not a checkpoint of this project, or holds objects other than plain values.
    """
    path = find_checkpoint(path)
    checkpoint = read_file(path, allowed=())
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= OURS:
        keys = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"checkpoint {path} is not one of train.py's: it holds {keys}; expected model_config, ema, …")
    return checkpoint


def read_export(path: Path) -> dict:
    """The same dictionary from a safetensors file of `scripts/export.py`; from any other, a state dict, as of authors.

    Raises:
        ValueError: the file is no safetensors file, or its configuration is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} cannot be read as a safetensors file: {error}") from error
    if "config" not in metadata:
        return convert(state, path)
    with reading(f"checkpoint {path}, its configuration"):
        config = json.loads(metadata["config"])
        if config["bank"]:
            config["bank"]["path"] = str(path.parent / config["bank"]["path"])
        memory = {"memory": [state.pop(name) for name in MEMORY]} if MEMORY[0] in state else {}
        return {"ema": state, **memory, **config}


def read_any(path: Path) -> dict:
    """The dictionary of a checkpoint of train.py, of its export, or of a published file."""
    if path.suffix == ".safetensors":
        return read_export(path)
    contents = read_file(path)
    if isinstance(contents, dict) and contents.keys() >= OURS:
        return contents
    return convert(contents, path)


def state_differences(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `module`, a line for each missing, unexpected or mis-shaped tensor."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return (
        [f"missing     {name} {wanted[name]}" for name in wanted if name not in given]
        + [f"unexpected  {name} {given[name]}" for name in given if name not in wanted]
        + [
            f"mis-shaped  {name}: the file has {given[name]}, the network {wanted[name]}"
            for name in wanted
            if name in given and wanted[name] != given[name]
        ]
    )


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`; everything must fit.

    Raises:
        ValueError: something is missing, unexpected or of another shape; the message lists it.
    """
    differences = state_differences(module, state)
    if differences:
        shown = "\n  ".join(summary(differences))
        raise ValueError(f"{source} does not fit this network ({len(differences)} differences):\n  {shown}")
    module.load_state_dict(state)


def summary(differences: list[str]) -> list[str]:
    """A short table of differences: one line for those that only the block's number tells apart, a few of each kind."""
    alike = {}
    for line in differences:
        alike.setdefault(re.sub(r"\bblocks\.\d+\.", "blocks.*.", line), []).append(line)
    lines = [found[0] if len(found) == 1 else f"{name}, {len(found)} times" for name, found in alike.items()]
    table = []
    for kind in ("missing", "unexpected", "mis-shaped"):
        of_kind = [line for line in lines if line.startswith(kind)]
        table += of_kind[:LISTED] + [f"{kind}  {len(of_kind) - LISTED} more"] * (len(of_kind) > LISTED)
    return table


def init_weights(module: nn.Module, path: str | os.PathLike) -> list[str]:
    """Start `module` from the EMA weights of a checkpoint, as far as names and shapes agree; returns what did not.

    Those of train.py, exported or published are taken.
    """
    state = read_any(find_checkpoint(path))["ema"]
    differences = state_differences(module, state)
    fitting = module.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name in fitting and tensor.shape == fitting[name].shape}
    if not taken:
        raise ValueError(f"--init {path}: no tensor of it fits the network by name and shape")
    module.load_state_dict(taken, strict=False)
    return differences


def load_bank(config: dict, bank: str | os.PathLike | None) -> MemoryBank | None:
    """The bank that a checkpoint holds or names, or `bank` in its place if it can serve this network; with a warning if
    that stands for other images than the network was trained on, which may be meant.

    Raises:
        ValueError: no bank is named, it is not where it was, it changed, or its dimension or encoder is another.
    """
    if bank is None and "memory" in config:
        with reading(f"checkpoint {config['checkpoint']['path']}, its memory bank"):
            return MemoryBank(*config["memory"])
    if bank is None:
        named = config["bank"]
        if named is None:
            raise ValueError(
                "the checkpoint names no memory bank (it was trained on images' own features): pass --bank"
            )
        path = Path(named["path"])
        if not path.exists():
            raise ValueError(f"bank {path}, which the checkpoint names, is not there: pass its place as --bank")
        for file, expected in ((path, named["sha256"]), (path.with_suffix(".freq"), named.get("freq_sha256"))):
            if expected and file.exists() and sha256(file) != expected:
                raise ValueError(
                    f"bank {file} is not the one of training (its SHA-256 differs from {expected[:12]}…): "
                    "restore it, or pass it as --bank to use it all the same"
                )
        return MemoryBank.load(path)
    loaded, snippet_dim = MemoryBank.load(bank), config["model_config"]["snippet_dim"]
    if loaded.dim != snippet_dim:
        raise ValueError(f"--bank {bank} has snippets of dimension {loaded.dim}; the checkpoint takes {snippet_dim}")
    encoder = loaded.meta.get("encoder")
    if encoder and config["encoder"] and encoder != config["encoder"]:
        raise ValueError(f"--bank {bank} was made by encoder {encoder!r}; the checkpoint's is {config['encoder']!r}")
    made_from, trained_on = loaded.meta.get("store_fingerprint"), (config["store"] or {}).get("fingerprint")
    if made_from and trained_on and made_from != trained_on:
        stores = f"{loaded.meta.get('store')}, than the checkpoint was trained on, {config['store'].get('path')}"
        warnings.warn(
            f"--bank {bank} was built from another store, {stores}: its snippets are of other images", stacklevel=2
        )
    return loaded


def load_model(
    path: str | os.PathLike,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    bank: str | os.PathLike | bool | None = None,
) -> tuple[SiT, dict, MemoryBank | None]:
    """Load a trained network with its bank.

    Args:
        path: a checkpoint file of train.py, exported or published, its name on the hub, or a run's folder for its
            latest.
        weights: "ema" or "model".
        device: where the network goes; the bank stays on the CPU.
        bank: path of a bank to use instead of the one the checkpoint names; False loads none.

    Returns:
        The network in eval mode, the checkpoint's facts (everything but tensors of weights and optimizer), the bank
        (None for a network without a snippet condition).

    Raises:
        ValueError: a file is missing, changed, or does not fit; the message names it and the remedy.
    """
    path = find_checkpoint(path)
    if weights not in WEIGHTS:
        raise ValueError(f"--weights {weights!r}: expected one of {', '.join(WEIGHTS)}")
    checkpoint = read_any(path)
    if weights not in checkpoint:
        raise ValueError(f"checkpoint {path} is a snapshot without {weights!r} weights: use --weights ema")
    if checkpoint.get("format") in MARKS.values():
        raise ValueError(f"checkpoint {path} is, by its tensors, {checkpoint['format']}")
    with reading(f"checkpoint {path}, its model_config"), torch.device("meta"):  # drawing weights would take longer
        model = build_model(checkpoint["model_config"])
    for key, form in FACTS.items():
        check_form(checkpoint.get(key), form, f"checkpoint {path}: {key}")
    taken_for = f" (by its tensors {checkpoint['format']})" if "format" in checkpoint else ""
    load_state(model.to_empty(device="cpu"), checkpoint[weights], f"checkpoint {path}{taken_for}")
    checkpoint["model_config"] = model.config
    checkpoint["checkpoint"] = {"path": str(path), "sha256": sha256(path), "weights": weights}
    config = {key: value for key, value in checkpoint.items() if key not in ("model", "ema", "opt", "memory")}
    takes_snippets = "snippet" in model.reads
    loaded = load_bank(checkpoint, bank) if takes_snippets and bank is not False else None
    return model.to(device).eval(), config, loaded
