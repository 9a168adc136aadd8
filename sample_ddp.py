"""Generate N images from a trained network, on any number of processes.

    python sample_ddp.py --checkpoint runs/NAME --out samples/NAME --num-images 64
    torchrun --nproc-per-node 8 sample_ddp.py --checkpoint runs/gmem-xl/checkpoints/2000000.pt --out samples/gmem-xl

The defaults are GMem's published sampling: 50,000 images, the SDE with 250 evaluations, the snippet that the starting
noise points to, no guidance, the EMA weights. Everything random about image i (starting noise, snippet, label, each
step's noise) is a function of (seed, i), so i is the same picture at any batch size and number of processes. The same
command again continues where it stopped, and with a larger --num-images goes on from there.

Reads   a checkpoint of train.py, the bank and the codec it names (--bank, --codec where they moved)
Writes  OUT/000000.png …      the images (--format png or both)
        OUT/samples.npz       `arr_0` uint8 (N, H, W, 3), grey repeated (--format npz or both)
        OUT/samples.json      everything that determined them, where they were made and at how many images/s
        OUT/preview.png       the first 64
"""

import argparse
import itertools
import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from loss import interpolants
from memory.bank import read_snippets, snippet_rules
from memory.files import atomic, check_folder, read_json, sha256, write_json
from memory.provenance import provenance
from models.autoencoder import check_codec, load_codec, to_uint8
from models.checkpoint import WEIGHTS, load_model
from models.sit import SiT
from samplers import LABEL_DRAW, LAST_STEP, SNIPPET_DRAW, Velocity, guided, noise, samplers, sde_samplers, uniform

PREVIEW = 64  # images in the preview grid
CHUNK = 1 << 24  # bytes copied at once


