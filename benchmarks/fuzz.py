"""Feed every reader broken and hostile files made from real ones, and see that none does harm.

    python -m benchmarks.fuzz --cases 20000 --out FILE [--targets bank.pth zip …] [--show]

A case is a target and a number: the target's real file, mutated as the number says (bits and spans of bytes; members of
an archive, its checksums made right again; values and keys of JSON; shapes and types in array headers), and read as the
commands read it. It holds if reading succeeds or one of our own modules raises a ValueError or OSError of which a
command prints one line. It does not if any other exception comes, if it lasts over 10 s, takes over 1 GB, or if code
planted in a file runs.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from dataset import LatentDataset, read_meta
from evaluations.images import open_images
from evaluations.inception import read_weights
from evaluations.reference import Reference, load_summary
from evaluations.samples import Samples
from memory.bank import MemoryBank
from memory.command import named, return_freed_memory
from memory.files import sha256, write_json
from memory.output import Output
from memory.provenance import provenance
from memory.run_folder import RunFolder
from models.autoencoder import load_codec
from models.checkpoint import load_model
from models.encoder import load_encoder
from models.sit import SiT_models
from sample_ddp import read_snippets
from scripts import cost, encode_dataset, export, report
from scripts.images import UNREADABLE, square
from scripts.sources import open_source
from scripts.store import Progress

ROOT = Path(__file__).resolve().parents[1]
SECONDS, GIGABYTE = 10, 1 << 30
ENCODER = "test_vit"  # timm's smallest
SETTINGS = {"image_shape": [16, 16, 3], "sampler": "euler", "steps": 4, "seed": 0, "encoder": "e", "guidance": None}
NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, -(2**31))
JSON_VALUES = (None, True, -1, 0, 1, 7, 2**63, 1e308, "", "x", "../../x", [], [1], {}, {"a": 1}, "\ud800", float("nan"))


class Planted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_seeds(folder: Path) -> None:
    """Small real files of every kind that the commands read."""
    generator = torch.Generator().manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for name in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        for label, image in enumerate(images[:2]):
            path = folder / f"folder-{name}" / f"class{label}" / f"0.{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    for packed in ("zip", "tar"):
        shutil.make_archive(str(folder / f"archive-{packed}" / "images"), packed, folder / "folder-png")
    with zipfile.ZipFile(folder / "archive-zip" / "images.zip", "a") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": [["class0/0.png", 0], ["class1/0.png", 1]]}))
    for name, save in (("npz", np.savez), ("npz-packed", np.savez_compressed)):
        (folder / name).mkdir()
        save(folder / name / "images.npz", arr_0=images, labels=np.arange(6))
    (folder / "idx").mkdir()
    header = struct.pack(">4I", 0x803, 6, 16, 16)
    (folder / "idx" / "train-images-idx3-ubyte").write_bytes(header + images[..., 0].tobytes())
    (folder / "idx" / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 6) + bytes(range(6)))

    bank = MemoryBank(torch.randn(5, 6, generator=generator), [3, 0, 5, 1, 7], torch.zeros(6, 1, dtype=torch.int32))
    bank.meta = {"encoder": "e", "k": 5}
    bank.save(folder / "bank" / "bank.pth")
    write_checkpoint(folder / "checkpoint" / "0000003.pt", folder / "bank" / "bank.pth")
    export.main([str(folder / "checkpoint" / "0000003.pt"), "--out", str(folder / "export")])
    write_published(folder / "published" / "gmem.pt")
    with zipfile.ZipFile(folder / "npz" / "images.npz") as archive:
        archive.extractall(folder / "npz")
    encode = [str(folder / "npz" / "images.npz"), "--out", str(folder / "store"), "--codec", "pixels"]
    encode_dataset.main([*encode, "--image-size", "16", "--keep-images", "--workers", "0"])
    (folder / "reference").mkdir()
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048, dtype=np.float16)}
    moments |= {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023, dtype=np.float16)}
    np.savez_compressed(folder / "reference" / "reference.npz", arr_0=images, **moments)
    (folder / "snippets").mkdir()
    np.save(folder / "snippets" / "vectors.npy", np.ones((4, 6), np.float32))
    (folder / "snippets" / "rows.txt").write_text("0 1\n2 3\n")
    shutil.copytree(ROOT / "assets" / "fashion-mnist-vae", folder / "vae")
    write_results(folder / "report", read_meta(folder / "store"))
    write_networks(folder / "networks")
    write_unfinished(folder, images)


def write_networks(folder: Path) -> None:
    """Weights of a small vision encoder, and a file with what tells Inception's apart."""
    folder.mkdir()
    torch.manual_seed(0)
    weights = timm.create_model(ENCODER).state_dict()
    torch.save(weights, folder / "encoder.pth")
    save_file(weights, folder / "encoder.safetensors")
    names = {"fc.weight": (1008, 2048), "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1)}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in names.items()}, folder / "inception.pth")


def write_unfinished(folder: Path, images: np.ndarray) -> None:
    """What commands leave for their next run, or for one another: samples, a run's log, a store's progress."""
    for name, complete in (("samples", True), ("output", False)):
        (folder / name).mkdir()
        facts = {"num_images": len(images), "complete": complete, "settings": SETTINGS}
        write_json(folder / name / "samples.json", facts)
    np.savez(folder / "samples" / "samples.npz", arr_0=images)
    (folder / "output" / ".pixels").write_bytes(images.tobytes())
    (folder / "output" / ".done").write_bytes(bytes([1, 1, 0, 1, 0, 0]))
    lines = [{"step": step, "loss": 1.0, "time": 1.5} for step in (2, 4)]
    write_json(folder / "run" / "config.json", {"args": {"lr": 1e-4}, "store": {"fingerprint": "f"}, "bank": None})
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = Progress(np.arange(6) < 4, {1: "cut short"})
    progress.save(folder / "progress" / "rows-0.json")
    (folder / "kept").mkdir()
    moments = {"mu": np.zeros(8), "sigma": np.eye(8)}
    np.savez(folder / "kept" / "features.npz", key=np.array("key"), features=np.ones((6, 8), np.float32), **moments)


def write_results(folder: Path, meta: dict) -> None:
    """A result of the evaluator as if of ImageNet, and its sources: a store with this meta.json, a bank, a run."""
    config = {"model": "SiT-Ti/2", "input_size": 16, "in_channels": 3, "condition": "label+snippet", "num_classes": 9}
    args = {"batch_size": 4, "precision": "fp32", "align_coeff": 0.0}
    trained = {"format": None, "model_config": config, "args": args, "store": {"fingerprint": "f"}}
    made = {"trained": trained, "checkpoint": "run/checkpoints/0000004.pt", "bank_shape": [5, 6]}
    guidance = {"by": "null", "scale": 1.5, "interval": [0.0, 1.0], "channels": 3}
    settings = {"training_steps": 7_000_000, "evaluations": 250, "sampler": "sde", "guidance": guidance}
    settings |= {"condition": "label", "encoder": ENCODER, "bank": {"bank.pth": "b"}}
    made = {"settings": settings, "run": made | {"images_per_second": 2.5, "device": "CPU"}}
    result = {"metrics": {"FID": 2.06, "Recall": 0.5}, "num_samples": 50_000, "protocol": "50,000 images, sde 250"}
    result |= {"samples": [{"path": "samples/samples.npz", "made": made}], "same_family_as_snippets": False}
    result |= {"reference": {"path": "VIRTUAL_imagenet256_labeled.npz", "sha256": "0" * 64}, "run": {"code": "c" * 40}}
    write_json(folder / "result.json", result | {"network": {"name": "inception", "sha256": "6726825d0af5"}})
    bank = {"sha256": {"bank.pth": "b"}, "rule": "k-means", "k": 5, "dim": 6, "iterations": 2}
    write_json(folder / "bank" / "bank.json", bank | {"run": {"seconds": 1.5, "processes": 1}})
    encoders = {ENCODER: {"dim": 6, "model": ENCODER, "input_size": 160}}
    codec = meta["codec"] | {"name": "vae"}
    write_json(folder / "data" / "meta.json", meta | {"fingerprint": "f", "encoders": encoders, "codec": codec})
    shutil.copytree(ROOT / "assets" / "fashion-mnist-vae", folder / "vae")
    runs = [{"from_step": 0, "processes": 1}, {"from_step": 2, "processes": 2}]
    write_json(folder / "run" / "config.json", {"args": args, "runs": runs})
    log = [{"step": step, "loss": 1.0, "images_per_second": 1.5} for step in (2, 4)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def write_checkpoint(path: Path, bank: Path) -> None:
    """A checkpoint of train.py on the bank, small."""
    torch.manual_seed(0)
    model = SiT_models["SiT-Ti/2"](input_size=8, in_channels=1, condition="snippet", snippet_dim=6)
    checkpoint = {
        "ema": {name: tensor.half() for name, tensor in model.state_dict().items()},
        "args": {"interpolant": "linear", "snippet_from": "nearest"},
        "model_config": model.config,
        "steps": 3,
        "codec": load_codec("pixels", channels=1).meta(8),
        "encoder": "e",
        "bank": {"path": str(bank), "sha256": sha256(bank), "k": 5, "dim": 6},
        "store": {"path": "s", "fingerprint": "f", "num_images": 18, "image_size": 8},
        "image_size": 8,
        "num_classes": None,
    }
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)


def write_published(path: Path) -> None:
    """A file laid out as GMem's release: network, memorybank, memoryfreq."""
    torch.manual_seed(0)
    model = SiT_models["SiT-Ti/2"](input_size=32, in_channels=4, condition="snippet", snippet_dim=6)
    path.parent.mkdir(parents=True)
    torch.save(
        {"network": model.half().state_dict(), "memorybank": torch.randn(5, 6), "memoryfreq": [3, 0, 5, 1, 7]}, path
    )


def read_source(path: Path) -> None:
    source = open_source(path)
    for index in range(min(len(source.names), 4)):
        try:
            square(source.image(index), 16, 1 if source.grey else 3, source.on_black)
        except UNREADABLE:  # the command reports such an image and goes on
            continue


def read_bank(path: Path) -> None:
    bank = MemoryBank.load(path)
    bank.indices_from_noise(torch.zeros(2, 1, 8, 8))
    bank.nearest(torch.ones(2, bank.dim))


def read_model(path: Path) -> None:
    model, _, bank = load_model(path)
    if bank is not None and model.latent_shape[1] <= 64:
        with torch.no_grad():
            model(torch.zeros(1, *model.latent_shape), torch.zeros(1), bank[[0]])


def read_store(path: Path) -> None:
    store = LatentDataset(path, images=True)
    rows = np.arange(min(4, len(store)))
    store.fetch(rows, np.zeros_like(rows))


def read_images(path: Path) -> None:
    images = open_images(path)
    for _ in images.batches(range(min(4, len(images))), 2):
        pass


def read_reference(path: Path) -> None:
    Reference(path, use_moments=True, use_images=True)


def read_vae(path: Path) -> None:
    codec = load_codec(str(path))
    codec.meta(32)


def read_run(path: Path) -> None:
    """As a run that has no checkpoint yet is met by its command."""
    run = RunFolder(path, {"lr": 1e-4}, {"store": {"fingerprint": "f"}, "bank": None})
    run.check_same()
    run.rewind_log(3)
    run.note(3, {})


def read_report(path: Path) -> None:
    cost.codec_multiply_adds.cache_clear()  # it would remember what a codec of this name was before
    with contextlib.chdir(path), contextlib.redirect_stdout(io.StringIO()):
        report.main(["result.json", "bank", "data", "run"])


def read_samples(path: Path) -> None:
    samples = Samples(path, None)
    samples.protocol()
    samples.related_to(ENCODER)


@dataclass
class Target:
    """A kind of file: the folder of real files it needs, which of them is mutated, and what reads it from where."""

    folder: str
    file: str
    read: Callable[[Path], None]
    at: str = ""


TARGETS = {
    **{f"image.{name}": Target(f"folder-{name}", f"class0/0.{name}", read_source) for name in ("png", "jpg", "webp")},
    **{f"image.{name}": Target(f"folder-{name}", f"class0/0.{name}", read_source) for name in ("gif", "tiff", "bmp")},
    "zip": Target("archive-zip", "images.zip", read_source, "images.zip"),
    "tar": Target("archive-tar", "images.tar", read_source, "images.tar"),
    "npz": Target("npz", "images.npz", read_source, "images.npz"),
    "npz-packed": Target("npz-packed", "images.npz", read_source, "images.npz"),
    "idx": Target("idx", "train-images-idx3-ubyte", read_source),
    "idx-labels": Target("idx", "train-labels-idx1-ubyte", read_source),
    "bank.pth": Target("bank", "bank.pth", read_bank),
    "bank.freq": Target("bank", "bank.freq", read_bank),
    "bank.assign": Target("bank", "bank.assign", read_bank),
    "bank.json": Target("bank", "bank.json", read_bank),
    "checkpoint": Target("checkpoint", "0000003.pt", read_model),
    "safetensors": Target("export", "model.safetensors", read_model),
    "published": Target("published", "gmem.pt", read_model, "gmem.pt"),
    "meta.json": Target("store", "meta.json", read_store),
    "latents.npy": Target("store", "latents.npy", read_store),
    "labels.npy": Target("store", "labels.npy", read_store),
    "samples.npz": Target("npz", "images.npz", read_images, "images.npz"),
    "samples.png": Target("folder-png", "class0/0.png", read_images, "class0"),
    "store-images": Target("store", "images.npy", read_images),
    "reference": Target("reference", "reference.npz", read_reference, "reference.npz"),
    "snippets.npy": Target("snippets", "vectors.npy", lambda path: read_snippets(str(path)), "vectors.npy"),
    "snippets.txt": Target("snippets", "rows.txt", lambda path: read_snippets(str(path)), "rows.txt"),
    "vae-config": Target("vae", "config.json", read_vae),
    "vae-weights": Target("vae", "diffusion_pytorch_model.safetensors", read_vae),
    "encoder.pth": Target("networks", "encoder.pth", lambda path: load_encoder(ENCODER, path), "encoder.pth"),
    "encoder.safetensors": Target(
        "networks", "encoder.safetensors", lambda path: load_encoder(ENCODER, path), "encoder.safetensors"
    ),
    "inception": Target("networks", "inception.pth", read_weights, "inception.pth"),
    "samples.json": Target("samples", "samples.json", read_samples, "samples.npz"),
    "output": Target("output", "samples.json", lambda path: Output(path, 6, "npz", SETTINGS).prepare()),
    "output-marks": Target("output", ".done", lambda path: Output(path, 6, "npz", SETTINGS).prepare()),
    "config.json": Target("run", "config.json", read_run),
    "log.jsonl": Target("run", "log.jsonl", read_run),
    "report.result": Target("report", "result.json", read_report),
    "report.bank": Target("report", "bank/bank.json", read_report),
    "report.store": Target("report", "data/meta.json", read_report),
    "report.codec": Target("report", "vae/config.json", read_report),
    "report.config": Target("report", "run/config.json", read_report),
    "report.log": Target("report", "run/log.jsonl", read_report),
    "progress": Target("progress", "rows-0.json", lambda path: Progress.merged(path, 6)),
    "kept": Target("kept", "features.npz", lambda path: load_summary(path, "key", torch.device("cpu")), "features.npz"),
}


def mutated(data: bytes, draw: random.Random, planted: Path) -> bytes:
    """The file's bytes with one to four changes of a kind that its format suggests."""
    if data[:2] == b"PK" and draw.random() < 0.6:
        return mutated_archive(data, draw, planted)
    if data[:1] == b"{" and draw.random() < 0.8:
        return mutated_lines(data, draw) if b"\n{" in data else mutated_json(data, draw)
    if data[:6] == b"\x93NUMPY" and draw.random() < 0.5:
        return mutated_header(data, draw)
    return mutated_bytes(data, draw)


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        size = len(data)
        place = draw.randrange(size + 1) if draw.random() < 0.5 else draw.randrange(min(size, 256) + 1)  # headers count
        end = min(size, place + draw.choice((1, 1, 2, 4, 8, 64, 1024)))
        change = draw.randrange(7)
        if change == 0 and place < size:
            data[place] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[place:end] = bytes(draw.choice((0, 255, draw.randrange(256))) for _ in range(end - place))
        elif change == 2:
            del data[place:]
        elif change == 3:
            del data[place:end]
        elif change == 4:
            data[place:place] = draw.randbytes(draw.choice((1, 2, 4, 16)))
        elif change == 5:
            data[place:place] = data[place:end]
        else:
            number = struct.pack(draw.choice("<>") + "q", max(-(2**63), min(2**63 - 1, draw.choice(NUMBERS))))
            data[place : place + 4] = number[: draw.choice((2, 4, 8))]
    return bytes(data)


def mutated_archive(data: bytes, draw: random.Random, planted: Path) -> bytes:
    """A zip with one member changed, renamed, left out, doubled, inflated or replaced, its checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[entry.filename, archive.read(entry), entry.compress_type] for entry in archive.infolist()]
    weights = [1 / (len(content) + 100) for _, content, _ in members]  # small members say what the large ones are
    chosen, change = draw.choices(members, weights)[0], draw.randrange(9)
    if change < 4:
        chosen[1] = mutated(chosen[1], draw, planted) if chosen[1] else b"x"
    elif change == 4:
        chosen[0] = draw.choice(("../" * 3 + "x.png", "/etc/x.png", "", "\n.png", chosen[0] + "x", "arr_1.npy"))
    elif change == 5:
        members.remove(chosen)
    elif change == 6:
        members.append(list(chosen))
    elif change == 7:  # a few kilobytes that unpack to many megabytes
        chosen[1], chosen[2] = chosen[1] + bytes(draw.choice((1, 200)) << 20), zipfile.ZIP_DEFLATED
    elif chosen[0].endswith(".npy"):
        stream = io.BytesIO()
        np.save(stream, np.array([Planted(planted)], object), allow_pickle=True)
        chosen[1] = stream.getvalue()
    else:
        chosen[1] = pickle.dumps({"ema": Planted(planted)}, 2)
    result = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(result, "w") as archive:
        warnings.simplefilter("ignore")  # a doubled name
        for name, content, method in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return result.getvalue()


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """JSON with a key removed or a value replaced, somewhere."""
    value = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.7:
                place = place[key]
                continue
            if draw.random() < 0.3:
                del place[key]
            else:
                place[key] = copy.deepcopy(draw.choice(JSON_VALUES))
            break
    if draw.random() < 0.05:
        value = copy.deepcopy(draw.choice(JSON_VALUES))
    return json.dumps(value).encode()


def mutated_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON lines with one of them changed."""
    lines = data.splitlines()
    chosen = draw.randrange(len(lines))
    lines[chosen] = mutated_json(lines[chosen], draw)
    return b"\n".join(lines) + b"\n"


def mutated_header(data: bytes, draw: random.Random) -> bytes:
    """An array file whose header gives another type, shape or order, its length kept."""
    size = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:size].decode("latin1")
    types = ("'|O'", "'<f8'", "'|u1'", "'<U9'", "'|V7'", "'<m8'", "[('a', '<f4')]", "'no'", "'>i8'")
    shapes = ("(-1,)", "(2, 3)", "(99999999999, 9)", "(0, 4, 4, 3)", "()", "(1e9,)", "'x'", "(4611686018427387904, 4)")
    old, new = draw.choice(
        (
            (header[header.index("'descr': ") + 9 : header.index(", 'fortran")], draw.choice(types)),
            (header[header.index("'shape': ") + 9 : header.index(", }")], draw.choice(shapes)),
            ("False", draw.choice(("True", "None"))),
        )
    )
    changed = header.replace(old, new, 1).rstrip()
    return data[:10] + changed.ljust(len(header) - 1)[: len(header) - 1].encode("latin1") + b"\n" + data[size:]


