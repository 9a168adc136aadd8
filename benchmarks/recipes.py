"""Do the recipes survive? The ImageNet scripts at real shapes on random data, one process killed in each long stage.

    python -m benchmarks.recipes --gpus 2 --work /tmp/recipes --out benchmarks/results/recipes.json

Makes JPEG files and random weights in their real formats (a VAE of Stable Diffusion's shape, DINOv2 ViT-B/14, GMem's
published file), then runs encode-imagenet.sh, build-bank-imagenet.sh, train-gmem-xl.sh with the alignment online and
sample-gmem-xl.sh from the published file. In the last two one process is killed at work, the recipe must fail, and the
same command must continue: the steps that training repeats have the losses of the first time, and the first images
equal those of a run that nobody killed. The continued training is told to stop, and must save its running step.
`--small` shrinks every size for a machine without a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.path import facts, make_encoder, make_images, make_vae, parser
from memory.files import write_json
from models.sit import SiT_models

GMEM = "GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth"
LOG_EVERY, SAVE_EVERY = 2, 10  # steps
PATIENCE = 900  # seconds until a recipe must have begun its work
POLL = 0.05
KILLED, STOPPED = "one process killed", "told to stop"
STATUS_WHEN_STOPPED = 143  # of a recipe, scripts/launch.sh


def make_gmem(path: Path, name: str, latent_side: int, dim: int, snippets: int) -> None:
    """GMem's published file with random weights and bank, none of its layers zero."""
    torch.manual_seed(0)
    heads = {"align_dims": (768,)} if name.startswith("SiT-XL") else {}
    model = SiT_models[name](input_size=latent_side, snippet_dim=dim, **heads)
    for parameter in (*model.blocks.parameters(), *model.final_layer.parameters()):
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    bank = {"memorybank": torch.randn(snippets, dim), "memoryfreq": [1 + i % 3 for i in range(snippets)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"network": model.state_dict(), **bank}, path)


def workers(recipe: psutil.Process, script: str) -> list[psutil.Process]:
    """The processes that a recipe's command runs in, without their launcher and their own children."""
    found = {}
    for process in recipe.children(recursive=True):
        try:
            words = process.cmdline()
            if script in words and "torch.distributed.run" not in words and process.ppid() not in found:
                found[process.pid] = process
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return list(found.values())


class Recipes:
    """Runs recipes in one environment and notes what each took."""

    def __init__(self, variables: dict[str, object], folder: Path):
        if shutil.which("python") is None:  # where there is only python3
            os.symlink(sys.executable, folder / "python")
            variables = {**variables, "PATH": f"{folder}:{os.environ['PATH']}"}
        self.environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        self.rows = []

    def run(self, title: str, recipe: str, *flags: object, when: Callable[[], bool] | None = None, **variables) -> int:
        """Run `scripts/RECIPE` and return its status; with `when`, disturb it as the title says once that is true."""
        print(f"+ {recipe}: {title}", flush=True)
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        begin = time.perf_counter()
        process = subprocess.Popen(["bash", f"scripts/{recipe}", *map(str, flags)], env=environment)
        if when:
            while not when():
                assert process.poll() is None, f"{recipe} ended before it could be disturbed, with {process.returncode}"
                assert time.perf_counter() - begin < PATIENCE, f"{recipe} has not begun its work"
                time.sleep(POLL)
            if title.endswith(STOPPED):
                process.terminate()
            else:
                workers(psutil.Process(process.pid), "sample_ddp.py" if "sample" in recipe else "train.py")[-1].kill()
        status = process.wait()
        assert (status != 0) == bool(when), f"{recipe} ended with status {status}"
        self.rows.append({"what": title, "recipe": recipe, "seconds": round(time.perf_counter() - begin, 1)})
        return status


def losses(run: Path) -> dict[int, float]:
    """Loss by step of a run's log."""
    path = run / "log.jsonl"
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def finished(samples: Path) -> int:
    """Images that an unfinished run has marked as done."""
    path = samples / ".done"
    return int(np.fromfile(path, np.uint8).sum()) if path.exists() else 0


