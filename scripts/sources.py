"""Where images come from: a folder, a zip, a tar, an npz or idx files, all as a numbered list of named images.

A source is listed once and sent to the other processes; files are opened by whoever reads an image, so that a source
can be pickled and survives a fork. Images are in the order of their names, whatever the file system's order.
"""

import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from memory.files import reading
from scripts.images import read_image

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD = (".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef")  # photos in formats that PIL does not read
IDX_IMAGES, IDX_LABELS = 0x00000803, 0x00000801  # magic numbers: unsigned bytes in three dimensions and in one
LABELS_FILE = "dataset.json"  # of the StyleGAN and EDM tools
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")  # no member can be read alone


@dataclass
class Source:
    """N images with names; subclasses say how image `index` is read.

    `labels` (N,) int64 or None, `class_names` where folders give them, `hash` of names, sizes and labels, `grey` if
    every image is known to have one channel, `on_black` if small images may be framed in black, `upright` if image
    files are to be turned as their EXIF orientation says.
    """

    path: Path
    names: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    hash: str
    grey: bool = False
    on_black: bool = False
    upright: bool = False

    def image(self, index: int) -> Image.Image:
        """Image `index` in mode L or RGB; raises one of `scripts.images.UNREADABLE` if it is damaged."""
        raise NotImplementedError


class FolderSource(Source):
    """Image files below a folder."""

    def image(self, index: int) -> Image.Image:
        with open(self.path / self.names[index], "rb") as stream:
            return read_image(stream, self.upright)


class ZipSource(Source):
    """Image files in a zip."""

    def image(self, index: int) -> Image.Image:
        with open_zip(self.path, os.getpid()).open(self.names[index]) as stream:
            return read_image(stream, self.upright)


@dataclass
class TarSource(Source):
    """Image files in a tar that is not compressed; `spans` (N, 2) int64 are the first byte and the length of each."""

    spans: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))

    def image(self, index: int) -> Image.Image:
        begin, size = self.spans[index].tolist()
        content = os.pread(open_tar(self.path), size, begin)
        if len(content) < size:
            raise OSError(f"{self.path} has become shorter than when it was listed")
        return read_image(io.BytesIO(content), self.upright)


class NpzSource(Source):
    """A uint8 array (N, H, W, c) or (N, H, W) in an npz."""

    def image(self, index: int) -> Image.Image:
        return array_image(npz_array(self.path)[index])


class IdxSource(Source):
    """An idx file of grey images, plain or gzipped, as MNIST and Fashion-MNIST come."""

    def image(self, index: int) -> Image.Image:
        return array_image(read_idx(self.path, IDX_IMAGES)[index])


