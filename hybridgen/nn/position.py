"""Positions: rotary embeddings in one or two dimensions (Su et al. 2021), fixed sine-cosine tables, and the buckets
of relative positions (Raffel et al. 2020).

A rotary table is `(cos, sin)`, each `[n, k/2]` or `[b, n, k/2]`. A two-dimensional one rotates the first half of a head
by the row and the second half by the column. Text before an image has positions on the diagonal, and the image's grid
starts where the text ends, so that all positions are distinct.

Letters: b batch, n tokens, h heads, k head width, d width.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError

Rotary = tuple[jax.Array, jax.Array]


def grid_positions(height: int, width: int, prefix: int = 0) -> np.ndarray:
    """(row, column) of `prefix` text tokens on the diagonal and then of a raster grid: [prefix + height*width, 2]."""
    text = np.stack([np.arange(prefix)] * 2, -1)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    grid = np.stack([rows.reshape(-1), columns.reshape(-1)], -1) + prefix
    return np.concatenate([text, grid]).astype(np.int32)


def learned(module: Any, name: str, std: float, grid: tuple[int, int], width: int) -> jax.Array:
    """A learned table of positions, the parameter `name [n, width]` of `module`, as `[h, w, width]`.

    Its size is that of the config's own pictures, which are square; for other grids it is resized.
    """
    made = module.has_variable("params", name)
    n = module.get_variable("params", name).shape[0] if made else math.prod(grid)
    table = module.param(name, nn.initializers.normal(std), (n, width))
    side = math.isqrt(n)
    if side**2 != n or tuple(grid) == (side, side):
        return table.reshape(*grid, width)
    return jax.image.resize(table.reshape(side, side, width), (*grid, width), "linear")


def rotary(
    positions: np.ndarray | jax.Array, head_width: int, base: float = 10_000.0, scaling: Mapping | None = None
) -> Rotary:
    """Rotary table for integer positions `[n]` or `[..., n, axes]`; `head_width` must divide by 2 * axes (UserError).

    scaling: options of `stretched`, for texts longer than those of the first training; and `gain`, a factor of cosine
    and sine.
    """
    positions = jnp.asarray(positions)
    positions = positions[:, None] if positions.ndim == 1 else positions  # ... n axes
    axes = positions.shape[-1]
    if head_width % (2 * axes):
        raise UserError(f"head width {head_width} does not divide by {2 * axes}")
    count = head_width // (2 * axes)
    frequency = base ** (-np.arange(count) / count)
    options = dict(scaling or {})
    gain = options.pop("gain", 1.0)
    frequency = stretched(frequency, **options, length=positions.max() + 1) if options else frequency
    angles = positions[..., None] * jnp.asarray(frequency, jnp.float32)  # ... n axes k/(2 axes)
    angles = angles.reshape(*positions.shape[:-1], head_width // 2)  # ... n k/2
    return gain * jnp.cos(angles), gain * jnp.sin(angles)


def stretched(
    frequency: np.ndarray,
    kind: str,
    factor: float = 1.0,
    low: float = 1.0,
    high: float = 4.0,
    trained: int = 8192,
    by: tuple[float, ...] = (),
    far: tuple[float, ...] = (),
    length: jax.Array | int = 0,
) -> np.ndarray | jax.Array:
    """Rotary frequencies for longer texts. kind "linear": all are divided by `factor` (Chen et al. 2023).

    "llama3": frequencies with fewer than `low` turns within `trained` positions are divided by `factor`, those with
    more than `high` turns are unchanged, those between are interpolated. "each": each is divided by its number in `by`,
    or in `far` (if given) when `length` exceeds `trained`. "dynamic": the base grows with `length` beyond `trained`.
    Raises UserError for another kind.
    """
    if kind == "linear":
        return frequency / factor
    if kind == "each":
        short, long = np.asarray(by), np.asarray(far or by)
        return frequency / (jnp.where(length > trained, long, short) if far else short)
    if kind == "dynamic":
        grown = factor * jnp.maximum(length, trained) / trained - (factor - 1)
        return frequency * grown ** (-np.arange(len(frequency)) / max(len(frequency) - 1, 1))
    if kind != "llama3":
        raise UserError(f"rotary scaling {kind!r} is not one of 'linear', 'llama3', 'each', 'dynamic'")
    turns = trained * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / factor)


def relative_buckets(distance: np.ndarray, buckets: int, farthest: int) -> np.ndarray:
    """T5's bucket of each distance (key minus query position), in both directions: ints of `distance`'s shape.

    Half of the buckets are for keys after the query. In each half, half of the buckets are for one distance each and
    the others grow by a constant factor up to `farthest`. Computed in float32, with the rounding of official code.
    """
    half = buckets // 2
    exact = half // 2
    if exact < 1 or farthest <= exact:
        raise UserError(
            f"{buckets} buckets, farthest {farthest}: need at least 4 buckets, and farthest above buckets / 4"
        )
    far = np.abs(distance)
    octaves = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(farthest / exact))
    large = exact + (octaves * np.float32(half - exact)).astype(np.int64)
    return np.where(far < exact, far, np.minimum(large, half - 1)) + half * (distance > 0)


def rotate(x: jax.Array, table: Rotary) -> jax.Array:
    """Rotates `x [b, n, h, k]`: the pair (i, i + k/2) by the table's i-th angle."""
    cos, sin = (part[..., None, None, :].astype(x.dtype) for part in table)  # (b) n 1 1 k/2
    halves = x.reshape(*x.shape[:-1], 2, -1)  # b n h 2 k/2
    # the halves are exchanged with flip, which, unlike a concatenation, is fused into the products
    turned = halves * cos + jnp.flip(halves, -2) * jnp.concatenate([-sin, sin], -2)
    return turned.reshape(x.shape)


def sincos_2d(height: int, width: int, d: int) -> np.ndarray:
    """Fixed sine-cosine table of a grid (MAE, He et al. 2021): [height * width, d]; d divides by 4."""
    if d % 4:
        raise UserError(f"width {d} must divide by 4 for 2D sine-cosine positions")
    frequency = 10_000.0 ** (-np.arange(d // 4) / (d // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    parts = []
    for axis in (rows.reshape(-1), columns.reshape(-1)):
        angles = axis[:, None] * frequency
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, -1).astype(np.float32)
