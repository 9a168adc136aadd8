"""Train a SiT by flow matching on a store of latents, conditioned on the snippets of a memory bank.

    python train.py --store data/NAME --bank banks/NAME --out runs/NAME
    torchrun --nproc-per-node 8 train.py --store data/imagenet256 --bank banks/imagenet256 --out runs/gmem-xl

The defaults are GMem's network with REPA's optimiser recipe. The same command again continues where the last checkpoint
stands and repeats an uninterrupted run, because every random number of a step depends on (seed, step) alone.

Reads   the store (scripts/encode_dataset.py) and the bank (memory/build_bank.py)
Writes  OUT/config.json           the command's settings, and where each part of the run was made
        OUT/checkpoints/*.pt      full states, the last `--keep`; *-ema.pt snapshots, never deleted
        OUT/log.jsonl             a line every `--log-every` steps, or at a shorter run's end; one a held-out evaluation
        OUT/samples/*.png         images from fixed noise and snippets
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

from dataset import StepSampler, holdout_path, rows_of_step
from loss import Draws, FlowMatchingLoss, draw, interpolants, seed_of, time_distributions
from memory.claim import claimed
from memory.command import Help, execute
from memory.files import atomic, check_folder, free_space, reading, remove_stale
from memory.pairs import Pairs
from memory.processes import join
from memory.provenance import provenance
from memory.run_folder import RunFolder
from models.autoencoder import check_codec, load_codec, to_uint8
from models.checkpoint import init_weights, load_state, read_checkpoint, summary
from models.kernels import compile_blocks, compile_by_default, default_precision, fast_attention, fitting
from models.replay import WARM_STEPS, Replay, take
from models.sit import Options, SiT_models, conditions
from models.update import Update
from samplers import euler_sampler, noise
from scripts.needs import describe, extent, missing
from scripts.stop import StopSignal, leave_signals_alone

TIME_BINS = 10  # of the held-out loss
HOLDOUT_IMAGES = 2_000  # at most, in one held-out evaluation
GRID_IMAGES, GRID_STEPS, GRID_AT_ONCE = 64, 50, 2
HOLDOUT_STREAM, DROPOUT_STREAM = 1, 2  # keep the seeds of these draws apart from a step's
# Options of SiT that are no --model-options because they follow from the data, and how the others are written.
FROM_DATA = ("input_size", "in_channels", "condition", "snippet_dim", "num_classes", "align_dims")
FORMS = {
    float: (r"(?=.)(0|[1-9]\d*)?(\.\d+)?", "a number", float),
    int: (r"0|[1-9]\d*", "a whole number", int),
    bool: (r"true|false", "true or false", "true".__eq__),
    str: (r"\w+", "a word", str),
}
TIMEOUT = timedelta(hours=2)  # the others wait while one process writes a checkpoint to slow storage


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; defaults are the published recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--store", required=True, help="folder written by scripts.encode_dataset")
    add("--bank", help="bank.pth, or its folder, written by memory.build_bank")
    add("--out", required=True, help="the run's folder; an existing run continues")
    add("--holdout", help="store of held-out images to evaluate on; STORE-holdout where it exists")

    add("--model", default="SiT-XL/2", choices=SiT_models, metavar="NAME", help="a preset of models/sit.py")
    add("--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="of SiT, as null_dropout=0.1")
    add("--condition", default="snippet", choices=conditions, help="what the network is told of an image")
    add("--snippet-from", default="nearest", choices=("nearest", "own"), help="row nearest to an image, or its feature")
    add("--encoder", help="encoder of the snippets where no bank says so")
    add("--init", metavar="CKPT", help="start from the EMA weights of this checkpoint")

    add("--steps", type=int, default=400_000, help="train until this step")
    add("--batch-size", type=int, default=256, help="global batch")
    add("--micro-batch", type=int, help="images at once in a process, the rest by accumulation; all if not given")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW, constant after --warmup")
    add("--warmup", type=int, default=0, help="steps in which the learning rate rises linearly to --lr")
    add("--beta2", type=float, default=0.999, help="second-moment decay of AdamW")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--ema-decay", type=float, default=0.9999, help="decay of the averaged weights, warmed up as (1 + s)/(10 + s)")
    add("--interpolant", default="linear", choices=interpolants, help="path between data and noise")
    add("--time", default="uniform", choices=time_distributions, help="distribution of training times")
    add("--align-coeff", type=float, default=0.0, help="weight of the alignment term (REPA: 0.5)")
    add("--align-encoder", help="encoder whose patch tokens are the target, in the store or run online on its images")
    add("--align-encoder-weights", help="weights file of an encoder that runs online")
    add("--seed", type=int, default=0, help="seed of weights, data order and every draw")
    add("--precision", choices=("bf16", "fp32"), help="of the network; bf16 where a GPU has it, else fp32 (tf32 there)")

    add("--log-every", type=int, default=100, help="steps between lines of the log")
    add("--save-every", type=int, default=5_000, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="number of latest full checkpoints kept")
    add("--snapshot-every", type=int, default=50_000, help="steps between EMA-only snapshots; 0 writes none")
    add("--eval-every", type=int, default=5_000, help="steps between losses on the held-out store; 0 never")
    add("--sample-every", type=int, default=5_000, help="steps between grids of samples; 0 never")
    add("--codec", help="where the store's codec lies now, to decode the grids; by its own name if not given")
    add("--stage", metavar="DIR", help="copy the store to this fast disk first, sequentially, and read it there")
    add("--resident", action="store_true", help="keep all that steps read on the GPU (latents of 1.28M images: 21 GB)")
    add("--workers", type=int, default=0, help="reading processes for each training process, where the disk is slow")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases (WANDB_MODE=offline works)")
    add("--checkpoint-activations", action="store_true", help="compute them twice: less memory, a third more work")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile and replay as CUDA graphs; on with a GPU")
    add("--dry-run", action="store_true", help="only print configuration, parameters, memory, disk, missing files")
    if "--resume" in (sys.argv if argv is None else argv):  # which other projects have
        parser.error("--resume is not needed: the same command continues")
    args = parser.parse_args(argv)

    positive = "steps batch_size micro_batch log_every save_every keep"
    others = "seed workers align_coeff warmup snapshot_every eval_every sample_every"
    for least, names in ((1, positive), (0, others)):
        for name in names.split():
            if (value := getattr(args, name)) is not None and value < least:
                parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not (0 <= args.ema_decay < 1 and 0 <= args.beta2 < 1 and args.clip > 0 and args.lr > 0):
        parser.error("expected 0 <= --ema-decay < 1, 0 <= --beta2 < 1, --clip > 0 and --lr > 0")
    for name in ("align_encoder", "align_encoder_weights"):
        if (value := getattr(args, name)) and args.align_coeff == 0:
            parser.error(f"--{name.replace('_', '-')} {value} is not read without --align-coeff (REPA: 0.5)")
    with_snippets = "snippet" in conditions[args.condition].reads
    if with_snippets and args.snippet_from == "nearest" and not args.bank:
        made = f"`python -m memory.build_bank --store {args.store} --out banks/NAME` makes one"
        parser.error(f"--bank is missing: {made}; --condition none trains without")
    if args.bank and not with_snippets:
        parser.error(f"--condition {args.condition} does not read --bank {args.bank}: leave it out")
    try:
        model_options(args.model_options)
    except ValueError as error:
        parser.error(str(error))
    args.precision = args.precision or default_precision()
    if args.compile is None:
        args.compile = compile_by_default()
    if args.holdout is None and (beside := holdout_path(args.store)).exists():
        args.holdout = str(beside)
    return args


def model_options(pairs: list[str]) -> dict[str, object]:
    """Constructor arguments of SiT from NAME=VALUE pairs.

    Raises:
        ValueError: a pair that is none, a name that SiT does not have or that follows from the data, or a value of
            another kind than the option's.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Options) if field.name not in FROM_DATA}
    options = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kinds:
            raise ValueError(f"--model-options {pair}: expected NAME=VALUE with one of {', '.join(kinds)}")
        form, expected, read = FORMS[kinds[name]]
        if not re.fullmatch(form, value):
            default = str(getattr(Options, name)).lower()
            raise ValueError(f"--model-options {pair}: expected NAME=VALUE with {expected}, as {name}={default}")
        options[name] = read(value)
    return options


