"""The command from store to bank: its files against brute force, its reruns, its processes and its refusals."""

import json
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from dataset import layout
from memory.bank import MemoryBank
from memory.build_bank import auc, main, memory_of_images
from memory.kmeans import normalised

FILES = ("bank.pth", "bank.freq", "bank.assign")


def write_store(path, features, **changes):
    """A complete store with these features (N, V, F) of the encoder "tiny" and latents of zeros."""
    n, views, dim = features.shape
    meta = {
        "format": 1,
        "num_images": n,
        "num_views": views,
        "views": ["original", "mirrored"][:views],
        "image_size": 2,
        "image_channels": 1,
        "codec": {"name": "test", "moments_shape": [2, 1, 1], "dtype": "float16"},
        "encoders": {"tiny": {"name": "tiny", "dim": dim}},
        "patches": {},
        "has_images": False,
        "fingerprint": "a" * 64,
        "complete": True,
    } | changes
    for file, (shape, dtype) in layout(meta).items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(path / file, features.astype(dtype) if file.startswith("features") else np.zeros(shape, dtype))
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def make_features(n, seed):
    """Two views (n, 2, 12) around 20 points shared by all seeds, every sixth image the same."""
    middle = np.random.default_rng(0).normal(size=(20, 1, 12))
    rng = np.random.default_rng(seed)
    features = middle[rng.integers(20, size=n)] + 0.4 * rng.normal(size=(n, 2, 12))
    features[::6] = features[0]
    return features.astype(np.float16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 301 images with 40 held out beside it."""
    folder = tmp_path_factory.mktemp("data")
    write_store(folder / "clothes-holdout", make_features(40, 2))
    return write_store(folder / "clothes", make_features(301, 1))


def command(store, out, *more):
    return ["--store", str(store), "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def built(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("banks") / "clothes"
    main(command(store, out, "--k", 60, "--passes", 4))
    return out


def features_of(store):
    return torch.from_numpy(np.load(store / "features" / "tiny.npy"))


def cosine_to(bank, features):
    """Cosines (N, K) in float64."""
    unit = torch.nn.functional.normalize
    return unit(features.double(), dim=-1) @ unit(bank.snippets.double(), dim=-1).T


def test_assignment_and_frequencies_are_those_of_the_stored_rows(store, built):
    bank, features = MemoryBank.load(built), features_of(store)
    assert bank.snippets.shape == (60, 12)
    assert bank.snippets.dtype == torch.float32
    assert bank.assignment.shape == (301, 2)
    for view in range(2):
        cosine = cosine_to(bank, features[:, view])
        chosen = cosine.gather(1, bank.assignment[:, view, None].long())[:, 0]
        assert torch.allclose(chosen, cosine.amax(1), rtol=0, atol=1e-12)
    assert torch.equal(bank.freq, torch.bincount(bank.assignment[:, 0], minlength=60))
    assert isinstance(torch.load(built / "bank.freq", weights_only=True), list)


def test_report_equals_its_definitions(store, built):
    bank = MemoryBank.load(built)
    meta, freq = bank.meta, bank.freq.numpy()
    assert meta["rows_of_one_image"] == sum(freq == 1) / 60
    assert meta["draws_of_one_image"] == pytest.approx(sum(freq == 1) / 301)
    sizes = meta["cluster_sizes"]
    assert (sizes["min"], sizes["median"], sizes["max"]) == (freq.min(), np.median(freq), freq.max())
    histogram = sizes["histogram"]
    edges = np.array(histogram["edges"])
    inside = [((freq >= low) & (freq < high)).sum() for low, high in pairwise(edges)]
    assert histogram["rows"] == inside
    assert sum(inside) == 60
    train = cosine_to(bank, features_of(store)[:, 0]).amax(1).numpy()
    held = cosine_to(bank, features_of(store.with_name("clothes-holdout"))[:, 0]).amax(1).numpy()
    assert meta["cosine_train"]["mean"] == pytest.approx(train.mean(), abs=1e-6)
    assert meta["cosine_holdout"]["median"] == pytest.approx(np.median(held), abs=1e-6)
    labels = np.repeat([1, 0], [301, 40])
    # the repeated image ties with itself up to the rounding of this reference
    reference = roc_auc_score(labels, np.concatenate([train, held]).round(9))
    assert meta["auc_train_vs_holdout"] == pytest.approx(reference, abs=1e-3)
    assert len(meta["inertia"]) == 4
    assert meta["inertia"] == sorted(meta["inertia"], reverse=True)
    expected = {"encoder": "tiny", "k": 60, "iterations": 4, "seed": 0, "dim": 12, "store": str(store), "parent": None}
    assert {key: meta[key] for key in expected} == expected
    assert meta["store_fingerprint"] == "a" * 64


def test_histogram_is_a_picture(built):
    with Image.open(built / "histogram.png") as picture:
        assert picture.size == (600, 400)
        assert len(picture.convert("L").getcolors()) > 2


def test_auc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    seen, unseen = rng.integers(0, 8, size=200) + 1.0, rng.integers(0, 8, size=90) + 0.0
    labels = np.repeat([1, 0], [200, 90])
    assert auc(seen, unseen) == pytest.approx(roc_auc_score(labels, np.concatenate([seen, unseen])), abs=1e-12)
    assert auc(np.ones(5), np.ones(3)) == 0.5


def test_large_clusters_share_the_bins_of_the_histogram():
    report = memory_of_images(np.array([0, 1, 1, 7, 1000]))
    histogram = report["cluster_sizes"]["histogram"]
    assert sum(histogram["rows"]) == 5
    assert len(histogram["rows"]) <= 50
    assert histogram["edges"][-1] > 1000
    assert (report["rows_of_one_image"], report["draws_of_one_image"]) == (0.4, 2 / 1009)


def test_two_processes_write_the_same_bank_bit_for_bit(store, built, environment, tmp_path):
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = command(store, tmp_path / "two", "--k", 60, "--passes", 4)
    subprocess.run([*torchrun, "-m", "memory.build_bank", *arguments], env=environment, check=True, timeout=120)
    for file in FILES:
        assert (tmp_path / "two" / file).read_bytes() == (built / file).read_bytes(), file
    one, two = (json.loads((folder / "bank.json").read_text()) for folder in (built, tmp_path / "two"))
    runs = [meta.pop("run") for meta in (one, two)]
    assert one == two
    assert [run["processes"] for run in runs] == [1, 2]
    assert runs[1]["command"] == ["build_bank.py", *map(str, arguments)]
    assert all(run["code"] and run["seconds"] > 0 for run in runs)


def test_the_same_command_again_changes_nothing_and_another_is_refused(store, built, capsys):
    before = {file: file.stat().st_mtime_ns for file in built.iterdir()}
    main(command(store, built, "--encoder", "tiny", "--k", 60, "--iterations", 4))
    assert "already holds this bank" in capsys.readouterr().out
    for more, difference in (
        (("--k", 61, "--passes", 4), "k is 60, not 61"),
        (("--k", 60, "--passes", 3), "iterations is 4, not 3"),
        (("--k", 60, "--passes", 4, "--seed", 1), "seed is 0, not 1"),
        (("--k", "all"), "rule is k-means, not every feature"),
    ):
        with pytest.raises(ValueError, match=difference):
            main(command(store, built, *more))
    assert {file: file.stat().st_mtime_ns for file in built.iterdir()} == before


def test_seed_decides_centroids_and_order(store, built, tmp_path):
    main(command(store, tmp_path / "other", "--k", 60, "--passes", 4, "--seed", 1))
    assert not torch.equal(MemoryBank.load(tmp_path / "other").snippets, MemoryBank.load(built).snippets)


def test_k_all_keeps_every_feature_in_random_order(store, tmp_path):
    main(command(store, tmp_path, "--k", "all"))
    bank, features = MemoryBank.load(tmp_path), features_of(store)
    assert bank.freq.tolist() == [1] * 301
    own = bank.assignment.long()
    assert torch.equal(own[:, 0].sort().values, torch.arange(301))
    assert torch.equal(own[:, 0], own[:, 1])
    assert torch.equal(bank.snippets[own[:, 0]], normalised(features[:, 0]))
    assert abs(spearmanr(own[:, 0], range(301)).statistic) < 0.2  # a row's position says nothing about its image
    assert bank.meta["rule"] == "every feature"
    assert bank.meta["cosine_train"]["mean"] == pytest.approx(1)
    assert bank.meta["rows_of_one_image"] == 1.0


def test_zero_iterations_keep_a_random_subset(store, tmp_path):
    main(command(store, tmp_path, "--k", 50, "--iterations", 0))
    bank, unit = MemoryBank.load(tmp_path), normalised(features_of(store)[:, 0])
    rows = [(unit == snippet).all(1).nonzero()[0].item() for snippet in bank.snippets]
    assert bank.meta["rule"] == "random subset"
    assert bank.meta["inertia"] == []
    assert bank.freq.sum() == 301
    assert abs(spearmanr(rows, range(50)).statistic) < 0.4


def test_without_a_held_out_store_the_comparison_is_null(tmp_path, capsys):
    store = write_store(tmp_path / "alone", make_features(30, 1)[:, :1])
    main(command(store, tmp_path / "bank", "--k", 5, "--passes", 1))
    meta = MemoryBank.load(tmp_path / "bank").meta
    assert meta["cosine_holdout"] is None
    assert meta["auc_train_vs_holdout"] is None
    assert "encode with --holdout" in capsys.readouterr().out


def test_bad_stores_and_folders_are_refused_before_the_work(store, tmp_path):
    small = make_features(30, 1)
    out = tmp_path / "bank"
    with pytest.raises(ValueError, match=r"--k 302: the store .*clothes has 301 images"):
        main(command(store, out, "--k", 302))
    with pytest.raises(ValueError, match="no store at"):
        main(command(tmp_path / "nothing", out))
    with pytest.raises(ValueError, match=r"no features of encoder 'huge'; it has tiny"):
        main(command(store, out, "--encoder", "huge", "--k", 5))
    half = write_store(tmp_path / "half", small, complete=False)
    with pytest.raises(ValueError, match="half is incomplete"):
        main(command(half, out, "--k", 5))
    empty = write_store(tmp_path / "empty", small[:0])
    with pytest.raises(ValueError, match="empty has 0 images"):
        main(command(empty, out, "--k", "all"))
    both = write_store(tmp_path / "both", small, encoders={"tiny": {"dim": 12}, "large": {"dim": 12}})
    with pytest.raises(ValueError, match=r"--encoder: .*has features of tiny, large; name one"):
        main(command(both, out, "--k", 5))
    assert not out.exists()


@pytest.mark.parametrize("part", ["bad", "bad-holdout"])
def test_features_with_nan_or_zeros_are_named_by_file_and_row(tmp_path, part):
    features = {"bad": make_features(30, 1), "bad-holdout": make_features(20, 2)}
    features[part][4, 0, 3], features[part][9, 1] = np.nan, 0
    for name, values in features.items():
        write_store(tmp_path / name, values)
    with pytest.raises(ValueError, match=rf"/{part}/features/tiny.npy: .*\(rows 4, 9\)"):
        main(command(tmp_path / "bad", tmp_path / "bank", "--k", 5, "--passes", 1))
    assert not (tmp_path / "bank").exists()


def test_a_bank_whose_writing_was_cut_off_is_made_again(store, built, tmp_path, monkeypatch):
    save = MemoryBank.save

    def cut_off(bank, path):
        save(bank, path)
        path.with_suffix(".json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryBank, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main(command(store, tmp_path / "bank", "--k", 60, "--passes", 4))
    monkeypatch.undo()
    main(command(store, tmp_path / "bank", "--k", 60, "--passes", 4))
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == sorted(path.name for path in built.iterdir())
    assert (tmp_path / "bank" / "bank.pth").read_bytes() == (built / "bank.pth").read_bytes()


def test_a_foreign_or_damaged_bank_is_not_overwritten(store, tmp_path):
    MemoryBank(torch.eye(3, 12), [1, 1, 1]).save(tmp_path / "bank.pth")
    (tmp_path / "bank.json").unlink()
    with pytest.raises(ValueError, match=r"bank.pth exists without a bank.json"):
        main(command(store, tmp_path, "--k", 5))
    (tmp_path / "bank.pth").unlink()  # as a run leaves it that was stopped before bank.pth took its name
    main(command(store, tmp_path, "--k", 5, "--passes", 1))
    (tmp_path / "bank.assign").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bank.assign is not the file that bank.json describes"):
        main(command(store, tmp_path, "--k", 5, "--passes", 1))


def test_a_bank_does_not_go_into_its_store(store, capsys):
    before = sorted(store.rglob("*"))
    for out in (store, store / "features" / ".."):
        with pytest.raises(SystemExit):
            main(command(store, out, "--k", 5))
        assert f"--out {out} is the folder of the store: expected one of the bank's own" in capsys.readouterr().err
    assert sorted(store.rglob("*")) == before


@pytest.mark.parametrize("flags", [("--k", "0"), ("--k", "many"), ("--passes", "-1"), ("--seed", "-1")])
def test_bad_flags_are_named(store, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        main(command(store, tmp_path, *flags))
    assert f"{flags[0]} {flags[1]}: expected" in capsys.readouterr().err
