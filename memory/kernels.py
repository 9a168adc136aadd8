"""Triton kernels of k-means: the best tiles of a product that is never stored, the columns inside a tile that could be
the best, and the sums of clusters. `memory/fused.py` makes exact assignments of them.

A product of N rows and M columns is cut into tiles of `Shape.columns` columns. `best_tiles` keeps per row the largest
scores of the four best tiles, which costs one comparison a score; `candidates` then looks inside the few tiles that
matter. Matrices are float16 and contiguous, their width a multiple of 64 (`fused.halves`), sums are float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from memory.kmeans import HOPPER
from memory.trust import distrusted

PAIRS = 64  # rows × one tile of a program of `candidates`
WAVES = 8  # programs a multiprocessor: fewer leave some idle at the end
WINDOW = 12 * 2**20  # bytes of columns that all rows pass before the next ones: they and the rows at work fit the L2


@dataclass(frozen=True)
class Shape:
    """Rows × columns × depth of one step of the product, how many steps are loaded ahead, and warps a program."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


WIDE = Shape(rows=128, columns=256, depth=64, stages=4, warps=8)  # 192 KB of shared memory: Hopper
SMALL = Shape(rows=128, columns=128, depth=32, stages=4, warps=8)  # 64 KB
GLUON = [(3, 6), (3, 7), (3, 8)]  # releases of Triton that memory/hopper.py was compiled with


