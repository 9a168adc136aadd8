"""The recipes in scripts/: what each runs by default, every one of them at tiny size, and what signals do to them.

Scripts run as users run them; only their `python` has imported the libraries beforehand (preloaded_python.py).
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks import recipes as bench
from benchmarks.path import make_encoder
from memory.files import sha256
from models.checkpoint import load_model
from models.sit import SiT_models
from scripts import make_assets
from scripts.fetch import FILES
from scripts.quoted import QUOTED
from scripts.sources import open_source

ELSEWHERE = {"demo.sh": "tests/test_demo.py", "fetch.sh": "tests/test_fetch.py", "test.sh": ".ci/run"}
ELSEWHERE |= {"miniature.sh": "tests/test_miniature.py"}
SOURCED = {"launch.sh", "imagenet.sh", "setup.sh"}
STAGES = ["encode-imagenet.sh", "build-bank-imagenet.sh", "train-gmem-xl.sh", "train-gmem-b.sh", "train-sit-xl.sh"]
STAGES += ["train-repa-xl.sh", "sample-gmem-xl.sh", "sample-gmem-xl-ode.sh", "sample-sit-xl.sh", "sample-repa-xl.sh"]
SMALL_RUN = ["--save-every", "2", "--eval-every", "2", "--sample-every", "0", "--log-every", "1", "--workers", "0"]


def bash(root, environment, script, *flags, status=0, **variables):
    """Run a script; returns what it printed."""
    environment = {**environment, **{name: str(value) for name, value in variables.items()}}
    words = ["bash", root / "scripts" / script, *map(str, flags)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_script_is_run_by_a_test(root):
    small_runs = (root / "tests" / "test_recipes.py").read_text().split("def site(")[-1]
    small_runs += (root / "benchmarks" / "recipes.py").read_text()
    for script in sorted((root / "scripts").glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
        if script.name in ELSEWHERE:
            assert script.name in (root / ELSEWHERE[script.name]).read_text(), script.name
        elif script.name in SOURCED:
            sources = [other.read_text() for other in (root / "scripts").glob("*.sh") if other != script]
            assert any(script.name in source for source in sources), script.name
        else:
            assert f'"{script.name}"' in small_runs, f"no test runs {script.name}"


@pytest.mark.parametrize("name", [*STAGES, "own-photos.sh"])
def test_the_head_says_what_a_recipe_takes(root, name):
    script = root / "scripts" / name
    head = script.read_text().split("\nset -euo pipefail\n")[0]
    assert f"bash scripts/{name}" in head
    for word in ("time", "memory", "disk", "expected", "gpu" if name == "own-photos.sh" else "hardware"):
        assert re.search(rf"^#.*\b{word}\b", head, re.I | re.M), word
    assert os.access(script, os.X_OK)


# What each recipe runs by default: the published settings.
DEFAULTS = {
    "encode-imagenet.sh": (
        "scripts.encode_dataset",
        {"codec": "sd-vae-ft-mse", "encoder": "dinov2-vitb14", "image_size": 256, "views": 1, "keep_images": True},
    ),
    "build-bank-imagenet.sh": ("memory.build_bank", {"k": 640_000, "passes": 5, "encoder": "dinov2-vitb14"}),
    "train-gmem-xl.sh": (
        "train",
        {"model": "SiT-XL/2", "condition": "snippet", "align_coeff": 0.5, "batch_size": 256, "micro_batch": 32}
        | {"snippet_from": "nearest", "lr": 1e-4, "ema_decay": 0.9999, "clip": 1.0, "bank": "banks/imagenet256"},
    ),
    "train-gmem-b.sh": ("train", {"model": "SiT-B/2", "condition": "snippet", "align_coeff": 0.5}),
    "train-sit-xl.sh": (
        "train",
        {"model": "SiT-XL/2", "condition": "label", "align_coeff": 0.0, "store": "data/imagenet256-flips"}
        | {"bank": None, "clip": 1e9},
    ),
    "train-repa-xl.sh": (
        "train",
        {"model": "SiT-XL/2", "condition": "label", "align_coeff": 0.5, "store": "data/imagenet256", "bank": None},
    ),
    "sample-gmem-xl.sh": (
        "sample_ddp",
        {"num_images": 50_000, "sampler": "sde", "steps": 250, "uint8": "truncate", "guide": None}
        | {"snippets": "noise", "last_step": 0.04, "weights": "ema"},
    ),
    "sample-gmem-xl-ode.sh": ("sample_ddp", {"sampler": "euler", "steps": 50, "uint8": "truncate"}),
    "sample-sit-xl.sh": (
        "sample_ddp",
        {"num_images": 50_000, "sampler": "sde", "steps": 250, "uint8": "round", "labels": "random", "guide": None},
    ),
    "sample-repa-xl.sh": (
        "sample_ddp",
        {"num_images": 50_000, "sampler": "sde", "steps": 250, "uint8": "truncate", "labels": "random"},
    ),
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Runs a script whose `python` only notes its words; returns those of torchrun and of our command."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$WORDS"\n')
    (folder / "python").chmod(0o755)
    (folder / "weights").mkdir()
    for file in FILES:
        (folder / "weights" / file.path).parent.mkdir(exist_ok=True)
        (folder / "weights" / file.path).touch()

    def run(root, script, *flags, **variables):
        given = {"NPROC": "8", "WORDS": folder / "words", "IMAGENET": "train", "GMEM_WEIGHTS": folder / "weights"}
        given |= {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": folder, **variables}  # or .venv is activated
        bash(root, {}, script, *flags, **given)
        words = (folder / "words").read_text().split("\n")[:-1]
        place = next(
            i for i, word in enumerate(words) if word.startswith(("scripts.", "memory.")) or word[-3:] == ".py"
        )
        module = words[place].removesuffix(".py")
        return words[:place], module, importlib.import_module(module).parse(words[place + 1 :])

    return run


@pytest.mark.parametrize("script", STAGES)
def test_the_defaults_are_the_published_settings(root, dry, script):
    launcher, module, args = dry(root, script)
    expected_module, expected = DEFAULTS[script]
    assert module == expected_module
    assert {name: getattr(args, name) for name in expected} == expected
    assert launcher[:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone"]


@pytest.mark.parametrize("script", STAGES)
def test_flags_go_through_and_come_last(root, dry, script):
    flag = "--num-images" if script.startswith("sample") else "--steps" if script.startswith("train") else "--seed"
    flag = "--batch-size" if script.startswith("encode") else flag
    _, _, args = dry(root, script, flag, "7")
    assert vars(args)[flag[2:].replace("-", "_")] == 7


def test_512_pixels(root, dry):
    _, _, encode = dry(root, "encode-imagenet.sh", SIZE="512")
    assert (encode.image_size, encode.encoder, str(encode.out)) == (512, "dinov2-vitb14@448", "data/imagenet512")
    assert encode.batch_size == 16
    _, _, train = dry(root, "train-gmem-xl.sh", SIZE="512", NPROC="1")
    assert (train.store, train.bank, train.align_encoder) == ("data/imagenet512", "banks/imagenet512", encode.encoder)
    assert (train.batch_size, train.micro_batch) == (256, 32)


@pytest.mark.parametrize(
    ("variables", "micro_batch", "launcher"),
    [
        ({"NPROC": "1"}, 128, []),
        ({"NPROC": "1", "MICRO_BATCH": "24"}, 16, []),  # 24 does not divide 256
        ({"NPROC": "2"}, 128, ["--nproc-per-node", "2", "--standalone"]),
        (
            {"NPROC": "8", "NODES": "4", "NODE": "2", "HEAD": "first", "PORT": "20001"},
            8,
            ["--rdzv-endpoint", "first:20001"],
        ),
    ],
)
def test_one_gpu_accumulates_and_many_machines_meet(root, dry, variables, micro_batch, launcher):
    words, _, args = dry(root, "train-gmem-xl.sh", **variables)
    assert (args.batch_size, args.micro_batch) == (256, micro_batch)
    assert launcher == [word for word in words if word in launcher]
    if "NODES" in variables:
        assert words[words.index("--nnodes") + 1] == "4"
        assert "is_host=0" in words


def test_guidance_variants(root, dry):
    _, _, sit = dry(root, "sample-sit-xl.sh", GUIDANCE="1.5")
    assert (sit.guide, sit.guidance_scale, sit.guidance_channels, sit.out) == (
        "null",
        1.5,
        3,
        "samples/sit-xl-guided-1.5",
    )
    _, _, repa = dry(root, "sample-repa-xl.sh", GUIDANCE="1.8")
    assert (repa.guide, repa.guidance_scale, repa.guidance_interval) == ("null", 1.8, [0, 0.7])


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [("runs/gmem-xl-256/", "gmem-xl-256"), ("/my runs/a/checkpoints/0400000.pt", "a-0400000"), (None, "gmem-xl")],
)
def test_images_of_other_weights_go_elsewhere(root, dry, tmp_path, checkpoint, folder):
    variables = {}
    if checkpoint:
        variables["CHECKPOINT"] = tmp_path / checkpoint.strip("/")
        variables["CHECKPOINT"].mkdir(parents=True)
    assert dry(root, "sample-gmem-xl.sh", **variables)[2].out == f"samples/{folder}"
    assert dry(root, "sample-gmem-xl-ode.sh", **variables)[2].out == f"samples/{folder}-ode"


def test_a_name_on_the_hub_goes_through(root, dry):
    name = f"hf:Tangentone/GMem/a.pth@{'0' * 40}"
    assert dry(root, "sample-gmem-xl.sh", CHECKPOINT=name)[2].checkpoint == name


def printed(dry, root, line):
    """The arguments that a printed command line ends in."""
    words = shlex.split(line)
    place = words.index("bash")
    variables = dict(word.split("=", 1) for word in words[:place])
    return dry(root, words[place + 1].removeprefix("scripts/"), *words[place + 2 :], **variables)[2]


def test_the_commands_beside_quoted_figures_are_theirs(root, dry):
    outs = {}
    for row in QUOTED:
        trained = printed(dry, root, row.retrain)
        assert (trained.steps, trained.model, trained.batch_size) == (row.training_steps, row.model, 256)
        if row.re_evaluate is None or row.re_evaluate in outs:
            continue
        sampled = printed(dry, root, row.re_evaluate)
        assert (sampled.num_images, sampled.sampler) == (50_000, "sde" if row.sampler == "SDE" else "heun")
        assert sampled.steps == (row.evaluations or 125)  # Heun's evaluate twice, but for the last: 249
        guidance = row.guidance or {"scale": None}
        assert sampled.guidance_scale == guidance["scale"]
        assert sampled.guidance_channels == guidance.get("channels")
        assert list(sampled.guidance_interval) == guidance.get("interval", [0.0, 1.0])
        outs[row.re_evaluate] = sampled.out
    assert len(outs) == len(set(outs.values())) == 7


def test_paths_with_spaces_stay_whole(root, dry):
    _, _, args = dry(root, "train-gmem-xl.sh", STORE="my data", OUT="a run", ENCODER_WEIGHTS="my weights/e.pth")
    assert (args.store, args.out, args.align_encoder_weights) == ("my data", "a run", "my weights/e.pth")


def test_without_weights_or_images_the_recipes_say_what_to_get(root, environment, tmp_path):
    for name in ("gmem", "sit", "repa"):
        (file,) = [file.path for file in FILES if file.name == name]
        said = bash(root, environment, f"sample-{name}-xl.sh", status=2, GMEM_WEIGHTS=tmp_path)
        assert f"{tmp_path}/{file} is not there" in said
        assert re.search(rf"bash scripts/fetch\.sh {name} sd-vae-ft-\w+", said)
        said = bash(root, environment, f"sample-{name}-xl.sh", status=2, GMEM_WEIGHTS="none")
        assert f"none/{file} is not there (relative paths start at the repository: {root}/none/{file})" in said
    assert "4.7 GB, of the hub repository Tangentone/GMem" in bash(
        root, environment, "sample-gmem-xl-ode.sh", status=2, GMEM_WEIGHTS=tmp_path
    )
    for name, elsewhere in (("gmem-xl", "runs/none"), ("gmem-xl-ode", tmp_path / "none.pth")):
        said = bash(root, environment, f"sample-{name}.sh", status=2, CHECKPOINT=elsewhere)
        assert said.startswith(f"CHECKPOINT={elsewhere} is not there")
        assert (f"relative paths start at the repository: {root}/runs/none" in said) == (elsewhere == "runs/none")
        assert "fetch.sh" not in said
    said = bash(root, environment, "evaluate.sh", tmp_path, "--quick", status=2, REF="ref.npz")
    assert said == f"{tmp_path} is no run of train.py: it has no config.json\n"
    there, none = tmp_path, tmp_path / "no such"
    for place, name in enumerate(("STORE", "BANK", "SAMPLES", "REF")):
        paths = [none if place == number else there for number in range(4)]
        said = bash(root, environment, "evaluate.sh", *paths, tmp_path / "page", status=2)
        assert said == f"{name} {none} is not there: expected an existing path, absolute or from {root}\n"
    assert not (tmp_path / "page").exists()
    assert "IMAGENET is not set: name the images" in bash(root, environment, "encode-imagenet.sh", status=2)
    assert "HEAD is not set: with NODES=2 it" in bash(root, environment, "train-sit-xl.sh", status=2, NODES=2)
    for recipe in ((), ("scripts/train-sit-xl.sh",)):  # none named; not by sbatch
        said = bash(root, environment, "slurm.sh", *recipe, status=2)
        assert said == "expected sbatch and a recipe: sbatch scripts/slurm.sh scripts/train-gmem-xl.sh\n"
    assert "own-photos.sh FOLDER" in bash(root, environment, "own-photos.sh", status=2)


@pytest.mark.parametrize("name", ["demo.sh", "fashion-mnist.sh", "own-photos.sh"])
def test_a_flag_where_a_folder_is_expected_shows_the_head(root, name, tmp_path):
    """And makes no folder of that name."""
    words = ["bash", root / "scripts" / name, "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    head = (root / "scripts" / name).read_text().split("\nset ")[0].split("\n", 1)[1]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head.splitlines()]
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (2, "", [])


WRONG = ["train-gmem-xl SIZE=abc", "train-gmem-b BATCH=0", "train-sit-xl MICRO_BATCH=1e3", "encode-imagenet VIEWS=0"]
WRONG += ["encode-imagenet KEEP_IMAGES=false", "sample-sit-xl NPROC=all", "evaluate NODES=two", "own-photos STEPS=1e5"]
WRONG += ["own-photos RATE=0", "own-photos BATCH=08", "fashion-mnist K=1%"]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_variables_are_named(root, environment, wrong):
    script, variable = wrong.split()
    name, value = variable.split("=")
    environment = environment | {"IMAGENET": str(root / "assets"), "VIRTUAL_ENV": sys.prefix}
    said = bash(root, environment, f"{script}.sh", root / "assets", status=2, **{name: value})
    assert said.splitlines()[-1].startswith(f"{variable}: expected ")


def test_own_photos_stops_early_where_there_are_too_few(root, tmp_path):
    """Before the bank and the training, whose page at the end could not be made."""
    assert "is not there: expected a folder" in bash(root, os.environ, "own-photos.sh", tmp_path / "none", status=2)
    commands = programs(tmp_path / "bin", "/bin/sh", python='echo "$@" >>"$WORDS"')
    shell = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "NPROC": "1"}
    shell |= {"WORDS": str(tmp_path / "words"), "OUT": str(tmp_path)}
    for made in ("bank", "samples/30000-steps"):  # which evaluate.sh looks for
        (tmp_path / made).mkdir(parents=True)
    for images, held, status in ((9, 40, 2), (120, 3, 2), (120, 4, 0)):
        for name, rows in (("photos", images), ("photos-holdout", held)):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / "files.txt").write_text("a.jpg\n" * rows)
        said = bash(root, shell, "own-photos.sh", tmp_path, status=status)
        assert (f"{images} images, and {held} held out" in said) == (status == 2)
    words = (tmp_path / "words").read_text()
    assert "memory.build_bank" in words
    assert words.count("--k 12\n") == 1
    (tmp_path / "weights.pth").touch()
    subprocess.run(
        ["bash", root / "scripts" / "own-photos.sh", "."], cwd=tmp_path, env=shell | {"INIT": "weights.pth"}, check=True
    )
    assert f"--init {tmp_path}/weights.pth" in (tmp_path / "words").read_text()


def test_a_dry_run_tells_what_is_missing(root, environment, tmp_path):
    said = bash(root, environment, "train-gmem-b.sh", "--dry-run", status=1, STORE=tmp_path / "s", BANK=tmp_path / "b")
    assert "memory a process  2.8" in said
    assert f"--store: {tmp_path}/s does not exist" in said


@pytest.fixture(scope="module")
def site(tmp_path_factory, root, environment):
    """An ImageNet in small with everything the recipes need, through the killed and continued ones of the benchmark:
    40 JPEG files in class folders, a VAE and an encoder of reduced width, GMem's file; encoded, with bank and run."""
    work = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, value in environment.items():
            patch.setenv(name, value)
        bench.main(["--small", "--gpus", "1", "--work", str(work), "--out", str(work / "bench.json")])
    shutil.copytree(work / "weights" / "sd-vae-ft-mse", work / "weights" / "sd-vae-ft-ema")
    return work


