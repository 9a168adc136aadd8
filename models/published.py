"""The authors' weight files, as checkpoints of this project.

    GMem, first release   {"network", "memorybank", "memoryfreq"}, or {"ema"} with bank.pth and bank.freq beside it
    REPA (2410.06940)     a state dict, or a training checkpoint {"ema", "model", "args", …}; old files call late blocks
                          `decoder_blocks`, counted anew from 0
    SiT (2401.08740)      the same containers; 2·C output channels of which the first C are the velocity, and time from
                          noise at 0 to data at 1

`convert` tells them apart by keys and shapes, and reads every size of the network from its tensors. Parameters have
this project's names already, because it kept the published ones.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory.bank import NUMPY
from memory.files import weights_folder, why_unreadable
from models.autoencoder import SD_SCALE
from models.hub import from_hub
from models.sit import SiT_models, TimestepEmbedder

GMEM, REPA, SIT = "GMem's first release", "REPA's, or another label-conditioned SiT", "SiT's own, time reversed"
SD_DOWNSAMPLING = 8  # pixels of a side for one of the latents, of Stable Diffusion's VAEs
SIZE = ("depth", "width", "patch_size")  # what tells the networks apart
FALLBACK = "SiT-XL/2"  # what a file of no known size is compared with
INTERPOLANTS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # path types of REPA and SiT, in our names

# What authors' files may hold beside tensors and plain values: the arguments of their scripts, NumPy's numbers and
# arrays.
ALLOWED = (argparse.Namespace, *NUMPY)

# Files often mistaken for a SiT: part of a tensor's name, and what it is then.
MARKS = {
    "quant_conv": "a VAE: pass it as --codec, as a folder in diffusers' format",
    "decoder.conv_in": "a VAE: pass it as --codec, as a folder in diffusers' format",
    "Mixed_5b": "the Inception network: pass it to the evaluator",
    "feat_rope": "a LightningDiT, as GMem's second release: another network",
    "mlp.w12": "a LightningDiT, as GMem's second release: another network",
    "transformer_blocks": "a network in diffusers' layout: take the authors' own file",
    "input_blocks": "a U-Net of ADM or LDM: another network",
    "cls_token": "a vision encoder: it makes snippets and cannot generate",
}
# The same for what holds no state dict.
CONTAINERS = (
    (lambda found: isinstance(found, Tensor), "a bank's snippets? pass that file as --bank"),
    (lambda found: isinstance(found, list), "a bank's frequencies? pass the bank.pth beside it as --bank"),
    (lambda found: isinstance(found, dict) and "state_dict" in found, "a Lightning checkpoint? VAEs come as such"),
    (lambda found: isinstance(found, dict) and "param_groups" in found, "an optimizer's state"),
)


def hub_file(name: str) -> Path:
    """The local copy of `hf:ORGANISATION/REPOSITORY/FILE@REVISION`: a file of that name in the weights folder, taken as
    it is; else that revision, from the cache or downloaded.

    Raises:
        ValueError: the name has another form or no full commit hash, or the file is not to be had.
    """
    parts = re.fullmatch(r"hf:([^/@]+/[^/@]+)/([^@]+)@([0-9a-f]{40})", name)
    if parts is None:
        raise ValueError(
            f"checkpoint {name}: expected hf:ORGANISATION/REPOSITORY/FILE@REVISION with the 40 digits of a commit (a "
            "branch may change), as hf:Tangentone/GMem/GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth@…; the hub lists a "
            "repository's commits under Files, History"
        )
    repository, file, commit = parts.groups()
    local = weights_folder() / Path(file).name
    if local.is_file():
        return local
    remedy = "copy it there or give its path (`bash scripts/fetch.sh gmem` gets GMem's first release)"
    return from_hub(f"checkpoint {name}", repository, (file,), local, remedy, commit)[0]


def read_file(path: Path, allowed: Sequence[object] = ALLOWED) -> object:
    """What a `torch.save` file holds, by the safe loader; tensors are mapped from disk where its format permits.

    Raises:
        ValueError: it is no such file, or holds objects other than tensors, plain values and those `allowed`.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = f"{why_unreadable(error)}; give a run's folder or one of its checkpoints/*.pt"
        raise ValueError(f"checkpoint {path} cannot be read as a torch.save file of plain values: {reason}") from error


