"""Glyphs with fonts that every environment has: those of matplotlib, and Latin letters in place of Han characters."""

import io
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from scripts import make_glyphs
from scripts.make_glyphs import main
from scripts.sources import open_source


@pytest.fixture
def latin(monkeypatch):
    """Command-line words that find two fonts with 26 shared letters."""
    monkeypatch.setattr(make_glyphs, "PACKAGES", {"DejaVuSans.ttf": "fonts-dejavu", "STIXGeneral.ttf": "fonts-stix"})
    monkeypatch.setattr(make_glyphs, "HAN", range(0x41, 0x5B))
    return ["--fonts", str(Path(matplotlib.get_data_path()) / "fonts")]


def read(path):
    with zipfile.ZipFile(path) as archive:
        return {name: np.array(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


def test_characters_are_classes_and_fonts_images(latin, tmp_path):
    main([*latin, "--out", str(tmp_path / "a.zip"), "--characters", "5", "--size", "32"])
    images = read(tmp_path / "a.zip")
    assert len(images) == 10
    assert all(image.shape == (32, 32) and image.max() > 200 and image[0].max() == 0 for image in images.values())
    source = open_source(tmp_path / "a.zip")
    assert np.bincount(source.labels).tolist() == [2] * 5
    again = tmp_path / "again" / "b.zip"
    main([*latin, "--out", str(again), "--characters", "5", "--size", "32"])
    assert again.read_bytes() == (tmp_path / "a.zip").read_bytes()


def test_fewer_characters_are_a_subset_of_more(latin, tmp_path):
    for count in (4, 9):
        main([*latin, "--out", str(tmp_path / f"{count}.zip"), "--characters", str(count)])
    few, more = read(tmp_path / "4.zip"), read(tmp_path / "9.zip")
    assert few.keys() < more.keys()
    assert all(np.array_equal(few[name], more[name]) for name in few)


def test_what_is_missing_is_named(latin, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"lacks fonts: `apt-get install fonts-dejavu fonts-stix`"):
        main(["--fonts", str(tmp_path), "--out", str(tmp_path / "a.zip")])
    with pytest.raises(ValueError, match="--characters 27: the 2 fonts share 26 characters"):
        main([*latin, "--out", str(tmp_path / "a.zip"), "--characters", "27"])
    with pytest.raises(SystemExit):
        main([*latin, "--out", str(tmp_path / "a.tar")])
    assert "a new file that ends in .zip" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