@pytest.fixture(scope="module")
def recipe(root, site, environment):
    """Runs a recipe at tiny size."""
    sizes = {"SIZE": 64, "K": 8, "BATCH": 4, "STEPS": 2, "IMAGES": 5, "MODEL": "SiT-Ti/2"}
    places = {"IMAGENET": site / "imagenet", "GMEM_WEIGHTS": site / "weights", "STORE": site / "store"}
    places |= {"BANK": site / "bank", "ENCODER": "test_vit@64", "ENCODER_WEIGHTS": site / "weights/encoder.safetensors"}

    def run(script, *flags, **variables):
        return bash(root, environment, script, *flags, **{**sizes, **places, **variables})

    return run


def test_killed_recipes_continue(site):
    """The benchmark has compared losses and images; here, that it did."""
    result = json.loads((site / "bench.json").read_text())
    assert result["training steps repeated"]
    assert 0 < result["images kept of the killed run"] < 40
    assert result["largest relative difference of their losses"] < 1e-6
    assert result["largest pixel difference of the images"] <= 1
    assert [row["recipe"] for row in result["recipes"]][:3] == STAGES[:3]


def test_the_baselines_train(site, recipe):
    recipe("encode-imagenet.sh", "--workers", "0", VIEWS=2, KEEP_IMAGES="no", HOLDOUT=0.1, STORE=site / "flips")
    meta = json.loads((site / "flips" / "meta.json").read_text())
    assert (meta["num_views"], meta["num_classes"], meta["has_images"]) == (2, 4, False)
    recipe("train-sit-xl.sh", *SMALL_RUN, "--sample-every", 2, STORE=site / "flips", OUT=site / "sit")
    recipe("train-repa-xl.sh", *SMALL_RUN, "--model-options", "align_depth=2", OUT=site / "repa")
    recipe("train-gmem-b.sh", *SMALL_RUN, OUT=site / "b", ALIGN=0)
    for name, condition, heads in (("sit", "label", 0), ("repa", "label", 1), ("b", "snippet", 0)):
        checkpoint = torch.load(site / name / "checkpoints" / "0000002.pt", weights_only=True)
        assert checkpoint["model_config"]["condition"] == condition
        assert len(checkpoint["model_config"]["align_dims"]) == heads
    assert (site / "sit" / "samples" / "0000002.png").is_file()


