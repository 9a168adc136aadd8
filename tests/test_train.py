"""Training: the data of a step, resume, process counts, signals, and commands that must not start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sample_ddp
import train
from benchmarks import chaos
from dataset import LatentDataset, rows_of_step, views_of_step
from loss import Draws
from memory import pairs, resident
from memory.bank import MemoryBank
from memory.files import read_json, write_json
from memory.resident import ResidentDataset
from memory.run_folder import RunFolder
from models import replay, sit
from models.checkpoint import load_model

ROOT = train.Path(train.__file__).parent
IMAGES, VIEWS, CLUSTERS, DIM = 40, 2, 8, 12
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


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
    assignment = bank.assign(data.features)
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


def test_a_condition_of_ones_own_trains_and_samples(tmp_path, monkeypatch):
    """By a class alone, whatever its name: what it reads says what it is given, in training and in sampling."""

    class Quiet(sit.LabelSnippetCondition):
        def forward(self, cond, uniforms):
            labels, snippets = cond
            assert (labels.dtype, labels.shape, snippets.shape[1]) == (torch.long, snippets.shape[:1], DIM)
            return 0.5 * super().forward(cond, uniforms)

    monkeypatch.setitem(sit.conditions, "quiet", Quiet)
    write_bank(tmp_path / "bank", write_store(tmp_path / "store", pixels=True))
    train.main(command(tmp_path, tmp_path / "run", "--steps", 1, "--condition", "quiet", "--eval-every", 0))
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "samples", "--num-images", 4, "--steps", 2]
    sample_ddp.main([*map(str, words), "--labels", "balanced", "--snippets", "random", "--format", "npz"])
    assert read_json(tmp_path / "samples" / "samples.json")["settings"]["condition"] == "quiet"


def test_six_steps_equal_three_and_three(folder, whole):
    train.main(command(folder, folder / "halves", "--steps", 3))
    train.main(command(folder, folder / "halves", "--steps", 6))
    one, two = final(whole), final(folder / "halves")
    for part in ("model", "ema", "opt", "steps", "sums", "model_config", "codec", "bank"):
        assert_same(one[part], two[part])
    assert log(whole) == log(folder / "halves")
    assert [line["step"] for line in log(whole)] == [2, 2, 4, 4, 6, 6]
    runs = json.loads((folder / "halves" / "config.json").read_text())["runs"]
    assert [(part["from_step"], part["processes"]) for part in runs] == [(0, 1), (3, 1)]
    assert [part["command"][part["command"].index("--steps") + 1] for part in runs] == ["3", "6"]
    assert all(part["code"] and part["versions"] and part["device"] for part in runs)


def test_a_run_and_its_continuation_begin_by_saying_what_they_train(folder, capsys):
    """As --dry-run says it, of the run as a whole."""
    batch = "8 = 1 processes × 4 micro-batches × 2 images"
    told = f"images 24, that is 0.6 epochs of the store's {IMAGES}; batch {batch}\n"
    for steps in (2, 3):
        words = command(folder, folder / "told", "--steps", steps, "--save-every", 2, "--micro-batch", 2)
        if steps == 3:
            train.main([*words, "--dry-run"])
            assert f"\nbatch             {batch}\n" in capsys.readouterr().out
        train.main(words)
        said = capsys.readouterr().out
        assert re.search(rf"^(continuing.*\n)?parameters [\d,]+; images {8 * steps}, that is ", said)
    assert told in said


def test_a_killed_run_repeats_its_lost_steps(folder, whole):
    train.main(command(folder, folder / "killed", "--steps", 5))
    out = folder / "killed"
    (out / "checkpoints" / "0000005.pt").unlink()  # as if killed after the line of step 4, before a checkpoint
    config = json.loads((out / "config.json").read_text())
    config["runs"].append(config["runs"][0] | {"from_step": 5})  # and went on from what is lost
    (out / "config.json").write_text(json.dumps(config))
    train.main(command(folder, out, "--steps", 6))
    assert_same(final(whole)["ema"], final(out)["ema"])
    assert log(whole) == log(out)
    for _ in range(2):  # the second time nothing is left to do
        assert [part["from_step"] for part in json.loads((out / "config.json").read_text())["runs"]] == [0, 3]
        train.main(command(folder, out, "--steps", 6))


def test_every_process_continues_from_the_checkpoint_that_the_main_one_sees(folder, whole, monkeypatch, capsys):
    """Between the checks and the claim the command before may have saved once more: processes must not differ."""
    out = folder / "seen"
    shutil.copytree(whole, out)
    monkeypatch.setattr(train, "broadcast_object_list", lambda paths: [out / "checkpoints" / "0000003.pt"])
    train.main(command(folder, out, "--steps", 6))
    assert "0000003.pt at step 3" in capsys.readouterr().out
    assert_same(final(whole)["ema"], final(out)["ema"])


def test_accumulation_sees_the_same_data_and_noise(folder, whole):
    plain = ("--model-options", "snippet_dropout=0")
    train.main(command(folder, folder / "at-once", "--steps", 6, *plain))
    train.main(command(folder, folder / "by-two", "--steps", 6, "--micro-batch", 2, *plain))
    one, two = log(folder / "at-once"), log(folder / "by-two")
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "holdout_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert one != log(whole), "dropout must matter"


@pytest.mark.parametrize("alone", [0, 3])
def test_two_processes_train_like_one(folder, environment, alone):
    """From the start, and in continuing what one process began."""
    plain = ("--model-options", "snippet_dropout=0")
    one, two = folder / f"one-process-{alone}", folder / f"two-processes-{alone}"
    train.main(command(folder, one, *plain, "--steps", 6))
    if alone:
        train.main(command(folder, two, *plain, "--steps", alone))
    words = command(folder, two, *plain, "--steps", 6)
    subprocess.run(["python", *TORCHRUN, "train.py", *words], check=True, cwd=ROOT, env=environment)
    for a, b in zip(log(one), log(two), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "holdout_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    one, two = final(one)["ema"], final(two)["ema"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def start(folder, out, launch, *more):
    """A real run in a process group of its own, at a moment when it has trained and is not about to save."""
    words = command(folder, out, "--steps", 10_000, "--save-every", 10_000, *more)
    process = subprocess.Popen(
        [sys.executable, *launch, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.parametrize(("launch", "number"), [([], signal.SIGTERM), ([], signal.SIGINT), (TORCHRUN, signal.SIGTERM)])
def test_a_signal_to_the_whole_group_saves_the_running_step(folder, launch, number):
    """As schedulers, terminals and torchrun send it: to the reading processes, too. Ten seconds are promised."""
    out = folder / f"stopped-{len(launch)}-{number}"
    process = start(folder, out, launch, "--workers", 2)
    began = time.perf_counter()
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert time.perf_counter() - began < 10
    assert process.returncode == 0 or launch, error  # torchrun itself reports that it was signalled
    (saved,) = (out / "checkpoints").glob("*.pt")
    assert torch.load(saved, weights_only=True)["steps"] == int(saved.stem) < 10_000
    assert not list(out.rglob(".*"))


def test_a_second_signal_leaves_at_once(folder):
    """In the middle of a step, of which nothing can be saved."""
    out = folder / "second"
    process = start(folder, out, [], "--batch-size", 32, "--log-every", 1, "--eval-every", 0)
    os.kill(process.pid, signal.SIGSTOP)  # the step lasts as long as we like
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGCONT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert time.perf_counter() - began < 5
    assert not list((out / "checkpoints").glob("*"))


def test_a_process_that_dies_is_named_and_ends_the_others(folder):
    """Within the 30 seconds after which torchrun kills those that do not end when they are told to."""
    out = folder / "died"
    process = start(folder, out, TORCHRUN, "--workers", 1)
    workers = psutil.Process(process.pid).children()
    (second,) = (worker for worker in workers if worker.environ()["RANK"] == "1")
    began = time.perf_counter()
    second.kill()
    _, error = process.communicate(timeout=60)
    assert time.perf_counter() - began < 30
    assert process.returncode == 1
    cause = error[error.rindex("Root Cause") :]
    assert re.search(r"rank +: 1 ", cause)
    assert "(SIGKILL)" in cause or "Signal 9" in cause
    assert not any(worker.is_running() for worker in workers)


def test_a_process_that_hangs_is_given_up_after_the_timeout(folder, tmp_path):
    """Two hours, because the others wait while one writes to slow storage; here twenty seconds, in which both must also
    have started on a busy machine."""

    def main(words):
        AcceleratorState._reset_state(reset_partial_state=True)  # of runs before the fork
        train.TIMEOUT = timedelta(seconds=20)
        train.main(words)

    words = command(folder, tmp_path / "run", "--steps", 10_000, "--save-every", 10_000)
    job = chaos.Job(main, words, 2, tmp_path / "log")
    first, second = job.pids
    try:
        while not (tmp_path / "run" / "log.jsonl").exists():
            assert job.wait(time.monotonic()) is None
            time.sleep(0.1)
        os.kill(second, signal.SIGSTOP)
        job.pids = [first]
        assert job.wait(time.monotonic() + 60) == [1]
        assert "Timed out waiting 20000ms" in (tmp_path / "log").read_text()
    finally:
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)


def test_a_rerun_with_another_result_stops_and_says_why(folder, whole):
    with pytest.raises(ValueError, match=r"lr: the run has 0.001, this command 0.002"):
        train.main([*command(folder, whole, "--steps", 8), "--lr", "0.002"])
    other = write_store(folder / "other-store", seed=5)
    with pytest.raises(ValueError, match=r"store fingerprint: the run has 0-False-40, this command 5-False-40"):
        train.main(
            [*command(folder, whole, "--steps", 8), "--store", str(other), "--holdout", str(folder / "store-holdout")]
        )


def test_another_frequency_file_is_another_run(folder, whole):
    copy = folder / "edited-bank"
    shutil.copytree(folder / "bank", copy)
    torch.save([2] * CLUSTERS, copy / "bank.freq")
    with pytest.raises(ValueError, match=r"\n  bank freq-sha256: the run has [0-9a-f]{12}, this command [0-9a-f]{12}$"):
        train.main([*command(folder, whole, "--steps", 8), "--bank", str(copy)])


def test_a_start_that_failed_does_not_block_its_folder(folder):
    out = folder / "second-try"
    with pytest.raises(ValueError, match="toy-vae"):
        train.main(command(folder, out, "--steps", 1, "--sample-every", 1))
    assert not out.exists()
    train.main(command(folder, out, "--steps", 1, "--lr", 0.5))


def test_a_log_that_was_cut_off_is_mended(folder, whole):
    out = folder / "cut"
    shutil.copytree(whole, out)
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text() + '{"step": 7, "lo')
    train.main(command(folder, out, "--steps", 8))
    assert [line["step"] for line in log(out)] == [2, 2, 4, 4, 6, 6, 8, 8]


@pytest.mark.parametrize("damage", [{"opt": {}}, {"opt": [1]}, {"steps": None}, {"sums": "x"}])
def test_a_checkpoint_of_another_kind_is_named(folder, whole, damage):
    out = folder / f"odd-{sorted(damage)}-{type(damage.get('opt')).__name__}"
    shutil.copytree(whole, out)
    torch.save(final(whole) | damage, out / "checkpoints" / "0000006.pt")
    with pytest.raises(ValueError, match=r"checkpoint .*0000006\.pt: .*(copy it again|parameter group)"):
        train.main(command(folder, out, "--steps", 8))


def test_a_snapshot_under_the_name_of_a_full_state_is_named(folder, whole):
    out = folder / "renamed"
    shutil.copytree(whole, out)
    snapshot = {name: part for name, part in final(whole).items() if name not in ("model", "opt", "sums")}
    torch.save(snapshot, out / "checkpoints" / "0000006.pt")
    with pytest.raises(ValueError, match=r"checkpoint .*0000006\.pt does not fit this network"):
        train.main(command(folder, out, "--steps", 8))


def test_the_average_keeps_no_graph(folder, monkeypatch):
    trainers = []
    prepare = train.Trainer.prepare
    monkeypatch.setattr(train.Trainer, "prepare", lambda self: trainers.append(self) or prepare(self))
    train.main(command(folder, folder / "graph", "--steps", 2))
    assert not any(average.requires_grad for average in trainers[0].update.averages)


def test_ema_follows_its_warm_up(folder):
    """After one step the average has moved by 1 − min(decay, 1/10) = 0.9 of the way, after the second by 1 − 2/11."""
    words = ("--save-every", 1, "--keep", 9, "--ema-decay", 0.9)
    train.main(command(folder, folder / "ema", "--steps", 2, *words))
    one, two = (torch.load(folder / "ema" / "checkpoints" / f"000000{i}.pt", weights_only=True) for i in (1, 2))
    for name, average in two["ema"].items():
        expected = one["ema"][name] + (1 - 2 / 11) * (two["model"][name] - one["ema"][name])
        torch.testing.assert_close(average, expected)


def test_the_learning_rate_warms_up(folder):
    """The first step of AdamW is proportional to its rate, here all of it, a half and a quarter; and a run that
    continues stands where it would."""
    weights = {}
    for warmup in (0, 2, 4):
        out = folder / f"warmup-{warmup}"
        train.main(command(folder, out, "--steps", 1, "--warmup", warmup))
        weights[warmup] = torch.load(out / "checkpoints" / "0000001.pt", weights_only=True)["model"]
    for name, plain in weights[0].items():
        half, quarter = weights[2][name], weights[4][name]
        torch.testing.assert_close(plain - half, 2 * (half - quarter), rtol=1e-3, atol=2e-7)
    assert any((plain - weights[2][name]).abs().max() > 4e-4 for name, plain in weights[0].items())
    train.main(command(folder, folder / "warmup-4", "--steps", 6, "--warmup", 4))
    train.main(command(folder, folder / "warmup-whole", "--steps", 6, "--warmup", 4))
    parted, whole = final(folder / "warmup-4"), final(folder / "warmup-whole")
    for part in ("model", "ema", "opt"):
        assert_same(parted[part], whole[part])


def test_a_run_from_before_the_warm_up_continues_without(folder):
    train.main(command(folder, folder / "older", "--steps", 3))
    path = folder / "older" / "checkpoints" / "0000003.pt"
    state = torch.load(path, weights_only=True)
    del state["args"]["warmup"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="warmup: the run has 0, this command 5"):
        train.main(command(folder, folder / "older", "--steps", 6, "--warmup", 5))
    train.main(command(folder, folder / "older", "--steps", 6))
    assert final(folder / "older")["steps"] == 6


@pytest.mark.parametrize("source", ["stored", "online"])
def test_alignment_reads_the_view_of_the_latent(folder, source, monkeypatch):
    """Patch tokens from the store, and from an encoder on its images, which are mirrored where the latent is; read by
    the step or resident, with the same log and weights."""
    store = folder / f"aligned-{source}"
    write_bank(folder / f"bank-{source}", write_store(store))
    meta = json.loads((store / "meta.json").read_text())
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (IMAGES, 1, 8, 8), dtype=np.uint8)
    tokens = np.stack([images, images[..., ::-1]], 1).reshape(IMAGES, VIEWS, 16, 4).astype(np.float16)
    if source == "stored":
        (store / "patches").mkdir()
        np.save(store / "patches" / "toy.npy", tokens)
        meta["patches"] = {"toy": [16, 4]}
    else:
        np.save(store / "images.npy", images)
        meta["has_images"] = True
    write_json(store / "meta.json", meta)

    class Pixels:
        dim, num_patches = 4, 16

        def __call__(self, images, return_patches):
            assert len(images) <= 3
            assert not torch.is_grad_enabled()
            return None, images.reshape(len(images), 16, 4).float()

    made = []
    monkeypatch.setattr(pairs, "load_encoder", lambda name, **options: made.append(options["dtype"]) or Pixels())
    monkeypatch.setattr(pairs, "ALIGNED_AT_ONCE", 3)  # of 8
    seen = []
    align = train.Pairs.align_targets
    monkeypatch.setattr(train.Pairs, "align_targets", lambda self, batch: seen.append(align(self, batch)) or seen[-1])
    for how, flags in (("run", []), ("resident-run", ["--resident"])):
        out = folder / f"{how}-{source}"
        words = command(folder, out, "--steps", 6, "--align-coeff", 0.5, "--align-encoder", "toy", *flags)
        words[1:4:2] = [str(store), str(folder / f"bank-{source}")]
        train.main([*words, "--model-options", "align_depth=3"])
    for step, (target,) in enumerate(seen):
        rows, views = rows_of_step(IMAGES, 8, 0, step % 6), views_of_step(8, VIEWS, 0, step % 6)
        assert torch.equal(target.float(), torch.from_numpy(tokens[rows, views]).float())
    assert len(seen) == 2 * 6
    if source == "online":
        pairs.Pairs(train.parse([*words, "--precision", "bf16"]), torch.device("cpu"))
        assert made == [torch.float32] * 2 + [torch.bfloat16]  # as the network's
    assert {"velocity", "align"} <= log(out)[0].keys()
    assert log(folder / f"run-{source}") == log(out)
    for part in ("model", "ema", "opt"):
        assert_same(final(folder / f"run-{source}")[part], final(out)[part])


def test_a_finished_run_is_left_alone(folder, whole, capsys):
    before = (whole / "log.jsonl").read_bytes()
    train.main(command(folder, whole, "--steps", 6))
    assert "at step 6 already" in capsys.readouterr().out
    assert (whole / "log.jsonl").read_bytes() == before


def test_a_finished_run_asks_for_no_disk_space(folder, whole, monkeypatch, capsys):
    monkeypatch.setattr(train, "free_space", lambda path: 0)
    train.main(command(folder, whole, "--steps", 6))
    assert "at step 6 already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="are needed for checkpoints"):
        train.main(command(folder, whole, "--steps", 7))


def test_a_run_shorter_than_the_interval_of_the_log_leaves_a_line(folder, whole):
    """Of its last step, with the mean over all of them."""
    train.main(command(folder, folder / "brief", "--steps", 4, "--log-every", 100, "--eval-every", 0))
    (line,) = log(folder / "brief")
    losses = [line["loss"] for line in log(whole) if "loss" in line][:2]  # of two steps each
    assert (line["step"], line["loss"]) == (4, pytest.approx(sum(losses) / 2, rel=1e-6))


def test_old_checkpoints_go_and_snapshots_stay(folder):
    out = folder / "kept"
    train.main(command(folder, out, "--steps", 6, "--save-every", 5, "--keep", 2, "--snapshot-every", 2))
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["0000002-ema.pt", "0000004-ema.pt", "0000005.pt", "0000006-ema.pt", "0000006.pt"]
    (out / "checkpoints" / "10000000.pt").symlink_to("0000006.pt")
    args = train.parse(command(folder, out))
    found = RunFolder(train.Path(args.out), vars(args), {}).checkpoints
    assert [path.stem for path in found] == ["0000005", "0000006", "10000000"]
    found[-1].unlink()
    model, config, bank = load_model(out)
    assert config["steps"] == 6
    assert len(bank) == CLUSTERS
    snapshot, _, _ = load_model(out / "checkpoints" / "0000006-ema.pt")
    assert_same(dict(model.state_dict()), dict(snapshot.state_dict()))
    with pytest.raises(ValueError, match="use --weights ema"):
        load_model(out / "checkpoints" / "0000002-ema.pt", weights="model")


@pytest.mark.parametrize("condition", ["label", "label+snippet", "none", "snippet"])
def test_every_condition_trains_and_draws_a_grid(folder, condition, monkeypatch, capsys):
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
    bars = capsys.readouterr().err.split("\r")
    assert any(bar.startswith("drawing 64 samples: 100%") for bar in bars)  # nothing else moves meanwhile
    assert not any("drawing" in bar for bar in bars[-2:])  # what remains on the screen


def test_a_grid_that_does_not_fit_is_left_out_and_training_goes_on(folder, whole, monkeypatch):
    """Beside a network that fills a small GPU; the rest of the run is as it would have been."""

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "euler_sampler", full)
    monkeypatch.setattr(train, "load_codec", lambda *given, **options: SimpleNamespace(meta=lambda size: {}))
    monkeypatch.setattr(train, "check_codec", lambda *given: None)
    out = folder / "no-grid"
    with pytest.warns(
        UserWarning, match=r"no grid of samples at step 3: .* --sample-every 0 .*--checkpoint-activations"
    ):
        train.main(command(folder, out, "--steps", 6, "--sample-every", 3))
    assert log(out) == log(whole)
    assert_same(final(out)["model"], final(whole)["model"])
    assert not list((out / "samples").glob("*"))


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


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_either_of_loss_and_gradient_stops_before_a_checkpoint(folder, part, monkeypatch):
    """Also where no line of the log is due; the step's rows are named."""
    accumulate, update = train.Trainer.accumulate, train.Update.__call__
    odd = lambda step, value: torch.full_like(value, torch.inf) if step == 2 else value  # noqa: E731
    if part == "loss":
        monkeypatch.setattr(train.Trainer, "accumulate", lambda self, batch: odd(self.step, accumulate(self, batch)))
    else:
        monkeypatch.setattr(train.Update, "__call__", lambda self, step: odd(step, update(self, step)))
    out = folder / f"infinite-{part}"
    rows = re.escape(str(rows_of_step(IMAGES, 8, 0, 2).tolist()))
    with pytest.raises(FloatingPointError, match=rf"of step 2 is not finite \(rows {rows}"):
        train.main(command(folder, out, "--steps", 6, "--save-every", 2, "--log-every", 100, "--eval-every", 100))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000002.pt"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(folder, environment):
    store, out = folder / "one-bad-row", folder / "bad-in-one"
    write_bank(folder / "one-bad-bank", write_store(store))
    moments = np.load(store / "latents.npy")
    moments[rows_of_step(IMAGES, 8, 0, 2)[5]] = np.nan  # of the second process, in the third step alone
    np.save(store / "latents.npy", moments)
    words = ("--steps", 5, "--save-every", 1, "--store", store, "--bank", folder / "one-bad-bank")
    run = ["python", *TORCHRUN, "train.py", *command(folder, out, *words)]
    ended = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "of step 2 is not finite" in ended.stderr
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["0000001.pt", "0000002.pt"]


