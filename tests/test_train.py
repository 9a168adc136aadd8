"""Training: the data of a step, resume, process counts, signals, and commands that must not start."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
from dataset import LatentDataset
from memory.bank import MemoryBank
from memory.files import write_json
from models.checkpoint import load_model

IMAGES, VIEWS, CLUSTERS, DIM = 40, 2, 8, 12


def write_store(path, pixels=False, seed=0, images=IMAGES):
    """A complete store of random moments (4×8×8 latents of a VAE, or 1×8×8 pixels), features and labels."""
    random = np.random.default_rng(seed)
    shape = [1, 8, 8] if pixels else [4, 8, 8]
    moments_shape = shape if pixels else [8, 8, 8]
    if pixels:
        moments = random.integers(0, 256, (images, VIEWS, *moments_shape), dtype=np.uint8)
    else:
        moments = random.random((images, VIEWS, *moments_shape)).astype(np.float16)
    (path / "features").mkdir(parents=True)
    np.save(path / "latents.npy", moments)
    np.save(path / "features" / "toy.npy", random.normal(size=(images, VIEWS, DIM)).astype(np.float16))
    np.save(path / "labels.npy", np.arange(images) % 3)
    (path / "files.txt").write_text("".join(f"{i:08d}\n" for i in range(images)))
    codec = {
        "name": "pixels" if pixels else "toy-vae",
        "scale": 1 / 127.5 if pixels else 0.5,
        "shift": 127.5 if pixels else 0.0,
        "latent_shape": shape,
        "moments_shape": moments_shape,
        "dtype": "uint8" if pixels else "float16",
        "image_channels": 1,
        "sha256": None,
    }
    meta = {
        "format": 1,
        "num_images": images,
        "num_views": VIEWS,
        "views": ["original", "mirrored"],
        "image_size": 8,
        "image_channels": 1,
        "codec": codec,
        "encoders": {"toy": {"name": "toy", "dim": DIM}},
        "patches": {},
        "has_images": False,
        "num_classes": 3,
        "class_names": None,
        "fingerprint": f"{seed}-{pixels}-{images}",
        "complete": True,
    }
    write_json(path / "meta.json", meta)
    return path


def write_bank(path, store):
    """A bank of random snippets with the assignment of the store's features."""
    data = LatentDataset(store, encoder="toy")
    snippets = torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(0))
    bank = MemoryBank(snippets, [1] * CLUSTERS)
    assignment = train.assign(bank, data).int()
    meta = {"encoder": "toy", "store_fingerprint": data.meta["fingerprint"]}
    MemoryBank(snippets, [1] * CLUSTERS, assignment, meta).save(path / "bank.pth")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_bank(folder / "bank", write_store(folder / "store"))
    write_store(folder / "store-holdout", seed=1, images=24)
    return folder


def command(folder, out, *more):
    """A small run's command line."""
    paths = ["--store", folder / "store", "--bank", folder / "bank", "--out", out]
    sizes = ["--model", "SiT-Ti/2", "--batch-size", 8, "--lr", 1e-3, "--ema-decay", 0.9]
    every = ["--log-every", 2, "--save-every", 3, "--eval-every", 2, "--sample-every", 0, "--workers", 0]
    return [str(word) for word in (*paths, *sizes, *every, *more)]


def final(out):
    return torch.load(train.Path(out) / "checkpoints" / "0000006.pt", weights_only=True)


def log(out):
    """The log without its timing fields."""
    lines = [json.loads(line) for line in (train.Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "images_per_second")} for line in lines]


