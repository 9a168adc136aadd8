"""AdamW and the weights' moving average in one Triton kernel over all tensors: each number is read and written once.

PyTorch's fused AdamW also writes the clipped gradients back, which nobody reads, and the average takes a pass of its
own; together they move a fifth more bytes. `models/update.py` is what this must equal. At step s, from 1 on:

    g ← g·min(1, clip/(norm + 10⁻⁶))
    m ← m + (1 − β₁)·(g − m),   v ← v + (1 − β₂)·(g² − v)
    w ← w − lr/(1 − β₁ˢ)·m/(√v/√(1 − β₂ˢ) + ε)                     (arXiv 1711.05101, algorithm 2, without decay)
    e ← e + share·(w − e)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # numbers of a program


@triton.jit
def numbers_of(places, which, start, block: tl.constexpr, alignment: tl.constexpr):
    """Pointers to the numbers of one program in tensor `which` of a row of addresses, multiples of `alignment`."""
    numbers = tl.load(places + which).to(tl.pointer_type(tl.float32)) + start + tl.arange(0, block)
    return tl.max_contiguous(tl.multiple_of(numbers, alignment), block)


@triton.jit
def move(weight, gradient, first, second, average, factor, rate, root, fresh1, fresh2, eps, share, mask):
    g = tl.load(gradient, mask=mask) * factor
    m = tl.load(first, mask=mask)
    m += fresh1 * (g - m)
    v = tl.load(second, mask=mask)
    v += fresh2 * (g * g - v)
    w = tl.load(weight, mask=mask) - rate * m / (tl.sqrt(v) / root + eps)
    e = tl.load(average, mask=mask)
    tl.store(first, m, mask=mask)
    tl.store(second, v, mask=mask)
    tl.store(weight, w, mask=mask)
    tl.store(average, e + share * (w - e), mask=mask)


@triton.jit
def update_kernel(
    places, sizes, of, starts, norm, tensors, clip, rate, root, fresh1, fresh2, eps, share,
    block: tl.constexpr, alignment: tl.constexpr,
):  # fmt: skip
    which = tl.load(of + tl.program_id(0))
    start = tl.load(starts + tl.program_id(0))
    left = tl.load(sizes + which) - start
    factor = tl.minimum(clip / (tl.load(norm) + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    weight = numbers_of(places, which, start, block, alignment)
    gradient = numbers_of(places + tensors, which, start, block, alignment)
    first = numbers_of(places + 2 * tensors, which, start, block, alignment)
    second = numbers_of(places + 3 * tensors, which, start, block, alignment)
    average = numbers_of(places + 4 * tensors, which, start, block, alignment)
    if left >= block:  # without a mask, loads are wide
        move(weight, gradient, first, second, average, factor, rate, root, fresh1, fresh2, eps, share, None)
    else:
        mask = tl.arange(0, block) < left
        move(weight, gradient, first, second, average, factor, rate, root, fresh1, fresh2, eps, share, mask)


class Kernel:
    """The kernel on tensors of these sizes on one device."""

    def __init__(self, parameters: list[Tensor]):
        device = parameters[0].device
        self.sizes = torch.tensor([tensor.numel() for tensor in parameters], device=device)
        parts = [range(0, tensor.numel(), BLOCK) for tensor in parameters]
        # The tensor of each program, and where in it the program starts.
        self.of = torch.tensor([which for which, part in enumerate(parts) for _ in part], device=device)
        self.starts = torch.tensor([start for part in parts for start in part], device=device)
        self.addresses, self.places = [], None

    def __call__(
        self, tensors: list[list[Tensor]], norm: Tensor, clip: float, step: int, optimizer: dict, share: float
    ) -> None:
        """Step `step`, from 1 on, all in place; see the top of this file.

        Args:
            tensors: contiguous float32 lists: weights, gradients, first and second moments, averages.
            norm: of the gradients before they are clipped to `clip`, ().
            optimizer: lr, betas and eps.
        """
        addresses = [tensor.data_ptr() for part in tensors for tensor in part]
        if addresses != self.addresses:  # gradients move until steps are replayed
            assert all(tensor.is_contiguous() and tensor.dtype is torch.float32 for part in tensors for tensor in part)
            places = torch.tensor(addresses, pin_memory=norm.is_cuda)
            self.addresses, self.places = addresses, places.to(norm.device, non_blocking=True)
        beta1, beta2 = optimizer["betas"]
        rate, root = optimizer["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
        constants = clip, rate, root, 1 - beta1, 1 - beta2, optimizer["eps"], share
        alignment = 4 if any(place % 16 for place in addresses) else 16
        with torch.cuda.device_of(norm):  # Triton launches on the current GPU
            update_kernel[(len(self.of),)](
                self.places, self.sizes, self.of, self.starts, norm, len(self.sizes), *constants,
                block=BLOCK, alignment=alignment, num_warps=WARPS,
            )  # fmt: skip
