"""Published weights and reference files: into one folder where there is a network, checked where there is none.

    bash scripts/fetch.sh [NAME ...]            NAME: a row of the table below, by default all that is not optional
    bash scripts/fetch.sh --check [--hash]      offline, in seconds: is all there?

Files go to `--folder` (default: $GMEM_WEIGHTS, or `weights`), where commands look for them by their names before they
ask any hub. `manifest.json` there keeps the size, SHA-256, address and date of each. A file's first download is
trusted, except where its hash is known: from the table, from its own name, or from the hub's answer. From then on the
manifest is what a file is compared with. Downloads continue where they stopped. $HF_ENDPOINT names a mirror of the hub.

This file needs nothing but Python, so that it runs before anything is installed.
"""

import argparse
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import date
from email.message import Message
from http.client import HTTPException
from pathlib import Path

from memory.command import execute
from memory.files import check_folder, read_json, sha256, weights_folder, write_json
from models.hub import COMMITS, HUB

DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
MANIFEST = "manifest.json"
READ_BYTES = 2**20
ATTEMPTS = 5  # in a row without a new byte, before a download is given up
PAUSE, TIMEOUT, REPORT = 3, 60, 10  # seconds: between attempts, without an answer, between lines of progress


@dataclass(frozen=True)
class File:
    """One published file: which name asks for it, where it lies in the folder, its address, what it is for.

    `sha256` is its hash, or the first digits of it, as far as known beforehand; `optional` files must be asked for.
    """

    name: str
    path: str
    url: str
    purpose: str
    sha256: str = ""
    optional: bool = False


VAE = "diffusion_pytorch_model.safetensors"
DINO = "vit_base_patch14_dinov2.lvd142m"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
GMEM = "GMem_XL_2Miter_ImageNet-1K_K640000_5epo.pth"
MSE, EMA, TIMM = (
    f"{HUB}/{name}/resolve/{COMMITS[name]}"
    for name in ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", f"timm/{DINO}")
)
# As the hub states them; those of Inception and of ADM's reference are the same in independent copies. GMem's file came
# with commit 0d99167 of its repository, whose 40 digits are not known here: the hash fixes it all the same.
MSE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
EMA_SHA256 = "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46"
DINO_SHA256 = "55cbb5d887b336d430e649c277b85a1429e724871f9d02ac16203235886d8c7b"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
REFERENCE_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
GMEM_SHA256 = "8920912de49a55824c877f7851c8c5bcc37919e198e20d6e47939c46ff2738ce"
FILES = (
    File("sd-vae-ft-mse", "sd-vae-ft-mse/config.json", f"{MSE}/config.json", "VAE of GMem and REPA"),
    File("sd-vae-ft-mse", f"sd-vae-ft-mse/{VAE}", f"{MSE}/{VAE}", "VAE of GMem and REPA", MSE_SHA256),
    File("sd-vae-ft-ema", "sd-vae-ft-ema/config.json", f"{EMA}/config.json", "VAE of SiT's sampling"),
    File("sd-vae-ft-ema", f"sd-vae-ft-ema/{VAE}", f"{EMA}/{VAE}", "VAE of SiT's sampling", EMA_SHA256),
    File("dinov2-vitb14", f"{DINO}.safetensors", f"{TIMM}/model.safetensors", "snippets", DINO_SHA256),
    File(
        "inception",
        INCEPTION,
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}",
        "FID, sFID, IS",
        INCEPTION_SHA256,
    ),
    File(
        "reference-256",
        "VIRTUAL_imagenet256_labeled.npz",
        f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
        "FID at 256 px",
        REFERENCE_SHA256,
    ),
    File("reference-512", "VIRTUAL_imagenet512.npz", f"{ADM}/512/VIRTUAL_imagenet512.npz", "FID at 512 px"),
    File(
        "gmem",
        GMEM,
        f"{HUB}/Tangentone/GMem/resolve/main/{GMEM}",
        "GMem's network and bank",
        GMEM_SHA256,
        optional=True,
    ),
    File(
        "sit",
        "SiT-XL-2-256x256.pt",
        f"{DROPBOX}/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1",
        "SiT's network",
        optional=True,
    ),
    File(
        "repa",
        "REPA-SiT-XL-2-256x256.pt",
        f"{DROPBOX}/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&dl=1",
        "REPA's network",
        optional=True,
    ),
    File(
        "admnet-256",
        "admnet_guided_upsampled_imagenet256.npz",
        f"{ADM}/256/admnet_guided_upsampled_imagenet256.npz",
        "self-check of the evaluator",
        optional=True,
    ),
)