def convert(contents: object, path: Path) -> dict:
    """The contents of an author's file at `path` as a checkpoint (see models/checkpoint.py).

    What the file does not say is None. `format` says what it was taken for; a bank inside the file is under `memory`
    as (snippets, frequencies). The tensors are not checked against the network, whose configuration comes from them:
    `load_state` does that.

    Raises:
        ValueError: no network's weights are in it, or one that does not predict a velocity; the message says which.
    """
    states, args = unwrap(contents, path)
    # "module." is what DistributedDataParallel puts before a name.
    states = {key: {name.removeprefix("module."): state[name] for name in state} for key, state in states.items()}
    early = {key.split(".")[1] for state in states.values() for key in state if key.startswith("blocks.")}
    late = any(key.startswith("decoder_blocks.") for state in states.values() for key in state)
    states = {key: {rename(name, len(early)): state[name] for name in state} for key, state in states.items()}
    config, form = recognise(next(iter(states.values())))
    if late or "encoder_depth" in args:
        config["align_depth"] = len(early) if late else args["encoder_depth"]
    check_prediction(form, args, path)
    if form == SIT:
        states = {key: reverse_time(state, config["in_channels"]) for key, state in states.items()}
    side, channels = config["input_size"], config["in_channels"]
    vae = args.get("vae", "mse" if form == GMEM else "ema")  # of the authors' sampling scripts
    bank, memory = None, {}
    if "network" in contents:
        memory = {"memory": (torch.as_tensor(contents["memorybank"]), contents["memoryfreq"])}
    elif form == GMEM:
        bank = {"path": str(path.with_name("bank.pth")), "sha256": None, "k": None, "dim": config["snippet_dim"]}
    return {
        **states,
        **memory,
        "format": form,
        "model_config": config,
        "steps": int(contents["steps"]) if "steps" in contents else int(path.stem) if path.stem.isdigit() else None,
        "args": {**args, "interpolant": INTERPOLANTS[args.get("path_type", "linear").lower()], "snippet_from": None},
        "codec": {
            "name": f"sd-vae-ft-{vae}",
            "scale": SD_SCALE,
            "shift": 0.0,
            "latent_shape": [channels, side, side],
            "moments_shape": [2 * channels, side, side],
            "dtype": "float16",
            "image_channels": 3,
            "sha256": None,
        },
        "encoder": None,
        "bank": bank,
        "store": None,
        "image_size": side * SD_DOWNSAMPLING,
        "num_classes": config.get("num_classes"),
    }