def published(path, out_channels):
    """SiT's and REPA's published state dicts, for labels, with random weights."""
    torch.manual_seed(1)
    model = SiT_models["SiT-Ti/2"](input_size=8, condition="label", num_classes=4)
    state = {name: torch.randn_like(tensor) * 0.02 + tensor for name, tensor in model.state_dict().items()}
    if out_channels == 8:  # velocity and variance
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = torch.cat([state[name].unflatten(0, (4, 4))] * 2, 1).flatten(0, 1)
    torch.save(state, path)


def test_published_weights_sample(site, recipe):
    published(site / "weights" / "SiT-XL-2-256x256.pt", 8)
    published(site / "weights" / "REPA-SiT-XL-2-256x256.pt", 4)
    runs = {
        "ode": ("sample-gmem-xl-ode.sh", {}, {"sampler": "euler", "steps": 3, "guidance": None}),
        "sit": ("sample-sit-xl.sh", {"GUIDANCE": 1.5}, {"sampler": "sde", "uint8": "round"}),
        "repa": ("sample-repa-xl.sh", {"GUIDANCE": 1.8}, {"sampler": "sde", "uint8": "truncate"}),
    }
    for name, (script, variables, expected) in runs.items():
        out = site / "samples-of" / name
        recipe(script, "--steps", "3", OUT=out, **variables)
        settings = json.loads((out / "samples.json").read_text())["settings"]
        assert {key: settings[key] for key in expected} == expected
        assert np.load(out / "samples.npz")["arr_0"].shape == (5, 64, 64, 3)
    guided = json.loads((site / "samples-of" / "repa" / "samples.json").read_text())["settings"]["guidance"]
    assert guided == {"by": "null", "scale": 1.8, "interval": [0.0, 0.7], "channels": None}


