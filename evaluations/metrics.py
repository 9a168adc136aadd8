"""Distances between two sets of feature vectors, and the inception score: pure mathematics, no images, no networks.

Everything is computed in float64. What compares features with features does so on the device of the tensors given and
in blocks: precision and recall of 50,000 samples against 10,000 references of 2,048 features need less than 2 GB.
"""

from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch

Array = np.ndarray | torch.Tensor

BLOCK = 4096  # rows a block; a block of distances takes 134 MB


class Statistics:
    """Mean and covariance of a stream of feature vectors, without keeping them.

    Batches, and accumulators of other processes, are combined by the pairwise update of Chan, Golub and LeVeque (1979),
    which does not subtract large sums from each other.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)  # (F,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # (F, F) Σ (x − mean)(x − mean)ᵀ

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of features (B, F)."""
        features = features.to(self.mean)
        mean = features.mean(0)
        centred = features - mean
        self.combine(len(features), mean, centred.T @ centred)

    def combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add `count` vectors given by their mean (F,) and scatter (F, F)."""
        total = self.count + count
        if total == 0:
            return
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (F, F), divided by N − 1; ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance of two Gaussians, |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) (Heusel et al. 2017, eq. 6).

    Means (F,) and covariances (F, F), as arrays or tensors; computed on the CPU. The trace of the root is the sum of
    the roots of the eigenvalues of RᵀΣ₂R, where Σ₁ = RRᵀ: a symmetric, non-negative matrix with the eigenvalues of
    Σ₁Σ₂ but for zeros. So rank-deficient covariances (fewer images than features) give neither complex numbers nor NaN,
    and need no term added to a diagonal. What rounding leaves below zero is cut off: the result is never negative.
    ValueError if shapes disagree or an entry is not finite.
    """
    given = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    given = {name: torch.as_tensor(value).double().cpu().numpy() for name, value in given.items()}
    mu1, sigma1, mu2, sigma2 = given.values()
    dim = len(mu1)
    if mu2.shape != (dim,) or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = {name: value.shape for name, value in given.items()}
        raise ValueError(f"expected means (F,) and covariances (F, F) of the same features, got {shapes}")
    for name, value in given.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds values that are not finite; its images or its file are broken")
    root = root_of(sigma1)  # (F, R)
    eigenvalues = np.linalg.eigvalsh(root.T @ sigma2 @ root)  # (R,)
    trace_of_root = np.sqrt(eigenvalues.clip(0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)


def root_of(sigma: np.ndarray) -> np.ndarray:
    """R (F, rank) with RRᵀ = Σ (F, F), by Cholesky with pivoting, which ends at the rank (LAPACK's `pstrf`)."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def inception_score(probs: Array, split_size: int = 5000) -> float:
    """Exponential of the mean KL divergence of class probabilities (N, C) from their mean (Salimans et al. 2016).

    The mean over consecutive splits of `split_size` rows; as in ADM, the last split may be shorter.
    """
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"probabilities must have shape (N, C) with N > 0, got {tuple(probs.shape)}")
    scores = []
    for split in probs.split(split_size):
        split = split.double()
        mean = split.mean(0)  # (C,)
        information = torch.special.xlogy(split, split).sum(1).mean() - torch.special.xlogy(mean, mean).sum()
        scores.append(information.exp().item())
    return float(np.mean(scores))


def precision_recall(reference: Array, samples: Array, k: int = 3, block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `samples` (M, F) against `reference` (N, F).

    A set's manifold is the union of balls around its vectors, each reaching to the vector's k-th nearest neighbour in
    the set, itself not counted. Precision is the share of samples inside the reference's manifold, recall the share of
    references inside the samples'. Distances are exact (ADM forms them in float16). ValueError for k or fewer vectors.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    check_features(reference, samples, k + 1)
    centre = reference.double().mean(0)
    reference_radii, sample_radii = (neighbour_radii(x, k, centre, block) for x in (reference, samples))
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, references in blocks(reference, block, centre):
        for columns, others in blocks(samples, block, centre):
            distances = squared_distances(references, others)  # (rows, columns)
            precise[columns] |= (distances <= reference_radii[rows, None]).any(0)
            recalled[rows] |= (distances <= sample_radii[columns]).any(1)
    return precise.sum().item() / len(samples), recalled.sum().item() / len(reference)


def kid(reference: Array, samples: Array, block: int = BLOCK) -> float:
    """Kernel distance (Bińkowski et al. 2018): unbiased squared MMD with the kernel (x·y / F + 1)³.

    Over all pairs of `reference` (N, F) and `samples` (M, F), so that nothing is drawn: its value is what the usual
    mean over random subsets of 1,000 estimates. Slightly negative values are possible for equal distributions.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    check_features(reference, samples, 2)
    across = kernel_sum(reference, samples, block) / (len(reference) * len(samples))
    within = 0.0  # means over pairs of different vectors
    for features in (reference, samples):
        norms = torch.cat([rows.square().sum(1) for _, rows in blocks(features, block)])
        diagonal = polynomial_kernel(norms, features.shape[1]).sum().item()
        within += (kernel_sum(features, features, block) - diagonal) / (len(features) * (len(features) - 1))
    return within - 2 * across


def polynomial_kernel(products: torch.Tensor, dim: int) -> torch.Tensor:
    """KID's kernel, given inner products of `dim`-vectors."""
    return (products / dim + 1) ** 3


def kernel_sum(first: torch.Tensor, second: torch.Tensor, block: int) -> float:
    """Sum of the kernel over all pairs of rows of (A, F) and (B, F)."""
    total = 0.0
    for _, a in blocks(first, block):
        for _, b in blocks(second, block):
            total += polynomial_kernel(a @ b.T, a.shape[1]).sum().item()
    return total


def check_features(reference: torch.Tensor, samples: torch.Tensor, least: int) -> None:
    """ValueError unless both are (N, F) with the same F and at least `least` rows."""
    shapes = f"references {tuple(reference.shape)}, samples {tuple(samples.shape)}"
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features of different spaces: {shapes}; both must be (images, F) of one encoder")
    if min(len(reference), len(samples)) < least:
        raise ValueError(f"too few images: {shapes}; this metric needs at least {least} on each side")


def blocks(
    features: torch.Tensor, size: int, centre: torch.Tensor | float = 0.0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of `features` in blocks: the slice, and the block in float64 less `centre`."""
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        yield rows, features[rows].double() - centre


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances of (A, F) and (B, F) as (A, B); exactly zero between equal rows.

    The expansion |a|² + |b|² − 2a·b leaves rounding of about 1e-14 of the norms between equal rows, where a collapsed
    sample set has all its distances; float32 features cannot resolve anything below 1e-12 of the norms.
    """
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances < 1e-12 * norms, 0)


def neighbour_radii(features: torch.Tensor, k: int, centre: torch.Tensor, block: int) -> torch.Tensor:
    """Squared distance (N,) of each row to its k-th nearest other row; each pair of blocks is computed once."""
    nearest = torch.full((len(features), k), torch.inf, dtype=torch.float64, device=features.device)

    def keep(rows: slice, distances: torch.Tensor) -> None:
        candidates = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], candidates], 1).topk(k, largest=False).values

    for rows, a in blocks(features, block, centre):
        for columns, b in blocks(features[rows.start :], block, centre):
            distances = squared_distances(a, b)
            if columns.start == 0:
                keep(rows, distances.fill_diagonal_(torch.inf))
            else:
                keep(rows, distances)
                keep(slice(rows.start + columns.start, rows.start + columns.stop), distances.T)
    return nearest[:, -1]