def unwrap(contents: object, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The state dicts in a file, under "ema" and "model" as far as there are, and the arguments of its training.

    A plain state dict counts as "ema": those that are published are averages.
    """
    states, args, described = {}, {}, type(contents).__name__
    if isinstance(contents, dict):
        described = f"a dictionary of {', '.join(map(str, list(contents)[:8])) or 'nothing'}"
        args = contents.get("args", {})
        args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
        args = {name: value.tolist() if isinstance(value, np.generic) else value for name, value in args.items()}
        states = {key: contents[key] for key in ("ema", "model") if key in contents}
        if "network" in contents:
            states = {"ema": contents["network"]}
        elif "ema" not in contents:
            states = {"ema": contents}
        lacking = [key for key in ("memorybank", "memoryfreq") if "network" in contents and key not in contents]
        if lacking:
            raise ValueError(f"checkpoint {path} holds {described}; a file of GMem's has {' and '.join(lacking)} too")
    if states and all(map(is_state, states.values())):
        return states, args
    hint = next((f" ({what})" for test, what in CONTAINERS if test(contents)), "")
    raise ValueError(
        f"checkpoint {path} is not one of train.py's nor of the published ones: it holds {described}{hint}; expected "
        "model_config, ema, … (train.py), network, memorybank, memoryfreq (GMem), ema, … (SiT, REPA), or a state dict"
    )


def is_state(value: object) -> bool:
    """Whether a value is a state dict: tensors by name, at least one."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def rename(name: str, early: int) -> str:
    """A parameter's name today; REPA's old files call the block after the `early` ones `decoder_blocks.0`."""
    parts = name.split(".")
    if parts[0] == "decoder_blocks":
        parts[:2] = "blocks", str(int(parts[1]) + early)
    return ".".join(parts)


def recognise(state: dict[str, Tensor]) -> tuple[dict, str]:
    """The configuration of the network that `state` belongs to, from its shapes, and the format's name.

    Where the tensor that would tell is absent, or of no known size, stands what SiT-XL/2 has, so that a foreign file
    can be compared with that.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    width, channels, patch, _ = (*shapes.get("x_embedder.proj.weight", ()), 0, 0, 0, 0)[:4]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    sizes = {tuple(make.keywords[key] for key in SIZE): name for name, make in SiT_models.items()}
    size = (depth, width, patch)
    config = {"model": sizes.get(size, FALLBACK), "in_channels": 4, "input_size": 32}
    if size in sizes and "pos_embed" in shapes:
        side = math.isqrt(state["pos_embed"].numel() // width)  # in patches
        config |= {"in_channels": channels, "input_size": side * patch}
    kinds = {"label": "y_embedder.embedding_table.weight", "snippet": "condition_projection.linear.weight"}
    kinds = {kind: shapes[name] for kind, name in kinds.items() if name in shapes}
    config["condition"] = "+".join(kinds) or "none"
    if "label" in kinds:
        config["num_classes"] = kinds["label"][0] - 1  # the last row is the null label, always there
    if "snippet" in kinds:
        config["snippet_dim"] = kinds["snippet"][1]
    heads = {int(name.split(".")[1]) for name in shapes if re.fullmatch(r"projectors\.\d+\.4\.weight", name)}
    config["align_depth"] = min(8, depth or 8)  # of REPA and GMem, where there are so many blocks
    config["align_dims"] = [shapes[f"projectors.{head}.4.weight"][0] for head in sorted(heads)]
    config["qk_norm"] = any(".attn.q_norm." in name for name in shapes)
    for mark, what in MARKS.items():
        if any(mark in name for name in shapes):
            return config, what
    if shapes.get("final_layer.linear.weight") == (2 * config["in_channels"] * patch**2, width):
        return config, SIT
    return config, GMEM if "snippet" in kinds else REPA


def check_prediction(form: str, args: dict, path: Path) -> None:
    """Raise ValueError for networks of a SiT's shape that do not predict a velocity on a path of loss.py."""
    for key, known in (("path_type", (*INTERPOLANTS,)), ("prediction", ("v", "velocity"))):
        if key in args and str(args[key]).lower() not in known:
            raise ValueError(
                f"checkpoint {path} was trained with {key} {args[key]!r}; this project samples {', '.join(known)}"
            )
    if form == SIT and path.name.lower().startswith("dit"):  # DiT's tensors have the same names and shapes
        raise ValueError(
            f"checkpoint {path} is one of DiT's by its name: it predicts noise at 1000 discrete times; take a file of "
            "SiT's, or rename it if it is one"
        )


def reverse_time(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """SiT's weights as weights of the same velocity in this project's terms, exactly: v(x, t) = −v_SiT(x, 1 − t).

    With frequencies w, cos(w − wt) = cos w·cos wt + sin w·sin wt and sin(w − wt) = sin w·cos wt − cos w·sin wt, so the
    reversal is a rotation of the 256 time features, taken up by the columns of the layer that reads them. The sign
    goes into the last layer, of whose 2C channels (the fastest index of its rows) the first C are kept. Tensors that
    are missing or mis-shaped are left for `load_state` to list.
    """
    half, reversed_ = TimestepEmbedder.num_features // 2, dict(state)
    weight = state.get("t_embedder.mlp.0.weight", torch.empty(0))  # (D, 256)
    if weight.shape[1:] == (2 * half,):
        w = torch.exp(-math.log(TimestepEmbedder.max_period) * torch.arange(half, dtype=torch.float64) / half)  # (128,)
        cosines, sines = weight.double().chunk(2, dim=1)  # (D, 128) each
        rotated = torch.cat([cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()], dim=1)
        reversed_["t_embedder.mlp.0.weight"] = rotated.to(weight.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in state and len(state[name]) % (2 * channels) == 0:
            rows = state[name].unflatten(0, (-1, 2 * channels))  # (p², 2C, …)
            reversed_[name] = -rows[:, :channels].flatten(0, 1)  # (p²·C, …)
    return reversed_