def test_a_runs_curve(root, site, environment):
    """What scripts/evaluate.sh makes of a run of these recipes."""
    network = ["--encoder", "test_vit@64", "--encoder-weights", site / "weights" / "encoder.safetensors"]
    few = {"IMAGES": 6, "STEPS": 2, "GMEM_WEIGHTS": site / "weights"}
    bash(root, environment, "evaluate.sh", site / "run", "--quick", *network, **few)
    assert list((site / "run" / "quick").glob("*.json"))


def test_a_job_array_shares_the_checkpoints(root, tmp_path):
    steps = [f"{5000 * i:07d}" for i in range(1, 25)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").touch()
    for step in steps:
        (tmp_path / "checkpoints" / f"{step}.pt").touch()
        (tmp_path / "checkpoints" / f"{step}-ema.pt").touch()  # its result is the same
    commands = programs(tmp_path / "bin", "/bin/sh", python='[ "$1" = -c ] || echo "$@" >>"$WORDS"')
    shell = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "NPROC": "1", "REF": "r.npz", "KEEP": "1"}

    def taken(name, **variables):
        words = tmp_path / name
        bash(root, shell, "evaluate.sh", tmp_path, "--quick", WORDS=words, **variables)
        return set(re.findall(r"sample_ddp.py --checkpoint \S+/(\d+)", words.read_text()))

    array = {"SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_MIN": 1}
    parts = [taken(f"words {task}", SLURM_ARRAY_TASK_ID=task, **array) for task in (1, 2, 3)]
    assert sorted(step for part in parts for step in part) == steps
    assert all(parts)
    assert sorted(taken("words")) == steps


