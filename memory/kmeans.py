"""Exact spherical k-means on tensors: the same bits from one process or many, on any device, with any block size.

Feature rows and centroids are unit vectors whose components are rounded to multiples of 2⁻²⁴. A cosine of two such
rows is a multiple of 2⁻⁴⁸ below 2, and a sum of rows a multiple of 2⁻²⁴ below their number: float64 holds both exactly
for up to 2²⁹ rows, so the order of summation cannot matter. Assignments come from matrix products whose error has a
bound; rows that it leaves in doubt are decided by exact cosines. The plain path (`assign_plain`) multiplies blocks in
float32 and rests on IEEE arithmetic alone. On a GPU of the Hopper generation or later memory/fused.py multiplies in
float16 without storing scores; that its labels are the same, bit for bit, rests also on how tensor cores add, as stated
at `fused._error`; some of its results are compared with the plain path's, which takes over where they differ or kernels
fail. What is left, lengths and quotients, is computed in an order of its own (`ordered_sum`).

Memory for N rows on this process: features in float32 (4·N·F bytes; 8·N·F with the float16 copies of memory/fused.py),
centroids before and after an update in float32 and their sums in float64 (16·K·F in all: 7.9 GB at K = 640,000,
F = 768), and one block of scores; never N × K.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from memory.trust import distrust, distrusted

GRID = 2.0**24
BLOCK = {"cpu": (2048, 2048), "cuda": (16384, 32768)}  # rows × centroids of one product; no result depends on it
ROWS = 4096  # rows whose float64 copy is held at once
HOPPER, SEARCH, SUMS = "memory/hopper.py", "memory/fused.py", "memory/kernels.py"  # files of kernels


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (K, F) float32 of unit length, counts (K,) long over all processes, assignment (N,) long of this
    process's rows to these centroids, and inertia: Σ(2 − 2 x·c) over all rows after each pass, never rising."""

    centroids: torch.Tensor
    counts: torch.Tensor
    assignment: torch.Tensor
    inertia: list[float]


