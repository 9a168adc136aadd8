"""Where a result comes from: code, command, libraries, device."""

import hashlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "triton", "torchvision", "timm", "diffusers", "accelerate", "numpy", "scipy", "pillow")
LIBRARIES += ("torch-fidelity",)


def provenance(argv: list[str] | None = None, processes: int = 1) -> dict:
    """What a result's JSON says of its making, in plain values.

    Args:
        argv: the command's arguments where they are not this process's own (None: they are).
        processes: how many processes worked on it.
    """
    return {
        "code": code_version(),
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "processes": processes,
        "versions": {"python": platform.python_version()} | library_versions(),
    }


def code_version() -> str:
    """The commit, with `+changes` if tracked files differ from it; without git, a hash of the Python files."""
    commit = _git("rev-parse", "HEAD")
    if commit:
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    digest = hashlib.sha256()
    for folder in (".", "models", "memory", "evaluations", "scripts"):
        for file in sorted((ROOT / folder).glob("*.py")):
            digest.update(f"{folder}/{file.name}\0".encode() + file.read_bytes())
    return f"sources-{digest.hexdigest()[:40]}"


def _git(*words: str) -> str:
    """What git says of this repository; nothing where there is no git, or this folder lies in another's repository."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide numbers, none of which is imported for it."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has held: in main memory, and allocated on the GPU (0 without one)."""
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "gpu": gpu}


def device_name() -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
