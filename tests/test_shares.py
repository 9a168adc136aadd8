"""Shares of groups by closed forms: samples that are training images find themselves, and controls do not."""

import io
import json
import math
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from memory.files import sha256
from scripts import encode_dataset, shares

ENCODER = "test_vit@32"
GREYS = {  # of classes and fonts: many a grey is nearest to one of another class
    "a": {"black": 0, "bold": 10, "light": 30, "thin": 32},
    "b": {"black": 1, "bold": 29, "light": 31, "thin": 200},
    "c": {"black": 2, "bold": 11, "light": 28},
}
HELD_OUT = {"a": {"x": 9}, "b": {"x": 100}, "c": {"x": 15}}
PIXELS = ["--codec", "pixels", "--image-size", "32", "--workers", "0"]
FONTS = ["black", "bold", "light", "thin"]


def encode(source, out, classes, words=()):
    """A store of grey images in class folders."""
    with zipfile.ZipFile(source, "w") as archive:
        for name, files in classes.items():
            for file, grey in files.items():
                stream = io.BytesIO()
                Image.new("L", (32, 32), grey).save(stream, "png")
                archive.writestr(f"{name}/{file}.png", stream.getvalue())
    encode_dataset.main([str(source), "--out", str(out), *PIXELS, *words])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny vision transformer with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def store(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    words = ["--encoder", ENCODER, "--encoder-weights", str(weights)]
    encode(folder / "training.zip", folder / "store", GREYS, words)
    encode(folder / "held-out.zip", folder / "store-holdout", HELD_OUT, words)
    return folder / "store"


@pytest.fixture
def count(tmp_path, capsys):
    """Run the command on samples of one grey each; what it printed, and its JSON."""

    def run(store, greys, *words, side=32, **settings):
        pixels = np.array(greys, np.uint8)[:, None, None, None]
        np.savez(tmp_path / "samples.npz", arr_0=np.broadcast_to(pixels, (len(greys), side, side, 3)))
        made = {"num_images": len(greys), "complete": True, "settings": settings}
        (tmp_path / "samples.json").write_text(json.dumps(made))
        out = tmp_path / "shares.json"
        shares.main([str(tmp_path / "samples.npz"), "--store", str(store), "--out", str(out), *words])
        return capsys.readouterr().out, json.loads(out.read_text())

    return run


def of(found, row):
    return [found["groups"][font][row] for font in FONTS]


def test_within_classes(count, store):
    """Samples i of class i mod 3: a 11 of class b is nearest to its black 1, whatever others have."""
    greys = [0, 11, 2, 10, 29, 3, 30, 200, 28, 31, 31, 6]  # a, b, c, a, …
    fonts = ["black", "black", "black", "bold", "bold", "black", "light", "thin", "light", "light", "light", "black"]
    printed, found = count(store, greys, labels="balanced", seed=0)
    expected = [5 / 18, 5 / 18, 5 / 18, 3 / 18]  # thirds of ¼ + ¼ + ⅓, and of ¼ + ¼
    assert of(found, "samples") == [fonts.count(font) / 12 for font in FONTS]
    np.testing.assert_allclose(of(found, "expected"), expected, rtol=1e-12)
    np.testing.assert_allclose(of(found, "ratio"), [18 / 12, 18 / 30, 18 / 15, 6 / 12], rtol=1e-12)
    np.testing.assert_allclose(of(found, "standard_error"), [(p * (1 - p) / 12) ** 0.5 for p in expected], rtol=1e-12)
    assert list(found["groups"]) == ["thin", "bold", "light", "black"]  # by the ratio
    assert found["within_classes"]
    assert found["num_images"] == {"samples": 12, "random training images": 11, "held-out images": 3}

    # Nearest other of the class: black bold black bold, bold black light, light thin bold bold, thin light light.
    assert of(found, "random training images") == [2 / 11, 5 / 11, 3 / 11, 1 / 11]
    assert of(found, "held-out images") == [0, 2 / 3, 1 / 3, 0]  # 9 → 10, 15 → 11, 100 → 31
    distances = found["total_variation"]
    of_samples = (abs(5 - 5 / 18 * 12) + abs(2 - 5 / 18 * 12) + abs(4 - 5 / 18 * 12) + abs(1 - 2)) / 24
    assert distances["samples"]["distance"] == pytest.approx(of_samples)
    chance = sum((p * (1 - p) / 12) ** 0.5 for p in expected) / 2 * (2 / math.pi) ** 0.5
    assert distances["samples"]["chance"] == pytest.approx(chance)
    assert distances["random training images"]["distance"] == pytest.approx(2 / 11)  # two of 3, 3, 3, 2 are elsewhere
    assert f"samples (12): {of_samples:.4f}, by chance {chance:.4f}" in printed
    assert "| 16.67%   | 8.33%   |" in printed


def test_chance_is_that_of_draws():
    drawn, expected = np.random.default_rng(0), np.array([0.5, 0.2, 0.2, 0.1])
    rows = [shares.Shares(drawn.multinomial(400, expected) / 400, expected, 400) for _ in range(2000)]
    assert np.mean([row.total_variation() for row in rows]) == pytest.approx(rows[0].chance(), rel=0.03)


@pytest.mark.parametrize("space", ["latent", ENCODER])
def test_training_images_find_themselves(count, store, weights, space):
    """In both spaces, and without labels among all images, where two fonts of class a have neighbours elsewhere."""
    words = [] if space == "latent" else ["--encoder", ENCODER, "--encoder-weights", str(weights)]
    _, found = count(store, [grey for fonts in GREYS.values() for grey in fonts.values()], *words)
    assert found["space"] == space
    assert of(found, "samples") == pytest.approx([3 / 11, 3 / 11, 3 / 11, 2 / 11], rel=1e-12)
    assert of(found, "expected") == pytest.approx(of(found, "samples"), rel=1e-12)
    assert found["total_variation"]["samples"]["distance"] == pytest.approx(0, abs=1e-12)
    if space == "latent":  # 28 and 30 find b's bold 29; 29, 31 and 32 find lights; 200 finds 32
        of_others = {"black": 3, "bold": 2 + 2, "light": 3, "thin": 1}
        assert of(found, "random training images") == [of_others[font] / 11 for font in FONTS]


def test_without_names_groups_are_classes(count, tmp_path):
    """And then no search is within a class, though labels were drawn."""
    greys = {"t": {"0": 0, "1": 4, "2": 60}, "u": {"3": 50, "4": 56, "5": 70}}
    encode(tmp_path / "a.zip", tmp_path / "clothes", greys)
    encode(tmp_path / "b.zip", tmp_path / "clothes-holdout", {"t": {"6": 1}, "u": {"7": 52}})
    _, found = count(tmp_path / "clothes", [0, 3, 5, 61, 57, 90], labels="random", seed=1)
    assert (found["by"], found["within_classes"]) == ("class", False)
    errors = {"standard_error": pytest.approx((0.25 / 6) ** 0.5), "ratio": pytest.approx(4 / 3)}
    controls = {"random training images": 4 / 6, "held-out images": 0.5}  # 0, 4, 56 and 70 find a t
    assert found["groups"]["t"] == {"expected": 0.5, "samples": 4 / 6} | errors | controls
    encode(tmp_path / "c.zip", tmp_path / "flat", {"": {"0": 0, "1": 1}})
    shutil.copytree(tmp_path / "flat", tmp_path / "flat-holdout")
    with pytest.raises(ValueError, match="neither file names that repeat nor labels"):
        count(tmp_path / "flat", [0, 1, 2, 3])
    with pytest.raises(ValueError, match="no labels: leave out --by class"):
        count(tmp_path / "flat", [0, 1, 2, 3], "--by", "class")


def test_groups_are_classes_on_request(count, store):
    """Though file names are shared: as those of images that are numbered in each class are."""
    _, found = count(store, [0, 10, 29, 200, 2, 11], "--by", "class", labels="balanced", seed=0)
    assert (found["by"], found["within_classes"]) == ("class", False)
    rows = {name: (row["expected"], row["samples"]) for name, row in found["groups"].items()}
    assert rows == {
        name: pytest.approx(shares)
        for name, shares in (("a", (4 / 11, 2 / 6)), ("b", (4 / 11, 2 / 6)), ("c", (3 / 11, 2 / 6)))
    }


def test_a_search_among_all_copies_no_store():
    class OnDisk(np.ndarray):
        def __getitem__(self, index):
            assert isinstance(index, slice), "read a part at a time"
            return super().__getitem__(index)

    stored = np.arange(20, dtype=np.float32).reshape(10, 1, 2).view(OnDisk)
    space, zeros = SimpleNamespace(points=lambda kept: kept), np.zeros(10, np.int64)
    rows = shares.nearest_rows(torch.tensor([[4.0, 5], [19, 19]]), zeros[:2], stored, zeros, space, None, "")
    assert rows.tolist() == [2, 9]


def test_names_that_come_twice_are_groups(tmp_path):
    """As of two pictures by each hand."""
    (tmp_path / "files.txt").write_text("a/one.png\nb/one.png\na/two.png\nb/two.png\n")
    store = SimpleNamespace(path=tmp_path, labels=np.array([0, 1, 0, 1]), meta={"num_classes": 2, "class_names": None})
    twice = shares.grouped(store, False, None)
    assert (twice.names, twice.groups.tolist()) == (["one", "two"], [0, 0, 1, 1])
    (tmp_path / "files.txt").write_text("a/one.png\nb/one.png\na/two.png\nb/three.png\n")
    once = shares.grouped(store, False, None)
    assert (once.names, once.groups.tolist()) == (["0", "1"], [0, 1, 0, 1])


def test_labels_of_a_file(count, store, tmp_path):
    np.save(tmp_path / "labels.npy", np.array([1, 2]))
    digest = sha256(tmp_path / "labels.npy")
    words = ["--labels", str(tmp_path / "labels.npy")]
    _, found = count(store, [11, 11, 11, 11], *words, labels=digest, seed=0)
    assert of(found, "samples") == [0.5, 0.5, 0, 0]  # b's black is 1, c's bold 11
    with pytest.raises(ValueError, match=rf"--labels None: .*the file whose SHA-256 is {digest}; name it"):
        count(store, [11] * 4, labels=digest, seed=0)
    with pytest.raises(ValueError, match=r"labels\.npy: .*the file whose SHA-256 is 0123; name it"):
        count(store, [11] * 4, *words, labels="0123", seed=0)
    np.save(tmp_path / "labels.npy", np.array([1, 3]))
    with pytest.raises(ValueError, match="class 3, and the store has 3"):
        count(store, [11] * 4, *words, labels=sha256(tmp_path / "labels.npy"), seed=0)


@pytest.mark.parametrize(("left", "controls"), [(1, [10, 3]), (0, [11, 2])])
def test_controls_without_a_neighbour_are_left_out(count, store, tmp_path, left, controls):
    """Class c with one image, which may not find itself, and with none, so that its held-out image finds nothing."""
    for part in ("store", "store-holdout"):
        shutil.copytree(store.with_name(part), tmp_path / part)
    np.save(tmp_path / "store" / "labels.npy", [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1 + left])
    np.save(tmp_path / "labels.npy", np.array([0, 1]))
    words = ["--labels", str(tmp_path / "labels.npy")]
    greys = [grey for fonts in GREYS.values() for grey in fonts.values()]
    _, found = count(tmp_path / "store", greys, *words, labels=sha256(tmp_path / "labels.npy"), seed=0)
    assert list(found["num_images"].values()) == [11, *controls]


def test_what_cannot_be_compared_is_named(count, store, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"its images are \(16, 16\), those of .* \(32, 32\)"):
        count(store, [0] * 4, side=16)
    for part in ("store", "store-holdout"):
        shutil.copytree(store.with_name(part), tmp_path / part)
    np.save(tmp_path / "store" / "labels.npy", np.minimum(np.load(store / "labels.npy"), 1))
    with pytest.raises(ValueError, match="no image of class 2, which was drawn"):
        count(tmp_path / "store", [0] * 4, labels="balanced", seed=0)
    for words, message in ((["--encoder-weights", "x"], "needs --encoder"), (["--batch-size", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            count(store, [0] * 4, *words)
        assert message in capsys.readouterr().err
