"""The exact nearest centroid on a GPU from float16 products, and nothing computed twice from pass to pass.

Products of float16 copies, summed in float32, are off by at most a bound that `_error` states. Columns whose score lies
within twice this bound of the best are *candidates*; there is nearly always one. Their cosines are computed without
any error (memory/kmeans.py) and decide; a row with more candidates than the kernels keep is assigned by the plain path.
So labels are those of the plain path, bit for bit, as long as tensor cores add at least as well as `_error` assumes
and kernels do what they say; `check_labels` looks at some rows of every search.

Between passes each row keeps an upper bound on its cosine with all centroids but its own. What has not moved is not
searched again, unless the row's own centroid moved away so far that the bound no longer holds off the others (the
argument of Hamerly, Making k-means even faster, SDM 2010, with the exact cosine in place of its upper bound). A row
alone in its cluster *is* its centroid; to see that nothing else is as near, a sketch of 64 numbers is enough:
the first 63 components and the length of the rest, whose product is never below the cosine (Cauchy–Schwarz).
"""

from dataclasses import dataclass

import torch

from memory.kernels import best_tiles, candidates
from memory.kmeans import BLOCK, assign_plain, cosines, full_precision, rounding, sums_plain
from memory.trust import Disagreement

CHUNK = 65536  # rows converted at once
ALIGNMENT = 64  # of the width: one step of the products
COMPARED = 5000, 64  # of so many rows one is compared with the plain path, and at least so many rows
TWIN = 1 - 2.0**-20  # cosines of unit rows rounded to 2⁻²⁴ with themselves lie above it


@dataclass(frozen=True)
class Halves:
    """Rows (N, W) in float16, filled with zeros to a width of whole steps, and the largest length of a row's error.

    Indexed by ascending, distinct row numbers; all of them give no copy.
    """

    matrix: torch.Tensor
    error: float

    def __getitem__(self, index: torch.Tensor) -> "Halves":
        return self if len(index) == len(self.matrix) else Halves(self.matrix[index], self.error)


