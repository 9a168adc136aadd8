"""Reading checkpoints: a file becomes a network, the facts that belong to it, and its memory bank.

A checkpoint is a `torch.save` dictionary of tensors and plain values, read with `weights_only=True`:

    model, ema, opt     state dicts (a snapshot holds `ema` alone)
    model_config        arguments of `SiT_models[...]`, the name under "model"
    steps, args         training steps done; the command line of train.py as a dict
    codec, encoder      the codec's description and the name of the snippets' encoder
    bank, store         path and hash of the bank and of the store; neither is contained
    image_size          height and width of the images in pixels
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from memory.bank import MemoryBank
from memory.files import sha256
from models.sit import SiT, SiT_models

WEIGHTS = ("ema", "model")


def build_model(config: dict) -> SiT:
    """The network that `model.config` describes, untrained."""
    options = {key: value for key, value in config.items() if key != "model"}
    if config.get("model") not in SiT_models:
        raise ValueError(f"model {config.get('model')!r}: expected one of {', '.join(SiT_models)}")
    return SiT_models[config["model"]](**options)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint file, given itself, its folder, or a run's folder (then the one of most steps).

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = sorted(folder.glob("[0-9]*.pt"), key=lambda file: (int(file.stem.split("-")[0]), "-" not in file.stem))
        if found:
            return found[-1]
    raise ValueError(f"checkpoint {path}: no such file, nor a folder with checkpoints/0000000.pt files")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in a checkpoint file, its tensors mapped from disk and read only when used.

    Raises:
        ValueError: the file is missing, is not a checkpoint of this project, or holds objects other than plain values.
    """
    path = find_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read as a torch.save file of plain values: {error}") from error
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint or "ema" not in checkpoint:
        keys = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"checkpoint {path} is not one of train.py's: it holds {keys}; expected model_config, ema, …")
    return checkpoint


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
        shown = "\n  ".join(differences[:20]) + (f"\n  … {len(differences) - 20} more" if len(differences) > 20 else "")
        raise ValueError(f"{source} does not fit this network ({len(differences)} differences):\n  {shown}")
    module.load_state_dict(state)


def init_weights(module: nn.Module, path: str | os.PathLike) -> list[str]:
    """Start `module` from the EMA weights of a checkpoint, as far as names and shapes agree; returns what did not."""
    state = read_checkpoint(path)["ema"]
    differences = state_differences(module, state)
    fitting = module.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name in fitting and tensor.shape == fitting[name].shape}
    if not taken:
        raise ValueError(f"--init {path}: no tensor of it fits the network by name and shape")
    module.load_state_dict(taken, strict=False)
    return differences


def load_bank(config: dict, bank: str | os.PathLike | None) -> MemoryBank | None:
    """The bank that a checkpoint names, or `bank` in its place if it can serve this network.

    Raises:
        ValueError: no bank is named, it is not where it was, it changed, or its dimension or encoder is another.
    """
    named, snippet_dim = config["bank"], config["model_config"]["snippet_dim"]
    if bank is None:
        if named is None:
            raise ValueError(
                "the checkpoint names no memory bank (it was trained on images' own features): pass --bank"
            )
        if not Path(named["path"]).exists():
            raise ValueError(
                f"bank {named['path']}, which the checkpoint names, is not there: pass its place as --bank"
            )
        if sha256(named["path"]) != named["sha256"]:
            raise ValueError(
                f"bank {named['path']} is not the one of training (its SHA-256 differs from {named['sha256'][:12]}…): "
                "restore it, or pass it as --bank to use it all the same"
            )
        return MemoryBank.load(named["path"])
    loaded = MemoryBank.load(bank)
    if loaded.dim != snippet_dim:
        raise ValueError(f"--bank {bank} has snippets of dimension {loaded.dim}; the checkpoint takes {snippet_dim}")
    encoder = loaded.meta.get("encoder")
    if encoder and config["encoder"] and encoder != config["encoder"]:
        raise ValueError(f"--bank {bank} was made by encoder {encoder!r}; the checkpoint's is {config['encoder']!r}")
    return loaded


def load_model(
    path: str | os.PathLike,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    bank: str | os.PathLike | bool | None = None,
) -> tuple[SiT, dict, MemoryBank | None]:
    """Load a trained network with its bank.

    Args:
        path: a checkpoint file, or a run's folder for its latest.
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
    checkpoint = read_checkpoint(path)
    if weights not in WEIGHTS:
        raise ValueError(f"--weights {weights!r}: expected one of {', '.join(WEIGHTS)}")
    if weights not in checkpoint:
        raise ValueError(f"checkpoint {path} is a snapshot without {weights!r} weights: use --weights ema")
    model = build_model(checkpoint["model_config"])
    load_state(model, checkpoint[weights], f"checkpoint {path}")
    config = {key: value for key, value in checkpoint.items() if key not in ("model", "ema", "opt")}
    config["checkpoint"] = {"path": str(path), "sha256": sha256(path), "weights": weights}
    takes_snippets = "snippet" in model.condition
    loaded = load_bank(config, bank) if takes_snippets and bank is not False else None
    return model.to(device).eval(), config, loaded
