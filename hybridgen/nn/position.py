"""Positions: rotary embeddings in one or two dimensions (Su et al. 2021) and fixed sine-cosine tables.

A rotary table is `(cos, sin)`, each `[n, k/2]` or `[b, n, k/2]`: two-dimensional ones rotate the first half of a head
by the row and the second by the column. Text before an image counts on the diagonal, and the image's grid starts where
the text ends, so that every position has one place in the plane.

Letters: b batch, n tokens, h heads, k head width, d width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.errors import UserError

Rotary = tuple[jax.Array, jax.Array]


def grid_positions(height: int, width: int, prefix: int = 0) -> np.ndarray:
    """(row, column) of `prefix` text tokens on the diagonal and then of a raster grid: [prefix + height*width, 2]."""
    text = np.stack([np.arange(prefix)] * 2, -1)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    grid = np.stack([rows.reshape(-1), columns.reshape(-1)], -1) + prefix
    return np.concatenate([text, grid]).astype(np.int32)


def rotary(positions: np.ndarray | jax.Array, head_width: int, base: float = 10_000.0) -> Rotary:
    """Rotary table for integer positions `[n]` or `[..., n, axes]`; `head_width` must divide by 2 * axes."""
    positions = jnp.asarray(positions)
    positions = positions[:, None] if positions.ndim == 1 else positions  # ... n axes
    axes = positions.shape[-1]
    if head_width % (2 * axes):
        raise UserError(f"head width {head_width} does not divide by {2 * axes}")
    count = head_width // (2 * axes)
    frequency = base ** (-np.arange(count) / count)
    angles = positions[..., None] * jnp.asarray(frequency, jnp.float32)  # ... n axes k/(2 axes)
    angles = angles.reshape(*positions.shape[:-1], head_width // 2)  # ... n k/2
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: Rotary) -> jax.Array:
    """Rotates `x [b, n, h, k]`: the pair (i, i + k/2) by the table's i-th angle."""
    cos, sin = (part[..., None, None, :].astype(x.dtype) for part in table)  # (b) n 1 1 k/2
    halves = x.reshape(*x.shape[:-1], 2, -1)  # b n h 2 k/2
    # the other half by reversal: unlike a concatenation of the two it is fused into the products
    turned = halves * cos + jnp.flip(halves, -2) * jnp.concatenate([-sin, sin], -2)
    return turned.reshape(x.shape)


def sincos_2d(height: int, width: int, d: int) -> np.ndarray:
    """Fixed sine-cosine table of a grid (MAE, He et al. 2021): [height * width, d]; d divides by 4."""
    if d % 4:
        raise UserError(f"width {d} does not divide by 4")
    frequency = 10_000.0 ** (-np.arange(d // 4) / (d // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    parts = []
    for axis in (rows.reshape(-1), columns.reshape(-1)):
        angles = axis[:, None] * frequency
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, -1).astype(np.float32)