def halves(rows: torch.Tensor) -> Halves:
    """Rows (N, F) float32 in float16."""
    width = -(-rows.shape[1] // ALIGNMENT) * ALIGNMENT
    matrix = torch.zeros(len(rows), width, dtype=torch.float16, device=rows.device)
    errors = [torch.zeros(1, device=rows.device)]
    for some, out in zip(rows.split(CHUNK), matrix.split(CHUNK), strict=True):
        out[:, : rows.shape[1]] = some
        errors.append((some - out[:, : rows.shape[1]].float()).norm(dim=1))
    return Halves(matrix, torch.cat(errors).amax().item())


def sketch(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, 64) float32 of the length of `rows` (N, F), whose products are never below those of `rows`."""
    kept = ALIGNMENT - 1
    rest = [some[:, kept:].double().norm(dim=1) for some in rows.split(CHUNK)]
    return torch.cat([rows[:, :kept], torch.cat(rest).float()[:, None]], 1)


def _error(rows: Halves, columns: Halves) -> float:
    """Bound on the distance of a kernel's score from the cosine of unit rows: rounding to float16 (Cauchy–Schwarz on
    the rounding errors), and sums in which every product and every partial sum of four products loses less than 2⁻²³
    of a length of at most one (tensor cores truncate; Fasi, Higham, Mikaitis & Pranesh 2021). 2⁻¹⁹ covers float32
    thresholds and lengths that are not exactly one."""
    return 1.001 * (rows.error + columns.error + 1.25 * rows.matrix.shape[1] * 2.0**-23) + 2.0**-19


@dataclass(frozen=True)
class Found:
    """What `find` learnt of the rows `rows` (n,): pairs of a `row` and a candidate `column` (P,); how many candidates
    each row has, its only one or -1; an upper bound on its cosine with any column, and with any but the only
    candidate; and whether it has more candidates than are listed. Rows and columns by their numbers among all."""

    rows: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    total: torch.Tensor
    only: torch.Tensor
    bound: torch.Tensor
    bound_others: torch.Tensor
    crowded: torch.Tensor


def find(
    matrix: Halves,
    rows: torch.Tensor,
    centroids: Halves,
    columns: torch.Tensor,
    floor: torch.Tensor,
    upper: bool = False,
) -> Found:
    """Which of the centroids `columns` (m,) can have a cosine of at least `floor` (n,) with the rows `rows` (n,), and,
    where scores are not mere `upper` bounds, one as high as the best."""
    halves_of_rows, halves_of_columns = matrix[rows], centroids[columns]
    error = _error(halves_of_rows, halves_of_columns)
    values, tiles = best_tiles(halves_of_rows.matrix, halves_of_columns.matrix)  # (4, n), (3, n)
    threshold = floor.float() if upper else torch.maximum(values[0] - error, floor.float())
    threshold = threshold - error
    ranked = [(value >= threshold).nonzero().squeeze(1) for value in values[:3]]
    row, tile = torch.cat(ranked), torch.cat([of[some] for of, some in zip(tiles, ranked, strict=True)])
    count, first, second, below = candidates(halves_of_rows.matrix, halves_of_columns.matrix, row, tile, threshold)

    total = torch.zeros_like(tiles[0]).index_add_(0, row, count)
    crowded = values[3] >= threshold
    crowded[row[count > 2]] = True
    one, two = count > 0, count > 1
    only = torch.full_like(rows, -1)
    only[row[one]] = columns[first[one]]
    only[total != 1] = -1
    others = values[1].clone()
    others[ranked[0]] = torch.maximum(others[ranked[0]], below[: len(ranked[0])])
    bound = values[0] + error
    return Found(
        rows,
        rows[torch.cat([row[one], row[two]])],
        columns[torch.cat([first[one], second[two]])],
        total,
        only,
        bound,
        torch.where(only >= 0, others + error, bound),
        crowded,
    )


class Search:
    """The nearest centroid of each of the unit rows (N, F), pass after pass; see the top of this file."""

    def __init__(self, features: torch.Tensor):
        self.features = features
        self.halves, self.sketches = halves(features), halves(sketch(features))
        self.centroids = None

    def __call__(self, centroids: torch.Tensor, guess: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest of the centroids (K, F), the lowest among equals: (N,) long, and its exact cosine (N,) float64.

        `guess` (N,) long, read in the first pass: a centroid that may be the nearest, or -1. The centroids are kept
        for comparison with the next: do not change them in place.
        """
        if self.centroids is None:
            self._begin(guess)
            moved = torch.ones(len(centroids), dtype=torch.bool, device=centroids.device)
        else:
            moved = torch.cat(
                [(a != b).any(1) for a, b in zip(centroids.split(CHUNK), self.centroids.split(CHUNK), strict=True)]
            )
        self.centroids = centroids
        stale = ((self.label >= 0) & moved[self.label]).nonzero().squeeze(1)
        self.cosine[stale] = cosines(self.features, centroids, self.label[stale], stale)
        lost = stale[self.cosine[stale] <= self.others[stale]]
        self.others[lost] = -torch.inf

        found = self._find(moved.nonzero().squeeze(1), (~moved).nonzero().squeeze(1), lost)
        label, cosine = self._decide(found)
        away = (label != self.label).nonzero().squeeze(1)
        self.others[away] = torch.maximum(self.others[away], self.cosine[away].float() + 2.0**-20)  # rounded up
        for part in found:
            bound = torch.where(part.only == label[part.rows], part.bound_others, part.bound)
            self.others[part.rows] = torch.maximum(self.others[part.rows], bound)
        self.label, self.cosine = label, cosine
        return label.clone(), cosine.clone()

    def _begin(self, guess: torch.Tensor | None) -> None:
        """Labels, exact cosines and bounds before the first pass: nothing is known."""
        empty = self.features.new_full((len(self.features),), -torch.inf)
        self.label = empty.new_full(empty.shape, -1, dtype=torch.long) if guess is None else guess.clone()
        self.cosine, self.others = empty.double(), empty

    def _find(self, moved: torch.Tensor, still: torch.Tensor, lost: torch.Tensor) -> list[Found]:
        """Search the centroids that moved for all rows, and the others for `lost`; twins first by their sketches."""
        twin = self.cosine > TWIN
        rows = twin.nonzero().squeeze(1)
        if len(rows) and len(moved):
            sketches = halves(sketch(self.centroids))
            part = find(self.sketches, rows, sketches, moved, self.cosine[rows], upper=True)
            settled = ~part.crowded & ((part.total == 0) | (part.only == self.label[rows]))
            alone = rows[settled]
            self.others[alone] = torch.maximum(self.others[alone], part.bound_others[settled])
            twin[rows[~settled]] = False
        centroids = halves(self.centroids)
        searches = [((~twin).nonzero().squeeze(1), moved), (lost, still)]
        return [
            find(self.halves, rows, centroids, columns, self.cosine[rows])
            for rows, columns in searches
            if len(rows) and len(columns)
        ]

    def _decide(self, found: list[Found]) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and exact cosines: the best of each row's own centroid and its candidates."""
        label, cosine = self.label.clone(), self.cosine.clone()
        if not found:
            return label, cosine
        row, column = torch.cat([part.row for part in found]), torch.cat([part.column for part in found])
        exact = cosines(self.features, self.centroids, column, row)
        cosine.scatter_reduce_(0, row, exact, "amax")
        label[self.cosine < cosine] = len(self.centroids)
        best = exact == cosine[row]
        label.scatter_reduce_(0, row[best], column[best], "amin")
        crowded = torch.cat([part.rows[part.crowded] for part in found]).unique()
        if len(crowded):
            label[crowded] = assign_plain(self.features[crowded], self.centroids)
            cosine[crowded] = cosines(self.features, self.centroids, label[crowded], crowded)
        return label, cosine