@pytest.fixture(scope="module")
def photos(tmp_path_factory, root):
    """Sixty real images as folders of PNG files, and an encoder of reduced width."""
    folder = tmp_path_factory.mktemp("photos")
    source = open_source(root / "assets" / "fashion-mnist")
    for i in range(60):
        path = folder / "photos of clothes" / f"{source.labels[i]}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).save(path)
    (folder / "photos of clothes" / "9" / "broken.png").write_bytes(b"")
    make_encoder(folder / "encoder.safetensors", "test_vit")
    return folder


def test_own_photos(root, photos, site, environment):
    sizes = {"STEPS": 2, "BATCH": 4, "SIZE": 32, "HOLDOUT": 0.2, "IMAGES": 6, "EVALUATIONS": 4}
    networks = {"CODEC": "assets/fashion-mnist-vae", "ENCODER": "test_vit@32", "AUDIT": "efficientnet-lite0@64"}
    networks |= {"ENCODER_WEIGHTS": photos / "encoder.safetensors", "MODEL": "SiT-B/2"}
    networks["INIT"] = site / "run" / "checkpoints"  # of a SiT-Ti/2, which the network then is
    out, flags = photos / "all of it", ["--workers", "0", "--sample-every", "0", "--lr", "1e-3"]
    source = photos / "photos of clothes"
    said = bash(root, environment, "own-photos.sh", source, *flags, OUT=out, **sizes, **networks)
    parts = [
        "0.0 hours at 200 images/s",
        "memory a process",
        "61 images, 10 classes",
        "cannot read 9/broken.png",
        "--init",
        "near copies",
        "look at",
    ]
    assert sorted(parts, key=said.index) == parts
    meta = json.loads((out / "data" / "photos" / "meta.json").read_text())
    bank = json.loads((out / "bank" / "bank.json").read_text())
    assert meta["num_views"] == 2
    assert bank["k"] == meta["num_images"] // 10
    assert bank["auc_train_vs_holdout"] is not None
    args = json.loads((out / "run" / "config.json").read_text())["args"]
    assert (args["lr"], args["model"], args["holdout"]) == (1e-3, "SiT-Ti/2", str(out / "data" / "photos-holdout"))
    assert len(list((out / "samples" / "2-steps").glob("0*.png"))) == 6
    assert Image.open(out / "samples" / "2-steps" / "preview.png").width > 6 * 32
    page = out / "evaluation" / "2-steps"
    assert "held-out images" in (page / "card.md").read_text()
    copies = json.loads((page / "copies.json").read_text())
    assert not any(space["same_family_as_snippets"] for space in copies["spaces"].values())
    assert copies["spaces"].keys() == {"efficientnet-lite0@64", "latent"}