def open_source(path: str | os.PathLike) -> Source:
    """List a source: a folder of images (class folders make labels), a folder with Fashion-MNIST's idx files, an idx
    file, a zip, a tar or an npz. Raises ValueError if it is none of these, holds no image, or its labels do not fit."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no source at {path}: expected a folder of images, a zip, a tar, an npz, or an idx file")
    if path.is_dir():
        training = sorted(path.glob("train-images-idx3-ubyte*"))
        return idx_source(training[0]) if training else folder_source(path)
    if path.suffix == ".zip":
        return zip_source(path)
    if path.suffix == ".tar":
        return tar_source(path)
    if path.name.endswith(PACKED_TARS):
        raise ValueError(
            f"source {path} is compressed, so that no image in it can be read alone: decompress it to a .tar"
        )
    if path.suffix == ".npz":
        return npz_source(path)
    if "idx3-ubyte" in path.name:
        return idx_source(path)
    raise ValueError(f"source {path} is no folder, .zip, .tar, .npz or idx3-ubyte file")


def folder_source(path: Path) -> FolderSource:
    sizes = dict(walk(path))
    labels_file = path / LABELS_FILE
    text = labels_file.read_text() if labels_file.is_file() else None
    return FolderSource(path, **described(path, sizes, text))


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Relative name and size in bytes of every image file below a folder, also of an unread kind; no hidden ones."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES + UNREAD):
            yield prefix + entry.name, entry.stat().st_size


def zip_source(path: Path) -> ZipSource:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist() if is_image(entry.filename)}
            text = archive.read(LABELS_FILE).decode() if LABELS_FILE in archive.namelist() else None
    except Exception as error:  # of every kind, whatever is wrong with the file
        raise ValueError(f"source {path} is no zip file, or was cut short ({error})") from error
    return ZipSource(path, **described(path, sizes, text))


def is_image(name: str) -> bool:
    """Whether a file in an archive is an image by its suffix, also of an unread kind, and not hidden."""
    return name.lower().endswith(SUFFIXES + UNREAD) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a name in an archive is hidden, as a Mac's notes about files are."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def tar_source(path: Path) -> TarSource:
    """A tar of images, listed once by its headers. A tar inside it counts as a folder of its name, so that ImageNet's
    own file, a tar of one tar a class, has the names and labels of the unpacked class folders."""
    spans, text = {}, None
    with open(path, "rb", buffering=0) as archive:  # a buffer would read ahead, a megabyte a file on some disks
        members = tar_members(archive, path, 0, path.stat().st_size)
        for name, begin, size in tqdm(members, unit="file", desc=f"listing {path.name}", mininterval=1, delay=2):
            if name in spans:
                raise ValueError(f"source {path} holds {name} twice, as an updated archive does: pack it anew")
            if is_image(name):
                spans[name] = begin, size
            elif name == LABELS_FILE:
                text = os.pread(archive.fileno(), size, begin).decode()
    listed = described(path, {name: size for name, (_, size) in spans.items()}, text)
    return TarSource(path, **listed, spans=np.array([spans[name] for name in listed["names"]], np.int64))


def tar_members(
    archive: BinaryIO, path: Path, begin: int, end: int, folder: str = ""
) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of each file in the tar that lies in an open file from byte `begin` to `end`.

    Raises ValueError if it is no whole tar, a name leads out of it, or an image is not in it but linked.
    """
    inner = f" ({folder}.tar in it)" if folder else ""
    cut = f"source {path}{inner} is no tar, or was cut short: {{}}. Copy or download it again"
    archive.seek(begin)
    try:
        tar = tarfile.open(fileobj=archive, mode="r:")  # noqa: SIM115
        while member := tar.next():
            tar.members.clear()  # it would keep them all: a gigabyte for ImageNet
            first, past = member.offset_data, member.offset_data + member.size
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise ValueError(
                    f"source {path}{inner} holds {member.name!r}, a name that leads out of it: pack it anew"
                )
            name = str(PurePosixPath(folder, member.name))  # without the ./ that `tar -c .` puts before it
            if is_image(name) and (member.issparse() or not member.isreg()):
                raise ValueError(
                    f"source {path}{inner} holds {member.name} not as a file but as a link or a sparse file: pack it "
                    "anew with `tar --dereference --hard-dereference`"
                )
            if name.endswith(".tar") and member.isreg() and not is_hidden(name):
                yield from tar_members(archive, path, first, past, name.removesuffix(".tar"))
            elif member.isreg():
                yield name, first, member.size
    except tarfile.TarError as error:
        raise ValueError(cut.format(error)) from error
    archive.seek(tar.offset)
    if tar.offset >= end or archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(cut.format(f"neither a file nor the mark of its end is at byte {tar.offset:,}"))


@functools.lru_cache(maxsize=1)
def open_tar(path: Path) -> int:
    """The file's descriptor. `pread` takes the position as an argument, so processes may share it over a fork."""
    return os.open(path, os.O_RDONLY)


@functools.lru_cache(maxsize=1)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """The archive, opened once a process: a handle shared over a fork would share its position."""
    return zipfile.ZipFile(path)


def described(path: Path, sizes: dict[str, int], labels_text: str | None) -> dict:
    """Names in order, labels and hash of image files; labels come from dataset.json where there is one, else from the
    folders below the deepest one that all images share. Prints a note of photos in formats that cannot be read."""
    names = sorted(name for name in sizes if name.lower().endswith(SUFFIXES))
    if unread := sorted(sizes.keys() - names):
        print(f"note: {len(unread):,} photos in formats that cannot be read are left out, such as {unread[0]}")
    if not names:
        raise ValueError(f"source {path} holds no images: expected files ending in {', '.join(SUFFIXES)}")
    if any("\n" in name for name in names):
        raise ValueError(f"source {path} has file names with line breaks: rename them")
    if labels_text is not None:
        labels, class_names = listed_labels(path, names, labels_text), None
    else:
        labels, class_names = folder_labels(names)
    listing = [f"{name}\t{sizes[name]}" for name in names]
    return {
        "names": names,
        "labels": labels,
        "class_names": class_names,
        "hash": source_hash(listing, labels),
    }


def listed_labels(path: Path, names: list[str], text: str) -> np.ndarray | None:
    """Labels (N,) of dataset.json, `{"labels": [[name, class], …]}`; None if it says null."""
    try:
        pairs = json.loads(text)["labels"]
        classes = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{LABELS_FILE} of {path} is not JSON of the form {{"labels": …}}: {error!r}') from error
    if classes is None:
        return None
    for name in names:
        if type(classes.get(name)) is not int or not 0 <= classes[name] < 2**31:
            raise ValueError(
                f"{LABELS_FILE} of {path} gives {name} the label {classes.get(name)!r}, expected a class number: "
                "correct it, or remove the file to take labels from the folders"
            )
    return np.array([classes[name] for name in names], np.int64)


