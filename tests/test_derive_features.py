"""Derived features against their definitions, in both parts of a store and in a bank."""

import numpy as np
import pytest

from dataset import LatentDataset
from memory import build_bank
from memory.bank import MemoryBank
from scripts import derive_features, encode_dataset

NAME = "efficientnet-lite0@32"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    base = tmp_path_factory.mktemp("derive")
    images = np.random.default_rng(0).integers(256, size=(60, 16, 16), dtype=np.uint8)
    np.savez(base / "images.npz", arr_0=images, labels=np.arange(60) % 3)
    words = [str(base / "images.npz"), "--out", str(base / "store"), "--codec", "pixels", "--image-size", "16"]
    encode_dataset.main([*words, "--encoder", NAME, "--holdout", "0.3", "--workers", "0"])
    return base / "store"


def derived(store, rule):
    derive_features.main([rule, "--store", str(store), "--encoder", NAME])
    parts = [LatentDataset(path, rule) for path in (store, store.with_name("store-holdout"))]
    return [(np.array(part.labels), np.array(part.features[:, 0], np.float32)) for part in parts]


def test_random_vectors_are_an_image_s_own(store):
    (_, trained), (_, unseen) = derived(store, "random")
    every = np.concatenate([trained, unseen])
    cosines = every @ every.T - np.eye(60)
    np.testing.assert_allclose(np.linalg.norm(every, axis=1), 1, atol=1e-3)
    assert abs(cosines).max() < 0.2  # of 1,280 dimensions: no two images share anything
    (_, again), _ = derived(store, "random")
    np.testing.assert_array_equal(again, trained)


def test_class_means_are_a_label(store):
    (labels, trained), (unseen_labels, unseen) = derived(store, "class-mean")
    own = np.array(LatentDataset(store, NAME).features[:, 0], np.float64)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    for label in range(3):
        mean = own[labels == label].mean(0)
        for row in (*trained[labels == label], *unseen[unseen_labels == label]):
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-3)


def test_a_bank_is_built_from_them(store, tmp_path):
    derived(store, "random")
    build_bank.main(["--store", str(store), "--encoder", "random", "--out", str(tmp_path / "bank"), "--k", "all"])
    bank = MemoryBank.load(tmp_path / "bank")
    features = np.array(LatentDataset(store, "random").features[:, 0], np.float32)
    np.testing.assert_allclose(bank[bank.assignment[:, 0].long()].numpy(), features, atol=1e-3)


def test_what_is_there_already_is_not_replaced(store):
    derived(store, "random")
    with pytest.raises(ValueError, match="has other features 'random' already"):
        derive_features.main(["random", "--store", str(store), "--encoder", NAME, "--seed", "1"])
