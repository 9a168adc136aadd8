"""Files of the model hub: from its cache or downloaded, at a fixed commit where one is known."""

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

HUB = "https://huggingface.co"
CONNECT = 10  # seconds to wait for the hub's address to answer, as long as its client does
# What is taken of these repositories; their branches may change. scripts/fetch.py takes the same.
COMMITS = {
    "stabilityai/sd-vae-ft-mse": "31f26fdeee1355a5c34592e401dd41e45d25a493",
    "stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a",
    "timm/vit_base_patch14_dinov2.lvd142m": "1dc7cda4727a9f4baa37f3ef407928dd642d0149",
}


def from_hub(
    what: str, repository: str, files: Sequence[str], local: Path, remedy: str, commit: str | None = None
) -> list[Path]:
    """Local copies of a repository's files, at `commit`, or that of COMMITS, or its main branch.

    Raises:
        ValueError: they are not to be had; the message names who asks (`what`), the files, `local`, where they were
            looked for before, and what else helps (`remedy`).
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    commit = commit or COMMITS.get(repository)
    try:
        for file in files:
            check_reachable(repository, (file,), commit)
        return [Path(hf_hub_download(repository, file, revision=commit)) for file in files]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(absent(what, repository, files, local, remedy, error, commit)) from error


def check_reachable(repository: str, files: Sequence[str], commit: str | None = None) -> None:
    """Raise ConnectionError where none of these files is in the cache and nothing answers at the hub's address: its
    client would try that file again for 23 seconds. Whether a proxy reaches the hub only the client can tell."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file, revision=commit), str) for file in files)
    if not (cached or constants.HF_HUB_OFFLINE or getproxies()):
        address = urlsplit(constants.ENDPOINT)
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname, port), timeout=CONNECT).close()
        except OSError as error:
            raise ConnectionError(f"{constants.ENDPOINT} does not answer: {error}") from error


def absent(
    what: str,
    repository: str,
    files: Sequence[str],
    local: Path,
    remedy: str,
    error: Exception,
    commit: str | None = None,
) -> str:
    """What to tell a user whose files could not be had."""
    from huggingface_hub.constants import HF_HUB_CACHE

    at = f" at {commit[:12]}" if commit else ""
    return (
        f"{what}: {' and '.join(files)} of hub repository {repository!r}{at} neither lie at {local}, nor in the cache "
        f"({HF_HUB_CACHE}), nor could they be downloaded ({type(error).__name__}); {remedy}"
    )
