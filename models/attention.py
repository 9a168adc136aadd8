"""Attention of short sequences: cuDNN forward, and Triton kernels backward, on queries, keys and values in one tensor.

The heads of SiT-XL have 72 dimensions and see 256 tokens: general kernels pad the heads to 128, and their gradients of
queries, keys and values are packed in a pass of its own. Here a head is split into a power of two and a small rest, the
gradients are written where the projection's gradient needs them, and their sums over tokens, the gradient of the
projection's bias, are formed on the way (keys have none: what is added to all of them changes no weight). With
P = softmax(q·kᵀ/√S), made again from the logarithms of its rows' sums (`lse`) that the forward pass keeps, and `inner`,
the sums over S of d_out ∘ out, the gradients are (FlashAttention-2, arXiv 2307.08691, algorithm 2)

    d_v = Pᵀ·d_out,   d_scores = P ∘ (d_out·vᵀ − inner),   d_q = d_scores·k/√S,   d_k = d_scoresᵀ·q/√S

The kernel of keys and values leaves d_scores for that of queries, so that scores are computed once. This costs B·H·T²
numbers for the time of one layer: 268 MB for 128 images of SiT-XL in bf16.

Shapes: B images, T tokens, H heads of size S, D = H·S; qkv (B, T, 3·D), out (B, T, D), d_scores (B, H, T, T), kept
transposed, a row for each key.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

LOG2_E = tl.constexpr(math.log2(math.e))
REST = 16  # least columns of a matrix product
# Tokens and head size that the tiles below were tried with. With 64 tokens of 72 an earlier form of these kernels was
# right when interpreted, but compiled by Triton 3.6 for an H200 its gradients were wrong.
SHAPES = ((256, 72), (256, 64), (64, 64))
BLOCK = 64  # tokens of a program
# Tokens at once against them, loads under way: about the fastest for SiT-XL on an H200 (benchmarks/bench_kernels.py).
KEYS = {"step": 64, "stages": 3, "num_warps": 4}
QUERIES = {"step": 64, "stages": 3, "num_warps": 4}


@triton.jit
def attention_inner_kernel(
    out, d_out, inner, heads,
    tokens: tl.constexpr, size: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    part, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, image = program % heads, program // heads
    width = heads * size
    low, high = tl.arange(0, main), main + tl.arange(0, 16)
    numbers = part * block + tl.arange(0, block)
    places = image * tokens * width + head * size + numbers[:, None] * width
    known, inside = (low < size)[None, :], (high < size)[None, :]
    o0 = tl.load(out + places + low[None, :], mask=known, other=0.0).to(tl.float32)
    g0 = tl.load(d_out + places + low[None, :], mask=known, other=0.0).to(tl.float32)
    products = tl.sum(o0 * g0, 1)
    if rest:
        o1 = tl.load(out + places + high[None, :], mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(d_out + places + high[None, :], mask=inside, other=0.0).to(tl.float32)
        products += tl.sum(o1 * g1, 1)
    tl.store(inner + program * tokens + numbers, products)


@triton.jit
def attention_keys_kernel(
    qkv, d_out, lse, inner, d_qkv, d_scores, sums, heads,
    factor: tl.constexpr, tokens: tl.constexpr, size: tl.constexpr, main: tl.constexpr, rest: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    part, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, image = program % heads, program // heads
    width = heads * size
    dtype = qkv.dtype.element_ty
    low, high = tl.arange(0, main), main + tl.arange(0, 16)
    known, inside = (low < size)[None, :], (high < size)[None, :]
    packed = image * tokens * 3 * width + head * size
    plain = image * tokens * width + head * size
    rows = (part * block + tl.arange(0, block))[:, None]
    keys = packed + width + rows * 3 * width
    d_scores += program * tokens * tokens
    k0 = tl.load(qkv + keys + low[None, :], mask=known, other=0.0)
    v0 = tl.load(qkv + keys + width + low[None, :], mask=known, other=0.0)
    d_k0, d_v0 = tl.zeros([block, main], tl.float32), tl.zeros([block, main], tl.float32)
    if rest:
        k1 = tl.load(qkv + keys + high[None, :], mask=inside, other=0.0)
        v1 = tl.load(qkv + keys + width + high[None, :], mask=inside, other=0.0)
        d_k1, d_v1 = tl.zeros([block, 16], tl.float32), tl.zeros([block, 16], tl.float32)
    for i in tl.range(0, tokens, step, num_stages=stages):
        numbers = i + tl.arange(0, step)
        queries, outputs = packed + numbers[:, None] * 3 * width, plain + numbers[:, None] * width
        q0 = tl.load(qkv + queries + low[None, :], mask=known, other=0.0)
        g0 = tl.load(d_out + outputs + low[None, :], mask=known, other=0.0)
        scores = tl.dot(k0, tl.trans(q0))  # (block, step): keys by queries
        d_weights = tl.dot(v0, tl.trans(g0))
        if rest:
            q1 = tl.load(qkv + queries + high[None, :], mask=inside, other=0.0)
            g1 = tl.load(d_out + outputs + high[None, :], mask=inside, other=0.0)
            scores = tl.dot(k1, tl.trans(q1), scores)
            d_weights = tl.dot(v1, tl.trans(g1), d_weights)
        largest = tl.load(lse + program * tokens + numbers) * LOG2_E
        products = tl.load(inner + program * tokens + numbers)
        weights = tl.exp2(scores * (factor * LOG2_E) - largest[None, :])
        rounded = weights.to(dtype)
        change = (weights * (d_weights - products[None, :])).to(dtype)
        tl.store(d_scores + rows * tokens + numbers[None, :], change)
        d_v0 = tl.dot(rounded, g0, d_v0)
        d_k0 = tl.dot(change, q0, d_k0)
        if rest:
            d_v1 = tl.dot(rounded, g1, d_v1)
            d_k1 = tl.dot(change, q1, d_k1)
    place = sums + (image * (tokens // block) + part) * 2 * width + width + head * size
    tl.store(d_qkv + keys + low[None, :], (d_k0 * factor).to(dtype), mask=known)
    tl.store(d_qkv + keys + width + low[None, :], d_v0.to(dtype), mask=known)
    tl.store(place + low, tl.sum(d_v0, 0), mask=low < size)
    if rest:
        tl.store(d_qkv + keys + high[None, :], (d_k1 * factor).to(dtype), mask=inside)
        tl.store(d_qkv + keys + width + high[None, :], d_v1.to(dtype), mask=inside)
        tl.store(place + high, tl.sum(d_v1, 0), mask=high < size)


@triton.jit
def attention_queries_kernel(
    qkv, d_scores, d_qkv, sums, heads,
    factor: tl.constexpr, tokens: tl.constexpr, size: tl.constexpr, main: tl.constexpr, rest: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    part, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, image = program % heads, program // heads
    width = heads * size
    dtype = qkv.dtype.element_ty
    low, high = tl.arange(0, main), main + tl.arange(0, 16)
    known, inside = (low < size)[None, :], (high < size)[None, :]
    packed = image * tokens * 3 * width + head * size
    columns = part * block + tl.arange(0, block)
    d_scores += program * tokens * tokens
    d_q0 = tl.zeros([block, main], tl.float32)
    if rest:
        d_q1 = tl.zeros([block, 16], tl.float32)
    for j in tl.range(0, tokens, step, num_stages=stages):
        rows = (j + tl.arange(0, step))[:, None]
        keys = packed + width + rows * 3 * width
        change = tl.trans(tl.load(d_scores + rows * tokens + columns[None, :]))  # (block, step): queries by keys
        d_q0 = tl.dot(change, tl.load(qkv + keys + low[None, :], mask=known, other=0.0), d_q0)
        if rest:
            d_q1 = tl.dot(change, tl.load(qkv + keys + high[None, :], mask=inside, other=0.0), d_q1)
    queries = packed + columns[:, None] * 3 * width
    place = sums + (image * (tokens // block) + part) * 2 * width + head * size
    tl.store(d_qkv + queries + low[None, :], (d_q0 * factor).to(dtype), mask=known)
    tl.store(place + low, tl.sum(d_q0, 0) * factor, mask=low < size)
    if rest:
        tl.store(d_qkv + queries + high[None, :], (d_q1 * factor).to(dtype), mask=inside)
        tl.store(place + high, tl.sum(d_q1, 0) * factor, mask=high < size)


def split(size: int) -> tuple[int, int]:
    """A head size as a power of two and what is left of it in multiples that a matrix product takes: 72 → (64, 16)."""
    main = 1 << (size.bit_length() - 1)
    return main, REST if size > main else 0


@triton_op("gmem::attention", mutates_args=())
def _attention_op(qkv: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, S) each
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = forward(q, k, v, None, compute_log_sumexp=True)  # (B, H, T, S), (B, H, T, 1)
    return out.transpose(1, 2).flatten(2), lse  # (B, T, D)


@triton_op("gmem::attention_backward", mutates_args=())
def _attention_backward_op(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    images, tokens, width = out.shape
    size = width // heads
    main, rest = split(size)
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    d_qkv, inner = torch.empty_like(qkv), torch.empty_like(lse)
    sums = lse.new_empty(images, tokens // BLOCK, 2, width)
    d_scores = qkv.new_empty(images, heads, tokens, tokens)
    grid, facts = (tokens // BLOCK, images * heads), {"tokens": tokens, "size": size, "main": main, "rest": rest}
    facts |= {"block": BLOCK}
    wrap_triton(attention_inner_kernel)[grid](out, d_out, inner, heads, **facts)
    facts |= {"factor": 1 / math.sqrt(size)}
    wrap_triton(attention_keys_kernel)[grid](qkv, d_out, lse, inner, d_qkv, d_scores, sums, heads, **facts, **KEYS)
    wrap_triton(attention_queries_kernel)[grid](qkv, d_scores, d_qkv, sums, heads, **facts, **QUERIES)
    d_queries, d_values = sums.sum((0, 1))  # (D,) each
    return d_qkv, torch.cat([d_queries, torch.zeros_like(d_queries), d_values])  # (B, T, 3·D), (3·D,)


def _save(ctx: object, inputs: tuple, output: tuple) -> None:
    qkv, _, ctx.heads = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: object, d_out: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_attention_backward_op(d_out, *ctx.saved_tensors, ctx.heads), None


_attention_op.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """softmax(q·kᵀ/√S)·v of every head, (B, T, D), from qkv (B, T, 3·D) in bf16 or fp16, where cuDNN has attention.

    `qkv` contains `bias` (3·D,), detached, which is named for its gradient alone.
    """
    return _attention_op(qkv, bias, heads)[0]


def fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernels serve timm's `Attention` on x (B, T, D): half precision, a shape of those at the top of this
    file, no norm of queries and keys."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and (x.shape[1], layer.head_dim) in SHAPES and type(layer.q_norm) is nn.Identity