class Refused(Exception):
    """A file cannot be had, or is not the published one; the message says why and what to do."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the SHA-256 that the hub's first answer states, `sha256`."""

    sha256 = ""

    def redirect_request(self, request, answer, code, reason, headers, address):
        stated = headers.get("X-Linked-Etag", "").strip('"')
        self.sha256 = stated if re.fullmatch("[0-9a-f]{64}", stated) else self.sha256
        return super().redirect_request(request, answer, code, reason, headers, address)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; names are checked against the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = list(dict.fromkeys(file.name for file in FILES))
    optional = ", ".join(file.name for file in FILES if file.optional)
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}, or all (default: all but {optional})")
    add(
        "--folder", type=Path, default=weights_folder(), help="where the files are (default: $GMEM_WEIGHTS, or weights)"
    )
    add("--check", action="store_true", help="download nothing; say what is missing or altered, exit with 1 if any is")
    add("--hash", action="store_true", help="with --check: compare the contents, too, which reads every file")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in (*names, "all")]:
        parser.error(f"{', '.join(unknown)}: expected {', '.join(names)} or all")
    if args.hash and not args.check:
        parser.error("--hash belongs to --check; what is downloaded is always compared")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_folder("--folder", args.folder)
    manifest = args.folder / MANIFEST
    records = read_json(manifest) if manifest.is_file() else {}
    files, refused = chosen(args.names, records), 0
    if not args.check:
        for file in files:
            if file.path in records and (args.folder / file.path).is_file():
                continue
            try:
                records[file.path] = fetch(file, args.folder / file.path, records.get(file.path))
                write_json(manifest, records)
            except Refused as error:
                print(f"{file.path}: {error}", file=sys.stderr, flush=True)
                refused += 1
    if not check(files, args.folder, records, args.hash) or refused:
        sys.exit(1)


def chosen(names: list[str], records: dict) -> list[File]:
    """The files that names stand for; without names all but the optional ones, of which those once fetched."""
    if names:
        return [file for file in FILES if file.name in names or "all" in names]
    return [file for file in FILES if not file.optional or file.path in records]


def url_of(path: str) -> str:
    """The address of a file, by its path in the folder."""
    return next(file.url for file in FILES if file.path == path)


def check(files: list[File], folder: Path, records: dict, hashes: bool) -> bool:
    """Print what is there; whether every file is, with the size (and with `hashes` the content) of its record."""
    rows = [(file, *state(file, folder / file.path, records.get(file.path), hashes)) for file in files]
    width = max(len(file.path) for file in files)
    print(f"{folder}:\n{'file':{width}}  {'for':28}  state")
    for file, _, what in rows:
        print(f"{file.path:{width}}  {file.purpose:28}  {what}")
    wrong = [file.name for file, good, _ in rows if not good]
    if wrong:
        print(
            f"{len(wrong)} of {len(files)} files are missing or wrong; remove wrong ones, and where there is a network "
            f"run `bash scripts/fetch.sh {' '.join(dict.fromkeys(wrong))}`"
        )
    return not wrong


def state(file: File, path: Path, record: dict | None, hashes: bool) -> tuple[bool, str]:
    """Whether a file is as it should be, and in words how it is."""
    if not path.is_file():
        part = partial(path)
        return False, f"missing, {part.stat().st_size:,} bytes of it are there" if part.is_file() else "missing"
    size, expected = path.stat().st_size, record["sha256"] if record else file.sha256
    if record and size != record["bytes"]:
        return False, f"WRONG SIZE: {size:,} bytes, expected {record['bytes']:,}"
    if hashes and expected:
        found = sha256(path)
        if not found.startswith(expected):
            return False, f"ALTERED: SHA-256 {found}, expected {expected}"
        return True, f"{size:,} bytes, content compared"
    return True, f"{size:,} bytes" + ("" if record else f"; not in {MANIFEST}, so nobody knows whether it is whole")


def partial(path: Path) -> Path:
    """Where a download lies until it is complete."""
    return path.with_name(f"{path.name}.part")