def test_fashion_mnist_and_its_asset(root, environment, tmp_path):
    """The recipe of the shipped model at tiny size, and what make_assets packs from it."""
    source, out, judge = tmp_path / "images", tmp_path / "out", tmp_path / "judge.safetensors"
    shipped = str(root / "assets" / "fashion-mnist")
    make_assets.main(["images", "--source", shipped, "--out", str(source), "--train", "200", "--test", "1"])
    make_encoder(judge, "regnetx_002")
    sizes = {"STEPS": 4, "BATCH": 5, "K": 8, "IMAGES": 8, "EVALUATIONS": 3, "OUT": out, "METRIC": judge, "SCALE": 3}
    bash(root, environment, "fashion-mnist.sh", source, *SMALL_RUN, **sizes)
    log = out / "run" / "log.jsonl"
    log.write_text(re.sub(r'("images_per_second": )[\d.]+', r"\g<1>0.5", log.read_text()))
    make_assets.main(["model", "--source", str(out), "--out", str(tmp_path / "asset")])
    assert {path.name for path in (tmp_path / "asset").iterdir()} == {"model.safetensors", "README.md", "report.json"}
    written = [(tmp_path / "asset" / name).read_text() for name in ("README.md", "report.json")]
    report = json.loads(written[1])
    assert str(tmp_path) not in written[0] + written[1]
    assert (report["training"]["steps"], report["bank"]["k"], report["sampling"]["evaluations"]) == (4, 8, 3)
    assert report["training"]["seconds"] == 4 * 5 / 0.5
    assert json.loads((out / "bank" / "bank.json").read_text())["iterations"] == 20  # as the shipped model's bank
    assert "snippet_scale=3" in report["training"]["model_options"]
    given = {"CODEC": "pixels", "MODEL": "SiT-Ti/4", "SCALE": "3", "STEPS": "4", "BATCH": "5", "LR": "0.001", "K": "8"}
    assert report["training"]["variables"] == given
    assert report["training"]["flags"] == [*SMALL_RUN]
    line = " ".join(f"{name}={value}" for name, value in given.items()) + " bash scripts/fashion-mnist.sh FOLDER "
    assert f"`{line}{shlex.join(SMALL_RUN)}`, by code" in written[0]
    other = shutil.copytree(out, tmp_path / "other")
    rows = json.loads((other / "controls.json").read_text())
    rows["rows"]["samples"]["metrics"]["held-out"]["FD-regnetx_002@64"] = 123.0
    (other / "controls.json").write_text(json.dumps(rows))
    config = json.loads((other / "run" / "config.json").read_text())
    config["args"]["steps"] = 9  # of a longer run that was cut off after the export
    config["codec"]["name"] = str(tmp_path / "codecs" / "mine")
    config["args"]["model_options"] = ["align_depth=3"]  # by a flag, in the place of the recipe's own
    config["runs"][-1]["command"] += ["--init", "two words"]
    (other / "run" / "config.json").write_text(json.dumps(config))
    make_assets.main(["candidates", "--source", str(out), str(other), "--out", str(tmp_path / "asset")])
    candidate, second = json.loads((tmp_path / "asset" / "candidates.json").read_text())
    assert second["scores"]["samples"] == candidate["scores"]["samples"] | {"FD-regnetx_002@64": 123.0}
    assert second["training"]["steps"] == 4  # of the network that was exported and scored
    assert second["training"]["variables"] == given | {"CODEC": "mine", "SCALE": "1"}
    make_assets.main(["model", "--source", str(other), "--out", str(tmp_path / "of another")])
    card = (tmp_path / "of another" / "README.md").read_text()
    assert f"FOLDER {shlex.join(SMALL_RUN)} --init 'two words'`" in card
    assert "(latent: the codec's latents that" in card
    assert "(latent: the pixels that" in written[0]
    titles = ("samples", "random training images")
    figures = ("near_copies", "near_copies_held_out", "excess", "standard_error")
    assert candidate == {
        **{name: report[name] for name in ("training", "sampling", "judge")},
        "sha256": report["file"]["sha256"],
        "scores": {title: report["rows"][title]["metrics"]["held-out"] for title in titles},
        "spaces": {name: {key: space[key] for key in figures} for name, space in report["spaces"].items()},
    }
    assert str(tmp_path) not in json.dumps([candidate, second])
    assert set(report["spaces"]) == {"regnetx_002@64", "latent"}
    assert "suspicious" not in report["spaces"]["latent"]  # pairs of files, of no use to others
    score = report["rows"]["samples"]["metrics"]["held-out"]["FD-regnetx_002@64"]
    for fact in (f"{score:.4g}", "4 steps of 5 images", "Bank of 8 snippets", "MIT"):
        assert fact in written[0]
    _, config, bank = load_model(tmp_path / "asset")
    assert (config["steps"], len(bank)) == (4, 8)
    assert "fashion-mnist.sh FOLDER" in bash(root, environment, "fashion-mnist.sh", status=2)
    (out / "export" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="its samples are of another network than its export"):
        make_assets.main(["model", "--source", str(out), "--out", str(tmp_path / "asset")])
    for command in ("model", "candidates"):
        with pytest.raises(ValueError, match=r"no export/model\.safetensors; run `bash scripts/fashion-mnist\.sh`"):
            make_assets.main([command, "--source", str(tmp_path)])


