"""Distances between two sets of features: Fréchet (Heusel et al. 2017) and kernel (Bińkowski et al. 2018).

    moments = Moments(2048); moments.add(features)       # one batch at a time: a set is never in memory as a whole
    frechet(*moments.statistics(), mean, covariance)     # "FID" where the features are InceptionV3's
    kernel(features, others, seed=0)                     # "KID"; (distance, its standard error)

All computations are in float64. The Fréchet distance of finite sets is biased, the more the smaller they are: compare
it with the distance of an equal number of real pictures. The kernel distance is unbiased and may be negative.

Letters: n, m pictures, d features, r rank.
"""

import numpy as np

from hybridgen.core.errors import UserError

SUBSETS, SUBSET = 100, 1000


class Moments:
    """Count, mean and covariance of rows that are added in batches; it needs the memory of the covariance."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)  # d
        self.scatter = np.zeros((width, width))  # d d, about the mean

    def add(self, features: np.ndarray) -> None:
        """Adds rows `[n, d]`. Raises UserError for another width and for numbers that are not finite."""
        rows = _rows(features, len(self.mean))
        if not len(rows):
            return
        mean, total = rows.mean(0), self.count + len(rows)
        step, centred = mean - self.mean, rows - mean
        # Chan et al. 1979: sums about the means, because differences of large sums lose digits
        self.scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(rows) / total)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[d]` and unbiased covariance `[d, d]`. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 pictures, not {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, from means `[d]` and covariances `[d, d]`, which may be singular."""
    cov_a, cov_b = (np.asarray(x, np.float64) for x in (cov_a, cov_b))
    _check_finite(cov_a, cov_b)
    if cov_a.shape != cov_b.shape or cov_a.shape != (len(mean_a), len(mean_b)):
        raise UserError(f"the Gaussians have different widths: covariances of shape {cov_a.shape} and {cov_b.shape}")
    return frechet_of_roots(mean_a, root(cov_a), mean_b, root(cov_b))


def frechet_of_roots(mean_a: np.ndarray, root_a: np.ndarray, mean_b: np.ndarray, root_b: np.ndarray) -> float:
    """Like `frechet`, from roots `[d, r]`: X with X X' = A, and Y likewise of B.

    |a - b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, where the last trace is the sum of the singular values of X' Y.
    This takes no root of a non-symmetric product and no root of rounding errors, which would turn 1e-16 into 1e-8 in
    each null direction of a singular covariance.
    """
    _check_finite(mean_a, root_a, mean_b, root_b)
    common = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    between = np.square(np.asarray(mean_a, np.float64) - mean_b).sum()
    return float(between + np.square(root_a).sum() + np.square(root_b).sum() - 2 * common)


def root(covariance: np.ndarray) -> np.ndarray:
    """X `[d, r]` with X X' = covariance `[d, d]`: eigenvectors times roots of the eigenvalues above rounding error."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def root_of_rows(features: np.ndarray) -> np.ndarray:
    """The root X `[d, n]` of the covariance of rows `[n, d]`, without computing it: smaller than `[d, d]` if n < d."""
    rows = _rows(features)
    return (rows - rows.mean(0)).T / np.sqrt(len(rows) - 1)


def kernel(
    a: np.ndarray, b: np.ndarray, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET
) -> tuple[float, float]:
    """(squared maximum mean discrepancy of `a [n, d]` and `b [m, d]`, standard error), kernel (x.y / d + 1)^3.

    Mean of the unbiased estimate over random subsets of `size` rows, at most half of the smaller set. The subsets
    overlap, so the standard error is not their deviation over the root of their number, but that of a jackknife that
    leaves out all but a subset (Shao & Wu 1989): deviation * sqrt(size / (n - size)). UserError for fewer than 4 rows.
    """
    a, b = _rows(a), _rows(b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"the features have different widths: {a.shape[1]} and {b.shape[1]}")
    least = min(len(a), len(b))
    size = min(size, least // 2)
    if size < 2:
        raise UserError(f"a kernel distance needs at least 4 pictures in each set, not {len(a)} and {len(b)}")
    draw = np.random.default_rng(seed)
    found = [unbiased(*(x[draw.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found) * np.sqrt(size / (least - size)))


def unbiased(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate over all pairs of `a [n, d]` and `b [m, d]`."""
    a, b = _rows(a), _rows(b)
    n, m = len(a), len(b)
    within_a, within_b = (_cubic(x, x) for x in (a, b))
    first = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    second = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(first + second - 2 * _cubic(a, b).mean())


def _check_finite(*statistics: np.ndarray) -> None:
    if not all(np.isfinite(x).all() for x in statistics):
        raise UserError("the mean or covariance of a set of features is not finite (NaN or infinity)")


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    k = a @ b.T / a.shape[1] + 1
    return k * k * k  # a general power takes many times as long


def _rows(features: np.ndarray, width: int | None = None) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or width not in (None, rows.shape[1]):
        raise UserError(f"features must have the shape n {width or 'd'}, not {rows.shape}")
    if not np.isfinite(rows).all():
        raise UserError(f"{int((~np.isfinite(rows)).any(1).sum())} of {len(rows)} pictures have non-finite features")
    return rows