def fetch(file: File, path: Path, record: dict | None) -> dict:
    """Download a file, or compare one that is there with the published size; its record for the manifest.

    Raises Refused if it cannot be had, or if its hash is not the one that is known.
    """
    url = file.url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    print(f"{path}: from {url}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        place, stated = path, compare_size(url, path)
    else:
        place, stated = partial(path), download(url, partial(path))
    found = sha256(place)
    recorded = record["sha256"] if record else ""
    for whose, expected in (("recorded", recorded), ("published", file.sha256), ("stated by the hub", stated)):
        if not found.startswith(expected):
            if place != path:
                place.unlink()  # else the next attempt would continue it
            raise Refused(f"its SHA-256 is {found}, {whose} is {expected}: another file than expected")
    os.replace(place, path)
    return {"bytes": path.stat().st_size, "sha256": found, "url": url, "date": date.today().isoformat()}


def compare_size(url: str, path: Path) -> str:
    """Raise Refused unless a file has the published size; the hash that the hub states for it, if any."""
    redirects, size = Redirects(), path.stat().st_size
    try:
        with urllib.request.build_opener(redirects).open(request(url), timeout=TIMEOUT) as answer:
            published = int(answer.headers.get("Content-Length", size))
    except (OSError, HTTPException) as error:
        raise Refused(f"is there, but cannot be compared with the published one: {error}") from error
    if size != published:
        raise Refused(f"has {size:,} bytes, the published one {published:,}: remove it, so that it can be fetched")
    return redirects.sha256


def download(url: str, part: Path) -> str:
    """Write what lies at an address to a file, after what is already in it; the hash that the hub states, if any."""
    redirects, failures = Redirects(), 0
    opener = urllib.request.build_opener(redirects)
    while True:
        begin = part.stat().st_size if part.is_file() else 0
        try:
            with opener.open(request(url, begin), timeout=TIMEOUT) as answer:
                receive(answer, part, begin)
            return redirects.sha256
        except urllib.error.HTTPError as error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{begin}":  # all of it was there
                return redirects.sha256
            if error.code == 416:  # more than all of it
                part.unlink()
            elif error.code != 429 and error.code < 500:
                raise Refused(f"{url} answers {error.code} {error.reason}{moved(url)}") from error
            problem = error
        except (OSError, HTTPException) as error:
            problem = error
        failures = 0 if part.is_file() and part.stat().st_size > begin else failures + 1
        if failures == ATTEMPTS:
            raise Refused(f"{url} cannot be reached: {problem}; the same command continues") from problem
        print(f"  {problem}: trying again", flush=True)
        time.sleep(PAUSE)


def moved(url: str) -> str:
    """What to do about a file that is gone from a branch of the hub."""
    repository, branch, file = url.partition("/resolve/main/")
    if not branch:
        return ""
    name = "/".join(repository.split("/")[-2:])
    return (
        f"; an earlier commit may have it: look through {repository}/commits/main, and give hf:{name}/{file}@COMMIT as "
        "CHECKPOINT, or put the file there by hand"
    )


def request(url: str, begin: int = 0) -> urllib.request.Request:
    """A request for an address, from byte `begin` on."""
    headers = {"User-Agent": "gmem-fetch", "Accept-Encoding": "identity"}
    return urllib.request.Request(url, headers=headers | ({"Range": f"bytes={begin}-"} if begin else {}))


def receive(answer, part: Path, begin: int) -> None:
    """Append an answer to the `begin` bytes of a file, or start it again if the answer does; print the progress.

    Raises OSError if the answer ends early, Refused if it is a web page or the disk is too small.
    """
    headers: Message = answer.headers
    if headers.get_content_type() == "text/html":
        raise Refused(f"{answer.url} is a web page, not the file: the address has moved, or a proxy asks for a login")
    begin = begin if answer.status == 206 else 0
    total = begin + int(headers["Content-Length"]) if "Content-Length" in headers else None
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - begin > free:
        raise Refused(f"needs {(total - begin) / 1e9:.2f} GB more, {part.parent} has {free / 1e9:.2f} GB free")
    size, reported = begin, time.monotonic()
    with open(part, "ab" if begin else "wb") as file:
        while block := answer.read(READ_BYTES):
            file.write(block)
            size += len(block)
            if time.monotonic() - reported > REPORT:
                reported = time.monotonic()
                print(f"  {size / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f}" if total else ""), flush=True)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and size < total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


if __name__ == "__main__":
    execute(main)
