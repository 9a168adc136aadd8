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
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from loss import interpolants
from memory.bank import read_snippets, snippet_rules
from memory.claim import claimed
from memory.command import Help, execute
from memory.files import sha256
from memory.output import Output
from memory.processes import from_main, join
from memory.provenance import peak_memory, provenance
from models.autoencoder import check_codec, load_codec, to_uint8
from models.checkpoint import WEIGHTS, load_model
from models.inference import round_weights
from models.kernels import compile_blocks, compile_by_default, default_precision, fast_attention, fitting
from models.replay import Replay
from models.sit import SiT, conditions
from samplers import (
    LABEL_DRAW,
    LAST_STEP,
    SNIPPET_DRAW,
    Velocity,
    guided,
    noise,
    normals_of,
    samplers,
    sde_samplers,
    uniform,
)

BATCH_SIZE = {"cuda": 256, "cpu": 64}
COMPILE_FROM, COMPILE_DECODER_FROM = 256, 5_000  # images of a process from which on compiling is repaid

# How images (B,) get their labels.
label_rules: dict[str, Callable[[int, Tensor, int], Tensor]] = {
    "random": lambda seed, images, num_classes: (uniform(seed, images, LABEL_DRAW) * num_classes).long(),
    "balanced": lambda seed, images, num_classes: images % num_classes,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults are the published sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a file, train.py's or a published one; or a run's folder for its latest")
    add("--weights", default="ema", choices=WEIGHTS, help="averaged or last weights")
    add("--bank", help="bank.pth, or its folder, if not the one that the checkpoint names")
    add("--codec", help="name or folder of the decoder, if not the one that the checkpoint names")
    add("--out", required=True, help="folder of the images; an unfinished run in it continues")
    add("--num-images", type=int, default=50_000, help="how many, from image 0 on")
    batches = f"images at once in each process; {BATCH_SIZE['cuda']} on a GPU, {BATCH_SIZE['cpu']} on a CPU"
    add("--batch-size", type=int, help=batches)
    compiling = f"compile network and decoder; if neither is given, on a GPU the network from {COMPILE_FROM} images a "
    compiling += f"process on, the decoder from {COMPILE_DECODER_FROM:,}"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiling)
    add("--seed", type=int, default=0, help="image i depends on (seed, i) alone")
    rules = "rows of the bank by the starting noise (published), or at random by frequency; or a file of entries that "
    rules += "images take in turn: row numbers (.txt, or .npy of integers) or vectors (.npy of (M, F) floats)"
    add("--snippets", default="noise", metavar="noise|random|FILE", help=rules)
    labels = "of a label-conditioned network; or a file (.txt, .npy) of labels that images take in turn"
    add("--labels", default="random", metavar="random|balanced|FILE", help=labels)
    add("--sampler", default="sde", choices=samplers, help="sde is Euler-Maruyama; euler and heun solve the ODE")
    add("--steps", type=int, default=250, help="steps of the ODE, grid points of the SDE")
    add("--last-step", type=float, default=LAST_STEP, help="time at which the SDE's noise ends; not read by the ODE")
    add("--guide", metavar="null|CHECKPOINT", help="lead away from the null condition, or from a weaker network")
    add("--guidance-scale", type=float, help="1 changes nothing; needed with --guide")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="times guided")
    add("--guidance-channels", type=int, help="guide the first so many channels alone; SiT's figures: 3")
    add("--precision", choices=("bf16", "fp32"), help="autocast of the network; bf16 where a GPU has it, else fp32")
    add("--uint8", default="round", choices=("round", "truncate"), help="pixels to integers; GMem and REPA truncate")
    add("--format", default="both", choices=("png", "npz", "both"), help="what to write")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = args.precision or default_precision()
    args.batch_size = BATCH_SIZE[device] if args.batch_size is None else args.batch_size

    for name, least in (("num_images", 1), ("batch_size", 1), ("steps", 2 if args.sampler in sde_samplers else 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed {args.seed}: expected a number from 0 to 2^64 - 1")
    if args.last_step != LAST_STEP and args.sampler not in sde_samplers:
        parser.error(f"--last-step {args.last_step}: not read by --sampler {args.sampler}: leave it out")
    if not 0 < args.last_step < 1:
        parser.error(f"--last-step {args.last_step}: expected a time between 0 and 1")
    if (args.guide is None) != (args.guidance_scale is None):
        parser.error("--guide and --guidance-scale need each other")
    if not args.guide and (args.guidance_channels is not None or args.guidance_interval != (0.0, 1.0)):
        parser.error("--guidance-channels and --guidance-interval need --guide")
    if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
        parser.error(f"--guidance-interval {args.guidance_interval}: expected 0 <= LO <= HI <= 1")
    return args


class Generator:
    """Images from their numbers: noise and condition, sampler, decoder.

    `settings` is everything that determines the images, in plain values; `sources` is where it was read.

    Raises:
        ValueError: checkpoint, bank, codec, snippets or guide do not fit; the message names flag, value and remedy.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.padded_to, self.normals, self.replay = None, None, None  # `compile` sets the first two
        self.entries = None if args.snippets in snippet_rules else read_snippets(args.snippets)  # (M,) or (M, F)
        self.labels = None if args.labels in label_rules else read_snippets(args.labels, "--labels")  # (M,)
        vectors = self.entries is not None and self.entries.ndim == 2
        if vectors and args.bank:
            raise ValueError(
                f"--bank {args.bank}: not read with the vectors of --snippets {args.snippets}: leave it out"
            )
        bank = False if vectors else args.bank
        self.model, self.config, self.bank = load_model(args.checkpoint, args.weights, device, bank)
        self._check_snippets()
        self._check_labels()
        self.interpolant = self.config["args"]["interpolant"]
        self.guide, self.guide_sha256 = self._load_guide()
        channels = self.model.latent_shape[0]
        if not 1 <= (args.guidance_channels or channels) <= channels:
            raise ValueError(f"--guidance-channels {args.guidance_channels}: the latents have {channels} channels")
        if args.precision == "bf16":
            for network in {self.model, self.guide} - {None}:
                round_weights(network)
        self.codec, codec_meta = self._load_codec()
        self.image_shape = [self.config["image_size"], self.config["image_size"], 3]
        self.settings = self._settings(codec_meta)
        self.sources = {
            "checkpoint": self.config["checkpoint"]["path"],
            "bank": self.bank and str(self.bank.path or self.config["checkpoint"]["path"]),
            "bank_shape": self.bank and list(self.bank.snippets.shape),
            "codec": codec_meta["name"],
            "trained": {key: self.config.get(key) for key in ("format", "model_config", "args", "bank", "store")},
        }

    def _check_snippets(self) -> None:
        args, entries, dim = self.args, self.entries, self.model.config["snippet_dim"]
        if "snippet" not in self.model.reads and (args.bank or args.snippets != "noise"):
            kind = self.model.condition
            raise ValueError(f"the checkpoint's condition is {kind!r}: leave out --snippets {args.snippets} and --bank")
        if entries is not None and entries.ndim == 2 and entries.shape[1] != dim:
            raise ValueError(f"--snippets {args.snippets} is {tuple(entries.shape)}; the checkpoint takes (M, {dim})")
        if entries is not None and entries.ndim == 1 and not 0 <= entries.min() <= entries.max() < len(self.bank):
            rows = f"{entries.min()} to {entries.max()}"
            raise ValueError(f"--snippets {args.snippets} names rows {rows}; the bank has 0 to {len(self.bank) - 1}")
        own = self.bank and self.config["args"]["snippet_from"] == "own"
        clustered = own and self.bank.meta.get("rule", "k-means") == "k-means"
        if clustered and len(self.bank) < self.config["store"]["num_images"]:
            message = "the network learned from images' own features, the bank holds averages of them: use a bank of "
            warnings.warn(message + "--k all, or --snippets FILE.npy", stacklevel=2)

    def _check_labels(self) -> None:
        labels, classes = self.labels, self.model.config["num_classes"]
        if "label" not in self.model.reads and self.args.labels != "random":
            kind = self.model.condition
            raise ValueError(f"the checkpoint's condition is {kind!r}: leave out --labels {self.args.labels}")
        if labels is not None and (labels.ndim == 2 or not 0 <= labels.min() <= labels.max() < classes):
            raise ValueError(f"--labels {self.args.labels}: expected whole numbers from 0 to {classes - 1}")

    def _load_guide(self) -> tuple[SiT | None, str | None]:
        """The network that predicts the weaker velocity and its hash: this one given the null, or another."""
        path, model = self.args.guide, self.model
        null = model.null_dropout > 0 or (self.model.reads == ("label",) and model.config["label_dropout"] > 0)
        if path == "null" and not null:
            raise ValueError(
                f"--guide null: the checkpoint's condition {model.condition!r} was trained without a null; train with "
                "--model-options null_dropout=0.1, or guide with another checkpoint"
            )
        if path in (None, "null"):
            return (model if path else None), None
        guide, config, _ = load_model(path, self.args.weights, self.device, bank=False)
        facts = [("latent shape", guide.latent_shape, model.latent_shape)]
        facts += [("interpolant", config["args"]["interpolant"], self.interpolant)]
        facts += [("condition", kind, model.condition) for kind in guide.reads if kind not in self.model.reads]
        if "snippet" in guide.reads:
            facts += [("encoder", config["encoder"], self.config["encoder"])]
        options = [{"snippet": "snippet_dim", "label": "num_classes"}[kind] for kind in guide.reads]
        facts += [(option, guide.config[option], model.config[option]) for option in options]
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
        labels = args.labels if self.labels is None else sha256(args.labels)
        names = ("weights", "sampler", "steps", "seed", "precision", "uint8", "format")
        given = {name: getattr(args, name) for name in names}
        return given | {
            "checkpoint": self.config["checkpoint"]["sha256"],
            "training_steps": self.config["steps"],
            "condition": self.model.condition,
            "encoder": self.config["encoder"],
            "bank": bank and (hashes or {"checkpoint": self.config["checkpoint"]["sha256"]}),
            "snippets": snippets if "snippet" in self.model.reads else None,
            "labels": labels if "label" in self.model.reads else None,
            "evaluations": count_evaluations(args.sampler, args.steps),
            "last_step": args.last_step if args.sampler in sde_samplers else None,
            "interpolant": self.interpolant,
            "guidance": guidance if self.guide else None,
            "codec": {key: value for key, value in codec_meta.items() if key != "name"},
            "image_shape": self.image_shape,
        }

    def labels_and_snippets(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        """What is read of "label" (B,) and "snippet" (B, F), for images (B,) that start from noise z (B, C, H, W)."""
        args, given = self.args, {}
        if "label" in self.model.reads:
            if self.labels is None:
                labels = label_rules[args.labels](args.seed, images, self.model.config["num_classes"])  # (B,)
            else:
                labels = self.labels[images % len(self.labels)]  # (B,)
            given["label"] = labels.to(self.device)
        if "snippet" in self.model.reads:
            if self.entries is None:
                u = uniform(args.seed, images, SNIPPET_DRAW)  # (B,)
                chosen = snippet_rules[args.snippets](self.bank, z, u)  # (B,)
            else:
                chosen = self.entries[images % len(self.entries)]  # (B,) or (B, F)
            given["snippet"] = (self.bank[chosen] if chosen.ndim == 1 else chosen).to(self.device)  # (B, F)
        return given

    def _velocity(self, network: SiT, cond: object, batch_size: int) -> Velocity:
        """A network as samplers call it, with float64 outside; its condition is embedded once for all steps."""
        condition = network.embed_condition(cond, batch_size, None)  # (B, D)

        def evaluate(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return network.velocity(x.float(), network.t_embedder(t.float()) + condition)

        if self.padded_to and not self.guide and self.device.type == "cuda":
            evaluate = self.replay = self.replay or Replay(evaluate, warm=2)
        return lambda x, t: evaluate(x, t, condition)

    def latents(self, images: Tensor, steps: int) -> Tensor:
        """Latents float32 (B, C, H, W) of the images with these numbers (B,)."""
        args, numbers = self.args, images.to(self.device)
        z = noise(args.seed, numbers, 0, self.model.latent_shape, normals=self.normals)  # (B, C, H, W)
        given = self.labels_and_snippets(images, z)
        options = {}
        if args.sampler in sde_samplers:
            step = itertools.count(1)
            options["randn"] = lambda x: noise(args.seed, numbers, next(step), x.shape[1:], normals=self.normals)
            options |= {"last_step": args.last_step, "interpolant": interpolants[self.interpolant]}
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        with bf16, fast_attention(self.device):
            velocity = self._velocity(self.model, conditions[self.model.condition].cond(given), len(images))
            if self.guide:
                cond = None if args.guide == "null" else conditions[self.guide.condition].cond(given)
                weaker = self._velocity(self.guide, cond, len(images))
                velocity = guided(velocity, weaker, args.guidance_scale, args.guidance_interval, args.guidance_channels)
            return samplers[args.sampler](velocity, z, steps, **options).float()

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pixels uint8 (B, H, W, 3) of latents (B, C, H, W)."""
        pixels = to_uint8(self.codec.decode(latents), self.args.uint8)  # (B, c, H, W)
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def compile(self, batch_size: int, decoder: bool = True) -> None:
        """Compile for batches of this size, to which smaller ones will be padded, by making one in two steps."""
        for network in {self.model, self.guide} - {None}:
            compile_blocks(network)
        if decoder:
            self.codec.compile_decoder()
        self.normals, self.padded_to, self.replay = torch.compile(normals_of, dynamic=False), batch_size, None
        self.decode(self.latents(torch.arange(batch_size), steps=2))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Pixels uint8 (B, H, W, 3) of the images with these numbers (B,).

        Raises:
            ValueError: the latents are not finite.
        """
        count = len(images)
        padded = images[torch.arange(self.padded_to or count).clamp(max=count - 1)]
        latents = self.latents(padded, self.args.steps)  # (B, C, H, W)
        if not latents.isfinite().all():
            raise ValueError(
                f"--checkpoint {self.args.checkpoint}: latents of images {images.min()} to {images.max()} are not "
                "finite; try --precision fp32, another checkpoint or a smaller --guidance-scale"
            )
        return self.decode(latents)[:count]


def count_evaluations(sampler: str, steps: int) -> int:
    """How often a sampler calls the network for one image: counted, with a velocity that costs nothing."""
    times = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return x

    samplers[sampler](velocity, torch.zeros(1, 1), steps)
    return len(times)


def generate(generator: Generator, output: Output, left: np.ndarray, batch_size: int, rank: int, world: int) -> None:
    """Generate the images `left`, batches of them in turn by all processes; the first returns when all are finished."""
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
    args, state = parse(argv), join()
    generator = Generator(args, state.device)
    output = Output(args.out, args.num_images, args.format, generator.settings)
    with claimed("--out", args.out, state.is_main_process):
        left = from_main(state, output.prepare)
        if left is None:
            state.print(f"{args.out} is complete: {args.num_images} images")
        else:
            complete(args, generator, output, left, state, argv)
    state.destroy_process_group()


def complete(
    args: argparse.Namespace,
    generator: Generator,
    output: Output,
    left: np.ndarray,
    state: PartialState,
    argv: list[str] | None,
) -> None:
    """Generate the images `left`, and pack all."""
    share = max(1, -(-len(left) // state.num_processes))  # images of each process
    batch_size = min(args.batch_size, share)  # a short run is shared too
    paid = share if args.compile is None and compile_by_default() else 0
    with fitting(f"try --batch-size {max(1, batch_size // 2)}"):
        if args.compile or paid >= COMPILE_FROM:
            generator.compile(batch_size, decoder=args.compile or paid >= COMPILE_DECODER_FROM)
        start = time.perf_counter()
        generate(generator, output, left, batch_size, state.process_index, state.num_processes)
    if not state.is_main_process:
        return
    output.pack()
    rate = len(left) / (time.perf_counter() - start)
    run = {**provenance(argv, state.num_processes), **generator.sources, "batch_size": batch_size}
    run |= {"compiled": generator.padded_to is not None, "peak_bytes": peak_memory()}
    output.finish(run | {"generated": len(left), "images_per_second": rate})
    print(f"{args.num_images} images in {args.out}; {len(left)} of them now, {rate:.2f} images/s")


if __name__ == "__main__":
    execute(main)