def test_the_only_checkpoint_stays_until_the_next_is_whole(folder, monkeypatch):
    out, write = folder / "only", RunFolder.write_checkpoint

    def full(run, name, state):
        if name == "0000004":
            raise OSError("the disk filled up")
        write(run, name, state)

    monkeypatch.setattr(RunFolder, "write_checkpoint", full)
    with pytest.raises(OSError, match="filled up"):
        train.main(command(folder, out, "--steps", 6, "--save-every", 2, "--keep", 1))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000002.pt"]


def test_dry_run_says_everything_and_writes_nothing(folder, capsys):
    train.main([*command(folder, folder / "dry"), "--dry-run", "--model", "SiT-S/2", "--stage", str(folder / "stage")])
    printed = capsys.readouterr().out
    for word in ("parameters", "memory", "disk", "snippet_dim", "fingerprint"):
        assert word in printed
    assert not (folder / "dry").exists()
    assert not (folder / "stage").exists()


def test_dry_run_counts_what_checkpointed_activations_save(folder, capsys):
    words = [*command(folder, folder / "dry"), "--dry-run", "--model", "SiT-S/2", "--batch-size", "1000000"]
    sizes = []
    for more in ([], ["--checkpoint-activations"]):
        train.main([*words, *more])
        sizes.append(float(re.search(r"([\d.]+) GB of activations", capsys.readouterr().out)[1]))
    assert sizes[1] == pytest.approx(sizes[0] * (6 * 12 + 61) / (41 * 12 + 20), rel=0.001)