def main(argv: list[str] | None = None) -> None:
    """Make the data, run the recipes, compare, write the results."""
    args = parser("Run the ImageNet recipes on random data, and kill them.").parse_args(argv)
    work, small = args.work.resolve(), args.small
    size, images, model, batch, drawn = (64, 40, "SiT-Ti/2", 4, 40) if small else (256, 512, "SiT-XL/2", 64, 64)
    encoder = ("test_vit@64", "test_vit") if small else ("dinov2-vitb14", "vit_base_patch14_dinov2.lvd142m")
    weights, store, run = work / "weights", work / "store", work / "run"
    make_images(work / "imagenet", images, size)
    make_vae(weights / "sd-vae-ft-mse", small)
    make_encoder(weights / "encoder.safetensors", encoder[1])
    make_gmem(weights / GMEM, model, size // 8, 64 if small else 768, 16 if small else 640_000)

    variables = {"NPROC": args.gpus, "IMAGENET": work / "imagenet", "GMEM_WEIGHTS": weights, "SIZE": size}
    variables |= {"STORE": store, "BANK": work / "bank", "ENCODER": encoder[0], "HOLDOUT": 0.1, "K": images // 4}
    variables |= {"ENCODER_WEIGHTS": weights / "encoder.safetensors", "BATCH": batch, "MODEL": model}
    recipes = Recipes(variables, work)
    recipes.run(f"encode {images} images", "encode-imagenet.sh")
    recipes.run("bank", "build-bank-imagenet.sh")

    train = f"--log-every {LOG_EVERY} --save-every {SAVE_EVERY} --keep 1 --sample-every 0".split()
    train += ["--model-options", "align_depth=2"] * small
    steps = {"OUT": run, "STEPS": 1_000_000}
    before: dict[int, float] = {}

    def saved() -> int:
        found = (run / "checkpoints").glob("[0-9]*.pt")
        return max((int(path.stem) for path in found if path.stem.isdigit()), default=0)

    def beyond_a_checkpoint() -> bool:
        before.update(losses(run))
        return saved() > 0 and max(before, default=0) > saved()

    repeated: list[int] = []
    while not repeated:  # a process killed right after a checkpoint leaves nothing to repeat
        recipes.run(f"train, {KILLED}", "train-gmem-xl.sh", *train, when=beyond_a_checkpoint, **steps)
        before |= losses(run)
        kept = saved()
        repeated = [step for step in before if step > kept]
    enough = max(before) + LOG_EVERY
    title = f"train, continued from step {kept}, {STOPPED}"
    status = recipes.run(title, "train-gmem-xl.sh", *train, when=lambda: max(losses(run), default=0) >= enough, **steps)
    assert status == STATUS_WHEN_STOPPED, f"a recipe that was told to stop ended with status {status}"
    after = losses(run)
    assert list(after) == list(range(LOG_EVERY, max(after) + 1, LOG_EVERY)), f"steps in the log: {list(after)}"
    assert 0 <= saved() - max(after) < LOG_EVERY, f"stopped after step {max(after)}, saved step {saved()}"
    largest = max(abs(after[step] / before[step] - 1) for step in repeated)
    assert largest < (1e-6 if small else 1e-2), f"losses before {before}, after {after}"

    sample = ["--steps", 8 if small else 250]
    whole, killed = work / "samples-whole", work / "samples"
    alone = max(2, drawn // 8)
    recipe, some = "sample-gmem-xl.sh", {"BATCH": 2 if small else 16 // args.gpus, "OUT": killed, "IMAGES": drawn}
    recipes.run(f"sample, {KILLED}", recipe, *sample, when=lambda: finished(killed) > 0, **some)
    kept = finished(killed)
    recipes.run(f"sample, continued from {kept} images", recipe, *sample, **some)
    recipes.run(f"sample {alone} on one", recipe, *sample, **some | {"OUT": whole, "IMAGES": alone, "NPROC": 1})
    array, reference = (np.load(folder / "samples.npz")["arr_0"] for folder in (killed, whole))
    assert array.shape == (drawn, size, size, 3), array.shape
    difference = np.abs(array[:alone].astype(int) - reference)
    assert difference.max() <= 8, f"images differ by {difference.max()} levels"
    assert len(np.unique(array.reshape(drawn, -1), axis=0)) == drawn, "images repeat"

    compared = {
        "training steps repeated": repeated,
        "largest relative difference of their losses": largest,
        "images kept of the killed run": kept,
        "largest pixel difference of the images": int(difference.max()),
        "mean pixel difference of the images": float(difference.mean()),
    }
    write_json(args.out, {**facts(args, "recipes"), "recipes": recipes.rows, **compared})
    print(f"\n{'seconds':>9}  recipe (start-up and compilation included)")
    for row in recipes.rows:
        print(f"{row['seconds']:9.1f}  {row['recipe']}: {row['what']}")
    for key, value in compared.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