# How images (B,) get their labels.
label_rules: dict[str, Callable[[int, Tensor, int], Tensor]] = {
    "random": lambda seed, images, num_classes: (uniform(seed, images, LABEL_DRAW) * num_classes).long(),
    "balanced": lambda seed, images, num_classes: images % num_classes,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults are the published sampling."""
    parser = argparse.ArgumentParser(
        description="Generate images from a trained network.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a checkpoint of train.py or a published one, or a run's folder for its latest",
    )
    add("--weights", default="ema", choices=WEIGHTS, help="averaged or last weights")
    add("--bank", help="bank.pth, or its folder, in place of the one that the checkpoint names")
    add("--codec", help="name or folder of the codec to decode with, in place of the one that the checkpoint names")
    add("--out", required=True, help="folder of the images; an unfinished run in it continues")
    add("--num-images", type=int, default=50_000, help="N")
    add("--batch-size", type=int, default=64, help="images at once in each process")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    rules = "row of the bank by the starting noise (published) or by frequency; or a file whose entry i mod M is image "
    rules += "i's: row numbers (.txt, or .npy of M integers) or vectors (.npy of (M, F) floats)"
    add("--snippets", default="noise", metavar="noise|random|FILE", help=rules)
    add("--labels", default="random", choices=label_rules, help="labels of a label-conditioned network")
    add("--sampler", default="sde", choices=samplers, help="sde is Euler-Maruyama; euler and heun solve the ODE")
    add("--steps", type=int, default=250, help="grid points of the SDE, steps of the ODE")
    add("--last-step", type=float, default=LAST_STEP, help="time at which the SDE's noise ends; no part of the ODE")
    add("--guide", metavar="null|CHECKPOINT", help="lead away from the null condition, or from a weaker network")
    add("--guidance-scale", type=float, help="1 changes nothing; needed with --guide")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="times guided")
    add("--guidance-channels", type=int, help="guide only the first so many channels (SiT's published figures: 3)")
    add("--precision", choices=("bf16", "fp32"), help="autocast of the network; bf16 on a GPU, fp32 on a CPU")
    add("--uint8", default="round", choices=("round", "truncate"), help="pixels to integers; GMem and REPA truncate")
    add("--format", default="both", choices=("png", "npz", "both"), help="what to write")
    args = parser.parse_args(argv)

    for name, least in (("num_images", 1), ("batch_size", 1), ("steps", 2 if args.sampler in sde_samplers else 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed {args.seed}: expected a number from 0 to 2^64 - 1")
    if not 0 < args.last_step < 1:
        parser.error(f"--last-step {args.last_step}: expected a time between 0 and 1")
    if (args.guide is None) != (args.guidance_scale is None):
        parser.error("--guide and --guidance-scale need each other")
    if args.guidance_channels is not None and not args.guide:
        parser.error("--guidance-channels needs --guide")
    if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
        parser.error(f"--guidance-interval {args.guidance_interval}: expected 0 <= LO <= HI <= 1")
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    return args


class Generator:
    """Images from their numbers: noise and condition, sampler, decoder.

    `settings` is everything that determines the images, in plain values; `sources` is where it was read.

    Raises:
        ValueError: checkpoint, bank, codec, snippets or guide do not fit; the message names flag, value and remedy.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.entries = None if args.snippets in snippet_rules else read_snippets(args.snippets)  # (M,) or (M, F)
        vectors = self.entries is not None and self.entries.ndim == 2
        if vectors and args.bank:
            raise ValueError(
                f"--bank {args.bank}: not read with the vectors of --snippets {args.snippets}: leave it out"
            )
        bank = False if vectors else args.bank
        self.model, self.config, self.bank = load_model(args.checkpoint, args.weights, device, bank)
        self.kinds = self.model.condition.split("+")
        self._check_snippets()
        self.interpolant = self.config["args"]["interpolant"]
        self.guide, self.guide_sha256 = self._load_guide()
        channels = self.model.latent_shape[0]
        if not 1 <= (args.guidance_channels or channels) <= channels:
            raise ValueError(f"--guidance-channels {args.guidance_channels}: the latents have {channels} channels")
        self.codec, codec_meta = self._load_codec()
        self.image_shape = [self.config["image_size"], self.config["image_size"], 3]
        self.settings = self._settings(codec_meta)
        self.sources = {
            "checkpoint": self.config["checkpoint"]["path"],
            "bank": self.bank and str(self.bank.path or self.config["checkpoint"]["path"]),
            "codec": codec_meta["name"],
            "trained": {key: self.config.get(key) for key in ("format", "model_config", "args", "bank", "store")},
        }

    def _check_snippets(self) -> None:
        args, entries, dim = self.args, self.entries, self.model.config["snippet_dim"]
        if "snippet" not in self.kinds and (args.bank or args.snippets != "noise"):
            kind = self.model.condition
            raise ValueError(f"the checkpoint's condition is {kind!r}: leave out --snippets {args.snippets} and --bank")
        if entries is not None and entries.ndim == 2 and entries.shape[1] != dim:
            raise ValueError(f"--snippets {args.snippets} is {tuple(entries.shape)}; the checkpoint takes (M, {dim})")
        if entries is not None and entries.ndim == 1 and not 0 <= entries.min() <= entries.max() < len(self.bank):
            rows = f"{entries.min()} to {entries.max()}"
            raise ValueError(f"--snippets {args.snippets} names rows {rows}; the bank has 0 to {len(self.bank) - 1}")
        own = self.bank and self.config["args"]["snippet_from"] == "own"
        if own and len(self.bank) < self.config["store"]["num_images"]:
            message = "the network learned from images' own features, the bank holds averages of them: use a bank of "
            warnings.warn(message + "--k all, or --snippets FILE.npy", stacklevel=2)

    def _load_guide(self) -> tuple[SiT | None, str | None]:
        """The network that predicts the weaker velocity and its hash: this one given the null, or another."""
        path, model = self.args.guide, self.model
        null = model.null_dropout > 0 or (self.kinds == ["label"] and model.config["label_dropout"] > 0)
        if path == "null" and not null:
            raise ValueError(
                f"--guide null: the checkpoint's condition {model.condition!r} was trained without a null; train with "
                "null_dropout > 0, or guide with another checkpoint"
            )
        if path in (None, "null"):
            return path and model, None
        guide, config, _ = load_model(path, self.args.weights, self.device, bank=False)
        kinds = [kind for kind in guide.condition.split("+") if kind != "none"]
        facts = [("latent shape", guide.latent_shape, model.latent_shape)]
        facts += [("interpolant", config["args"]["interpolant"], self.interpolant)]
        facts += [("condition", kind, model.condition) for kind in kinds if kind not in self.kinds]
        if "snippet" in kinds:
            facts += [("encoder", config["encoder"], self.config["encoder"])]
        for option in [{"snippet": "snippet_dim", "label": "num_classes"}[kind] for kind in kinds]:
            facts += [(option, guide.config[option], model.config[option])]
        for name, its, ours in facts:
            if its != ours:
                raise ValueError(f"--guide {path}: its {name} is {its}, the checkpoint's {ours}; choose another guide")
        check_codec(config["codec"], self.config["codec"], f"the checkpoint (--guide {path})")
        return guide, config["checkpoint"]["sha256"]

    def _load_codec(self) -> tuple[object, dict]:
        """The decoder and its description; --codec may name another VAE of the same latents, as REPA and SiT use."""
        expected = self.config["codec"]
        codec = load_codec(self.args.codec or expected["name"], self.device, channels=expected["image_channels"])
        meta = codec.meta(self.config["image_size"])
        compared = {key: value for key, value in expected.items() if key != "sha256" or not self.args.codec}
        check_codec(meta, compared, f"the checkpoint {self.config['checkpoint']['path']}")
        return codec, meta

    def _settings(self, codec_meta: dict) -> dict:
        args, bank = self.args, self.bank
        files = (bank.path, bank.path.with_suffix(".freq")) if bank and bank.path else ()
        hashes = {file.name: sha256(file) for file in files}  # none for a bank inside the checkpoint
        guidance = {"by": self.guide_sha256 or "null", "scale": args.guidance_scale}
        guidance |= {"interval": list(args.guidance_interval), "channels": args.guidance_channels}
        snippets = args.snippets if self.entries is None else sha256(args.snippets)
        times = []
        samplers[args.sampler](lambda x, t: times.append(t) or x, torch.zeros(1, 1), args.steps)  # counts evaluations
        names = ("weights", "sampler", "steps", "seed", "precision", "uint8", "format")
        given = {name: getattr(args, name) for name in names}
        return given | {
            "checkpoint": self.config["checkpoint"]["sha256"],
            "training_steps": self.config["steps"],
            "condition": self.model.condition,
            "encoder": self.config["encoder"],
            "bank": bank and (hashes or {"checkpoint": self.config["checkpoint"]["sha256"]}),
            "snippets": snippets if "snippet" in self.kinds else None,
            "labels": args.labels if "label" in self.kinds else None,
            "evaluations": len(times),
            "last_step": args.last_step if args.sampler in sde_samplers else None,
            "interpolant": self.interpolant,
            "guidance": guidance if self.guide else None,
            "codec": {key: value for key, value in codec_meta.items() if key != "name"},
            "image_shape": self.image_shape,
        }

    def conditions(self, images: Tensor, z: Tensor) -> dict[str, object]:
        """What a network of each kind of condition gets, for images (B,) that start from noise z (B, C, H, W)."""
        args, given = self.args, {"none": None}
        if "label" in self.kinds:
            labels = label_rules[args.labels](args.seed, images, self.model.config["num_classes"])  # (B,)
            given["label"] = labels.to(self.device)
        if "snippet" in self.kinds:
            if self.entries is None:
                u = uniform(args.seed, images, SNIPPET_DRAW)  # (B,)
                chosen = snippet_rules[args.snippets](self.bank, z, u)  # (B,)
            else:
                chosen = self.entries[images % len(self.entries)]  # (B,) or (B, F)
            given["snippet"] = (self.bank[chosen] if chosen.ndim == 1 else chosen).to(self.device)  # (B, F)
        if len(self.kinds) == 2:
            given["label+snippet"] = (given["label"], given["snippet"])
        return given

    def _velocity(self, model: SiT, cond: object) -> Velocity:
        """A network as samplers call it: float64 outside; float32, or autocast to bf16, inside."""

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
                return model(x.float(), t.float(), cond)

        return velocity

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Pixels uint8 (B, H, W, 3) of the images with these numbers (B,).

        Raises:
            ValueError: the latents are not finite.
        """
        args = self.args
        z = noise(args.seed, images, 0, self.model.latent_shape, self.device)  # (B, C, H, W)
        given = self.conditions(images, z)
        velocity = self._velocity(self.model, given[self.model.condition])
        if self.guide:
            weaker = self._velocity(self.guide, None if args.guide == "null" else given[self.guide.condition])
            velocity = guided(velocity, weaker, args.guidance_scale, args.guidance_interval, args.guidance_channels)
        options = {}
        if args.sampler in sde_samplers:
            step = itertools.count(1)
            options["randn"] = lambda x: noise(args.seed, images, next(step), x.shape[1:], x.device)
            options |= {"last_step": args.last_step, "interpolant": interpolants[self.interpolant]}
        latents = samplers[args.sampler](velocity, z, args.steps, **options).float()  # (B, C, H, W)
        if not latents.isfinite().all():
            raise ValueError(
                f"--checkpoint {args.checkpoint}: latents of images {images.min()} to {images.max()} are not finite; "
                "try --precision fp32, another checkpoint or a smaller --guidance-scale"
            )
        pixels = to_uint8(self.codec.decode(latents), args.uint8)  # (B, c, H, W)
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


class Output:
    """The folder of the images; what is finished is on disk before it is marked so: a killed run loses two batches.

    An unfinished run also has `.pixels` (N, H, W, 3), the npz in the making, and `.done` (N,), a byte an image. Each
    process writes its bytes of both, without memory maps, whose pages would clash on network file systems.
    """

    def __init__(self, args: argparse.Namespace, settings: dict):
        self.folder, self.num_images = Path(args.out), args.num_images
        self.facts = {"num_images": args.num_images, "complete": False, "settings": settings}
        self.image_shape = settings["image_shape"]
        self.image_bytes = int(np.prod(self.image_shape))
        self.png, self.npz = args.format != "npz", args.format != "png"
        self.pixels, self.done = self.folder / ".pixels", self.folder / ".done"
        self.json, self.archive = self.folder / "samples.json", self.folder / "samples.npz"
        self.threads = ThreadPoolExecutor(5)  # one writes the batch, the others compress PNGs for it
        self.writing: Future | None = None

    def prepare(self) -> np.ndarray | None:
        """Make or check the folder, in one process; returns the numbers of the images left to generate, or
        None if the run is complete.

        Raises:
            ValueError: it holds other images, or more of them, or the disk is too small.
        """
        check_folder("--out", self.folder)
        old, done = None, np.zeros(self.num_images, np.uint8)
        if self.json.exists():
            old = read_json(self.json)
            self._check_same(old)
            marks = self._kept(old["num_images"]) if old["complete"] else np.fromfile(self.done, np.uint8)
            done[: len(marks)] = marks[: self.num_images]
        elif self.archive.exists() or any(self.folder.glob("*.png")):
            raise ValueError(
                f"--out {self.folder} holds images but no samples.json to say which; choose another folder"
            )
        left = np.flatnonzero(done == 0)
        if old and old["complete"] and not len(left):
            self._tidy()
            return None
        self._check_disk(len(left))
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".*.tmp.*"):  # of a killed process
            stale.unlink()
        if self.npz:
            with open(self.pixels, "ab"):
                os.truncate(self.pixels, self.num_images * self.image_bytes)
        if self.npz and old and old["complete"] and self.archive.exists():
            with zipfile.ZipFile(self.archive).open("arr_0.npy") as rows, open(self.pixels, "r+b") as to:
                np.lib.format.read_magic(rows)
                np.lib.format.read_array_header_1_0(rows)
                shutil.copyfileobj(rows, to, CHUNK)
        with atomic(self.done) as temporary:
            done.tofile(temporary)
        write_json(self.json, self.facts)
        return left

    def _kept(self, count: int) -> np.ndarray:
        """Which images of a complete run of `count` are still there, (count,): files may have been removed since."""
        if self.npz and not self.archive.exists():
            return np.zeros(count, np.uint8)
        return np.array([not self.png or self._png(image).exists() for image in range(count)], np.uint8)

    def _check_same(self, old: dict) -> None:
        now = json.loads(json.dumps(self.facts["settings"]))
        there = {key: old["settings"].get(key) for key in now}
        lines = [f"{key}: there {there[key]}, here {now[key]}" for key in now if there[key] != now[key]]
        if lines:
            raise ValueError(
                f"--out {self.folder} holds images made otherwise; choose another folder\n  " + "\n  ".join(lines)
            )
        if old["num_images"] > self.num_images:
            raise ValueError(
                f"--num-images {self.num_images}: --out {self.folder} is a run of {old['num_images']}; ask for no fewer"
            )

    def _check_disk(self, left: int) -> None:
        place = next(folder for folder in (self.folder.absolute(), *self.folder.absolute().parents) if folder.exists())
        needed = self.image_bytes * ((self.num_images + left) * self.npz + left * self.png)
        free = shutil.disk_usage(place).free
        if free < needed:
            sizes = f"up to {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free"
            raise ValueError(f"--out {self.folder}: {sizes}; choose another disk, --format png, or fewer --num-images")

    def write(self, images: np.ndarray, pixels: np.ndarray) -> None:
        """Write pixels (B, H, W, 3) of the images with numbers (B,) while the next batch is being made."""
        self.wait()
        self.writing = self.threads.submit(self._write, images, pixels)

    def wait(self) -> None:
        """Return when everything given to `write` is on disk; raises what went wrong with it."""
        if self.writing:
            self.writing.result()

    def _write(self, images: np.ndarray, pixels: np.ndarray) -> None:
        if self.png:
            list(self.threads.map(self._write_png, images, pixels))
        if self.npz:
            self._write_at(self.pixels, images, pixels)
        self._write_at(self.done, images, np.ones(len(images), np.uint8))

    def _png(self, image: int) -> Path:
        return self.folder / f"{image:06d}.png"

    def _write_png(self, image: int, pixels: np.ndarray) -> None:
        with atomic(self._png(image)) as temporary:
            Image.fromarray(pixels).save(temporary)

    def _write_at(self, path: Path, images: np.ndarray, rows: np.ndarray) -> None:
        """Write each row at the place of its image, and flush them to disk."""
        with open(path, "r+b", buffering=0) as file:
            for image, row in zip(images.tolist(), rows, strict=True):
                if os.pwrite(file.fileno(), row.tobytes(), image * row.nbytes) != row.nbytes:
                    raise OSError(f"{path}: the disk is full; free some space and run the same command again")
            os.fsync(file.fileno())

    def count(self) -> int:
        """Number of images that all processes have finished."""
        return int(np.fromfile(self.done, np.uint8).sum())

    def finish(self, run: dict) -> None:
        """Pack the npz and draw the preview, in one process; `run` says where and how fast the images were made."""
        if self.npz:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *self.image_shape)}
            with atomic(self.archive) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                member = zipfile.ZipInfo("arr_0.npy")  # of a fixed date: the same images give the same file
                with archive.open(member, "w", force_zip64=True) as to, open(self.pixels, "rb") as rows:
                    np.lib.format.write_array_header_1_0(to, header)
                    shutil.copyfileobj(rows, to, CHUNK)
        shown = range(min(PREVIEW, self.num_images))
        if self.png:
            images = np.stack([np.asarray(Image.open(self._png(image))) for image in shown])
        else:
            images = np.fromfile(self.pixels, np.uint8, len(shown) * self.image_bytes).reshape(-1, *self.image_shape)
        grid = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=8)  # (3, H', W')
        with atomic(self.folder / "preview.png") as temporary:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary)
        write_json(self.json, self.facts | {"complete": True, "run": run})
        self._tidy()

    def _tidy(self) -> None:
        for file in (self.pixels, self.done):
            file.unlink(missing_ok=True)


def generate(generator: Generator, output: Output, left: np.ndarray, batch_size: int, rank: int, world: int) -> None:
    """Generate the images `left`, batches of them in turn by all processes; the first returns when all are finished."""
    batch_size = max(1, min(batch_size, -(-len(left) // world)))  # a short run is shared too
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    bar = tqdm(total=output.num_images, initial=output.num_images - len(left), unit=" images", disable=rank > 0)
    for images in batches[rank::world]:
        output.write(images, generator(torch.from_numpy(images)))
        if rank == 0:
            bar.update(output.count() - bar.n)
    output.wait()
    while rank == 0 and bar.n < output.num_images:  # no barrier, whose timeout a slower process could exceed
        bar.update(output.count() - bar.n)
        time.sleep(0.1)
    bar.close()


def main(argv: list[str] | None = None) -> None:
    """Load and check everything, generate what is missing, pack."""
    args = parse(argv)
    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    generator = Generator(args, state.device)
    output = Output(args, generator.settings)
    [left] = broadcast_object_list([output.prepare() if state.is_main_process else None])
    if left is None:
        state.print(f"{args.out} is complete: {args.num_images} images")
    else:
        start = time.perf_counter()
        generate(generator, output, left, args.batch_size, state.process_index, state.num_processes)
        rate = len(left) / (time.perf_counter() - start)
        if state.is_main_process:
            run = {**provenance(argv, state.num_processes), **generator.sources, "batch_size": args.batch_size}
            output.finish(run | {"generated": len(left), "images_per_second": rate})
            print(f"{args.num_images} images in {args.out}; {len(left)} of them now, {rate:.2f} images/s")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