def test_the_disk_need_not_hold_more_checkpoints_than_are_written(folder, monkeypatch):
    """Of a short run one at each `--save-every`, whatever `--keep` allows."""
    monkeypatch.setattr(train, "free_space", lambda path: 3 * 16 * 4_500_000)
    train.main(command(folder, folder / "short", "--steps", 2, "--save-every", 1, "--keep", 99))
    with pytest.raises(ValueError, match="are needed for checkpoints"):
        train.main(command(folder, folder / "long", "--steps", 9, "--save-every", 1, "--keep", 99))


def test_dry_run_estimates_the_memory_that_was_measured(folder, capsys, root):
    rows = json.loads((root / "benchmarks" / "results" / "train-memory.json").read_text())["rows"]
    measured = [row for row in rows if row.get("peak_gb")]
    assert {row["model"] for row in measured} == {"SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"}
    for row in measured:
        words = ["--store", folder / "nowhere", "--bank", folder / "nowhere", "--out", folder / "dry", "--dry-run"]
        words += ["--model", row["model"], "--micro-batch", row["micro_batch"]]
        words += ["--checkpoint-activations"] * row["checkpoint_activations"]
        with pytest.raises(SystemExit):
            train.main([*map(str, words)])
        line = re.search("memory a process.*", capsys.readouterr().out)[0]
        assert sum(map(float, re.findall(r"([\d.]+) GB", line))) == pytest.approx(row["peak_gb"], rel=0.03)