def assert_same(a, b):
    """Two nested structures of tensors and plain values are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(folder):
    """A run of six steps without interruption."""
    train.main(command(folder, folder / "whole", "--steps", 6))
    return folder / "whole"


def test_six_steps_equal_three_and_three(folder, whole):
    train.main(command(folder, folder / "halves", "--steps", 3))
    train.main(command(folder, folder / "halves", "--steps", 6))
    one, two = final(whole), final(folder / "halves")
    for part in ("model", "ema", "opt", "steps", "sums", "model_config", "codec", "bank"):
        assert_same(one[part], two[part])
    assert log(whole) == log(folder / "halves")
    assert [line["step"] for line in log(whole)] == [2, 2, 4, 4, 6, 6]


def test_a_killed_run_repeats_its_lost_steps(folder, whole):
    train.main(command(folder, folder / "killed", "--steps", 5))
    out = folder / "killed"
    (out / "checkpoints" / "0000005.pt").unlink()  # as if killed after the line of step 4, before a checkpoint
    train.main(command(folder, out, "--steps", 6))
    assert_same(final(whole)["ema"], final(out)["ema"])
    assert log(whole) == log(out)


def test_accumulation_sees_the_same_data_and_noise(folder, whole):
    plain = ("--model-options", "snippet_dropout=0")
    train.main(command(folder, folder / "at-once", "--steps", 6, *plain))
    train.main(command(folder, folder / "by-two", "--steps", 6, "--micro-batch", 2, *plain))
    one, two = log(folder / "at-once"), log(folder / "by-two")
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "holdout_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert one != log(whole), "dropout must matter"


def test_two_processes_train_like_one(folder):
    plain = ("--model-options", "snippet_dropout=0", "--steps", 6)
    train.main(command(folder, folder / "alone", *plain))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = command(folder, folder / "pair", *plain)
    subprocess.run([*launch, "train.py", *words], check=True, env=environment, cwd=train.Path(train.__file__).parent)
    for a, b in zip(log(folder / "alone"), log(folder / "pair"), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "holdout_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    one, two = final(folder / "alone")["ema"], final(folder / "pair")["ema"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_a_signal_saves_the_running_step(folder, whole):
    out = folder / "stopped"
    words = command(folder, out, "--steps", 10_000, "--save-every", 10_000)
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=train.Path(train.__file__).parent)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    (saved,) = (out / "checkpoints").glob("*.pt")
    assert torch.load(saved, weights_only=True)["steps"] == int(saved.stem) < 10_000
    assert not list(out.rglob("*.tmp*"))


def test_a_rerun_with_another_result_stops_and_says_why(folder, whole):
    with pytest.raises(ValueError, match=r"lr: the run has 0.001, this command 0.002"):
        train.main([*command(folder, whole, "--steps", 8), "--lr", "0.002"])
    other = write_store(folder / "other-store", seed=5)
    with pytest.raises(ValueError, match=r"store: the run has 0-False-40, this command 5-False-40"):
        train.main(
            [*command(folder, whole, "--steps", 8), "--store", str(other), "--holdout", str(folder / "store-holdout")]
        )


def test_a_finished_run_is_left_alone(folder, whole, capsys):
    before = (whole / "log.jsonl").read_bytes()
    train.main(command(folder, whole, "--steps", 6))
    assert "at step 6 already" in capsys.readouterr().out
    assert (whole / "log.jsonl").read_bytes() == before


def test_old_checkpoints_go_and_snapshots_stay(folder):
    out = folder / "kept"
    train.main(command(folder, out, "--steps", 6, "--save-every", 1, "--keep", 2, "--snapshot-every", 2))
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["0000002-ema.pt", "0000004-ema.pt", "0000005.pt", "0000006-ema.pt", "0000006.pt"]
    model, config, bank = load_model(out)
    assert config["steps"] == 6
    assert len(bank) == CLUSTERS
    snapshot, _, _ = load_model(out / "checkpoints" / "0000006-ema.pt")
    assert_same(dict(model.state_dict()), dict(snapshot.state_dict()))
    with pytest.raises(ValueError, match="use --weights ema"):
        load_model(out / "checkpoints" / "0000002-ema.pt", weights="model")


@pytest.mark.parametrize("condition", ["label", "label+snippet", "none", "snippet"])
def test_every_condition_trains_and_draws_a_grid(folder, condition, monkeypatch):
    monkeypatch.setattr(train, "GRID_STEPS", 2)
    store = folder / "pixels"
    if not store.exists():
        write_bank(folder / "pixel-bank", write_store(store, pixels=True))
    words = command(folder, folder / f"grid-{condition}", "--steps", 2, "--sample-every", 2, "--condition", condition)
    words += ["--store", str(store), "--model-options", "null_dropout=0.5", "snippet_scale=2"]
    if condition == "snippet":
        words += ["--snippet-from", "own"]
    words[2:4] = ["--bank", str(folder / "pixel-bank")] if "snippet" in condition else []
    train.main(words)
    (grid,) = (folder / f"grid-{condition}" / "samples").iterdir()
    assert Image.open(grid).size == (64, 64)  # 8 × 8 images of 8 × 8 pixels


def test_init_takes_what_fits_and_lists_the_rest(folder, whole, capsys):
    words = command(folder, folder / "init", "--steps", 1, "--condition", "label", "--init", whole)
    words[2:4] = []
    train.main(words)
    assert "condition_projection.linear.weight" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(folder):
    out = folder / "nan"
    words = command(folder, out, "--steps", 6, "--save-every", 1, "--log-every", 1)
    with pytest.raises(
        FloatingPointError, match=r"step 1 is not finite \(rows .* last good checkpoint is .*0000001.pt"
    ):
        train.main([*words, "--lr", "1e30"])  # the first step's gradient is sound, its update is not
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000001.pt"]
    assert [line["step"] for line in log(out)] == [1]


def test_dry_run_says_everything_and_writes_nothing(folder, capsys):
    train.main([*command(folder, folder / "dry"), "--dry-run", "--model", "SiT-S/2"])
    printed = capsys.readouterr().out
    for word in ("parameters", "memory", "disk", "snippet_dim", "fingerprint"):
        assert word in printed
    assert not (folder / "dry").exists()
    with pytest.raises(SystemExit, match=r"(?s)missing:.*--store: .*nowhere"):
        train.main([*command(folder, folder / "dry"), "--dry-run", "--store", str(folder / "nowhere")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "nowhere"], "--store: nowhere/meta.json does not exist"),
        (["--batch-size", "9", "--micro-batch", "2"], "does not divide"),
        (["--align-coeff", "0.5"], "needs patch tokens"),
        (["--encoder", "other"], "made by encoder toy"),
        (["--model-options", "depth=3"], "expected NAME=VALUE"),
        (["--init", "nowhere.pt"], "--init: nowhere.pt does not exist"),
    ],
)
def test_commands_that_cannot_work_stop_before_they_start(folder, words, message):
    with pytest.raises(ValueError, match=message):
        train.main([*command(folder, folder / "never"), *words])
    assert not (folder / "never").exists()
