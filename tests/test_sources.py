"""Image files of every kind to squares of pixels, and every kind of source to the same list of images."""

import gzip
import io
import json
import struct
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from scripts.images import UNREADABLE, centre_crop, read_image, square
from scripts.sources import open_source


def smooth(seed, height, width, channels=3):
    """A structured random image, uint8 (height, width, channels) or (height, width)."""
    coarse = np.random.default_rng(seed).integers(256, size=(5, 5, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return image if channels == 3 else image[..., 0]


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


@pytest.mark.parametrize(
    ("size", "halved", "resized", "corner"),
    [
        ((100, 70), [(50, 35)], (46, 32), (7, 0)),
        ((70, 140), [(35, 70)], (32, 64), (0, 16)),
        ((64, 64), [(32, 32)], (32, 32), (0, 0)),
        ((200, 131), [(100, 65), (50, 32)], (50, 32), (9, 0)),
        ((63, 80), [], (32, 41), (0, 4)),
        ((20, 33), [], (32, 53), (0, 10)),
        ((33, 20), [], (53, 32), (10, 0)),
    ],
)
def test_the_crop_is_adms(size, halved, resized, corner):
    image = expected = Image.fromarray(smooth(0, size[1], size[0]))
    for half in halved:
        expected = expected.resize(half, Image.Resampling.BOX)
    expected = np.asarray(expected.resize(resized, Image.Resampling.BICUBIC))
    expected = expected[corner[1] : corner[1] + 32, corner[0] : corner[0] + 32]
    assert np.array_equal(np.asarray(centre_crop(image, 32)), expected)


def test_small_grey_images_are_framed_and_others_resized():
    image = Image.fromarray(smooth(1, 28, 28, channels=1))
    framed = square(image, 32, 1, on_black=True)
    assert framed.shape == (1, 32, 32)
    assert np.array_equal(framed[0, 2:30, 2:30], np.asarray(image))
    assert framed.sum() == np.asarray(image).sum(dtype=int)
    for size, on_black in ((32, False), (56, True), (20, True)):
        assert np.array_equal(square(image, size, 1, on_black)[0], np.asarray(centre_crop(image, size)))
    repeated = square(image, 32, 3, on_black=True)
    assert np.array_equal(repeated, np.repeat(framed, 3, 0))
    assert np.array_equal(square(Image.fromarray(repeated.transpose(1, 2, 0)), 32, 1, False), framed)


def test_alpha_is_laid_on_white():
    pixels = np.dstack([smooth(2, 6, 6), np.full((6, 6), 255, np.uint8)])
    pixels[:3, :, 3], pixels[3, :, 3] = 0, 128
    image = read_image(saved(Image.fromarray(pixels), "png"))
    assert image.mode == "RGB"
    assert (np.asarray(image)[:3] == 255).all()
    assert np.array_equal(np.asarray(image)[4:], pixels[4:, :, :3])
    half = 255 + (pixels[3, :, :3].astype(float) - 255) * 128 / 255
    assert np.abs(np.asarray(image)[3] - half).max() <= 1


def test_other_modes_become_grey_or_rgb():
    pixels = smooth(3, 16, 16)
    rgb = Image.fromarray(pixels)
    palette = rgb.quantize(256)
    assert np.array_equal(np.asarray(read_image(saved(palette, "png"))), np.asarray(palette.convert("RGB")))
    transparent = palette.copy()
    transparent.putpixel((0, 0), 7)
    assert read_image(saved(transparent, "png", transparency=7)).getpixel((0, 0)) == (255, 255, 255)

    cmyk = read_image(saved(rgb.convert("CMYK"), "tiff"))
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk).astype(int) - pixels).max() <= 2

    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for kind in ("png", "tiff"):
        grey = read_image(saved(Image.fromarray(levels), kind))
        assert grey.mode == "L"
        assert np.array_equal(np.asarray(grey).ravel(), np.arange(256))

    bits = Image.fromarray(pixels[..., 0] > 128)
    assert np.array_equal(np.asarray(read_image(saved(bits, "png"))), (pixels[..., 0] > 128) * np.uint8(255))
    with pytest.raises(UNREADABLE, match="floating-point"):
        read_image(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff"))


def test_exif_orientation_is_applied():
    pixels = smooth(4, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image = read_image(saved(Image.fromarray(pixels), "png", exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images, with things beside them that are no images."""
    for label, name in enumerate(("bird", "cat", "dog")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(smooth(10 * label + i, 24, 20)).save(tmp_path / "folder" / name / f"{i}.PNG")
    (tmp_path / "folder/readme.txt").write_text("no image")
    (tmp_path / "folder/cat/._1.png").write_text("no image")
    return tmp_path / "folder"


def zipped(folder, path, prefix="", labels=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.PNG"), reverse=True):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def pixels(source):
    return [np.asarray(source.image(i)).tolist() for i in range(len(source.names))]


def test_folder_zip_and_npz_hold_the_same_images(folder, tmp_path):
    first = open_source(folder)
    assert first.names == [f"{name}/{i}.PNG" for name in ("bird", "cat", "dog") for i in range(4)]
    assert first.class_names == ["bird", "cat", "dog"]
    assert first.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert pixels(first)[5] == smooth(11, 24, 20).tolist()

    second = open_source(zipped(folder, tmp_path / "a.zip"))
    assert (second.names, second.class_names, second.hash) == (first.names, first.class_names, first.hash)
    nested = open_source(zipped(folder, tmp_path / "b.zip", "train/"))  # as `zip -r` of a folder makes it
    assert np.array_equal(nested.labels, first.labels)

    images = np.array(pixels(first), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images, labels=first.labels)
    np.savez_compressed(tmp_path / "b.npz", images=np.asfortranarray(images))
    np.savez(tmp_path / "c.npz", images=np.asfortranarray(images), arr_1=first.labels.astype(np.uint8))
    third, fourth, fifth = (open_source(tmp_path / f"{name}.npz") for name in "abc")
    assert third.names[:2] == ["00000000", "00000001"]
    assert np.array_equal(third.labels, first.labels)
    assert np.array_equal(fifth.labels, first.labels)
    assert fourth.labels is None
    for source in (second, nested, third, fourth, fifth):
        assert pixels(source) == pixels(first)
        assert not source.grey


def totals(source):
    return [int(np.asarray(source.image(i % 4)).sum()) for i in range(200)]


def test_processes_read_one_zip_at_the_same_time(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for seed in range(4):  # noise, so that no read buffer holds two of them
            image = Image.fromarray(np.random.default_rng(seed).integers(256, size=(64, 64, 3), dtype=np.uint8))
            archive.writestr(f"{seed}.png", saved(image, "png").read())
    source = open_source(tmp_path / "a.zip")
    expected = totals(source)  # the archive is open before the fork
    with get_context("fork").Pool(1) as pool:
        child = pool.apply_async(totals, (source,))
        assert totals(source) == expected
        assert child.get(timeout=60) == expected


def test_the_hash_knows_names_sizes_and_labels(folder, tmp_path):
    before = open_source(folder).hash
    assert open_source(folder).hash == before
    Image.fromarray(smooth(99, 30, 30)).save(folder / "cat/1.PNG")
    assert open_source(folder).hash != before
    relabelled = [[f"{name}/{i}.PNG", 5] for name in ("bird", "cat", "dog") for i in range(4)]
    assert open_source(zipped(folder, tmp_path / "l.zip", labels=relabelled)).hash != open_source(folder).hash


def test_labels_of_dataset_json(folder, tmp_path):
    names = [f"{name}/{i}.PNG" for name in ("bird", "cat", "dog") for i in range(4)]
    source = open_source(zipped(folder, tmp_path / "a.zip", labels=[[name, 7 - i % 3] for i, name in enumerate(names)]))
    assert source.labels.tolist() == [7 - i % 3 for i in range(12)]
    assert source.class_names is None
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.write(folder / "cat/1.PNG", "extra.png")
    with pytest.raises(ValueError, match=r"gives extra\.png the label None"):
        open_source(tmp_path / "a.zip")
    (folder / "dataset.json").write_text('{"labels": null}')
    assert open_source(folder).labels is None


def test_a_flat_folder_has_no_labels(folder):
    assert open_source(folder / "cat").labels is None
    (folder / "cat/1.PNG").rename(folder / "1.PNG")
    with pytest.raises(ValueError, match=r"images beside class folders, such as 1\.PNG"):
        open_source(folder)


def write_idx(path, array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_with_labels_beside_them(tmp_path, suffix):
    images = np.stack([smooth(i, 28, 28, channels=1) for i in range(5)])
    for part, count in (("train", 5), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8))
    source = open_source(tmp_path)
    assert np.array_equal(pixels(source), images)
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.names[4] == "00000004"
    assert source.grey
    assert source.on_black
    test = open_source(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    assert (len(test.names), test.labels.tolist()) == (3, [0, 1, 2])
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    assert open_source(tmp_path / f"t10k-images-idx3-ubyte{suffix}").labels is None


def bad_npz(path, **arrays):
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


def bad_file(path, name, content):
    (path / name).write_bytes(content)
    return path / name


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
IDX = struct.pack(">4I", 0x803, 2, 4, 4) + bytes(32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "no source at"),
        (lambda path: path, "holds no images: expected files ending in"),
        (lambda path: bad_file(path, "x.tar", b""), "no folder, .zip, .npz or idx3-ubyte file"),
        (lambda path: bad_file(path, "x.zip", b"PK"), "is no zip file, or was cut short"),
        (lambda path: bad_file(path, "x.npz", b"PK"), "is no npz file, or was cut short"),
        (lambda path: bad_npz(path, other=IMAGES), "has no array `arr_0` or `images`"),
        (lambda path: bad_npz(path, arr_0=IMAGES.astype(np.float32)), "float32 .*, expected uint8"),
        (lambda path: bad_npz(path, arr_0=IMAGES.transpose(0, 3, 1, 2)), "expected uint8"),
        (lambda path: bad_npz(path, arr_0=IMAGES[:0]), "holds no images"),
        (lambda path: bad_npz(path, arr_0=IMAGES, labels=np.zeros(3, int)), "one class number"),
        (lambda path: bad_npz(path, arr_0=IMAGES, labels=np.full(4, -1)), "one class number"),
        (lambda path: bad_npz(path, arr_0=IMAGES, labels=np.zeros(4)), "one class number"),
        (lambda path: bad_file(path, "a-idx3-ubyte", IDX[:-1]), "has 47 bytes, its header announces 48"),
        (lambda path: bad_file(path, "a-idx3-ubyte", b"\0\0\x08\x01" + IDX[4:]), "is no idx file"),
        (lambda path: bad_file(path, "a-idx3-ubyte", b"\0"), "is no idx file"),
        (lambda path: bad_file(path, "a-idx3-ubyte.gz", gzip.compress(IDX)[:-12]), "cut short or is not gzipped"),
    ],
)
def test_bad_sources_are_refused_by_name(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_source(make(tmp_path))