def test_a_folder_of_images_is_no_store(folder, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").touch()
    for flag in ("--store", "--holdout"):
        with pytest.raises(ValueError, match=r"images is a folder, but no store: it has no meta\.json"):
            train.main([*command(folder, tmp_path / "run"), flag, str(tmp_path / "images")])


def test_dry_run_before_the_data_exists(folder, capsys):
    with pytest.raises(SystemExit, match=r"(?s)missing.*--store: .*nowhere"):
        train.main(
            [*command(folder, folder / "dry"), "--dry-run", "--store", str(folder / "nowhere"), "--model", "SiT-XL/2"]
        )
    printed = capsys.readouterr().out
    assert "parameters        674,843,920" in printed
    assert "10.8" in printed  # GB a checkpoint


def test_the_holdout_beside_the_store_is_found(folder):
    with_slash = train.parse(command(folder, folder / "x", "--store", f"{folder / 'store'}/"))
    assert with_slash.holdout == str(folder / "store-holdout")


def test_steps_are_read_in_the_training_process_unless_workers_are_asked_for(folder, monkeypatch):
    """Which is faster wherever the disk is not slow: see dataset.py."""
    words = command(folder, folder / "never")
    at = words.index("--workers")
    args = train.parse(words[:at] + words[at + 2 :])
    trainer = train.Trainer(args, train.launch(args), pairs.Pairs(args, torch.device("cpu")))
    asked = []
    monkeypatch.setattr(train, "DataLoader", lambda store, **options: asked.append(options["num_workers"]) or [])
    assert list(trainer.batches()) == []
    args.workers = 3
    assert list(trainer.batches()) == []
    assert asked == [0, 3]


def test_stage_reads_a_copy(folder, whole):
    train.main(command(folder, folder / "staged", "--steps", 6, "--stage", folder / "fast"))
    assert (folder / "fast" / "store" / "latents.npy").exists()
    assert_same(final(whole)["ema"], final(folder / "staged")["ema"])


@pytest.mark.parametrize("source", ["nearest", "own"])
def test_a_resident_store_gives_the_same_bits(folder, source):
    words = ("--steps", 6, "--snippet-from", source, "--condition", "label+snippet")
    train.main(command(folder, folder / f"loader-{source}", *words))
    train.main(command(folder, folder / f"resident-{source}", *words, "--resident"))
    assert_same(final(folder / f"loader-{source}")["ema"], final(folder / f"resident-{source}")["ema"])


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resident_store_fetches_what_the_store_does(tmp_path, monkeypatch, device, num_views):
    """Every key, shape, type and bit, brought in parts of which the last is short."""
    path, random = write_store(tmp_path / "store"), np.random.default_rng(5)
    (path / "patches").mkdir()
    np.save(path / "patches" / "toy.npy", random.normal(size=(IMAGES, num_views, 16, 4)).astype(np.float16))
    np.save(path / "images.npy", random.integers(0, 256, (IMAGES, 1, 8, 8), dtype=np.uint8))
    for file in ("latents.npy", "features/toy.npy"):
        np.save(path / file, np.load(path / file)[:, :num_views])
    meta = json.loads((path / "meta.json").read_text())
    meta |= {"patches": {"toy": [16, 4]}, "has_images": True}
    meta |= {"num_views": num_views, "views": meta["views"][:num_views]}
    write_json(path / "meta.json", meta)
    assignment = random.integers(0, 9, (IMAGES, num_views), dtype=np.int32)
    store = LatentDataset(path, encoder="toy", assignment=assignment, patches="toy", images=True)
    monkeypatch.setattr(resident, "CHUNK", 7 * store.latents[0].nbytes)
    held = ResidentDataset(store, torch.device(device))
    rows, views = random.integers(0, IMAGES, 64), random.integers(0, num_views, 64)
    found, expected = held[3, rows, views], store.fetch(rows, views)
    assert found.pop("step") == 3
    assert {values.device.type for values in found.values()} == {device}
    assert_same({key: values.cpu() for key, values in found.items()}, expected)
    for key, values in expected.items():
        assert (found[key].dtype, found[key].shape) == (values.dtype, values.shape)


def test_checkpointed_activations_give_the_same_bits(folder, whole, monkeypatch):
    calls, checkpoint = [], sit.checkpoint
    monkeypatch.setattr(sit, "checkpoint", lambda *args, **options: calls.append(1) or checkpoint(*args, **options))
    train.main(command(folder, folder / "checkpointed", "--steps", 6, "--checkpoint-activations"))
    assert len(calls) >= 6 * 6  # steps, blocks
    assert_same(final(whole)["ema"], final(folder / "checkpointed")["ema"])


def test_a_store_too_large_for_the_gpu_is_not_resident(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    with pytest.raises(ValueError, match=r"--resident: the store .*store takes 0.0 GB .* leave --resident out"):
        ResidentDataset(LatentDataset(folder / "store"), torch.device("cuda"))


def test_patch_tokens_and_images_count_for_what_fits(folder, monkeypatch):
    """A store whose latents would fit alone, in half of the free memory."""
    store = LatentDataset(folder / "store")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * store.latents.nbytes, 1))
    for name in ("patches", "images"):
        large = LatentDataset(folder / "store")
        setattr(large, name, np.zeros((2, store.latents.nbytes), np.uint8))
        with pytest.raises(ValueError, match="leave --resident out"):
            ResidentDataset(large, torch.device("cuda"))