class Trainer:
    """The state of a run (weights, EMA, optimiser, step, running means) and everything that is done to it."""

    def __init__(self, args: argparse.Namespace, accelerator: accelerate.Accelerator, data: Pairs):
        self.args, self.accelerator, self.data, self.device = args, accelerator, data, accelerator.device
        self.facts, self.out = data.identity(), Path(args.out)
        self.folder = RunFolder(self.out, vars(args), self.facts)
        self.step = 0
        # Sums since the last line of the log: loss, velocity, align, gradient norm, steps.
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.bad_step = torch.tensor(-1, device=self.device)  # the first with a loss or gradient that is not finite

        processes = accelerator.num_processes
        if args.batch_size % processes:
            raise ValueError(f"--batch-size {args.batch_size} is not a multiple of the {processes} processes")
        if self.local_batch % self.micro_batch:
            fits = next(size for size in range(self.micro_batch, 0, -1) if self.local_batch % size == 0)
            images = f"the {self.local_batch} images of a process"
            raise ValueError(f"--micro-batch {self.micro_batch} does not divide {images}; {fits} does")

        torch.manual_seed(args.seed)
        options = {"condition": args.condition, **data.options(), **model_options(args.model_options)}
        self.network = SiT_models[args.model](**options).to(self.device)
        if args.init and not self.folder.checkpoints:
            skipped = init_weights(self.network, args.init)
            told = f"--init {args.init}: {len(skipped)} tensors differ and were skipped"
            accelerator.print(told, *summary(skipped), sep="\n  ")
        self.network.checkpoint_activations = args.checkpoint_activations
        self.update = Update(self.network, args.lr, args.beta2, args.clip, args.ema_decay, args.warmup)
        self.ema, self.optimizer = self.update.average, self.update.optimizer
        self.loss = FlowMatchingLoss(interpolants[args.interpolant], args.align_coeff)
        self.model, self.run_micro_step = self.network, self.micro_step  # until `prepare` wraps both
        self.grid_codec, self.wandb = None, None  # of the main process: `check` and `run` load them

    @property
    def local_batch(self) -> int:
        """Images of a step in this process."""
        return self.args.batch_size // self.accelerator.num_processes

    @property
    def micro_batch(self) -> int:
        """Images of a forward pass."""
        return self.args.micro_batch or self.local_batch

    @property
    def rows(self) -> slice:
        """This process's part of the global batch."""
        start = self.accelerator.process_index * self.local_batch
        return slice(start, start + self.local_batch)

    def check(self) -> None:
        """What can be checked before the long work, with nothing written yet.

        Raises:
            ValueError: the alignment's encoder has more or fewer patches than the network tokens; the folder holds a
                run with other settings; the grids' codec is not to be had or not the store's; the disk is too small for
                what is left to do.
        """
        tokens = self.network.pos_embed.shape[1]
        if self.data.align_shape and self.data.align_shape[0] != tokens:
            counts = f"{tokens} tokens, the alignment's encoder {self.data.align_shape[0]} patches"
            remedy = "choose an input size of the encoder (NAME@SIZE) that gives as many"
            raise ValueError(f"--align-coeff: {self.args.model} has {counts}; {remedy}")
        check_folder("--out", self.out)
        self.folder.check_same()
        if self.args.sample_every and self.accelerator.is_main_process:
            name, codec = self.args.codec or self.data.codec["name"], self.data.codec
            self.grid_codec = load_codec(name, self.device, channels=codec["image_channels"])
            check_codec(self.grid_codec.meta(self.data.meta["image_size"]), codec, f"the store {self.args.store}")
        count = sum(parameter.numel() for parameter in self.network.parameters())
        kept = min(self.args.keep + 1, -(-self.args.steps // self.args.save_every))  # one is written beside the others
        needed = 16 * count * max(1, kept - len(self.folder.checkpoints))  # weights, EMA, two moments in float32
        finished = self.folder.checkpoints and int(self.folder.checkpoints[-1].stem) >= self.args.steps
        if not finished and (free := free_space(self.out)) < needed:
            sizes = f"{needed / 1e9:.1f} GB are needed for checkpoints, {free / 1e9:.1f} GB are free"
            raise ValueError(f"--out {self.out}: {sizes}; make room or lower --keep")

    def resume(self) -> None:
        """Continue from the latest checkpoint, or start."""
        if self.accelerator.is_main_process:
            remove_stale(self.out / "checkpoints", self.out / "samples")
        # The main process has claimed the folder; to the others, a checkpoint of just now may not show yet.
        [latest] = broadcast_object_list(self.folder.checkpoints[-1:] or [None])
        if not latest:
            return
        state, source = read_checkpoint(latest), f"checkpoint {latest}"
        for network, name in ((self.network, "model"), (self.ema, "ema")):
            load_state(network, state.get(name, {}), source)
        with reading(source):
            self.optimizer.load_state_dict(state["opt"])
            self.step = int(state["steps"])
            if self.accelerator.is_main_process:  # the sums of all processes; the others start from zero
                self.sums += torch.tensor(state["sums"], dtype=torch.float64, device=self.device)
        self.accelerator.print(f"continuing from {latest} at step {self.step:,}")

    def prepare(self) -> None:
        """Compile the blocks, wrap the network for mixed precision and several processes, and let steps be replayed."""
        replay = self.args.compile and self.device.type == "cuda"
        if replay:  # recordings need a stream that is not the default, and the one of DDP and of all steps before
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(stream)
        if self.args.compile:
            compile_blocks(self.network)
            compile_blocks(self.ema)
        self.model = self.accelerator.prepare_model(self.network)
        self.run_micro_step = Replay(self.micro_step) if replay else self.micro_step

    def batches(self) -> Iterator[dict]:
        """This process's rows of each remaining step."""
        args, store = self.args, self.data.train
        span = args.seed, self.step, args.steps, self.rows
        steps = StepSampler(len(store), args.batch_size, store.num_views, *span)
        if args.resident:
            return map(store.__getitem__, steps)
        options = {"num_workers": args.workers, "worker_init_fn": leave_signals_alone}
        return iter(DataLoader(store, sampler=steps, batch_size=None, pin_memory=self.device.type == "cuda", **options))

    def accumulate(self, batch: dict) -> Tensor:
        """Gradients of the global batch of `self.step`, by micro-batches; `micro_step`'s sums over them."""
        args = self.args
        draws = draw(args.seed, self.step, args.batch_size, self.network.latent_shape, args.time, self.device)
        draws = draws[self.rows]
        latents, cond = self.data.latents(batch, draws.posterior), self.data.cond(batch)
        patches = self.data.align_targets(batch)
        sums = torch.zeros(3, device=self.device)
        for micro, start in enumerate(range(0, self.local_batch, self.micro_batch)):
            rows = slice(start, start + self.micro_batch)
            torch.manual_seed(seed_of(args.seed, self.step, self.accelerator.process_index, micro, DROPOUT_STREAM))
            ends = start == 0, start + self.micro_batch == self.local_batch
            sums += self.run_micro_step(*ends, *take((latents, cond, draws, patches), rows))
        return sums

    def micro_step(self, first: bool, last: bool, latents: Tensor, cond: object, draws: Draws, patches: list) -> Tensor:
        """Add a micro-batch's gradients to those before it, if not `first`, and after the `last` average them over the
        processes; sums (3,) over its images of the loss and of its parts, velocity and alignment (0 without)."""
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            losses = self.loss(self.model, latents, cond, draws, patches)
            self.accelerator.backward(losses.total.sum() / self.local_batch)
        align = losses.velocity.new_zeros(1) if losses.align is None else losses.align.detach()
        return torch.stack([losses.total.detach().sum(), losses.velocity.detach().sum(), align.sum()])

    def train_step(self, batch: dict) -> None:
        """One optimiser step on the global batch of `self.step`; the host never waits for the device."""
        losses = self.accumulate(batch).double() / self.args.batch_size  # (3,) of this process's rows
        norm = self.update(self.step)
        # The norm, and this one step, are the same in all processes, over which `means` adds.
        shared = torch.stack([norm, torch.ones_like(norm)]).double() / self.accelerator.num_processes
        self.sums += torch.cat([losses, shared])
        finite = torch.isfinite(norm) & torch.isfinite(losses[0])
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, self.step, self.bad_step)
        self.step += 1

    def check_finite(self) -> None:
        """Raise FloatingPointError if a loss or gradient was not finite; run before anything is logged or saved."""
        steps = self.accelerator.gather(self.bad_step[None])  # (processes,): a loss may overflow in one of them alone
        if (steps >= 0).any():
            bad = int(steps[steps >= 0].min())
            rows = rows_of_step(len(self.data.train), self.args.batch_size, self.args.seed, bad)
            remedy = "start again in another folder with a smaller --lr or --precision fp32"
            if self.folder.checkpoints:
                remedy = f"the last good checkpoint is {self.folder.checkpoints[-1]}; {remedy}, from it by --init"
            where = f"step {bad:,} is not finite (rows {rows[:8].tolist()}… of the store)"
            raise FloatingPointError(f"the loss or the gradient of {where}; {remedy}")

    def means(self) -> dict[str, float]:
        """Means over all processes since the last line of the log."""
        *sums, steps = self.accelerator.reduce(self.sums, "sum").tolist()
        names = ("loss", "velocity", "align", "grad_norm")
        means = {name: seven_digits(value / steps) for name, value in zip(names, sums, strict=True)}
        return means if self.args.align_coeff > 0 else {name: means[name] for name in ("loss", "grad_norm")}

    def record(self, line: dict) -> None:
        """Append a line to the log, in the main process."""
        if self.accelerator.is_main_process:
            self.folder.record(line)
        if self.wandb:
            self.wandb.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def snapshot(self) -> dict:
        """What a checkpoint says besides the weights in training and the optimiser's state."""
        facts = {"model_config": self.network.config, "steps": self.step, "args": vars(self.args), **self.facts}
        return {"ema": self.ema.state_dict(), **facts}

    def save(self) -> None:
        """Write a full state; then remove the oldest."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        if self.accelerator.is_main_process:
            state = {"model": self.network.state_dict(), "opt": self.optimizer.state_dict(), "sums": sums}
            self.folder.write_checkpoint(f"{self.step:07d}", {**self.snapshot(), **state})
            self.folder.remove_old()

    @torch.no_grad()
    def evaluate(self) -> dict:
        """The EMA network's loss on held-out images at fixed noise, also in ten equal bins of time."""
        store, accelerator = self.data.holdout, self.accelerator
        images = min(len(store), HOLDOUT_IMAGES)
        rows = np.arange(images) * len(store) // images  # evenly, because stores are often sorted by class
        bins = torch.arange(images, device=self.device) % TIME_BINS
        draws = draw(seed_of(self.args.seed, HOLDOUT_STREAM), 0, images, self.network.latent_shape, device=self.device)
        draws = dataclasses.replace(draws, time=(bins + draws.time) / TIME_BINS)
        loss = FlowMatchingLoss(self.loss.interpolant)
        sums = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.device)  # losses, images
        parts = range(0, images, self.micro_batch)
        for start in parts[accelerator.process_index :: accelerator.num_processes]:
            part = slice(start, start + self.micro_batch)
            batch = store.fetch(rows[part], np.zeros_like(rows[part]))
            with accelerator.autocast():
                latents, cond = self.data.latents(batch, draws.posterior[part]), self.data.cond(batch)
                losses = loss(self.ema, latents, cond, draws[part]).total.double()
            sums.index_add_(1, bins[part], torch.stack([losses, torch.ones_like(losses)]))
        total, count = accelerator.reduce(sums, "sum").cpu()
        by_time = [seven_digits(value) if seen else None for value, seen in zip(total / count, count > 0, strict=True)]
        return {"holdout_loss": seven_digits(total.sum() / count.sum()), "holdout_loss_by_time": by_time}

    def sample(self) -> None:
        """Draw a grid on the first process; leave it out, with a warning, where the GPU has no room for it."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.draw_grid()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            remedy = "--sample-every 0 tries no more, --checkpoint-activations makes room"
            warnings.warn(f"no grid of samples at step {self.step:,}: the GPU's memory is full; {remedy}", stacklevel=2)

    @torch.no_grad()
    def draw_grid(self) -> None:
        """Write a grid of the EMA network's images from fixed noise and snippets (Euler, 50 steps)."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of pieces that are too small for what comes
        z = noise(self.args.seed, torch.arange(GRID_IMAGES), 0, self.network.latent_shape, self.device)
        cond = self.grid_condition(z)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return self.ema(x.float(), t.float(), cond).double()

        latents = euler_sampler(velocity, z, GRID_STEPS)
        parts = latents.split(GRID_AT_ONCE)  # the VAE must fit beside all that trains
        pixels = torch.cat([to_uint8(self.grid_codec.decode(part)) for part in parts])
        with atomic(self.out / "samples" / f"{self.step:07d}.png") as temporary:
            save_image(pixels.float() / 255, temporary, nrow=8, padding=0)

    def grid_condition(self, z: Tensor) -> object:
        """Conditions of the grid: the snippets that the noise draws, or own features of fixed rows; labels in turn."""
        rows = rows_of_step(len(self.data.train), GRID_IMAGES, self.args.seed, 0)
        batch = self.data.train.fetch(rows, np.zeros_like(rows))
        batch["label"] = torch.arange(GRID_IMAGES) % (self.data.meta.get("num_classes") or 1)
        if self.data.bank:
            batch["index"] = self.data.bank.indices_from_noise(z)
        return self.data.cond(batch)

    def run(self) -> None:
        """Train until `--steps` or a signal; log, evaluate, sample and save on the way."""
        args, main = self.args, self.accelerator.is_main_process
        self.wandb = start_wandb(args, self.out) if main and args.wandb else None
        total, done = args.steps * args.batch_size, self.step * args.batch_size
        bar = tqdm(total=total, initial=done, unit="img", disable=not main)
        began, since = time.perf_counter(), self.step
        with bar, StopSignal(TIMEOUT) as stop, fast_attention(self.device, self.network.pos_embed.shape[1]):
            for batch in self.batches():
                self.train_step(batch)
                bar.update(args.batch_size)
                leaving, last = stop.agreed(), self.step == args.steps
                if self.step % min(args.log_every, args.steps) == 0:
                    self.check_finite()  # waits for the device: the rate counts finished steps
                    rate = (self.step - since) * args.batch_size / (time.perf_counter() - began)
                    line = {"step": self.step, **self.means(), "images_per_second": round(rate, 2)}
                    self.record({**line, "time": round(time.time(), 2)})
                    self.sums.zero_()
                    bar.set_postfix({key: f"{line[key]:.4g}" for key in ("loss", "grad_norm")}, refresh=False)
                    began, since = time.perf_counter(), self.step
                evaluate = self.data.holdout and self.step % args.eval_every == 0
                sample = args.sample_every and (self.step % args.sample_every == 0 or last)
                save = self.step % args.save_every == 0 or last or leaving
                snapshot = args.snapshot_every and self.step % args.snapshot_every == 0
                if evaluate or sample or save or snapshot:
                    self.check_finite()
                    paused = time.perf_counter()
                    if evaluate:
                        self.record({"step": self.step, **self.evaluate()})
                    if sample:
                        bar.set_description(f"drawing {GRID_IMAGES} samples")
                        self.sample()
                        bar.set_description()
                    if snapshot and main:
                        self.folder.write_checkpoint(f"{self.step:07d}-ema", self.snapshot())
                    if save:
                        self.save()
                    began += time.perf_counter() - paused
                if leaving:
                    break
        self.run_micro_step = self.micro_step  # recordings go before the process group that they use
        how = "finished" if self.step == args.steps else "stopped by a signal; the same command continues"
        self.accelerator.print(f"{how} at step {self.step:,}: {self.out}")