def hopper(device: torch.device) -> bool:
    """Whether memory/hopper.py runs: its instructions are Hopper's alone, and Gluon may change between releases."""
    known = tuple(map(int, triton.__version__.split(".")[:2])) in GLUON and HOPPER not in distrusted
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def shape_for(device: torch.device) -> Shape:
    """The tile shape that a device's shared memory holds."""
    if device.type == "cpu":  # Triton's interpreter
        return SMALL
    return WIDE if torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200 * 1024 else SMALL


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one of the first argument."""

    @functools.wraps(launch)
    def launched(first: torch.Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *others)

    return launched


@_on_its_device
def best_tiles(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The four largest tile maxima (4, N) float32 of each row's scores, and the first three's tiles (3, N) int32.

    rows (N, W), columns (M, W). The last tile is filled with copies of the last column, so no score is made up. A row
    with fewer than four tiles gets -inf for the missing ones. Few rows are spread over the device by giving each
    program a part of the tiles; many rows pass the columns window by window, because programs drift apart and would
    then each fetch every column from main memory.
    """
    shape = shape_for(rows.device)
    missing = -len(columns) % shape.columns
    if missing:
        columns = torch.cat([columns, columns[-1:].expand(missing, -1)])
    tiles, blocks = len(columns) // shape.columns, triton.cdiv(len(rows), shape.rows)
    wanted = WAVES * _multiprocessors(rows.device)
    splits = 1 if blocks >= wanted else min(tiles, triton.cdiv(wanted, blocks))
    window = max(1, WINDOW // (shape.columns * rows.shape[1] * 2)) if splits == 1 else tiles
    values = torch.full((4, splits, len(rows)), -torch.inf, device=rows.device)
    places = torch.zeros(3, splits, len(rows), dtype=torch.int32, device=rows.device)
    for first in range(0, tiles, window):
        last = min(first + window, tiles)
        scope = first, last, triton.cdiv(last - first, splits)
        if hopper(rows.device):
            from memory.hopper import best_tiles as launch

            launch(rows, columns, values, places, shape.columns, *scope)
        else:
            _best_tiles[(blocks, splits)](
                TensorDescriptor.from_tensor(rows, [shape.rows, shape.depth]),
                TensorDescriptor.from_tensor(columns, [shape.columns, shape.depth]),
                values, places, len(rows), *scope, rows.shape[1],
                shape.rows, shape.columns, shape.depth, num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
    if splits == 1:
        return values[:, 0], places[:, 0]
    best = values.flatten(0, 1).topk(4, dim=0)
    # A fourth maximum has no tile. It can rank among the first three only beside three equals of its split, and four
    # equals say that there are too many candidates, whatever their tiles.
    return best.values, places.flatten(0, 1).gather(0, best.indices[:3].clamp(max=3 * splits - 1))


@_on_its_device
def candidates(
    rows: torch.Tensor, columns: torch.Tensor, row: torch.Tensor, tile: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each pair of a row and a tile holds: count (P,) int32 of scores ≥ the row's threshold, the columns (P,)
    int32 of its largest and second-largest score, and the largest score (P,) below the threshold.

    rows (N, W), columns (M, W), pairs `row` (P,) and `tile` (P,), threshold (N,) float32.
    """
    shape = shape_for(rows.device)
    tile, order = tile.long().sort(stable=True)
    sizes = torch.bincount(tile, minlength=triton.cdiv(len(columns), shape.columns))  # pairs of each tile
    parts = (sizes + PAIRS - 1) // PAIRS  # programs of each tile
    of = torch.repeat_interleave(parts)  # the tile of each program
    ends = sizes.cumsum(0)
    start = (ends - sizes)[of] + PAIRS * (torch.arange(len(of), device=of.device) - (parts.cumsum(0) - parts)[of])
    count, first, second = (torch.empty(len(row), dtype=torch.int32, device=row.device) for _ in range(3))
    below = torch.empty(len(row), dtype=torch.float32, device=row.device)
    if len(of):
        _candidates[(len(of),)](
            rows, columns, row, order, threshold, of, start, ends[of], count, first, second, below,
            len(columns), rows.shape[1], PAIRS, shape.columns, shape.depth, num_warps=shape.warps, num_stages=3,
        )  # fmt: skip
    return count, first, second, below


@_on_its_device
def cluster_sums(features: torch.Tensor, cluster: torch.Tensor, clusters: int) -> torch.Tensor:
    """Sums (K, F) float64 of the rows (N, F) float32 of each of K clusters; rows of cluster -1 (N,) are left out."""
    cluster, order = cluster.sort(stable=True)
    starts = torch.searchsorted(cluster, torch.arange(clusters + 1, device=cluster.device))
    sums = torch.empty(clusters, features.shape[1], dtype=torch.float64, device=features.device)
    if clusters:
        _cluster_sums[(clusters,)](
            features, order, starts, sums, features.shape[1], triton.next_power_of_2(features.shape[1])
        )
    return sums


def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["num_rows", "first", "last", "per_split"])
def _best_tiles(
    row_blocks, column_blocks, values, places, num_rows, first, last, per_split, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the tiles `first` to `last`, going on from the best so far.

    Tiles and steps along the width are one loop, so that the loads of the next tile run during the last product of
    this one. Neighbouring programs are neighbouring rows: they read the same columns at about the same time.
    """
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    some = rows < num_rows
    out = tl.program_id(1).to(tl.int64) * num_rows + rows
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    v1 = tl.load(values + out, some)
    v2 = tl.load(values + plane + out, some)
    v3 = tl.load(values + 2 * plane + out, some)
    v4 = tl.load(values + 3 * plane + out, some)
    t1 = tl.load(places + out, some)
    t2 = tl.load(places + plane + out, some)
    t3 = tl.load(places + 2 * plane + out, some)
    tile = first + tl.program_id(1) * per_split
    last = tl.minimum(tile + per_split, last)
    scores = tl.zeros((ROWS, COLUMNS), tl.float32)
    at = 0
    for _ in range((last - tile) * (width // DEPTH)):
        x = row_blocks.load([row, at])
        c = column_blocks.load([tile * COLUMNS, at])
        scores = tl.dot(x, c.T, scores)
        at += DEPTH
        if at == width:
            top = tl.max(scores, 1)
            v4 = tl.maximum(v4, tl.minimum(v3, top))
            t3 = tl.where(top > v2, t2, tl.where(top > v3, tile, t3))
            v3 = tl.maximum(v3, tl.minimum(v2, top))
            t2 = tl.where(top > v1, t1, tl.where(top > v2, tile, t2))
            v2 = tl.maximum(v2, tl.minimum(v1, top))
            t1 = tl.where(top > v1, tile, t1)
            v1 = tl.maximum(v1, top)
            scores = tl.zeros((ROWS, COLUMNS), tl.float32)
            tile += 1
            at = 0
    tl.store(values + out, v1, some)
    tl.store(values + plane + out, v2, some)
    tl.store(values + 2 * plane + out, v3, some)
    tl.store(values + 3 * plane + out, v4, some)
    tl.store(places + out, t1, some)
    tl.store(places + plane + out, t2, some)
    tl.store(places + 2 * plane + out, t3, some)


@triton.jit(do_not_specialize=["num_columns"])
def _candidates(
    rows, columns, row, order, threshold, tiles, starts, ends, count, first, second, below, num_columns, width,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Up to PAIRS rows against one tile."""
    program = tl.program_id(0)
    place = tl.load(starts + program) + tl.arange(0, PAIRS)
    some = place < tl.load(ends + program)
    pair = tl.load(order + place, some, 0)
    which = tl.load(row + pair, some, 0)
    column = tl.load(tiles + program) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < num_columns
    depth = tl.arange(0, DEPTH)
    x_at = rows + which[:, None] * width + depth[None, :]
    c_at = columns + tl.where(real, column, 0)[:, None] * width + depth[None, :]
    scores = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for at in range(0, width, DEPTH):
        scores = tl.dot(tl.load(x_at + at), tl.load(c_at + at).T, scores)
    scores = tl.where(real[None, :], scores, float("-inf"))
    hit = scores >= tl.load(threshold + which)[:, None]
    tl.store(count + pair, tl.sum(hit.to(tl.int32), 1), some)
    tl.store(below + pair, tl.max(tl.where(hit, float("-inf"), scores), 1), some)
    best = tl.argmax(scores, 1)
    tl.store(first + pair, tl.load(tiles + program).to(tl.int32) * COLUMNS + best, some)
    scores = tl.where(tl.arange(0, COLUMNS)[None, :] == best[:, None], float("-inf"), scores)
    tl.store(second + pair, tl.load(tiles + program).to(tl.int32) * COLUMNS + tl.argmax(scores, 1), some)


@triton.jit
def _cluster_sums(features, order, starts, sums, width, BLOCK: tl.constexpr):
    """The sum of one cluster's rows."""
    cluster = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(tl.load(starts + cluster), tl.load(starts + cluster + 1)):
        total += tl.load(features + tl.load(order + at) * width + column, column < width, 0.0).to(tl.float64)
    tl.store(sums + cluster * width + column, total, column < width)