def test_the_shipped_model_is_of_the_default_recipe(root):
    """The variables in the head and in the lines of scripts/fashion-mnist.sh, and its judge, are those of the asset."""
    report = json.loads((root / "assets" / "gmem-fashion-mnist" / "report.json").read_text())
    head, lines = (root / "scripts" / "fashion-mnist.sh").read_text().split("\nset -euo pipefail\n")
    of_lines = dict(re.findall(r"\$\{([A-Z]+):-([^}]*)\}", lines))
    assert sha256(root / of_lines["METRIC"]) == report["judge"]["sha256"]
    for defaults in (of_lines, dict(re.findall(r"\b([A-Z]+)=(\S+)", head))):
        defaults["LR"] = f"{float(defaults['LR']):g}"
        assert {name: defaults[name] for name in report["training"]["variables"]} == report["training"]["variables"]
        samples = {"IMAGES": report["rows"]["samples"]["num_images"], "SAMPLER": report["sampling"]["sampler"]}
        samples |= {"EVALUATIONS": report["sampling"]["evaluations"]}
        assert {name: defaults[name] for name in samples} == {name: str(value) for name, value in samples.items()}
    (options,) = re.findall(r"--model-options (.*?) --", lines)
    assert options.replace('"', "").replace("${SCALE:-1}", "1").split() == report["training"]["model_options"]
    assert f"--ema-decay {report['training']['ema_decay']} " in lines
    (share,) = re.findall(r"--holdout ([\d.]+) ", lines)
    assert report["training"]["images_trained_on"] == pytest.approx(60_000 * (1 - float(share)), rel=0.01)
    score = report["rows"]["samples"]["metrics"]["held-out"]["FD-regnetx_002@64"]
    assert f"FD to held-out images is {score:.2f};" in head


def test_a_limited_python_notes_what_a_command_took(root, tmp_path):
    (tmp_path / "leave.py").write_text("import sys\nprint(sys.argv, __name__)\nsys.exit(3)\n")
    words = [sys.executable, root / "benchmarks" / "limited.py", "22", tmp_path / "notes"]

    def run(*more):
        return subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True)

    done = run("leave.py", "--flag")
    assert (done.returncode, done.stdout) == (3, "['leave.py', '--flag'] __main__\n"), done.stderr
    assert run("-c", "print(1)").stdout == "1\n"
    assert run("-m", "pip", "nonsense").returncode == 0
    (note,) = (tmp_path / "notes").read_text().splitlines()
    assert json.loads(note)["command"] == "leave.py"


# Stand-ins of SLURM's commands. A job's tasks are noted in $SPOOL, as are the requests to queue it again. As on some
# clusters, scancel signals every process of a step; srun ends the other tasks when one fails.
SLURM = {
    "srun": """
        [ "$1" = --kill-on-bad-exit=1 ] || exit 99
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
            SLURM_NODEID=$node "$@" &
            echo $! >>"$SPOOL/tasks"
        done
        worst=0
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
            wait -n || { worst=$?; kill -KILL $(cat "$SPOOL/tasks"); }
        done
        exit $worst
    """,
    "scancel": """
        [ "$*" = "--signal=USR1 $SLURM_JOB_ID" ] || exit 99
        tree() { for child in $(pgrep -P $1); do tree $child; done; kill -USR1 $1; }
        for task in $(cat "$SPOOL/tasks"); do tree $task; done
        exit 1 # as where a task has just ended
    """,
    "scontrol": """
        case "$1" in
            show)
                for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
                    echo localhost || exit
                    sleep 0.1
                done
                ;;
            requeue) echo "$2" >>"$SPOOL/requeued" ;;
        esac
    """,
}
# A command that works until it is told to stop and then takes a while, longer on the second node; it notes each signal.
# Or one that finishes, fails or does not listen.
WORK = """
import os, pathlib, signal, sys, time
spool, how, node = pathlib.Path(os.environ["SPOOL"]), os.environ["HOW"], int(os.environ.get("SLURM_NODEID", 0))
with open(spool / "commands", "a") as file:
    file.write(f"{sys.argv[1]}\\n")
stopping = []
def stop(number, frame):
    with open(spool / "signals", "a") as file:
        file.write(f"{signal.Signals(number).name} {node}\\n")
    stopping.append(number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if how in ("finish", "fail"):
    sys.exit(3 * (how == "fail"))
(spool / f"working {node}").touch()
while not stopping or how == "stubborn":
    time.sleep(0.02)
time.sleep(0.2 + node)
(spool / f"saved {node}").touch()
"""