def check(name: str, number: int, seeds: Path, place: Path) -> str | None:
    """What went wrong with a case, or None."""
    target, draw = TARGETS[name], random.Random(f"{name} {number}")
    planted = place / "code-ran"
    folder = place / target.folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seeds / target.folder, folder)
    file = folder / target.file
    file.write_bytes(mutated(file.read_bytes(), draw, planted))
    began = time.process_time()  # of this process alone, since others may share the machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(folder / target.at)
        except Exception as error:
            if not ours(error):
                frames = traceback.extract_tb(error.__traceback__)
                last = next(frame for frame in reversed(frames) if str(ROOT) in frame.filename)
                where = f"{Path(last.filename).relative_to(ROOT)}:{last.lineno}"
                return f"{type(error).__name__} from a library at {where}: {str(error)[:120]}"
    if planted.exists():
        planted.rmdir()
        return "planted code ran"
    if (seconds := time.process_time() - began) > SECONDS:
        return f"took {seconds:.1f} s"
    return None


def ours(error: Exception) -> bool:
    """Whether one of this project's files raised an error that ends a command in one line."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    here = Path(innermost).is_relative_to(ROOT) and "site-packages" not in innermost
    return here and isinstance(error, ValueError | OSError) and named(error)


def work(cases: list[tuple[str, int]], seeds: Path, output: int) -> None:
    """In a forked process: check cases, writing a JSON line before and after each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, os.fdopen(output, "w", buffering=1) as lines:
        for name, number in cases:
            lines.write(json.dumps([name, number]) + "\n")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            problem = check(name, number, seeds, Path(place))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if grown > GIGABYTE and not problem:
                problem = f"took {grown / GIGABYTE:.1f} GiB"
            lines.write(json.dumps([name, number, problem]) + "\n")


