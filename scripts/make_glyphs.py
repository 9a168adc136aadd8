"""Render Chinese characters in many fonts: small real images of a diversity that one can choose.

    apt-get install fonts-noto-cjk fonts-noto-cjk-extra fonts-wqy-microhei fonts-wqy-zenhei fonts-arphic-ukai \\
        fonts-arphic-uming fonts-ipaexfont fonts-takao fonts-vlgothic fonts-droid-fallback fonts-hanazono \\
        fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-umeplus
    python -m scripts.make_glyphs --out data/glyphs.zip --characters 2500
    python -m scripts.encode_dataset data/glyphs.zip --out data/glyphs --codec pixels --image-size 32 --holdout 0.1 …

24 free fonts, none of which repeats another's outlines, share 6,384 Han characters. Each character is a class folder,
each font an image in it, white on black, so 2,500 characters make 60,000 images. The characters are a random choice
by `--seed`; fewer are always a subset of more. The same command gives the same bytes with the same font files and
version of FreeType, which the zip's comment states.
"""

import argparse
import io
import random
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from memory.command import execute
from memory.files import atomic, sha256

HAN = range(0x4E00, 0xA000)  # CJK unified ideographs
SCALE = 0.875  # of the em in the image: 28 of 32 pixels
PACKAGES = {  # Debian's package of each font file
    **dict.fromkeys([f"NotoSansCJK-{weight}.ttc" for weight in ("Bold", "Regular")], "fonts-noto-cjk"),
    **dict.fromkeys([f"NotoSerifCJK-{weight}.ttc" for weight in ("Bold", "Regular")], "fonts-noto-cjk"),
    **dict.fromkeys([f"NotoSansCJK-{weight}.ttc" for weight in ("Thin", "Light", "Medium")], "fonts-noto-cjk-extra"),
    **dict.fromkeys([f"NotoSerifCJK-{weight}.ttc" for weight in ("ExtraLight", "Medium")], "fonts-noto-cjk-extra"),
    **dict.fromkeys(("NotoSansCJK-Black.ttc", "NotoSerifCJK-Black.ttc"), "fonts-noto-cjk-extra"),
    **{"ipaexg.ttf": "fonts-ipaexfont-gothic", "ipaexm.ttf": "fonts-ipaexfont-mincho"},
    **{"TakaoMincho.ttf": "fonts-takao-mincho", "VL-Gothic-Regular.ttf": "fonts-vlgothic"},
    **{"ukai.ttc": "fonts-arphic-ukai", "uming.ttc": "fonts-arphic-uming", "HanaMinA.ttf": "fonts-hanazono"},
    **{"wqy-microhei.ttc": "fonts-wqy-microhei", "wqy-zenhei.ttc": "fonts-wqy-zenhei"},
    **{"MTLc3m.ttf": "fonts-motoya-l-cedar", "MTLmr3m.ttf": "fonts-motoya-l-maruberi"},
    **{"umeplus-gothic.ttf": "fonts-umeplus", "DroidSansFallbackFull.ttf": "fonts-droid-fallback"},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="zip to write")
    add("--characters", type=int, default=2500, help="how many of those that all fonts have (default 2500)")
    add("--size", type=int, default=32, help="side of the images in pixels (default 32)")
    add("--seed", type=int, default=0, help="of the choice of characters (default 0)")
    add("--fonts", type=Path, default=Path("/usr/share/fonts"), help="where fonts are installed (/usr/share/fonts)")
    args = parser.parse_args(argv)
    if args.characters < 1 or args.size < 8 or args.seed < 0:
        parser.error("expected --characters of at least 1, --size of at least 8, --seed of at least 0")
    if args.out.suffix != ".zip" or args.out.exists():
        parser.error(f"--out {args.out}: expected a new file that ends in .zip")
    return args


def find_fonts(folder: Path) -> dict[str, Path]:
    """The table's font files below a folder; ValueError, naming their packages, if some are missing."""
    present = {path.name: path for path in sorted(folder.rglob("*.tt?"))}
    missing = sorted({package for file, package in PACKAGES.items() if file not in present})
    if missing:
        raise ValueError(f"--fonts {folder} lacks fonts: `apt-get install {' '.join(missing)}`, or name another folder")
    return {file: present[file] for file in PACKAGES}


def shared_characters(fonts: list[Path]) -> list[int]:
    """Code points of the Han characters that all fonts have, in order."""
    from fontTools.ttLib import TTFont  # comes with matplotlib

    shared = set(HAN)
    for path in fonts:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            shared &= font.getBestCmap().keys()
    return sorted(shared)


def glyph(font: ImageFont.FreeTypeFont, character: str, size: int) -> bytes:
    """A character in the middle of a grey image (size, size), white on black, as PNG."""
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).text((size / 2, size / 2), character, fill=255, font=font, anchor="mm")
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Check the fonts, choose the characters, draw."""
    args = parse(argv)
    files = find_fonts(args.fonts)
    shared = shared_characters(list(files.values()))
    if args.characters > len(shared):
        raise ValueError(f"--characters {args.characters}: the {len(files)} fonts share {len(shared):,} characters")
    random.Random(args.seed).shuffle(shared)
    chosen = shared[: args.characters]
    fonts = {
        Path(file).stem: ImageFont.truetype(
            path, round(SCALE * args.size), index=0, layout_engine=ImageFont.Layout.BASIC
        )
        for file, path in files.items()
    }
    with atomic(args.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for code in tqdm(chosen, unit=" characters"):
            for name, font in fonts.items():
                member = zipfile.ZipInfo(f"U+{code:04X}/{name}.png")  # of a fixed date: the same images, the same file
                archive.writestr(member, glyph(font, chr(code), args.size))
        hashes = "".join(f"{sha256(path)}  {file}\n" for file, path in files.items())
        archive.comment = f"FreeType {features.version('freetype2')}, fonts:\n{hashes}".encode()
    print(f"wrote {args.out}: {len(chosen):,} of {len(shared):,} characters in {len(fonts)} fonts, {args.size} pixels")


if __name__ == "__main__":
    execute(main)
