"""Image files of every kind to squares of pixels, and every kind of source to the same list of images."""

import gzip
import io
import json
import shutil
import struct
import tarfile
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
        ((1, 1), [], (32, 32), (0, 0)),
        ((3, 2), [], (48, 32), (8, 0)),
        ((1000, 65), [(500, 32)], (500, 32), (234, 0)),
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


ORIENTATIONS = {  # EXIF value -> how the stored pixels are turned to be upright
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_ignored_as_by_adm_or_applied_on_request(orientation):
    pixels = smooth(4, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(read_image(saved(Image.fromarray(pixels), "png", exif=exif))), pixels)
    turned = read_image(saved(Image.fromarray(pixels), "png", exif=exif), upright=True)
    assert np.array_equal(np.asarray(turned), ORIENTATIONS[orientation](pixels))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("size", [(75, 50), (51, 130), (33, 33)])
def test_a_jpeg_is_squared_as_by_hand(mode, size):
    """From the file on: full decoding, PIL's conversion, ADM's halving, resize and crop, grey repeated last."""
    image = Image.fromarray(smooth(5, size[1], size[0])).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 8
    file = saved(image, "jpeg", quality=90, exif=exif)
    by_hand = Image.open(file).convert("RGB")
    if min(size) >= 2 * 24:
        by_hand = by_hand.resize((by_hand.width // 2, by_hand.height // 2), Image.Resampling.BOX)
    scale = 24 / min(by_hand.size)
    by_hand = by_hand.resize((round(by_hand.width * scale), round(by_hand.height * scale)), Image.Resampling.BICUBIC)
    left, top = (by_hand.width - 24) // 2, (by_hand.height - 24) // 2
    expected = np.asarray(by_hand)[top : top + 24, left : left + 24].transpose(2, 0, 1)
    file.seek(0)
    assert np.array_equal(square(read_image(file), 24, 3, on_black=False), expected)


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


def tarred(folder, path, prefix="", extra=(), **options):
    """A tar of the folder's images, in reverse order, and then of the members `extra` with four bytes each."""
    with tarfile.open(path, "w", **options) as archive:
        for file in sorted(folder.rglob("*.PNG"), reverse=True):
            archive.add(file, prefix + file.relative_to(folder).as_posix())
        for name, changes in extra:
            member = tarfile.TarInfo(name)
            member.size = 4
            for key, value in changes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(b"data"))
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


def test_edm2s_zip_has_its_labels_and_no_classes_of_its_folders(tmp_path):
    """Files of edm2's dataset_tool: folders of a thousand images each, whatever the class, and labels beside them."""
    with zipfile.ZipFile(tmp_path / "imagenet.zip", "w", zipfile.ZIP_STORED) as archive:
        labels = []
        for i in range(6):
            name = f"{i // 3:05d}/img{i:08d}.png"
            archive.writestr(name, saved(Image.fromarray(smooth(i, 16, 16)), "png").read())
            labels.append([name, (7 * i) % 5])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    source = open_source(tmp_path / "imagenet.zip")
    assert source.labels.tolist() == [0, 2, 4, 1, 3, 0]
    assert source.class_names is None
    assert source.names[3] == "00001/img00000003.png"
    assert pixels(source) == [smooth(i, 16, 16).tolist() for i in range(6)]


def test_tars_of_any_writer_hold_the_same_images_as_the_folder(folder, tmp_path):
    first = open_source(folder)
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    paths = [tarred(folder, tmp_path / f"{kind}.tar", format=kind) for kind in formats]
    other = [("./cat/._1.PNG", {}), ("notes.txt", {}), ("__MACOSX/x.png", {}), ("._cat.tar", {})]
    paths.append(tarred(folder, tmp_path / "dotted.tar", "./", other))  # as `tar -c .` makes it
    for path in paths:
        source = open_source(path)
        assert (source.names, source.class_names, source.hash) == (first.names, first.class_names, first.hash)
        assert source.labels.tolist() == first.labels.tolist()
        assert pixels(source) == pixels(first)
    long = "train/" + "a long folder name/" * 12
    assert open_source(tarred(folder, tmp_path / "long.tar", long)).class_names == first.class_names


def test_a_tar_of_tars_is_imagenets_own_file(folder, tmp_path):
    """ILSVRC2012_img_train.tar: a tar a class, without folders inside."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("dog", "bird", "cat"):
            archive.add(tarred(folder / name, tmp_path / f"{name}.tar"), f"{name}.tar")
    first, source = open_source(folder), open_source(tmp_path / "train.tar")
    assert (source.names, source.class_names, source.hash) == (first.names, first.class_names, first.hash)
    assert source.labels.tolist() == first.labels.tolist()
    assert pixels(source) == pixels(first)
    flat = open_source(tmp_path / "cat.tar")
    assert (flat.names, flat.labels) == ([f"{i}.PNG" for i in range(4)], None)


def test_a_tar_may_bring_dataset_json(folder, tmp_path):
    names = [f"{name}/{i}.PNG" for name in ("bird", "cat", "dog") for i in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    with tarfile.open(tarred(folder, tmp_path / "a.tar"), "a") as archive:
        archive.add(tmp_path / "dataset.json", "dataset.json")
    assert open_source(tmp_path / "a.tar").labels.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("../x.png", {}), r"holds '\.\./x\.png', a name that leads out of it"),
        (("/tmp/x.png", {}), "a name that leads out of it"),
        (("cat/../../x.txt", {}), "a name that leads out of it"),
        (
            ("x.png", {"type": tarfile.SYMTYPE, "linkname": "cat/1.PNG", "size": 0}),
            r"x\.png not as a file but as a link",
        ),
        (("x.png", {"type": tarfile.LNKTYPE, "linkname": "cat/1.PNG", "size": 0}), "--hard-dereference"),
        (("cat/1.PNG", {}), r"holds cat/1\.PNG twice"),
        (("./cat/1.PNG", {}), r"holds cat/1\.PNG twice"),
        (("cat.tar", {}), r"\(cat\.tar in it\) is no tar, or was cut short"),
    ],
)
def test_odd_members_of_a_tar_are_named(folder, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        open_source(tarred(folder, tmp_path / "a.tar", extra=[extra]))


def test_a_tar_cut_anywhere_is_refused(folder, tmp_path):
    whole = tarred(folder, tmp_path / "whole.tar").read_bytes()
    end = whole.rstrip(b"\0")  # but for padding
    end = len(end) + -len(end) % 512
    cuts = [100, 512, 700, 1024, end // 2, end // 512 // 2 * 512, end - 512, end, end + 100]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"source .*cut\.tar is no tar, or was cut short: "):
            open_source(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # the mark of the end is there
    assert len(open_source(tmp_path / "cut.tar").names) == 12
    middle = end // 512 // 2 * 512
    (tmp_path / "cut.tar").write_bytes(whole[:1536] + b"x" * middle + whole[1536 + middle :])
    with pytest.raises(ValueError, match="no tar, or was cut short"):
        open_source(tmp_path / "cut.tar")

    for cut in (end, end - 600):  # within the last tar of a tar
        (tmp_path / "z.tar").write_bytes(whole[:cut])
        with tarfile.open(tmp_path / "outer.tar", "w") as archive:
            archive.add(tmp_path / "whole.tar", "a.tar")
            archive.add(tmp_path / "z.tar", "z.tar")
        with pytest.raises(ValueError, match=r"outer\.tar \(z\.tar in it\) is no tar, or was cut short: "):
            open_source(tmp_path / "outer.tar")


def test_a_tar_that_shrinks_after_listing_is_an_unreadable_image(folder, tmp_path):
    source = open_source(tarred(folder, tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    with pytest.raises(UNREADABLE, match="shorter than when it was listed"):
        source.image(0)


def totals(source):
    return [int(np.asarray(source.image(i % 4)).sum()) for i in range(200)]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_processes_read_one_archive_at_the_same_time(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in range(4):  # noise, so that no read buffer holds two of them
            image = Image.fromarray(np.random.default_rng(seed).integers(256, size=(64, 64, 3), dtype=np.uint8))
            content = saved(image, "png").read()
            archive.writestr(f"{seed}.png", content)
            member = tarfile.TarInfo(f"{seed}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / f"a.{kind}")
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


def test_images_beside_folders_are_taken_without_labels(folder, capsys):
    """As people keep their photos."""
    (folder / "cat/1.PNG").rename(folder / "1.PNG")
    source = open_source(folder)
    assert len(source.names) == 12
    assert source.labels is None
    assert capsys.readouterr().out == (
        "note: images lie beside the folders, such as 1.PNG: folders give no labels here\n"
    )


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_photos_of_unread_formats_are_counted_and_left_out(folder, tmp_path, capsys, kind):
    expected = open_source(folder)
    assert capsys.readouterr().out == ""
    for name in ("IMG_2.HEIC", "IMG_1.heic", ".hidden.heic", "notes.txt"):
        (folder / "cat" / name).write_bytes(b"x")
    path = folder if kind == "folder" else shutil.make_archive(tmp_path / "a", kind, folder)
    source = open_source(path)
    assert source.names == expected.names
    assert np.array_equal(source.labels, expected.labels)
    assert all(np.array_equal(source.image(i), expected.image(i)) for i in (0, 5))
    said = capsys.readouterr().out
    assert said == "note: 2 photos in formats that cannot be read are left out, such as cat/IMG_1.heic\n"


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
        (lambda path: bad_file(path, "x.rar", b""), "no folder, .zip, .tar, .npz or idx3-ubyte file"),
        (lambda path: bad_file(path, "x.tar", b""), "is no tar, or was cut short: empty file"),
        (lambda path: bad_file(path, "x.tar", bytes(10240)), "holds no images: expected files ending in"),
        (lambda path: bad_file(path, "x.tar", b"no tar" * 1000), "is no tar, or was cut short"),
        (lambda path: bad_file(path, "x.tar.gz", b""), "is compressed, so that no image in it can be read alone"),
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