def test_replayed_inputs_keep_their_structure():
    draws = Draws(*(torch.rand(2) for _ in range(4)))
    inputs = (torch.rand(3), None, draws, (torch.rand(1), torch.rand(2)), [])
    copies = replay.clone(inputs)
    assert type(copies[2]) is Draws
    assert copies[1] is None
    assert len(replay.leaves(inputs)) == 7
    for given, copied in zip(replay.leaves(inputs), replay.leaves(copies), strict=True):
        assert torch.equal(given, copied)
        assert given.data_ptr() != copied.data_ptr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "nowhere"], "--store: nowhere does not exist; `python -m scripts.enc"),
        (["--batch-size", "9", "--micro-batch", "4"], "does not divide the 9 images of a process; 3 does"),
        (["--align-coeff", "0.5"], "needs patch tokens: .* for no encoder and no --align-encoder is named; encode"),
        (
            ["--align-coeff", "0.5", "--align-encoder", "toy"],
            "^--align-encoder toy: the store .*store has no images: encode it with --keep-images, or leave out --al",
        ),
        (["--encoder", "other"], "made by encoder toy"),
        (["--init", "nowhere.pt"], "--init: nowhere.pt does not exist; give the --out of train.py"),
        (["--align-coeff", "1", "--align-encoder-weights", "no.pt"], "weights: no.pt does not exist; give a file"),
        (["--init", "hf:some/where"], "checkpoint hf:some/where: expected hf:ORGANISATION"),
    ],
)
def test_data_that_cannot_work_stops_before_they_start(folder, words, message):
    with pytest.raises(ValueError, match=message):
        train.main([*command(folder, folder / "never"), *words])
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "runs/0000003.pt"], "error: --resume is not needed: the same command continues"),
        (["--model-options", "depth=3"], "depth=3: expected NAME=VALUE with one of snippet_dropout, "),
        (["--model-options", "num_classes=3"], "num_classes=3: expected NAME=VALUE with one of snippet_dropout, "),
        (["--model-options", "qk_norm=True"], "qk_norm=True: expected NAME=VALUE with true or false, as qk_norm=false"),
        (["--model-options", "qk_norm=0.3"], "qk_norm=0.3: expected NAME=VALUE with true or false"),
        (["--model-options", "align_depth=2.5"], "=2.5: expected NAME=VALUE with a whole number, as align_depth=8"),
        (["--model-options", "snippet_scale=true"], "=true: expected NAME=VALUE with a number, as snippet_scale=1.0"),
        (["--model-options", "snippet_scale="], "snippet_scale=: expected NAME=VALUE with a number"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--micro-batch", "0"], "--micro-batch 0: expected at least 1"),
        (["--align-encoder", "toy"], "not read without --align-coeff"),
        (["--align-encoder-weights", "x.pt"], "--align-encoder-weights x.pt is not read without --align-coeff"),
        (["--clip", "-1"], "--clip > 0"),
        (["--beta2", "1"], "0 <= --beta2 < 1"),
        (["--model-options", "align_depth=08"], "align_depth=08: expected NAME=VALUE"),
        (["--eval-every", "-1"], "--eval-every -1"),
        (["--condition", "label"], "does not read --bank"),
    ],
)
def test_flags_that_cannot_work_are_refused(folder, words, message, capsys):
    with pytest.raises(SystemExit):
        train.main([*command(folder, folder / "never"), *words])
    assert message in capsys.readouterr().err