def run(cases: list[tuple[str, int]], seeds: Path) -> dict[tuple[str, int], str]:
    """What went wrong, by case. A process that hangs or dies is replaced, and its case counted."""
    problems, left = {}, list(cases)
    while left:
        reader, writer = os.pipe()
        return_freed_memory()  # which would serve a case uncounted
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4 * GIGABYTE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                work(left, seeds, writer)
            finally:
                os._exit(0)
        os.close(writer)
        begun, finished, hung = None, 0, False
        for line in lines_of(reader):
            if line is None:
                hung = True
                break
            name, number, *outcome = json.loads(line)
            if outcome:
                finished, begun = finished + 1, None
                if outcome[0]:
                    problems[name, number] = outcome[0]
            else:
                begun = (name, number)
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if begun:
            problems[begun] = "hung" if hung else f"ended the process (status {status})"
            finished += 1
        assert finished, f"a process of the fuzzer failed with status {status}"
        left = left[finished:]
    return problems


def lines_of(pipe: int) -> Iterator[str | None]:
    """Lines from a pipe until it is closed; None if none comes for long."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], 3 * SECONDS)[0]:
            yield None
            return
        content = os.read(pipe, 1 << 16)
        if not content:
            return
        *lines, rest = (rest + content).split(b"\n")
        yield from (line.decode() for line in lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Feed every reader broken and hostile files.")
    parser.add_argument("--cases", type=int, default=20_000, help="in all")
    parser.add_argument("--first", type=int, default=0, help="number of each target's first case")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="NAME", help="readers")
    parser.add_argument("--out", type=Path, help="JSON file of the outcome")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    began = time.monotonic()
    each = -(-args.cases // len(args.targets))
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        problems = {}
        for name in args.targets:
            found = run([(name, number) for number in range(args.first, args.first + each)], Path(folder))
            print(f"{name:14} {each} cases, {len(found)} problems", *found.items(), sep="\n    ", flush=True)
            problems |= found
    seconds = time.monotonic() - began
    print(f"{each * len(args.targets):,} cases in {seconds:.0f} s, {len(problems)} problems")
    if args.out:
        rows = [{"target": name, "case": number, "problem": problem} for (name, number), problem in problems.items()]
        cases = {"cases_of_each": each, "first": args.first, "targets": args.targets, "problems": rows}
        write_json(args.out, cases | {"seconds": round(seconds), "provenance": provenance(argv)})
    if problems:
        sys.exit("not everything held")


if __name__ == "__main__":
    main()
