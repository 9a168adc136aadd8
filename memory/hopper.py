"""`kernels.best_tiles` for Hopper in Gluon, the level below Triton: one warp loads what two groups of four multiply.

The groups take 64 rows each and are not in step: while one looks for the maximum of its scores, the other keeps the
tensor cores busy. Loads run ahead by up to four steps, across tiles.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HALF = 64  # rows of one group of warps
DEPTH = 64  # components of one step
STAGES = 4  # steps in shared memory: 192 KB
REGISTERS = 168  # a thread: three groups of 128 threads share 65,536


def best_tiles(
    rows: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    tile: int,
    first: int,
    last: int,
    per_split: int,
) -> None:
    """Bring values (4, S, N) and places (3, S, N) up to date with the tiles `first` to `last` of `tile` columns each,
    each of the S splits with `per_split` of them: rows (N, W), columns (M, W)."""
    blocks = [[HALF, DEPTH], [tile, DEPTH]]
    layouts = [gl.NVMMASharedLayout.get_default_for(block, gl.float16) for block in blocks]
    _best_tiles[(triton.cdiv(len(rows), 2 * HALF), values.shape[1])](
        TensorDescriptor.from_tensor(rows, blocks[0], layouts[0]),
        TensorDescriptor.from_tensor(columns, blocks[1], layouts[1]),
        values, places, len(rows), first, last, per_split, rows.shape[1] // DEPTH, STAGES, REGISTERS, num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "first", "last", "per_split", "steps"])
def _best_tiles(
    row_blocks, column_blocks, values, places, num_rows, first, last, per_split, steps,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the tiles, going on from the best so far."""
    HALF: gl.constexpr = row_blocks.block_type.shape[0]
    DEPTH: gl.constexpr = row_blocks.block_type.shape[1]
    COLUMNS: gl.constexpr = column_blocks.block_type.shape[0]
    row = gl.program_id(0) * 2 * HALF
    first = first + gl.program_id(1) * per_split
    last = gl.minimum(first + per_split, last)
    upper = gl.allocate_shared_memory(gl.float16, [STAGES, HALF, DEPTH], row_blocks.layout)
    lower = gl.allocate_shared_memory(gl.float16, [STAGES, HALF, DEPTH], row_blocks.layout)
    tile = gl.allocate_shared_memory(gl.float16, [STAGES, COLUMNS, DEPTH], column_blocks.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups have read it
    gl.warp_specialize(
        [
            (_multiply, (upper, tile, full, empty, values, places, row, num_rows, first, last, steps)),
            (_multiply, (lower, tile, full, empty, values, places, row + HALF, num_rows, first, last, steps)),
            (_load, (row_blocks, column_blocks, upper, lower, tile, full, empty, row, first, last, steps)),
        ],
        [4, 1],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _load(row_blocks, column_blocks, upper, lower, tiles, full, empty, row, first, last, steps):
    """Fill the stages in turn, each once both groups have read what it held."""
    STAGES: gl.constexpr = upper.type.shape[0]
    HALF: gl.constexpr = upper.type.shape[1]
    DEPTH: gl.constexpr = upper.type.shape[2]
    COLUMNS: gl.constexpr = tiles.type.shape[1]
    stage = 0
    phase = 1  # nothing to wait for in the first round
    for tile in range(first, last):
        for step in range(0, steps):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (2 * HALF + COLUMNS) * DEPTH * 2)
            tma.async_copy_global_to_shared(row_blocks, [row, step * DEPTH], arrived, upper.index(stage))
            tma.async_copy_global_to_shared(row_blocks, [row + HALF, step * DEPTH], arrived, lower.index(stage))
            tma.async_copy_global_to_shared(column_blocks, [tile * COLUMNS, step * DEPTH], arrived, tiles.index(stage))
            stage += 1
            around = stage == STAGES
            stage = gl.where(around, 0, stage)
            phase = gl.where(around, phase ^ 1, phase)


@gluon.jit
def _multiply(rows, tiles, full, empty, values, places, row, num_rows, first, last, steps):
    """Scores of 64 rows and tile after tile, and the four best maxima of tiles."""
    STAGES: gl.constexpr = rows.type.shape[0]
    HALF: gl.constexpr = rows.type.shape[1]
    COLUMNS: gl.constexpr = tiles.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, layout)
    v1 = gl.full((HALF,), float("-inf"), gl.float32, per_row)
    v2 = v1
    v3 = v1
    v4 = v1
    t1 = gl.full((HALF,), 0, gl.int32, per_row)
    t2 = t1
    t3 = t1
    scores = gl.zeros((HALF, COLUMNS), gl.float32, layout)
    stage = 0
    before = 0
    phase = 0
    for tile in range(first, last):
        for step in range(0, steps):
            mbarrier.wait(full.index(stage), phase)
            columns = tiles.index(stage).permute((1, 0))
            scores = warpgroup_mma(rows.index(stage), columns, scores, use_acc=step > 0, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(empty.index(before), pred=step > 0)  # the product before this one is done
            before = stage
            stage += 1
            around = stage == STAGES
            stage = gl.where(around, 0, stage)
            phase = gl.where(around, phase ^ 1, phase)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(empty.index(before))
        v1, v2, v3, v4, t1, t2, t3 = _insert(gl.max(scores, 1), tile, v1, v2, v3, v4, t1, t2, t3)

    # The best of earlier windows come in last, when the scores have left their registers. The fourth of them has no
    # tile and needs none: the three before it are at least as large.
    rows_of_all = row + gl.arange(0, HALF, per_row)
    some = rows_of_all < num_rows
    out = gl.program_id(1).to(gl.int64) * num_rows + rows_of_all
    plane = gl.num_programs(1).to(gl.int64) * num_rows
    for rank in gl.static_range(3):
        tile_before = gl.load(places + rank * plane + out, some)
        before = gl.load(values + rank * plane + out, some)
        v1, v2, v3, v4, t1, t2, t3 = _insert(before, tile_before, v1, v2, v3, v4, t1, t2, t3)
    v4 = gl.maximum(v4, gl.load(values + 3 * plane + out, some))
    gl.store(values + out, v1, some)
    gl.store(values + plane + out, v2, some)
    gl.store(values + 2 * plane + out, v3, some)
    gl.store(values + 3 * plane + out, v4, some)
    gl.store(places + out, t1, some)
    gl.store(places + plane + out, t2, some)
    gl.store(places + 2 * plane + out, t3, some)


@gluon.jit
def _insert(top, tile, v1, v2, v3, v4, t1, t2, t3):
    """The four largest of five values, and the tiles of the first three."""
    v4 = gl.maximum(v4, gl.minimum(v3, top))
    t3 = gl.where(top > v2, t2, gl.where(top > v3, tile, t3))
    v3 = gl.maximum(v3, gl.minimum(v2, top))
    t2 = gl.where(top > v1, t1, gl.where(top > v2, tile, t2))
    v2 = gl.maximum(v2, gl.minimum(v1, top))
    t1 = gl.where(top > v1, tile, t1)
    v1 = gl.maximum(v1, top)
    return v1, v2, v3, v4, t1, t2, t3