def test_a_missing_bank_is_called_so(folder, capsys):
    """In the user's words: neither --condition nor --snippet-from need have been typed."""
    words = command(folder, folder / "never")
    del words[2:4]
    with pytest.raises(SystemExit):
        train.parse(words)
    made = f"`python -m memory.build_bank --store {folder / 'store'} --out banks/NAME` makes one"
    assert f"--bank is missing: {made}; --condition none trains without\n" in capsys.readouterr().err


def test_model_options_are_of_the_kinds_that_the_network_takes():
    pairs = "snippet_scale=6", "null_dropout=.1", "align_depth=3", "qk_norm=true", "snippet_dropout_at=snippet"
    options = train.model_options(pairs)
    assert list(options.values()) == [6.0, 0.1, 3, True, "snippet"]
    assert [type(value) for value in options.values()] == [float, float, int, bool, str]
    assert train.model_options(["qk_norm=false"]) == {"qk_norm": False}


def test_stores_that_lack_what_the_run_needs(folder):
    bare = write_store(folder / "bare", seed=2)
    meta = json.loads((bare / "meta.json").read_text())
    words = command(folder, folder / "never", "--holdout", bare)
    write_json(bare / "meta.json", meta | {"num_classes": None})
    remedy = "encode images in one folder per class, or choose another --condition"
    with pytest.raises(ValueError, match=rf"^--condition label\+snippet: the store .*bare has no labels; {remedy}$"):
        train.main([*words, "--condition", "label+snippet"])
    write_json(bare / "meta.json", meta | {"encoders": {}})
    adding = rf"`python -m scripts.encode_dataset SOURCE --out {bare} --add toy`"
    with pytest.raises(ValueError, match=f"bare has no features of the snippets' encoder toy, .* none; {adding} adds"):
        train.main(words)
    shutil.copytree(bare, folder / "bare-holdout")  # which the same command serves
    with pytest.raises(ValueError, match=f"bare-holdout has no features .*{adding}"):
        train.main([*words, "--holdout", str(folder / "bare-holdout")])
    write_json(bare / "meta.json", meta | {"encoders": {"toy": {"name": "toy", "dim": DIM + 1}}})
    with pytest.raises(ValueError, match=f"dimension {DIM}, the toy features of .* have {DIM + 1}"):
        train.main(words)


