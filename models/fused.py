"""Triton kernels for what lies between a block's matrix products, each way in one pass, and the block made of them.

    total  = x + gate·branch                                       (`join`)
    normed = LayerNorm(total)·(1 + scale) + shift
    active = GELU(hidden)                                          (`activate`)

torch.compile fuses the forward pass as well; backward it reads everything again for the sums over tokens that the
gradients of gate, shift, scale and of the products' biases are, which costs a training step of SiT-XL/2 some per cent.
So a bias enters its product detached and is handed to the kernel that comes next, which ignores it forward and gives
its gradient backward; and a weight's gradient is kept as its product adds it up. All arithmetic of the kernels is
float32. `models/kernels.py` decides where these run; `models/sit.py` is what they must equal.

Shapes: x, branch, total, normed (B, T, D); gate, shift, scale (B, D); hidden, active (B, T, 4·D).
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import custom_op, triton_op, wrap_triton

from models.attention import attention, fits

# Launch parameters, about the fastest of benchmarks/bench_kernels.py on an H200 (but for ACTIVATE, as good as others).
JOIN = {"num_warps": 1}
JOIN_BACKWARD = {"chunk": 64, "stages": 4, "num_warps": 4}  # chunk: see `chunk_of`
ACTIVATE = {"block": 4096, "num_warps": 4}  # block: numbers of a program
ACTIVATE_BACKWARD = {"columns": 1024, "tile": 4, "span": 128, "stages": 3, "num_warps": 4}  # span: rows of a program
PROGRAMS = 512  # that JOIN_BACKWARD should have at least, so that no multiprocessor is idle
SLOPE, CUBE = 2 * (2 / math.pi) ** 0.5, 0.044715  # tanh-GELU is x·σ(SLOPE·(x + CUBE·x³))
LINEAR, CUBIC = tl.constexpr(SLOPE), tl.constexpr(3 * SLOPE * CUBE)  # σ's argument has the slope LINEAR + CUBIC·x²
POWER, POWER_CUBIC = tl.constexpr(-SLOPE / math.log(2)), tl.constexpr(-SLOPE * CUBE / math.log(2))  # σ by powers of two


def chunk_of(images: int, tokens: int) -> int:
    """Tokens of a program of `join_backward_kernel`: JOIN_BACKWARD's, half of them where that would leave few programs,
    or what of it divides the tokens. It is a number at run time, so that few images are compared in the binary that
    serves many."""
    chunk = JOIN_BACKWARD["chunk"]
    return math.gcd(tokens, chunk if images * tokens >= PROGRAMS * chunk else chunk // 2)


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
    d_total, d_normed, total, branch, gate, scale, mean, rstd, d_x, d_branch, sums, gate_stride, scale_stride, chunk,
    tokens: tl.constexpr, width: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    opening = tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d_gate = tl.zeros([block], tl.float32)
    d_shift = tl.zeros([block], tl.float32)
    d_scale = tl.zeros([block], tl.float32)
    d_bias = tl.zeros([block], tl.float32)
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
        d_bias += d_sum
    place = sums + (image * tl.num_programs(0) + part) * 4 * width + columns
    tl.store(place, d_gate, mask=inside)
    tl.store(place + width, d_shift, mask=inside)
    tl.store(place + 2 * width, d_scale, mask=inside)
    tl.store(place + 3 * width, d_bias * opening, mask=inside)


@triton_op("gmem::join", mutates_args=())
def _join_op(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, tokens, width = x.shape
    x, branch = x.contiguous(), branch.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(branch)
    mean, rstd = x.new_empty(images * tokens), x.new_empty(images * tokens)
    wrap_triton(join_kernel)[(images * tokens,)](
        x, branch, gate, shift, scale, total, normed, mean, rstd, gate.stride(0), shift.stride(0), scale.stride(0),
        eps=eps, tokens=tokens, width=width, block=triton.next_power_of_2(width), **JOIN,
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
    chunk = chunk_of(images, tokens)
    d_x, d_branch = torch.empty_like(total), torch.empty_like(branch)
    sums = total.new_empty(images, tokens // chunk, 4, width)
    wrap_triton(join_backward_kernel)[(tokens // chunk, images)](
        d_total, d_normed, total, branch, gate, scale, mean, rstd, d_x, d_branch, sums, gate.stride(0), scale.stride(0),
        tokens=tokens, width=width, block=triton.next_power_of_2(width), **JOIN_BACKWARD | {"chunk": chunk},
    )  # fmt: skip
    return d_x, d_branch, sums.sum(1)  # (B, T, D), (B, T, D), (B, 4, D)


def _save_join(ctx: object, inputs: tuple, output: tuple) -> None:
    _, branch, gate, _, scale, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, branch, gate, scale, mean, rstd)


def _differentiate_join(ctx: object, d_total: Tensor, d_normed: Tensor, *unused: Tensor) -> tuple:
    total, branch, gate, scale, mean, rstd = ctx.saved_tensors
    d_x, d_branch, sums = _join_backward_op(d_total, d_normed, total, branch, gate, scale, mean, rstd)
    d_gate, d_shift, d_scale = sums[:, :3].to(gate.dtype).unbind(1)
    return d_x, d_branch, d_gate, d_shift, d_scale, sums[:, 3].sum(0), None


_join_op.register_autograd(_differentiate_join, setup_context=_save_join)


def join(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """total (B, T, D) float32 and normed (B, T, D) of `branch`'s type, as at the top of this file.

    Args:
        x: (B, T, D) float32, the residual stream.
        branch: (B, T, D), the output of the attention or MLP before.
        gate, shift, scale: (B, D), rows contiguous.
        bias: (D,), float32 where it is trained, which `branch` contains, detached; named for its gradient alone.
        eps: of LayerNorm.
    """
    total, normed, _, _ = _join_op(x, branch, gate, shift, scale, bias, eps)
    return total, normed


@triton.jit
def activate_kernel(hidden, active, numel, block: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(hidden + places, mask=places < numel, other=0.0).to(tl.float32)
    result = value / (1 + tl.exp2(value * (value * value * POWER_CUBIC + POWER)))
    tl.store(active + places, result.to(active.dtype.element_ty), mask=places < numel)


@triton.jit
def activate_backward_kernel(
    d_active, hidden, d_hidden, sums, rows,
    width: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr, span: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros([columns], tl.float32)
    for step in tl.range(0, span, tile, num_stages=stages):
        row = part * span + step + tl.arange(0, tile)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        places = row[:, None] * width + column[None, :]
        value = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(d_active + places, mask=inside, other=0.0).to(tl.float32)
        square = value * value
        share = 1 / (1 + tl.exp2(value * (square * POWER_CUBIC + POWER)))
        gradient *= share + value * (square * CUBIC + LINEAR) * (share - share * share)
        tl.store(d_hidden + places, gradient.to(d_hidden.dtype.element_ty), mask=inside)
        total += tl.sum(gradient, 0)
    tl.store(sums + part * width + column, total, mask=column < width)


@triton_op("gmem::activate", mutates_args=())
def _activate_op(hidden: Tensor, bias: Tensor) -> Tensor:
    hidden = hidden.contiguous()
    active = torch.empty_like(hidden)
    wrap_triton(activate_kernel)[(triton.cdiv(hidden.numel(), ACTIVATE["block"]),)](
        hidden, active, hidden.numel(), **ACTIVATE
    )
    return active


@triton_op("gmem::activate_backward", mutates_args=())
def _activate_backward_op(d_active: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    d_active, hidden = d_active.contiguous(), hidden.contiguous()
    width = hidden.shape[-1]
    rows = hidden.numel() // width
    d_hidden, parts = torch.empty_like(hidden), triton.cdiv(rows, ACTIVATE_BACKWARD["span"])
    sums = hidden.new_empty(parts, width, dtype=torch.float32)
    wrap_triton(activate_backward_kernel)[(parts, triton.cdiv(width, ACTIVATE_BACKWARD["columns"]))](
        d_active, hidden, d_hidden, sums, rows, width=width, **ACTIVATE_BACKWARD
    )
    return d_hidden, sums.sum(0)


def _save_hidden(ctx: object, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_activate(ctx: object, d_active: Tensor) -> tuple[Tensor, Tensor]:
    return _activate_backward_op(d_active, *ctx.saved_tensors)


_activate_op.register_autograd(_differentiate_activate, setup_context=_save_hidden)


def activate(hidden: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of hidden (B, T, 4·D), which contains `bias` (4·D,), detached, as in `join`."""
    return _activate_op(hidden, bias)


