"""Triton kernels for what joins a transformer's branches: gated residual, LayerNorm, modulation in one pass each way.

    total  = x + gate·branch
    normed = LayerNorm(total)·(1 + scale) + shift

torch.compile fuses the forward pass as well; backward it reads everything again for the sums over tokens that the
gradients of gate, shift and scale are, which costs a training step of SiT-XL/2 several per cent. All arithmetic is
float32. `models/kernels.py` decides where these run; `models/sit.py` is what they must equal.

Shapes: x, branch, total, normed (B, T, D); gate, shift, scale (B, D).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from models.attention import attention, fits

WARPS, BACKWARD_WARPS, STAGES = 4, 8, 1
CHUNKS = (16, 8, 4, 2, 1)  # tokens whose sums one program forms; the first that divides T is taken


@triton.jit
def join_kernel(
    x, branch, gate, shift, scale, total, normed, mean, rstd, gate_stride, shift_stride, scale_stride,
    eps: tl.constexpr, tokens: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32) * added
    center = tl.sum(value) / width
    deviation = tl.where(inside, value - center, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(deviation * deviation) / width + eps)
    factor = 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + image * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + row * width + columns, value, mask=inside)
    result = deviation * inverse * factor + offset
    tl.store(normed + row * width + columns, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean + row, center)
    tl.store(rstd + row, inverse)


@triton.jit
def join_backward_kernel(
    d_total, d_normed, total, branch, gate, scale, mean, rstd, d_x, d_branch, sums, gate_stride, scale_stride,
    tokens: tl.constexpr, width: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    opening = tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d_gate = tl.zeros([block], tl.float32)
    d_shift = tl.zeros([block], tl.float32)
    d_scale = tl.zeros([block], tl.float32)
    first = image * tokens + part * chunk
    for step in tl.range(0, chunk, num_stages=stages):
        row = first + step
        where = row * width + columns
        d_out = tl.load(d_normed + where, mask=inside, other=0.0).to(tl.float32)
        d_sum = tl.load(d_total + where, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + where, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(branch + where, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        unit = tl.where(inside, (value - tl.load(mean + row)) * inverse, 0.0)
        d_unit = d_out * factor
        constant = tl.sum(d_unit) / width
        slope = tl.sum(d_unit * unit) / width
        d_sum += inverse * (d_unit - constant - unit * slope)
        tl.store(d_x + where, d_sum, mask=inside)
        tl.store(d_branch + where, (opening * d_sum).to(d_branch.dtype.element_ty), mask=inside)
        d_gate += added * d_sum
        d_shift += d_out
        d_scale += d_out * unit
    place = sums + (image * (tokens // chunk) + part) * 3 * width + columns
    tl.store(place, d_gate, mask=inside)
    tl.store(place + width, d_shift, mask=inside)
    tl.store(place + 2 * width, d_scale, mask=inside)


@triton_op("gmem::join", mutates_args=())
def _join_op(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, tokens, width = x.shape
    x, branch = x.contiguous(), branch.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(branch)
    mean, rstd = x.new_empty(images * tokens), x.new_empty(images * tokens)
    wrap_triton(join_kernel)[(images * tokens,)](
        x, branch, gate, shift, scale, total, normed, mean, rstd, gate.stride(0), shift.stride(0), scale.stride(0),
        eps=eps, tokens=tokens, width=width, block=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip
    return total, normed, mean, rstd


@triton_op("gmem::join_backward", mutates_args=())
def _join_backward_op(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, width = total.shape
    d_total, d_normed, branch = d_total.contiguous(), d_normed.contiguous(), branch.contiguous()
    chunk = next(size for size in CHUNKS if tokens % size == 0)
    d_x, d_branch = torch.empty_like(total), torch.empty_like(branch)
    sums = total.new_empty(images, tokens // chunk, 3, width)
    wrap_triton(join_backward_kernel)[(tokens // chunk, images)](
        d_total, d_normed, total, branch, gate, scale, mean, rstd, d_x, d_branch, sums, gate.stride(0), scale.stride(0),
        tokens=tokens, width=width, block=triton.next_power_of_2(width), chunk=chunk, stages=STAGES,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return d_x, d_branch, sums.sum(1)  # (B, T, D), (B, T, D), (B, 3, D)


def _save(ctx: object, inputs: tuple, output: tuple) -> None:
    _, branch, gate, _, scale, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, branch, gate, scale, mean, rstd)


def _differentiate(ctx: object, d_total: Tensor, d_normed: Tensor, *unused: Tensor) -> tuple:
    total, branch, gate, scale, mean, rstd = ctx.saved_tensors
    d_x, d_branch, sums = _join_backward_op(d_total, d_normed, total, branch, gate, scale, mean, rstd)
    d_gate, d_shift, d_scale = sums.to(gate.dtype).unbind(1)
    return d_x, d_branch, d_gate, d_shift, d_scale, None


_join_op.register_autograd(_differentiate, setup_context=_save)


def join(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total (B, T, D) float32 and normed (B, T, D) of `branch`'s type, as at the top of this file.

    Args:
        x: (B, T, D) float32, the residual stream.
        branch: (B, T, D), the output of the attention or MLP before.
        gate, shift, scale: (B, D), rows contiguous.
        eps: of LayerNorm.
    """
    total, normed, _, _ = _join_op(x, branch, gate, shift, scale, eps)
    return total, normed


def run_block(
    packed: bool, block: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A `SiTBlock` on x + gate·branch; its own last residual is handed on in the same way, (x, branch, gate).

    `packed`: attention by models/attention.py, where it fits.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=-1)  # (B, D) each
    x, normed = join(x, branch, gate, shift1, scale1, block.norm1.eps)
    layer = block.attn
    if packed and fits(layer, normed):
        attended = layer.proj(attention(layer.qkv(normed), layer.num_heads))  # (B, T, D)
    else:
        attended = layer(normed)  # (B, T, D)
    x, normed = join(x, attended, gate1, shift2, scale2, block.norm2.eps)
    return x, block.mlp(normed), gate2.contiguous()  # of the first block's strides, so that one graph serves all


def finish(layer: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, c: Tensor) -> Tensor:
    """A `FinalLayer` on x + gate·branch: patches (B, T, p²·C)."""
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=-1)
    _, normed = join(x, branch, gate, shift, scale, layer.norm_final.eps)
    return layer.linear(normed)
