"""Samples beside their nearest images: the right ones, at the right place, under a title."""

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import make_assets, neighbours
from scripts.neighbours import nearest_by_pixels


def test_nearest_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=generator)
    searched = torch.randint(256, (2100, 3, 4, 4), dtype=torch.uint8, generator=generator)
    searched[2050], searched[7], searched[1500] = samples[0], samples[1], samples[1]
    distances = (samples[:, None].long() - searched[None].long()).square().sum((2, 3, 4))
    assert torch.equal(nearest_by_pixels(samples, searched), distances.argmin(1))
    assert nearest_by_pixels(samples, searched)[:2].tolist() == [2050, 7]


def test_picture_shows_each_sample_beside_its_neighbour(root, tmp_path, capsys):
    """Samples that are shipped images, shifted in grey: their neighbours are those images, framed to 32 pixels."""
    source = ["--source", str(root / "assets" / "fashion-mnist"), "--out", str(tmp_path / "images")]
    make_assets.main(["images", *source, "--train", "30", "--test", "1"])
    images = make_assets.framed(
        make_assets.rows(tmp_path / "images", "train", "images-idx3")
    ).numpy()  # (30, 1, 32, 32)
    wanted = [11, 3, 29, 0, 11, 5, 8, 1, 2]
    samples = np.clip(images[wanted].astype(int) + 3, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=samples.repeat(3, 1).transpose(0, 2, 3, 1))
    words = [str(tmp_path / "samples.npz"), "--among", str(tmp_path / "images"), "--called", "the shipped images"]
    neighbours.main([*words, "--out", str(tmp_path / "pairs.png")])
    assert "9 pairs; left: sample, right: the nearest of the shipped images (30, by pixels)" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "pairs.png").convert("L"))
    assert picture.shape == (26 + 4 + 2 * (64 + 4), 4 + 8 * (128 + 4))
    assert picture[:26].std() > 10  # a title
    for place, row in enumerate(wanted):
        top, left = 26 + 4 + 68 * (place // 8), 4 + 132 * (place % 8)
        pair = picture[top : top + 64 : 2, left : left + 128 : 2]
        assert np.array_equal(pair[:, :32], samples[place, 0])
        assert np.array_equal(pair[:, 32:], images[row, 0])


def test_what_cannot_be_shown_is_refused(tmp_path):
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((2, 4, 6, 3), np.uint8))
    words = ["--among", str(tmp_path), "--out", str(tmp_path / "pairs.png")]
    with pytest.raises(SystemExit):
        neighbours.parse(["x.npz", *words, "--count", "0"])
    with pytest.raises(SystemExit):
        neighbours.parse(["x.npz", *words[:-1], str(tmp_path / "pairs")])
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    words[1] = str(tmp_path / "few.npz")
    with pytest.raises(ValueError, match=r"wide\.npz: its images are \(4, 6\), expected squares"):
        neighbours.main([str(tmp_path / "wide.npz"), *words])