def seven_digits(value: float | Tensor) -> float:
    """A figure for the log, rounded: beyond these digits the order of sums shows."""
    return float(f"{value:.7g}")


def start_wandb(args: argparse.Namespace, out: Path) -> object:
    """A Weights & Biases run that continues with the training run, known by its folder."""
    import wandb

    name = out.resolve().name
    identity = f"{name}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
    return wandb.init(project=args.wandb, name=name, id=identity, resume="allow", dir=out, config=vars(args))


def launch(args: argparse.Namespace) -> accelerate.Accelerator:
    """Join the launcher's other processes, with the precision that the command line asks for."""
    state = join(TIMEOUT)
    if state.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    precision = {"bf16": "bf16", "fp32": "no"}[args.precision]
    exchange = accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return accelerate.Accelerator(cpu=state.device.type == "cpu", mixed_precision=precision, kwargs_handlers=[exchange])


def main(argv: list[str] | None = None) -> None:
    """Train, as the command line says."""
    args = parse(argv)
    lacking = missing(args)
    if lacking and args.dry_run:  # what is missing tells the shapes: assume ImageNet's at 256 pixels
        with torch.device("meta"):
            network = SiT_models[args.model](condition=args.condition, **model_options(args.model_options))
        print(describe(args, network, int(os.environ.get("WORLD_SIZE", 1)), {}))
        sys.exit("missing (latents of 4×32×32 and snippets of 768 assumed above):\n  " + "\n  ".join(lacking))
    if lacking:
        raise ValueError("; ".join(lacking))
    accelerator = launch(args)
    trainer = Trainer(args, accelerator, Pairs(args, accelerator.device))
    trainer.check()
    if args.dry_run:
        accelerator.print(describe(args, trainer.network, accelerator.num_processes, trainer.facts))
        return
    with claimed("--out", args.out, accelerator.is_main_process):
        trainer.resume()
        if trainer.step >= args.steps:
            accelerator.print(f"{args.out} is at step {trainer.step:,} already; raise --steps to go on")
            return
        if accelerator.is_main_process:
            trainer.folder.note(trainer.step, provenance(argv, accelerator.num_processes))
            trainer.folder.rewind_log(trainer.step)
        told = extent(args, trainer.network, accelerator.num_processes, trainer.facts)
        accelerator.print("; ".join(f"{name} {words}" for name, words in told.items()))
        trainer.prepare()
        less = f"try --micro-batch {max(1, trainer.micro_batch // 2)}, or --checkpoint-activations"
        with fitting(f"{less}; if it lasted for {WARM_STEPS} steps, --no-compile, because recording one takes more"):
            trainer.run()
    accelerator.end_training()


if __name__ == "__main__":
    execute(main)