class WideGradient(torch.autograd.Function):
    """A linear layer of x (B, T, D) in half precision, whose float32 weight's gradient comes out of its product as
    float32, instead of rounded and then widened by a kernel of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: object, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return d_out @ weight, weight_gradient(d_out.flatten(0, 1), x.flatten(0, 1)), None


def weight_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """(O, D) in float32 from the gradient (N, O) of a linear layer's result and from what it was given, (N, D)."""
    if d_out.is_cuda:
        return torch.mm(d_out.t(), x, out_dtype=torch.float32)
    return (d_out.t() @ x).float()


def widens(layer: nn.Linear, x: Tensor) -> bool:
    """Whether a linear layer is a `WideGradient`: trained in float32, on what is in half precision."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and layer.weight.dtype == torch.float32 and layer.weight.requires_grad and torch.is_grad_enabled()


def detached(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer that leaves its bias's gradient to the kernel that comes next; its weight's is not rounded."""
    if widens(layer, x):
        return WideGradient.apply(x, layer.weight, layer.bias.detach())
    return F.linear(x, layer.weight, layer.bias.detach())


@custom_op("gmem::linear_gelu", mutates_args=())  # which torch.compile leaves as it is
def _linear_gelu_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)  # tanh's form on a GPU alone
    return rows.unflatten(0, x.shape[:2])


