"""Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features, by neighbours.

Every picture has a ball whose radius is the distance to its k-th nearest neighbour in its own set. Precision is the
share of generated pictures inside a ball of a real one, recall the share of real ones inside a ball of a generated one.
Density is the mean number of balls of real pictures that contain a generated one, divided by k (it may exceed 1);
coverage is the share of real pictures with a generated one in their ball. Distances are computed in chunks of rows.

Letters: n real, m generated pictures, d features, c rows of a chunk.
"""

from collections.abc import Iterator

import numpy as np

from hybridgen.core.errors import UserError

MANIFOLD, COVERED = 3, 5  # k of precision and recall, and of density and coverage, as published
CHUNK = 1024


def prdc(true: np.ndarray, generated: np.ndarray, manifold: int = MANIFOLD, covered: int = COVERED) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of `true [n, d]` and `generated [m, d]`.

    manifold: k of precision and recall; covered: k of density and coverage. Raises UserError for different widths or
    if a set has too few rows.
    """
    true, generated = (np.asarray(x, np.float64) for x in (true, generated))
    if true.ndim != 2 or generated.ndim != 2 or true.shape[1] != generated.shape[1]:
        raise UserError(f"features must have the shapes n d and m d, not {true.shape} and {generated.shape}")
    if not np.isfinite(true).all() or not np.isfinite(generated).all():
        raise UserError("features are not finite (NaN or infinity)")
    least, k = min(len(true), len(generated)), max(manifold, covered)
    if least <= k:
        raise UserError(f"{k} nearest neighbours need more than {k} pictures in each set, not {least}")
    centre = true.mean(0)  # centring keeps distances and reduces their rounding error
    true, generated = true - centre, generated - centre
    near, wide = radii(true, (manifold, covered))  # n each
    (own,) = radii(generated, (manifold,))  # m
    precise = np.zeros(len(generated), bool)
    recalled, balls, covering = [], 0, []
    for start, far in chunks(true, generated):  # c m
        rows = slice(start, start + len(far))
        precise |= (far <= near[rows, None]).any(0)
        recalled.append((far <= own).any(1))
        within = far <= wide[rows, None]
        balls += int(within.sum())
        covering.append(within.any(1))
    shares = {"precision": precise.mean(), "recall": np.concatenate(recalled).mean()}
    shares |= {"density": balls / (covered * len(generated)), "coverage": np.concatenate(covering).mean()}
    return {name: float(share) for name, share in shares.items()}


def radii(x: np.ndarray, neighbours: tuple[int, ...]) -> list[np.ndarray]:
    """Squared distance of each row of `x [n, d]` to its k-th nearest other row, `[n]` for each k."""
    out: list[list[np.ndarray]] = [[] for _ in neighbours]
    for start, far in chunks(x, x):
        far[np.arange(len(far)), start + np.arange(len(far))] = np.inf  # a row is not its own neighbour
        ordered = np.partition(far, [k - 1 for k in neighbours], axis=1)
        for k, found in zip(neighbours, out, strict=True):
            found.append(ordered[:, k - 1])
    return [np.concatenate(found) for found in out]


def chunks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances `[c, m]` of some rows of `a [n, d]` to all of `b [m, d]`)."""
    size_a, size_b = np.square(a).sum(1), np.square(b).sum(1)
    for start in range(0, len(a), CHUNK):
        rows = slice(start, start + CHUNK)
        sizes = size_a[rows, None] + size_b
        far = sizes - 2 * a[rows] @ b.T
        far[far < 1e-12 * sizes] = 0.0  # rounding error of equal rows
        yield start, far