class Shards:
    """Where this process's rows lie among all rows: each process holds one contiguous slice, in the order of ranks."""

    def __init__(self, rows: int, device: torch.device):
        self.distributed = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        sizes = torch.zeros(processes, dtype=torch.long, device=device)
        sizes[rank] = rows
        sizes = self.sum(sizes).tolist()
        self.start, self.total = sum(sizes[:rank]), sum(sizes)
        self.stop = self.start + rows

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` over all processes, in place."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """Values (N, …) of all rows from each process's (n, …), on every process."""
        everyone = local.new_zeros(self.total, *local.shape[1:])
        everyone[self.start : self.stop] = local
        return self.sum(everyone)

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """Which (n,) of the global row numbers (M,) are this process's."""
        return ((rows >= self.start) & (rows < self.stop)).nonzero().squeeze(1)

    def rows(self, local: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The rows (M, …) of all processes' (N, …) whose global numbers are `wanted` (M,), on every process."""
        found, mine = local.new_zeros(len(wanted), *local.shape[1:]), self.mine(wanted)
        found[mine] = local[wanted[mine] - self.start]
        return self.sum(found)


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum (..., n) over the last dimension by adding halves: the same bits on every device and with any threads."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    while values.shape[-1] > 1:
        values = values[..., : values.shape[-1] // 2] + values[..., values.shape[-1] // 2 :]
    return values[..., 0]


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, F) of any float type to unit length, float32, rounded to multiples of 2⁻²⁴ (see the top of this file).

    A row of zeros becomes NaN; `undirected` finds such rows beforehand.
    """
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for some, out in zip(rows.detach().split(ROWS), unit.split(ROWS), strict=True):
        wide = some.double()
        length = ordered_sum(wide * wide).sqrt()
        out.copy_((wide / length[:, None] * GRID).round() / GRID + 0.0)  # + 0.0 makes -0.0 the one zero
    return unit


def undirected(rows: torch.Tensor) -> torch.Tensor:
    """Flags (N,) of the rows (N, F) without a direction: all zeros, or with NaN or infinity."""
    return torch.cat([~(some.isfinite().all(1) & some.any(1)) for some in rows.split(ROWS)])


def refuse(name: str, flags: torch.Tensor, start: int = 0) -> None:
    """Raise ValueError for `undirected` rows of what `name` says, giving the first of their numbers, from `start`."""
    bad = flags.nonzero().squeeze(1).tolist()
    if bad:
        first = ", ".join(str(start + row) for row in bad[:5]) + (", …" if len(bad) > 5 else "")
        raise ValueError(
            f"{name}: a row of zeros, or with NaN or infinity, has no direction (rows {first}); "
            "remove such rows or compute them again"
        )


def cosines(
    features: torch.Tensor, centroids: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact cosines (N,) float64 of normalised rows (N, F), or of the rows `rows` (N,) of such, and the rows `index`
    (N,) of normalised centroids (K, F)."""
    chosen = features.split(ROWS) if rows is None else (features[part] for part in rows.split(ROWS))
    pairs = zip(chosen, index.split(ROWS), strict=True)
    return torch.cat([(some.double() * centroids[at].double()).sum(1) for some, at in pairs])


def triton_works() -> bool:
    """Whether Triton is installed, and the C compiler that it calls."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and importlib.util.find_spec("triton") is not None


def fused(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device: a GPU since Hopper, where Triton works."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and triton_works()


def nearest(features: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function that gives normalised rows (N, F) their nearest centroids, for one set of centroids after the other.

    It takes the normalised centroids (K, F) and, as a hint, for each row a centroid that may be the nearest or -1 (N,),
    and returns the labels (N,) long, the lowest number among equals, and their exact cosines (N,) float64. Both are the
    same from `fused.Search`, taken where the device has what it needs and as long as it proves right, and from
    `assign_plain`.
    """
    search, searches = None, 0

    def find(centroids: torch.Tensor, guess: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal search, searches
        while fused(features.device) and SEARCH not in distrusted:
            kernels = SEARCH
            try:
                from memory.fused import Search, check_labels  # import Triton, which not every machine has
                from memory.kernels import hopper

                kernels = HOPPER if hopper(features.device) else SEARCH
                search = search or Search(features)
                label, cosine = search(centroids, guess)
                check_labels(features, centroids, label, searches)
                searches += 1
                return label, cosine
            except Exception as error:
                leave_out(kernels, error, features.device)
            search = None  # its memory goes back
        label = assign_plain(features, centroids)
        return label, cosines(features, centroids, label)

    return find


def leave_out(kernels: str, error: Exception, device: torch.device) -> None:
    """Do without these kernels from now on, and warn of it."""
    distrusted.add(kernels)
    distrust(kernels, error, device, "k-means takes a slower way, with the same result")


def assign(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid (N,) long by cosine, the lowest number among equals: features (N, F), centroids (K, F).

    Both must be `normalised`. The answer is exact.
    """
    return nearest(features)(centroids)[0]


def assign_plain(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """`assign` by blocks of float32 scores, on any device.

    Rows whose best two scores are closer than both could be off (`rounding`) are scored again in float64, where cosines
    of such rows have no error.
    """
    rows, columns = BLOCK[features.device.type]
    margin = 2 * rounding(features)
    index = torch.empty(len(features), dtype=torch.long, device=features.device)
    unsure = torch.empty(len(features), dtype=torch.bool, device=features.device)
    with full_precision():
        for start in range(0, len(features), rows):
            some = slice(start, start + rows)
            best, second, index[some] = _best_two(features[some], centroids, columns)
            unsure[some] = best - second <= margin
    for some in unsure.nonzero().squeeze(1).split(rows):
        _, _, index[some] = _best_two(features[some].double(), centroids, columns)
    return index


def rounding(features: torch.Tensor) -> float:
    """The most that a float32 cosine of normalised rows (N, F) can be off: F·2⁻²⁴ (1 + F·2⁻²⁴) times the product of the
    lengths, whatever the order of summation (Higham, Accuracy and Stability, §3.1)."""
    return 1.005 * features.shape[1] / GRID


def _best_two(
    features: torch.Tensor, centroids: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best and second-best score (n,) of each row, and the best one's number, computed in the features' precision."""
    best = features.new_full((len(features),), -torch.inf)
    second = best.clone()
    index = torch.zeros(len(features), dtype=torch.long, device=features.device)
    for start in range(0, len(centroids), columns):
        scores = features @ centroids[start : start + columns].to(features.dtype).T  # (n, columns)
        top, at = scores.max(1)  # the first of equals
        runner_up = scores.scatter_(1, at[:, None], -torch.inf).amax(1)
        second = torch.maximum(torch.minimum(best, top), torch.maximum(second, runner_up))
        index = torch.where(top > best, at + start, index)
        best = torch.maximum(best, top)
    return best, second, index


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch off TF32 and bfloat16 inside float32 products: the error bound of `assign` counts on float32."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision  # torch.get_float32_matmul_precision fails where these two differ
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def kmeans(
    features: torch.Tensor,
    k: int,
    iterations: int,
    seed: int = 0,
    init: torch.Tensor | None = None,
    on_pass: Callable[[float], None] = lambda inertia: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> KMeansResult:
    """Spherical k-means (Dhillon & Modha 2001): Lloyd's passes on unit vectors, centroids renormalised in each.

    features (N, F) float of any length but zero; where torch.distributed is initialised, this process's contiguous
    slice of them, and every process gets the same result but for its own `assignment`. Starts from `init` (k, F), or
    from k distinct rows drawn with `seed`; `iterations=0` returns these. An empty cluster restarts at the row farthest
    from its centroid (the next empty one at the next farthest; the first of equals). `on_pass` is called with the
    inertia after every pass, `on_stage` with "preparation", "assignment" or "update" after each of these. Raises
    ValueError for k outside 1..N, negative iterations, a wrong shape, and rows of zeros or with NaN or infinity, with
    their numbers.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features: expected floats (N, F), got {features.dtype} {tuple(features.shape)}")
    shards = Shards(len(features), features.device)
    if not 1 <= k <= shards.total:
        raise ValueError(f"k = {k}: expected 1 to {shards.total}, the number of feature rows")
    if iterations < 0:
        raise ValueError(f"iterations = {iterations}: expected 0 or more")
    refuse("features", shards.whole(undirected(features).long()))
    features = normalised(features)
    guess = torch.full((len(features),), -1, device=features.device)
    if init is None:
        chosen = torch.randperm(shards.total, generator=torch.Generator().manual_seed(seed))[:k].to(features.device)
        centroids = shards.rows(features, chosen)
        mine = shards.mine(chosen)
        guess[chosen[mine] - shards.start] = mine
    else:
        if init.shape != (k, features.shape[1]):
            raise ValueError(f"init: expected shape ({k}, {features.shape[1]}), got {tuple(init.shape)}")
        refuse("init", undirected(init))
        centroids = normalised(init.to(features.device))

    inertia, before, search = [], None, nearest(features)
    on_stage("preparation")
    assignment, cosine = search(centroids, guess)
    on_stage("assignment")
    for _ in range(iterations):
        centroids = _updated(features, centroids, assignment, before, cosine, shards)
        on_stage("update")
        before = assignment
        assignment, cosine = search(centroids)
        on_stage("assignment")
        inertia.append(_inertia(cosine, shards))
        on_pass(inertia[-1])
    counts = shards.sum(torch.bincount(assignment, minlength=k))
    return KMeansResult(centroids, counts, assignment, inertia)


def _updated(
    features: torch.Tensor,
    centroids: torch.Tensor,
    assignment: torch.Tensor,
    before: torch.Tensor | None,
    cosine: torch.Tensor,
    shards: Shards,
) -> torch.Tensor:
    """Centroids (K, F) of the clusters given by `assignment` (N,), and restarts for those without members.

    A cluster whose members are those of the assignment `before` (N,) the last update has the same sum and keeps its
    centroid; None: there was no update yet. `cosine` (N,) is that of each row and its present centroid.
    """
    touched = torch.full((len(centroids),), int(before is None), device=features.device)
    if before is not None:
        changed = (assignment != before).nonzero().squeeze(1)
        touched[before[changed]] = 1
        touched[assignment[changed]] = 1
    touched = shards.sum(touched).nonzero().squeeze(1)
    place = torch.full((len(centroids),), -1, device=features.device)
    place[touched] = torch.arange(len(touched), device=features.device)
    sums = shards.sum(cluster_sums(features, place[assignment], len(touched)))
    counts = shards.sum(torch.bincount(assignment, minlength=len(centroids)))

    # Rounding to the grid can make a mean a worse centre than the centre before it. It replaces the old one only if it
    # is better by more than the error of these two float64 sums; this is what keeps the inertia from ever rising.
    updated = centroids.clone()
    for some, total in zip(touched.split(ROWS), sums.split(ROWS), strict=True):
        old, new = centroids[some], normalised(total)
        gain = ordered_sum(total * new) - ordered_sum(total * old)
        updated[some] = torch.where((gain > counts[some] * 2.0**-48)[:, None], new, old)

    empty = (counts == 0).nonzero().squeeze(1)
    if len(empty):
        updated[empty] = shards.rows(features, shards.whole(cosine).argsort(stable=True)[: len(empty)])
    return updated


def cluster_sums(features: torch.Tensor, cluster: torch.Tensor, clusters: int) -> torch.Tensor:
    """Exact sums (K, F) float64 of the rows (N, F) of each of K clusters; rows of cluster -1 (N,) are left out."""
    if fused(features.device) and SUMS not in distrusted:
        try:
            from memory.fused import check_sums
            from memory.kernels import cluster_sums as sorted_sums

            sums = sorted_sums(features, cluster, clusters)
            check_sums(features, cluster, sums)
            return sums
        except Exception as error:
            leave_out(SUMS, error, features.device)
    return sums_plain(features, cluster, clusters)


def sums_plain(features: torch.Tensor, cluster: torch.Tensor, clusters: int) -> torch.Tensor:
    """`cluster_sums` on any device."""
    sums = torch.zeros(clusters, features.shape[1], dtype=torch.float64, device=features.device)
    for rows in (cluster >= 0).nonzero().squeeze(1).split(ROWS):
        sums.index_add_(0, cluster[rows], features[rows].double())
    return sums


def _inertia(cosine: torch.Tensor, shards: Shards) -> float:
    """Σ(2 − 2 x·c) over all processes from exact cosines (n,): summed as integers, so that not a bit is lost."""
    units = (cosine * GRID * GRID).long()  # multiples of 2⁻⁴⁸
    parts = shards.sum(torch.stack([(units >> 24).sum(), (units & (2**24 - 1)).sum()])).tolist()
    total = (parts[0] << 24) + parts[1]
    return max(0.0, (shards.total * 2**48 - total) / 2**47)  # rounded lengths can exceed 1 by 1e-7