def folder_labels(names: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) by the sorted names of the class folders, and those names; None for images in one flat folder, and,
    with a note, where some lie beside the folders."""
    folders = [name.split("/")[:-1] for name in names]
    ends = zip(min(folders), max(folders), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))  # leading folders of all images
    classes = [(folder[shared] or None) if len(folder) > shared else None for folder in folders]  # "": in archives
    if not any(classes):
        return None, None
    if not all(classes):
        print(f"note: images lie beside the folders, such as {names[classes.index(None)]}: folders give no labels here")
        return None, None
    class_names = sorted(set(classes))
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number[name] for name in classes], np.int64), class_names


def npz_source(path: Path) -> NpzSource:
    key = npz_key(path)
    with reading(f"source {path}"), np.load(path, allow_pickle=False) as file:
        images = npz_array(path)
        content = file.zip.getinfo(f"{key}.npy").CRC
        keys = [key for key in ("labels", "arr_1") if f"{key}.npy" in file.zip.namelist()]
        labels = file[keys[0]] if keys else None
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray | None):
        raise ValueError(f"source {path} holds files that are no arrays")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(
            f"images of {path} are {images.dtype} {images.shape}, expected uint8 (N, height, width, 3), "
            "(N, height, width, 1) or (N, height, width)"
        )
    grey = images.ndim == 3 or images.shape[3] == 1
    return NpzSource(path, **numbered(path, len(images), labels, content), grey=grey)


def npz_key(path: Path) -> str:
    """Which array of an npz holds the images."""
    try:
        with zipfile.ZipFile(path) as file:
            keys = [key for key in ("arr_0", "images") if f"{key}.npy" in file.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"source {path} is no npz file, or was cut short ({error})") from error
    if not keys:
        raise ValueError(f"source {path} has no array `arr_0` or `images`")
    return keys[0]


@functools.lru_cache(maxsize=1)
def npz_array(path: Path) -> np.ndarray:
    """The images of an npz: memory-mapped if stored (np.savez), read whole if compressed (np.savez_compressed)."""
    key = npz_key(path)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return np.load(path, allow_pickle=False)[key]
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))  # of the name and the extra field in the local header
        file.seek(sum(lengths), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def idx_source(path: Path) -> IdxSource:
    images = read_idx(path, IDX_IMAGES)
    base = path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
    beside = [path.with_name(name) for name in (base, f"{base}.gz") if path.with_name(name).is_file()]
    labels = read_idx(beside[0], IDX_LABELS) if beside else None
    return IdxSource(path, **numbered(path, len(images), labels, zlib.crc32(images)), grey=True, on_black=True)


@functools.lru_cache(maxsize=2)
def read_idx(path: Path, magic: int) -> np.ndarray:
    """The uint8 array of an idx file: (N, H, W) images or (N,) labels. ValueError if it is another kind or damaged."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} was cut short or is not gzipped ({error})") from error
    dimensions = magic & 0xFF
    header = struct.Struct(f">{1 + dimensions}I")
    found, *shape = header.unpack_from(data) if len(data) >= header.size else (0,)
    if found != magic:
        raise ValueError(f"{path} is no idx file of bytes in {dimensions} dimension(s): expected magic {magic:#010x}")
    if len(data) != header.size + np.prod(shape):
        raise ValueError(f"{path} has {len(data):,} bytes, its header announces {header.size + np.prod(shape):,}")
    return np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)


def numbered(path: Path, count: int, labels: np.ndarray | None, content: int) -> dict:
    """Names 00000000, 00000001, …, checked labels and hash of images that have no names of their own."""
    if count == 0:
        raise ValueError(f"source {path} holds no images")
    if labels is not None:
        if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"labels of {path} are {labels.dtype} {labels.shape}, expected one class number from 0 up for each of "
                f"{count} images"
            )
        labels = labels.astype(np.int64)
    names = [f"{i:08d}" for i in range(count)]
    listing = [f"{count}\t{content}"]
    return {"names": names, "labels": labels, "class_names": None, "hash": source_hash(listing, labels)}


def source_hash(listing: list[str], labels: np.ndarray | None) -> str:
    """SHA-256 of what a source lists and its labels."""
    digest = hashlib.sha256("\n".join(listing).encode(errors="surrogateescape"))
    digest.update(b"" if labels is None else labels.tobytes())
    return digest.hexdigest()


def array_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W), (H, W, 1) or (H, W, 3) as an image in mode L or RGB."""
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
