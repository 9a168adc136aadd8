"""How well the kernels of models/ agree with PyTorch on this GPU, and how long a network waits for the comparison.

    python -m benchmarks.bench_agreement --out FILE

`share` is the largest error of models/fused.py in parts of what is allowed (1 is the limit; see models/agreement.py),
and `attention` that of models/attention.py, compared here at shapes that it is not used for, too. `seconds` are those
of a first comparison, when Triton compiles, and `again` of one more in the same process; `kept_mb` stays on the GPU.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks.bench_train import show, synchronize
from memory.files import write_json
from memory.provenance import provenance
from models.agreement import Comparison, Error, trusted, trusted_update, update_errors
from models.inference import round_weights
from models.kernels import can_fuse, can_pack, entrance, fast_attention
from models.sit import SiT_models

MODELS = ["SiT-XL/2", "SiT-L/2", "SiT-B/2", "SiT-S/2", "SiT-S/4", "SiT-XL/4"]
USES = [("bf16", True), ("bf16", False), ("fp32", True)]  # precision, and whether it trains
CHOICES = {None: "PyTorch", False: "fused", True: "fused, attention"}


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Wall-clock seconds, the device idle before and after, and the result."""
    synchronize()
    begin = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - begin, result


def largest(errors: list[Error]) -> dict[str, object]:
    """The error that comes nearest to its limit, in parts of that, or passes it by most."""
    share, error = max(((error.kernels / error.allowed, error) for error in errors), key=lambda pair: pair[0])
    return {"share": share, "what": str(error)}


def attention_share(comparison: Comparison, network: torch.nn.Module, half: bool) -> float | None:
    """As `share`, of attention's kernels at this network's shape, whether or not it is one of theirs."""
    layer, tokens = network.blocks[0].attn, network.pos_embed.shape[1]
    if not (half and comparison.trains and can_pack(comparison.device) and tokens % 64 == 0):
        return None
    with mock.patch("models.attention.SHAPES", ((tokens, layer.head_dim),)):
        return largest(comparison.errors(packed=True))["share"]


def compare(model: str, precision: str, trains: bool, device: torch.device) -> dict[str, object]:
    """One row: a network of this preset, in one of its uses."""
    network, half = SiT_models[model](condition="none").to(device), precision == "bf16"
    if half and not trains:
        round_weights(network)
    (tokens, width), size = network.pos_embed.shape[1:], network.blocks[0].attn.head_dim
    x, c = torch.zeros(2, *network.latent_shape, device=device), torch.zeros(2, width, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    with fast_attention(device, tokens if trains else None), autocast, torch.set_grad_enabled(trains):
        inputs = entrance(network, x) | {"c": c}
        seconds, chosen = timed(lambda: trusted(network, can_pack(device), inputs))
        held = torch.cuda.memory_allocated()  # by the libraries, too, from the first one on
        again, _ = timed(lambda: trusted(network, can_pack(device), inputs))
        kept = (torch.cuda.memory_allocated() - held) / 1e6
        comparison = Comparison(network, inputs)
        row = {"model": model, "tokens": tokens, "head": size, "precision": precision, "trains": trains}
        row |= {"seconds": seconds, "again": again, "kept_mb": kept, "chosen": CHOICES[chosen]}
        return (
            row | largest(comparison.errors(packed=False)) | {"attention": attention_share(comparison, network, half)}
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the kernels of networks with PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=SiT_models, metavar="NAME", help="presets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not can_fuse(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the kernels need a GPU since Ampere and Triton; TRITON_INTERPRET=1 interprets them on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py does
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        seconds, _ = timed(lambda: trusted_update(device))
        again, _ = timed(lambda: trusted_update(device))
        update = {"seconds": seconds, "again": again, **largest(update_errors(device))}
        print(f"update: {seconds:.1f} s, again {again:.2f} s; {update['share']:.2f} of what is allowed", flush=True)
        rows = [compare(model, *use, device) for model in args.models for use in USES]
    columns = {"model": "", "tokens": "", "head": "", "precision": "", "trains": "", "seconds": ".1f", "again": ".2f"}
    show(rows, columns | {"kept_mb": ".0f", "share": ".2f", "attention": ".2f", "chosen": ""})
    write_json(args.out, provenance(argv) | {"update": update, "rows": rows})


if __name__ == "__main__":
    main()