@_linear_gelu_op.register_fake
def _like_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], len(weight))


def fits_product(layer: nn.Linear, x: Tensor) -> bool:
    """Whether a linear layer's product can give GELU of itself: on a GPU, all in half precision, without a gradient."""
    half = x.dtype == layer.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_cuda and not torch.is_grad_enabled()


def activated(layer: nn.Linear, x: Tensor) -> Tensor:
    """GELU, in its tanh form, of a linear layer of x (B, T, D): (B, T, 4·D)."""
    if fits_product(layer, x):
        return _linear_gelu_op(x, layer.weight, layer.bias)
    return activate(detached(layer, x), layer.bias)


def attend(packed: bool, layer: nn.Module, x: Tensor) -> Tensor:
    """timm's `Attention` of x (B, T, D) up to its last layer; `packed`: by models/attention.py, where it fits."""
    if packed and fits(layer, x):
        return attention(detached(layer.qkv, x), layer.qkv.bias, layer.num_heads)
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, S) each
    return F.scaled_dot_product_attention(layer.q_norm(q), layer.k_norm(k), v).transpose(1, 2).flatten(2)


def run_block(
    packed: bool, block: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A `SiTBlock` on x + gate·branch, where `branch` contains `bias`; its own last residual is handed on in the same
    way, (x, branch, gate), its bias that of the last layer."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=-1)  # (B, D) each
    layer, mlp = block.attn, block.mlp
    x, normed = join(x, branch, gate, shift1, scale1, bias, block.norm1.eps)
    attended = detached(layer.proj, attend(packed, layer, normed))  # (B, T, D)
    x, normed = join(x, attended, gate1, shift2, scale2, layer.proj.bias, block.norm2.eps)
    branch = detached(mlp.fc2, activated(mlp.fc1, normed))  # (B, T, D)
    return x, branch, gate2.contiguous()  # of the first block's strides, so that one graph serves all


def finish(layer: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, c: Tensor) -> Tensor:
    """A `FinalLayer` on x + gate·branch, where `branch` contains `bias`: patches (B, T, p²·C)."""
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=-1)
    _, normed = join(x, branch, gate, shift, scale, bias, layer.norm_final.eps)
    return layer.linear(normed)
