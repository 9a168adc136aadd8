"""Pixels of a data set: any image file to 8-bit grey or RGB, and to a square of the size asked for."""

import struct
import zipfile
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# What PIL and zipfile raise for a file that is damaged or of an unknown kind.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


def read_image(stream: BinaryIO, upright: bool = False) -> Image.Image:
    """The (first) image of a file in mode L or RGB; as ADM's loader does, without regard to its EXIF orientation unless
    `upright`.

    Palettes, CMYK and other colour spaces become RGB as by PIL. Transparent pixels are laid on white (ADM shows what
    lies under them), 16-bit grey is scaled to 8 bits. JPEGs are decoded at full size: PIL's draft mode is faster and
    gives other pixels. Raises one of `UNREADABLE` if the file is damaged, or of floating-point values, whose range
    nobody knows.
    """
    try:
        image = Image.open(stream)
        image.load()
    except UNREADABLE:
        raise
    except Exception as error:  # PIL meets damaged files with errors of every kind
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL may hold in 32 bits
        return Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (guided-diffusion, used by DiT, SiT and REPA): halve by box filter while the shorter side is at least
    twice `size`, resize it to `size` by bicubic interpolation, and cut the central square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def frame(image: Image.Image, size: int) -> Image.Image:
    """The image in the middle of a black square; for digits and clothes on black, 28×28 to 32×32 without resampling."""
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def square(image: Image.Image, size: int, channels: int, on_black: bool) -> np.ndarray:
    """An image of `read_image` as uint8 (channels, size, size).

    `on_black` images are framed if they fit and are more than half as large as `size`; all others are cropped and
    resized. With one channel colours become luminance, with three grey is repeated.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if on_black and max(image.size) <= size < 2 * min(image.size):
        image = frame(image, size)
    else:
        image = centre_crop(image, size)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)  # (c, H, W)
