"""Attention of short sequences: cuDNN forward, and a Triton kernel backward, on queries, keys and values in one tensor.

The heads of SiT-XL have 72 dimensions and see 256 tokens: general kernels pad the heads to 128, and their gradients of
queries, keys and values are packed in a pass of its own. Here a head is split into a power of two and a small rest, one
program makes all gradients of a head, and they are written where the projection's gradient needs them.

Shapes: B images, T tokens, H heads of size S, D = H·S; qkv (B, T, 3·D), out (B, T, D).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

LOG2_E = tl.constexpr(math.log2(math.e))
REST = 16  # least columns of a matrix product
TOKENS = 256  # what the tiles below were tried with: latents of 32×32 in patches of 2×2


@triton.jit
def attention_backward_kernel(
    qkv, out, d_out, lse, d_qkv, scratch, heads,
    factor: tl.constexpr, tokens: tl.constexpr, size: tl.constexpr, main: tl.constexpr, rest: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, image = program % heads, program // heads
    width = heads * size
    dtype = qkv.dtype.element_ty
    low, high = tl.arange(0, main), main + tl.arange(0, 16)
    known, inside = (low < size)[None, :], (high < size)[None, :]
    packed = image * tokens * 3 * width + head * size
    plain = image * tokens * width + head * size
    for j in tl.static_range(0, tokens, columns):
        keys = packed + width + (j + tl.arange(0, columns))[:, None] * 3 * width
        k0 = tl.load(qkv + keys + low[None, :], mask=known, other=0.0)
        v0 = tl.load(qkv + keys + width + low[None, :], mask=known, other=0.0)
        d_k0, d_v0 = tl.zeros([columns, main], tl.float32), tl.zeros([columns, main], tl.float32)
        if rest:
            k1 = tl.load(qkv + keys + high[None, :], mask=inside, other=0.0)
            v1 = tl.load(qkv + keys + width + high[None, :], mask=inside, other=0.0)
            d_k1, d_v1 = tl.zeros([columns, 16], tl.float32), tl.zeros([columns, 16], tl.float32)
        for i in tl.range(0, tokens, rows, num_stages=stages):
            numbers = i + tl.arange(0, rows)
            queries, outputs = packed + numbers[:, None] * 3 * width, plain + numbers[:, None] * width
            q0 = tl.load(qkv + queries + low[None, :], mask=known, other=0.0)
            g0 = tl.load(d_out + outputs + low[None, :], mask=known, other=0.0)
            o0 = tl.load(out + outputs + low[None, :], mask=known, other=0.0)
            inner = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)  # (rows,)
            scores = tl.dot(k0, tl.trans(q0))  # (columns, rows): keys by queries
            d_weights = tl.dot(v0, tl.trans(g0))
            if rest:
                q1 = tl.load(qkv + queries + high[None, :], mask=inside, other=0.0)
                g1 = tl.load(d_out + outputs + high[None, :], mask=inside, other=0.0)
                o1 = tl.load(out + outputs + high[None, :], mask=inside, other=0.0)
                inner += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
                scores = tl.dot(k1, tl.trans(q1), scores)
                d_weights = tl.dot(v1, tl.trans(g1), d_weights)
            largest = tl.load(lse + program * tokens + numbers) * LOG2_E
            weights = tl.exp2(scores * (factor * LOG2_E) - largest[None, :])
            rounded = weights.to(dtype)
            d_v0 = tl.dot(rounded, g0, d_v0)
            d_scores = (weights * (d_weights - inner[None, :])).to(dtype)
            d_k0 = tl.dot(d_scores, q0, d_k0)
            turned = tl.trans(d_scores)
            d_q0 = tl.dot(turned, k0)
            kept = scratch + (program * tokens + numbers[:, None]) * (main + rest)
            if j > 0:
                d_q0 += tl.load(kept + low[None, :])
            if j + columns < tokens:
                tl.store(kept + low[None, :], d_q0)
            else:
                tl.store(d_qkv + queries + low[None, :], (d_q0 * factor).to(dtype), mask=known)
            if rest:
                d_v1 = tl.dot(rounded, g1, d_v1)
                d_k1 = tl.dot(d_scores, q1, d_k1)
                d_q1 = tl.dot(turned, k1)
                if j > 0:
                    d_q1 += tl.load(kept + high[None, :])
                if j + columns < tokens:
                    tl.store(kept + high[None, :], d_q1)
                else:
                    tl.store(d_qkv + queries + high[None, :], (d_q1 * factor).to(dtype), mask=inside)
        tl.store(d_qkv + keys + low[None, :], (d_k0 * factor).to(dtype), mask=known)
        tl.store(d_qkv + keys + width + low[None, :], d_v0.to(dtype), mask=known)
        if rest:
            tl.store(d_qkv + keys + high[None, :], (d_k1 * factor).to(dtype), mask=inside)
            tl.store(d_qkv + keys + width + high[None, :], d_v1.to(dtype), mask=inside)
        tl.debug_barrier()  # the next keys add to what other threads wrote to `scratch`


def split(size: int) -> tuple[int, int]:
    """A head size as a power of two and what is left of it in multiples that a matrix product takes: 72 → (64, 16)."""
    main = 1 << (size.bit_length() - 1)
    return main, REST if size > main else 0


@triton_op("gmem::attention", mutates_args=())
def _attention_op(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, S) each
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = forward(q, k, v, None, compute_log_sumexp=True)  # (B, H, T, S), (B, H, T, 1)
    return out.transpose(1, 2).flatten(2), lse  # (B, T, D)


ROWS, COLUMNS, STAGES, WARPS = 64, 128, 3, 8  # the fastest of nine on an H200


@triton_op("gmem::attention_backward", mutates_args=())
def _attention_backward_op(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    images, tokens, width = out.shape
    size = width // heads
    main, rest = split(size)
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    d_qkv, scratch = torch.empty_like(qkv), lse.new_empty(images, heads, tokens, main + rest)
    wrap_triton(attention_backward_kernel)[(images * heads,)](
        qkv, out, d_out, lse, d_qkv, scratch, heads,
        factor=1 / math.sqrt(size), tokens=tokens, size=size, main=main, rest=rest,
        rows=ROWS, columns=COLUMNS, stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return d_qkv


def _save(ctx: object, inputs: tuple, output: tuple) -> None:
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: object, d_out: Tensor, unused: Tensor) -> tuple[Tensor, None]:
    return _attention_backward_op(d_out, *ctx.saved_tensors, ctx.heads), None


_attention_op.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q·kᵀ/√S)·v of every head, (B, T, D), from qkv (B, T, 3·D) in bf16 or fp16, where cuDNN has attention."""
    return _attention_op(qkv, heads)[0]


def fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernels serve timm's `Attention` on x (B, T, D): half precision, 256 tokens, no norm of queries and
    keys, heads of a power of two or a little more. The forward pass is cuDNN's, the faster one."""
    size, half = layer.head_dim, x.dtype in (torch.bfloat16, torch.float16)
    return half and x.shape[1] == TOKENS and size - split(size)[0] in (0, 8, 16) and type(layer.q_norm) is nn.Identity