def programs(folder, shell, **scripts):
    """Executable scripts in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!{shell}\n{text}")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def slurm(tmp_path, root, environment):
    """Submits a recipe with these variables as sbatch would, from a copy of the script in a spool folder."""
    commands = programs(tmp_path / "bin", "/bin/bash", **SLURM)
    jobs = []

    def submit(*words, nodes=1, **variables):
        spool = tmp_path / f"spool-{len(jobs)}"
        spool.mkdir()
        shutil.copy(root / "scripts" / "slurm.sh", spool / "slurm_script")
        job = {"SLURM_SUBMIT_DIR": root, "SLURM_JOB_ID": 4242, "SLURM_JOB_NUM_NODES": nodes, "SPOOL": spool}
        job |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": 2}
        job |= {"PATH": f"{commands}:{environment['PATH']}", **variables}
        job = {**environment, **{name: str(value) for name, value in job.items()}}
        with open(spool / "log", "wb") as log:
            words = ["bash", spool / "slurm_script", *map(str, words)]
            jobs.append(subprocess.Popen(words, env=job, cwd=tmp_path, stdout=log, stderr=log))
        return jobs[-1], spool

    yield submit
    for job in jobs:
        left = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
        for process in (job, *left):  # of a test that failed
            process.kill()


def wait_for(condition, seconds=120):
    """Return when a condition holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def worker(tmp_path, environment):
    """Variables of a shell whose `python` is the command above."""
    folder = programs(tmp_path / "worker", f"{sys.executable} -IS", python=WORK)
    return {"PATH": f"{tmp_path / 'bin'}:{folder}:{environment['PATH']}", "NPROC": "1"}


@pytest.mark.parametrize(("how", "status"), [("finish", 0), ("fail", 3)])
def test_a_job_that_ends_is_not_queued_again(tmp_path, environment, slurm, how, status):
    job, spool = slurm("scripts/train-gmem-b.sh", HOW=how, **worker(tmp_path, environment))
    assert job.wait(30) == status, (spool / "log").read_text()
    assert not (spool / "requeued").exists()


@pytest.mark.parametrize(("how", "nodes"), [("listens", 1), ("listens", 2), ("stubborn", 1)])
def test_the_time_limit_saves_and_queues_again(tmp_path, environment, slurm, how, nodes):
    variables = {"HOW": how, "PATIENCE": 1 if how == "stubborn" else 30, **worker(tmp_path, environment)}
    job, spool = slurm("scripts/train-gmem-b.sh", nodes=nodes, **variables)
    wait_for(lambda: job.poll() is not None or len(list(spool.glob("working *"))) == nodes)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0, (spool / "log").read_text()
    assert (spool / "requeued").read_text() == "4242\n"
    signals = (spool / "signals").read_text().splitlines()
    assert sorted(signals) == [f"SIGTERM {node}" for node in range(nodes)]
    assert len(list(spool.glob("saved *"))) == (0 if how == "stubborn" else nodes)
    for task in (spool / "tasks").read_text().split():
        subprocess.run(["pkill", "-KILL", "-P", task], check=False)  # of the stubborn one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_recipe_once(tmp_path, root, environment, number):
    """Ctrl-C goes to a terminal's whole process group; the worker must get one signal all the same."""
    shell = {**environment, **worker(tmp_path, environment), "SPOOL": str(tmp_path), "HOW": "listens"}
    terminal = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # jobs in the background ignore it
    command = ["bash", "scripts/train-gmem-b.sh"]
    recipe = subprocess.Popen(command, cwd=root, env=shell, start_new_session=True, **terminal)
    wait_for((tmp_path / "working 0").exists)
    os.killpg(recipe.pid, number)
    assert recipe.wait(30) == 143
    assert (tmp_path / "signals").read_text() == "SIGTERM 0\n"
    assert (tmp_path / "saved 0").exists()


def test_a_signal_between_two_commands_stops_too(tmp_path, root, environment):
    shell = {**environment, **worker(tmp_path, environment), "SPOOL": str(tmp_path), "HOW": "finish"}
    recipe = "source scripts/launch.sh; launch one.py; kill -TERM $$; launch two.py; echo three"
    done = subprocess.run(["bash", "-c", recipe], cwd=root, env=shell, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")
    assert (tmp_path / "commands").read_text() == "one.py\n"


def test_two_nodes_train_until_the_time_limit_and_continue(site, slurm):
    """torchrun on two machines, both this one: saved by the signal at a step where nothing is saved otherwise."""
    out = site / "nodes"
    places = {"STORE": site / "store", "BANK": site / "bank", "OUT": out, "GMEM_WEIGHTS": site / "weights"}
    places |= {"SIZE": 64, "BATCH": 4, "MODEL": "SiT-Ti/2", "ALIGN": 0}
    places["NODE"] = 7  # a stray variable of the shell that submits
    flags = ["scripts/train-gmem-xl.sh", "--log-every", 1, "--eval-every", 0, "--sample-every", 0, "--workers", 0]
    job, spool = slurm(*flags, nodes=2, STEPS=1_000_000, **places)
    wait_for(lambda: job.poll() is not None or len(bench.losses(out)) > 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, (spool / "log").read_text()
    assert (spool / "requeued").exists()
    assert "stopped by a signal" in (spool / "log").read_text()
    assert "closing signal" not in (spool / "log").read_text()  # torchrun's own, which kills after 30 seconds
    (saved,) = (out / "checkpoints").glob("*.pt")
    step = int(saved.stem)
    assert step == max(bench.losses(out)) < 5_000

    job, spool = slurm(*flags, STEPS=step + 2, **places)
    assert job.wait(120) == 0, (spool / "log").read_text()
    assert not (spool / "requeued").exists()
    assert f"continuing from {saved}" in (spool / "log").read_text()
    assert list(bench.losses(out)) == list(range(1, step + 3))
