"""Timestep embedding: sine-cosine features of t and a two-layer network (Nichol & Dhariwal 2021; DiT).

Letters: b batch, d width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.nn.linear import Linear, normal


def sincos(t: jax.Array, width: int, period: float = 10_000.0) -> jax.Array:
    """Features of `t [b]` (continuous times in [0, 1] are scaled by 1000 first, as discrete steps are): [b, width]."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(period) * jnp.arange(half) / half)
    angles = 1000.0 * t[:, None] * frequency  # b d/2
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimestepEmbed(nn.Module):
    """`t [b] in [0, 1] -> [b, width]`."""

    width: int
    features: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        x = sincos(t, self.features)  # b features
        x = nn.silu(Linear(self.width, bias=True, dtype=self.dtype, init=normal(0.02), name="hidden")(x))
        return Linear(self.width, bias=True, dtype=self.dtype, init=normal(0.02), name="out")(x)