def test_own_features_are_those_of_the_stores_only_encoder(folder):
    store = write_store(folder / "one-encoder", seed=6)
    words = command(folder, folder / "never", "--store", store, "--snippet-from", "own")
    del words[2:4]  # the bank
    data = pairs.Pairs(train.parse(words), torch.device("cpu"))
    assert (data.encoder, data.train.features.shape) == ("toy", (IMAGES, VIEWS, DIM))
    meta = json.loads((store / "meta.json").read_text())
    for names in ((), ("toy", "other")):
        write_json(store / "meta.json", meta | {"encoders": {name: {"name": name, "dim": DIM} for name in names}})
        with pytest.raises(ValueError, match=rf"{', '.join(names) or 'no encoder'}.*--encoder.*--add NAME"):
            pairs.Pairs(train.parse(words), torch.device("cpu"))
    shutil.copytree(folder / "bank", folder / "nameless", ignore=shutil.ignore_patterns("bank.json"))
    write_json(store / "meta.json", meta)
    with pytest.raises(ValueError, match=r"--bank .*nameless.* does not say"):
        pairs.Pairs(train.parse([*words, "--bank", str(folder / "nameless")]), torch.device("cpu"))


@pytest.mark.parametrize("source", ["nearest", "own"])
def test_a_bank_of_another_store_is_named_and_searched_anew(folder, source):
    """Its own assignment, of as many images, would join every latent with a stranger's snippet."""
    store = write_store(folder / f"other-{source}", seed=5)
    words = command(folder, folder / "never", "--store", store, "--snippet-from", source)
    message = r"bank was built from another store, .*0-False-40.*than --store .*other-.*5-False-40"
    with pytest.warns(UserWarning, match=message):
        data = pairs.Pairs(train.parse(words), torch.device("cpu"))
    if source == "nearest":
        features = LatentDataset(store, encoder="toy").features
        assert np.array_equal(data.train.assignment, data.bank.assign(features))
        assert not np.array_equal(data.train.assignment, data.bank.assignment)


