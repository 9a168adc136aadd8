"""What happens where a kernel of ours fails, or computes something else than PyTorch: a warning, and PyTorch's own way.

A compiler may get a kernel wrong on one GPU, in one release or at one shape, and say nothing. So whoever calls kernels
compares them, and whatever goes wrong on the way costs speed alone, unless it takes the GPU from the process: an error.
"""

import sys
import warnings

import torch

distrusted: set[str] = set()  # files whose kernels are not to be tried again in this process


class Disagreement(Exception):
    """A kernel's result is not PyTorch's; the message says where, by how much, and how much is allowed."""


def distrust(kernels: str, error: Exception, device: torch.device, remedy: str) -> None:
    """Warn that the kernels of the file `kernels` are left out because of `error`, and of what is done instead.

    Raises RuntimeError where the kernels left a GPU that no longer computes anything in this process.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    lines = str(error).strip().splitlines() or [""]
    who = f"on {gpu} with Triton {triton_release()} the kernels of {kernels}"
    if not computes(device):
        raise RuntimeError(
            f"{who} fail, and the GPU takes nothing more from this process: {lines[0]}; report this GPU and release, "
            "and start again without Triton (python -m pip uninstall triton), then PyTorch does the same, slower"
        ) from error
    why = f"are wrong: {lines[0]}" if isinstance(error, Disagreement) else f"fail: {type(error).__name__}: {lines[-1]}"
    warnings.warn(f"{who} {why}; {remedy}", stacklevel=3)


def computes(device: torch.device) -> bool:
    """Whether the device still does as it is told: an illegal memory access ends a process's use of its GPU."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def triton_release() -> str:
    """The version of Triton in this process."""
    return getattr(sys.modules.get("triton"), "__version__", "missing")