def check_labels(features: torch.Tensor, centroids: torch.Tensor, label: torch.Tensor, searches: int) -> None:
    """Raise Disagreement unless `label` (N,) names centroids (K, F) as near as any to some of the rows (N, F).

    The rows lie all over the data, at every place of a kernel's tile, and differ from one of the `searches` to the
    next; the first, in which all rows are searched, is compared most. Nearness is that of `assign_plain` within its
    error.
    """
    share, least = COMPARED
    step = max(1, len(features) // (least if searches else max(least, len(features) // share))) | 1  # odd
    rows = torch.arange(searches % step, len(features), step, device=features.device)
    some, nearest = features[rows], cosines(features, centroids, label[rows], rows)
    with full_precision():
        best = [(some @ part.T).amax(1) for part in centroids.split(BLOCK[features.device.type][1])]
    missed = torch.stack(best).amax(0).double() - nearest
    margin = rounding(features)
    if not (missed <= margin).all():
        worst = missed.argmax()
        raise Disagreement(
            f"{len(features):,} rows × {len(centroids):,} centroids of {features.shape[1]}, the cosine of row "
            f"{rows[worst]} and its centroid is off by {missed[worst]:.2g}; {margin:.2g} is allowed"
        )


def check_sums(features: torch.Tensor, cluster: torch.Tensor, sums: torch.Tensor) -> None:
    """Raise Disagreement unless up to 64 of the `sums` (K, F), one in a hundred or fewer, are those of the rows (N, F)
    of their `cluster` (N,), bit for bit."""
    chosen = torch.arange(0, len(sums), max(100, len(sums) // 64) | 1, device=sums.device)
    place = torch.full((len(sums) + 1,), -1, device=sums.device)  # the last is of the cluster -1
    place[chosen] = torch.arange(len(chosen), device=sums.device)
    error = (sums[chosen] - sums_plain(features, place[cluster], len(chosen))).abs()
    if not (error == 0).all():
        raise Disagreement(
            f"{len(features):,} rows of {features.shape[1]} in {len(sums):,} clusters, one sum is off by {error.max()}"
        )
