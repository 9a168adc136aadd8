"""Sampling runs of a small random network on 8×8 images: what determines an image, what a run leaves behind, how it
goes on, and what it refuses."""

import functools
import json
import os
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from memory import output
from memory.bank import MemoryBank
from memory.files import HOST, sha256
from models.autoencoder import load_codec, to_uint8
from models.checkpoint import load_model
from models.kernels import default_precision
from models.sit import SiT, SiT_models
from sample_ddp import Generator, main, parse
from samplers import noise, samplers

SIZE, DIM, CLASSES = 8, 6, 5
FREQ = [3, 0, 5, 1, 7, 2, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a bank and a checkpoint of every condition, as the commands before this one leave them."""
    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(torch.randn(len(FREQ), DIM, generator=generator), FREQ, meta={"encoder": "e", "k": len(FREQ)})
    bank.save(folder / "bank" / "bank.pth")
    for condition in ("snippet", "label", "label+snippet", "none"):
        write_checkpoint(folder / f"{condition}.pt", folder, condition)
    write_checkpoint(folder / "nullable.pt", folder, "snippet", null_dropout=0.1)
    return folder


def write_checkpoint(path, folder, condition, edit=lambda checkpoint: None, **options):
    """A checkpoint of train.py with random weights: after initialisation alone every velocity would be zero."""
    torch.manual_seed(len(condition))
    model = SiT_models["SiT-Ti/2"](
        input_size=SIZE, in_channels=1, condition=condition, snippet_dim=DIM, num_classes=CLASSES, **options
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    ema = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    file = folder / "bank" / "bank.pth"
    checkpoint = {
        "model": model.state_dict(),
        "ema": ema,
        "opt": {},
        "args": {"interpolant": "linear", "snippet_from": "nearest"},
        "model_config": model.config,
        "steps": 3,
        "codec": load_codec("pixels", channels=1).meta(SIZE),
        "encoder": "e",
        "bank": {"path": str(file), "sha256": sha256(file), "k": len(FREQ), "dim": DIM},
        "store": {"path": "data/s", "fingerprint": "f", "num_images": 18, "image_size": SIZE},
        "image_size": SIZE,
        "num_classes": CLASSES,
    }
    edit(checkpoint)
    torch.save(checkpoint, path)


def command(folder, out, *flags, checkpoint="snippet.pt", n=7):
    given = ["--checkpoint", folder / checkpoint, "--out", out, "--num-images", n, "--steps", 4, *flags]
    return [str(part) for part in given]


def pixels(out):
    return np.load(out / "samples.npz", allow_pickle=False)["arr_0"]


def generator(folder, *flags, **keywords):
    return Generator(parse(command(folder, "unused", *flags, **keywords)), torch.device("cpu"))


def almost_equal(a, b):
    """Equal up to the rounding of float32 products, whose order of summation follows the batch size."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 0.01


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A complete run of 7 images."""
    out = tmp_path_factory.mktemp("runs") / "all"
    main(command(folder, out, "--batch-size", 7))
    return out


def test_what_a_run_leaves(folder, run):
    images = pixels(run)
    assert images.shape == (7, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert (images == images[..., :1]).all(), "grey is repeated"
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(run / f"{i:06d}.png")), image)
    expected = {f"{i:06d}.png" for i in range(7)} | {"samples.npz", "samples.json", "preview.png"}
    assert set(os.listdir(run)) == expected
    assert np.array_equal(np.asarray(Image.open(run / "preview.png"))[2:10, 12:20], images[1])

    facts = json.loads((run / "samples.json").read_text())
    settings = facts["settings"]
    assert facts["complete"]
    assert facts["num_images"] == 7
    assert settings["checkpoint"] == sha256(folder / "snippet.pt")
    assert settings["bank"]["bank.pth"] == sha256(folder / "bank" / "bank.pth")
    assert (settings["sampler"], settings["steps"], settings["evaluations"]) == ("sde", 4, 4)
    assert (settings["last_step"], settings["guidance"], settings["snippets"]) == (0.04, None, "noise")
    assert (settings["weights"], settings["seed"], settings["labels"]) == ("ema", 0, None)
    assert facts["run"]["generated"] == 7
    assert facts["run"]["images_per_second"] > 0
    trained = torch.load(folder / "snippet.pt", weights_only=True)
    assert facts["run"]["bank_shape"] == list(load_model(folder / "snippet.pt")[2].snippets.shape)
    assert facts["run"]["trained"].pop("format") is None, "a checkpoint of our own"
    assert facts["run"]["trained"] == {key: trained[key] for key in ("model_config", "args", "bank", "store")}


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_an_image_is_the_sampler_applied_to_its_noise_and_snippet(folder, tmp_path, sampler):
    main(command(folder, tmp_path, "--sampler", sampler, "--seed", 3, "--weights", "model", "--uint8", "truncate", n=3))
    model, _, bank = load_model(folder / "snippet.pt", "model")
    starts = noise(3, torch.arange(3), 0, (1, SIZE, SIZE))
    cumulative = np.cumsum(FREQ) / np.sum(FREQ)
    for i, z in enumerate(starts):
        u = torch.special.ndtr(z.double().mean() * SIZE)
        row = min(int((cumulative <= u.item()).sum()), 5)  # the published rule, written out
        snippet = F.normalize(bank.snippets[row], dim=0)[None]
        steps = (noise(3, torch.tensor([i]), step, z.shape) for step in (1, 2, 3))
        options = {"randn": lambda x, steps=steps: next(steps)} if sampler == "sde" else {}
        with torch.no_grad():
            x = samplers[sampler](lambda x, t, s=snippet: model(x.float(), t.float(), s), z[None], 4, **options)
        image = to_uint8(x.clamp(-1, 1), "truncate")[0, 0].numpy()
        assert almost_equal(pixels(tmp_path)[i, ..., 0], image)


@pytest.mark.parametrize("flags", [("--batch-size", 3), ("--batch-size", 1), ("--format", "npz")])
def test_batch_size_and_format_change_nothing(folder, run, tmp_path, flags):
    main(command(folder, tmp_path, *flags))
    assert almost_equal(pixels(tmp_path), pixels(run))
    assert (tmp_path / "000000.png").exists() != ("npz" in flags)
    assert (tmp_path / "preview.png").read_bytes() or "npz" in flags


def test_compiled_batches_of_one_size_change_nothing(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    shapes = []
    velocity = SiT.velocity
    monkeypatch.setattr(SiT, "velocity", lambda self, x, c: shapes.append(len(x)) or velocity(self, x, c))
    main(command(folder, tmp_path, "--compile", "--batch-size", 3))
    assert set(shapes) == {3}, "the last batch has one image and two to fill it up"
    assert almost_equal(pixels(tmp_path), pixels(run))
    assert json.loads((tmp_path / "samples.json").read_text())["run"]["compiled"]
    assert not json.loads((run / "samples.json").read_text())["run"]["compiled"]


def test_png_alone(folder, run, tmp_path):
    main(command(folder, tmp_path, "--format", "png", n=2))
    assert set(os.listdir(tmp_path)) == {"000000.png", "000001.png", "samples.json", "preview.png"}
    main(command(folder, tmp_path, "--format", "png", n=4))
    images = np.stack([np.asarray(Image.open(tmp_path / f"{i:06d}.png")) for i in range(4)])
    assert almost_equal(images, pixels(run)[:4])


def test_two_processes_make_the_same_images(folder, run, environment, tmp_path, root):
    launch = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, "sample_ddp.py", *command(folder, tmp_path, "--batch-size", 2)]
    subprocess.run(words, cwd=root, env=environment, check=True, timeout=300)
    assert almost_equal(pixels(tmp_path), pixels(run))
    assert json.loads((tmp_path / "samples.json").read_text())["run"]["processes"] == 2


def interrupted(monkeypatch, after, *arguments, **keywords):
    """Run the command until `after` batches are made, then fail."""
    calls, real = [], Generator.__call__

    def stop(self, images):
        calls.append(images)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            main(command(*arguments, **keywords))


def test_the_same_command_continues(folder, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    main(command(folder, whole, "--batch-size", 2))
    interrupted(monkeypatch, 2, folder, part, "--batch-size", 2)
    assert not (part / "samples.npz").exists()
    assert not json.loads((part / "samples.json").read_text())["complete"]
    (part / f".000005.{HOST}-{2**22 + 1}.tmp.png").write_bytes(b"half an image")  # of a process that is gone

    main(command(folder, part, "--batch-size", 2))
    facts = json.loads((part / "samples.json").read_text())
    assert facts["run"]["generated"] in (3, 5), "the batch that was being written may or may not have been finished"
    assert sorted(os.listdir(part)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        if name != "samples.json":
            assert (part / name).read_bytes() == (whole / name).read_bytes(), name

    before = {name: (whole / name).stat().st_mtime_ns for name in os.listdir(whole)}
    main(command(folder, whole, "--batch-size", 5))  # complete: nothing to do
    assert before == {name: (whole / name).stat().st_mtime_ns for name in os.listdir(whole)}


@pytest.mark.parametrize("format", ["both", "npz"])
def test_a_run_grows(folder, run, tmp_path, monkeypatch, format):
    main(command(folder, tmp_path, "--format", format, n=2))
    interrupted(monkeypatch, 1, folder, tmp_path, "--format", format, "--batch-size", 1, n=4)
    main(command(folder, tmp_path, "--format", format))
    assert almost_equal(pixels(tmp_path), pixels(run))
    assert json.loads((tmp_path / "samples.json").read_text())["num_images"] == 7


@pytest.mark.parametrize("removed", [["samples.npz"], ["000002.png"], ["samples.npz", "000000.png"]])
def test_what_was_removed_from_a_complete_run_is_made_again(folder, run, tmp_path, removed):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in removed:
        (out / name).unlink()
    main(command(folder, out))
    assert set(os.listdir(out)) == set(os.listdir(run))
    assert almost_equal(pixels(out), pixels(run))


@pytest.mark.parametrize("lost", [".done", ".pixels", "000000.png"])
def test_what_an_unfinished_run_has_lost_is_made_again(folder, run, tmp_path, monkeypatch, lost):
    """As a copy without hidden files has: the npz must not get black images for it."""
    with monkeypatch.context() as patch:
        patch.setattr(output, "make_grid", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(folder, tmp_path))
    (tmp_path / lost).unlink()
    main(command(folder, tmp_path))
    assert set(os.listdir(tmp_path)) == set(os.listdir(run))
    assert almost_equal(pixels(tmp_path), pixels(run))


def test_a_run_that_stopped_before_packing_packs(folder, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(output, "make_grid", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(folder, tmp_path))
    main(command(folder, tmp_path))
    assert almost_equal(pixels(tmp_path), pixels(run))
    assert not (tmp_path / ".done").exists()


def test_a_full_disk_stops_the_run_and_the_same_command_continues(folder, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: 5)  # fewer bytes than asked for
        with pytest.raises(OSError, match="the disk is full"):
            main(command(folder, tmp_path))
    assert not (tmp_path / "samples.npz").exists()
    main(command(folder, tmp_path))
    assert almost_equal(pixels(tmp_path), pixels(run))


def test_images_beyond_any_disk_are_refused_before_memory_is_taken_for_them(folder, run, tmp_path):
    """In a new folder, and in one that would grow; both stay as they were."""
    before = (run / "samples.json").read_bytes()
    for out in (tmp_path / "new", run):
        with pytest.raises(ValueError, match=rf"--out {out}: up to [\d.]+ GB are needed .* or fewer --num-images"):
            main(command(folder, out, n=10**15))
    assert (run / "samples.json").read_bytes() == before
    assert not list((tmp_path / "new").glob("*"))


def test_a_batch_too_large_for_the_gpu_names_the_flag(folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SiT, "velocity", full)
    with pytest.raises(ValueError, match=r"the GPU's memory is too small for this: try --batch-size 2"):
        main(command(folder, tmp_path, "--batch-size", 5))


def test_another_run_in_the_same_folder_is_refused(folder, run, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)made otherwise.*seed: there 0, here 1"):
        main(command(folder, run, "--seed", 1))
    with pytest.raises(ValueError, match="sampler: there sde, here euler"):
        main(command(folder, run, "--sampler", "euler"))
    with pytest.raises(ValueError, match=r"--num-images 6.*run of 7"):
        main(command(folder, run, n=6))
    shutil.copy(run / "000000.png", tmp_path)
    with pytest.raises(ValueError, match=r"holds images but no samples\.json"):
        main(command(folder, tmp_path))


def test_snippet_choices(folder, tmp_path):
    images = torch.arange(3000)
    z = noise(0, images, 0, (1, SIZE, SIZE))
    share = torch.tensor(FREQ) / sum(FREQ)
    bank = MemoryBank.load(folder / "bank")
    for rule in ("noise", "random"):
        made = generator(folder, "--snippets", rule)
        snippets = made.labels_and_snippets(images, z)["snippet"]
        drawn = torch.bincount(bank.nearest(snippets), minlength=len(FREQ)) / len(images)
        assert (drawn - share).abs().max() < 4 * 0.5 / 3000**0.5, rule
        assert (drawn[share == 0] == 0).all()
        some = torch.tensor([2000, 7])
        assert torch.equal(made.labels_and_snippets(some, z[some])["snippet"], snippets[some])

    (tmp_path / "rows.txt").write_text("4 0\n2\n")
    np.save(tmp_path / "rows.npy", np.array([4, 0, 2], dtype=np.int32))
    for name in ("rows.txt", "rows.npy"):
        snippets = generator(folder, "--snippets", tmp_path / name).labels_and_snippets(images[:5], z[:5])["snippet"]
        assert torch.equal(snippets, bank[[4, 0, 2, 4, 0]])
    vectors = np.random.default_rng(0).normal(size=(4, DIM))
    np.save(tmp_path / "vectors.npy", vectors)
    snippets = generator(folder, "--snippets", tmp_path / "vectors.npy").labels_and_snippets(images[:5], z[:5])[
        "snippet"
    ]
    np.testing.assert_allclose(snippets, vectors[[0, 1, 2, 3, 0]], rtol=1e-6)


def test_label_choices(folder):
    images = torch.arange(3000)
    z = torch.zeros(3000, 1, SIZE, SIZE)
    balanced = generator(folder, "--labels", "balanced", checkpoint="label.pt").labels_and_snippets(images, z)["label"]
    assert balanced[:6].tolist() == [0, 1, 2, 3, 4, 0]
    drawn = generator(folder, checkpoint="label.pt").labels_and_snippets(images, z)["label"]
    counts = torch.bincount(drawn)
    assert len(counts) == CLASSES
    assert (counts - 600).abs().max() < 4 * (3000 * 0.2 * 0.8) ** 0.5
    labels, snippets = generator(folder, checkpoint="label+snippet.pt").labels_and_snippets(images[:4], z[:4]).values()
    assert torch.equal(labels, drawn[:4])
    assert snippets.shape == (4, DIM)


def test_labels_from_a_file(folder, tmp_path):
    np.save(tmp_path / "labels.npy", np.array([4, 0, 2]))
    made = generator(folder, "--labels", tmp_path / "labels.npy", checkpoint="label+snippet.pt")
    labels = made.labels_and_snippets(torch.arange(5), torch.zeros(5, 1, SIZE, SIZE))["label"]
    assert labels.tolist() == [4, 0, 2, 4, 0]
    assert len(made.settings["labels"]) == 64  # the file's hash
    (tmp_path / "labels.txt").write_text(f"0 {CLASSES}")
    with pytest.raises(ValueError, match=rf"--labels .*labels.txt: expected whole numbers from 0 to {CLASSES - 1}"):
        generator(folder, "--labels", tmp_path / "labels.txt", checkpoint="label.pt")
    with pytest.raises(ValueError, match="condition is 'snippet': leave out --labels"):
        generator(folder, "--labels", tmp_path / "labels.npy")
    with pytest.raises(ValueError, match="--labels blue: expected a rule"):
        generator(folder, "--labels", "blue", checkpoint="label.pt")


@pytest.mark.parametrize("condition", ["label", "label+snippet", "none"])
def test_every_condition_samples(folder, condition):
    images = generator(folder, "--sampler", "heun-sde", checkpoint=f"{condition}.pt")(torch.arange(2))
    assert images.shape == (2, SIZE, SIZE, 3)


def test_guidance(folder):
    images = torch.arange(4)

    def made(*flags, **keywords):
        return generator(folder, "--sampler", "euler", *flags, **keywords)(images)

    plain = made()
    unconditional = folder / "none.pt"
    for guide in (unconditional, folder / "nullable.pt"):
        assert almost_equal(made("--guide", guide, "--guidance-scale", 1), plain)
    assert almost_equal(made("--guide", unconditional, "--guidance-scale", 0), made(checkpoint="none.pt"))
    strong = made("--guide", unconditional, "--guidance-scale", 3)
    assert (strong != plain).mean() > 0.2
    never = ("--guidance-interval", 0.9, 0.95)  # the four times are 1, 0.75, 0.5 and 0.25
    assert np.array_equal(made("--guide", unconditional, "--guidance-scale", 3, *never), plain)
    null = made("--guide", "null", "--guidance-scale", 3, checkpoint="nullable.pt")
    assert (null != made(checkpoint="nullable.pt")).mean() > 0.2
    made("--guide", "null", "--guidance-scale", 3, checkpoint="label.pt")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_the_default_where_a_gpu_computes_in_it(native, monkeypatch):
    """Not where it is emulated."""

    def supported(including_emulation=True):
        return including_emulation or native

    assert default_precision() == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    training = train.parse(["--store", "x", "--out", "y", "--condition", "none", "--no-compile"])
    sampling = parse(["--checkpoint", "x", "--out", "y"])
    assert training.precision == sampling.precision == ("bf16" if native else "fp32")


def test_precision_and_rounding(folder):
    images = torch.arange(4)
    rounded, truncated = generator(folder)(images), generator(folder, "--uint8", "truncate")(images)
    assert set(np.unique(rounded.astype(int) - truncated)) == {0, 1}
    half = generator(folder, "--precision", "bf16")(images)
    assert 0 < np.abs(half.astype(int) - rounded).mean() < 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-images", "0"), "--num-images 0: expected at least 1"),
        (("--sampler", "dopri5"), "invalid choice: 'dopri5'"),
        (("--steps", "1"), "--steps 1: expected at least 2"),
        (("--last-step", "0"), "--last-step 0.0"),
        (("--last-step", "0.1", "--sampler", "heun"), "--last-step 0.1: not read by --sampler heun"),
        (("--seed", "-1"), "--seed -1"),
        (("--guide", "null"), "need each other"),
        (("--guide", "null", "--guidance-scale", "2", "--guidance-interval", "0.5", "0.2"), "0 <= LO <= HI <= 1"),
        (("--guidance-interval", "0.5", "0.7"), "need --guide"),
        (("--guidance-channels", "3"), "need --guide"),
    ],
)
def test_bad_command_lines(folder, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(command(folder, "unused", *flags))
    assert message in capsys.readouterr().err


def test_bad_snippets(folder, tmp_path):
    arrays = {
        "wide.npy": (np.ones((3, DIM + 1)), rf"\(3, {DIM + 1}\); the checkpoint takes \(M, {DIM}\)"),
        "nan.npy": (np.full((3, DIM), np.nan), "3 vectors are zero or not finite"),
        "zero.npy": (np.eye(DIM) * np.arange(DIM)[:, None], "1 vectors are zero or not finite, row 0 first"),
        "rows.npy": (np.array([0, 7]), "names rows 0 to 7; the bank has 0 to 6"),
        "empty.npy": (np.zeros(0, dtype=np.int64), "expected M integers"),
        "cube.npy": (np.zeros((2, 2, 2)), "expected M integers"),
    }
    for name, (array, message) in arrays.items():
        np.save(tmp_path / name, array)
        with pytest.raises(ValueError, match=message):
            main(command(folder, tmp_path / "out", "--snippets", tmp_path / name))
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    (tmp_path / "words.txt").write_text("one two")
    for name, message in (
        ("objects.npy", "no plain array"),
        ("words.txt", "no whole numbers"),
        ("none.npy", "existing"),
    ):
        with pytest.raises(ValueError, match=message):
            main(command(folder, tmp_path / "out", "--snippets", tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    def refused(message, *flags, **keywords):
        with pytest.raises(ValueError, match=message):
            main(command(folder, tmp_path / "out", *flags, **keywords))

    np.save(tmp_path / "vectors.npy", np.ones((2, DIM)))
    refused("condition is 'label': leave out --snippets", "--bank", folder / "bank", checkpoint="label.pt")
    refused("condition is 'none': leave out --snippets random", "--snippets", "random", checkpoint="none.pt")
    refused("condition is 'snippet': leave out --labels balanced", "--labels", "balanced")
    refused("not read with the vectors", "--bank", folder / "bank", "--snippets", tmp_path / "vectors.npy")
    MemoryBank(torch.ones(2, DIM + 1), [1, 1]).save(tmp_path / "wide" / "bank.pth")
    MemoryBank(torch.ones(2, DIM), [1, 1], meta={"encoder": "f"}).save(tmp_path / "other" / "bank.pth")
    refused(f"dimension {DIM + 1}; the checkpoint takes {DIM}", "--bank", tmp_path / "wide")
    refused("encoder 'f'", "--bank", tmp_path / "other")

    refused(r"without a null; .* --model-options null_dropout=0\.1, or", "--guide", "null", "--guidance-scale", 2)
    refused("its condition is label", "--guide", folder / "label.pt", "--guidance-scale", 2)
    write_checkpoint(tmp_path / "big.pt", folder, "none", lambda c: c["codec"].update(scale=0.5))
    refused(r"scale is 0\.5, expected", "--guide", tmp_path / "big.pt", "--guidance-scale", 2)
    for codec in ((), ("--codec", "pixels")):
        refused(r"scale is 0\.0078\d+, expected 0\.5", *codec, checkpoint=tmp_path / "big.pt")

    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(7 * SIZE * SIZE * 3 * 3 - 1))
        refused("are needed")
    assert not (tmp_path / "out").exists()

    write_checkpoint(tmp_path / "nan.pt", folder, "none", lambda c: c["ema"]["x_embedder.proj.bias"].fill_(torch.nan))
    refused("are not finite", checkpoint=tmp_path / "nan.pt")
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_clustered_bank_for_a_network_of_own_features_warns(folder, tmp_path):
    write_checkpoint(tmp_path / "own.pt", folder, "snippet", lambda c: c["args"].update(snippet_from="own"))
    with pytest.warns(UserWarning, match="averages"):
        generator(folder, checkpoint=tmp_path / "own.pt")


@pytest.mark.parametrize("rule", ["k-means", "random subset", "every feature"])
def test_few_features_as_they_are_do_not_warn_a_network_of_own_features(folder, tmp_path, recwarn, rule):
    """A random subset, or every feature of a smaller store, such as the held-out images'."""
    write_checkpoint(tmp_path / "own.pt", folder, "snippet", lambda c: c["args"].update(snippet_from="own"))
    MemoryBank(torch.eye(3, DIM), [1, 1, 1], meta={"encoder": "e", "rule": rule}).save(tmp_path / "bank" / "bank.pth")
    generator(folder, "--bank", tmp_path / "bank", checkpoint=tmp_path / "own.pt")
    assert any("averages" in str(warning.message) for warning in recwarn) == (rule == "k-means")