def test_nothing_is_said_of_the_own_bank_and_of_one_without_a_record(folder, recwarn):
    """Nor of the held-out store, which a bank is never built from."""
    published = folder / "published"
    published.mkdir()
    for name in ("bank.pth", "bank.freq"):
        shutil.copy(folder / "bank" / name, published)
    for words in ([], ["--bank", published, "--encoder", "toy"]):
        pairs.Pairs(train.parse(command(folder, folder / "never", *words)), torch.device("cpu"))
    assert not [said for said in recwarn if "another store" in str(said.message)]


def test_an_own_feature_that_is_not_finite_is_named(folder):
    store = write_store(folder / "nan", seed=4)
    features = np.load(store / "features" / "toy.npy")
    features[7, 1, 3] = np.nan
    np.save(store / "features" / "toy.npy", features)
    words = command(folder, folder / "never", "--store", store, "--snippet-from", "own")
    with pytest.raises(ValueError, match=r"the toy features of .*nan.*rows 7"):
        train.main(words)


def test_a_batch_too_large_for_the_gpu_names_the_flags(folder, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sit.SiT, "velocity", full)
    message = "the GPU's memory is too small for this: try --micro-batch 4, or --checkpoint-activations"
    with pytest.raises(ValueError, match=message):
        train.main(command(folder, folder / "never", "--steps", 1))


def test_wandb_offline_writes_below_the_run(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main(command(folder, folder / "wandb", "--steps", 2, "--wandb", "project"))
    assert list((folder / "wandb" / "wandb").glob("offline-run-*"))


def test_every_micro_batch_has_its_own_dropout(folder, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    train.main(command(folder, folder / "seeds", "--steps", 3, "--micro-batch", 2))
    assert len(seeds) == len(set(seeds)) == 1 + 3 * 4  # the weights, then 3 steps of 4 micro-batches


def test_the_held_out_loss_covers_ten_bins_of_time(folder, monkeypatch):
    """Every held-out image keeps its bin and its draws from one evaluation to the next, and the bins fill evenly."""
    seen, loss = [], train.FlowMatchingLoss.__call__

    def watch(self, model, latents, cond, draws, *patches):
        if not torch.is_grad_enabled():
            seen.append(draws)
        return loss(self, model, latents, cond, draws, *patches)

    monkeypatch.setattr(train.FlowMatchingLoss, "__call__", watch)
    train.main(command(folder, folder / "bins", "--steps", 4))
    times = torch.cat([draws.time for draws in seen])
    assert times.shape == (2 * 24,)
    assert torch.equal((times * 10).long(), torch.arange(24).repeat(2) % 10)
    assert torch.equal(times[:24], times[24:])
    for line in log(folder / "bins"):
        if "holdout_loss" in line:
            counts = torch.bincount(torch.arange(24) % 10)
            mean = (torch.tensor(line["holdout_loss_by_time"]) * counts).sum() / 24
            assert mean.item() == pytest.approx(line["holdout_loss"], rel=1e-5)


def test_a_checkpoint_says_how_it_was_made_without_the_config_file(folder, whole):
    out = folder / "no-config"
    shutil.copytree(whole, out)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lr: the run has 0.001, this command 0.5"):
        train.main(command(folder, out, "--steps", 8, "--lr", 0.5))
