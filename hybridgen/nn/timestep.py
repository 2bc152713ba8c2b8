"""Timestep embedding: sine-cosine features of t and a two-layer network (Nichol & Dhariwal 2021; DiT).

Letters: b batch, d width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.nn.linear import Linear, normal

ROUNDED_UP = (13, 44)  # frequencies of DiT that torch's exp rounds up, just below the middle between two floats


def sincos(t: jax.Array, width: int, period: float = 10_000.0, scale: float = 1000.0, shift: float = 0.0) -> jax.Array:
    """Features of `t [b]`, cosines first: [b, width].

    scale: of t; continuous times in [0, 1] count in thousandths, as discrete steps do. shift: frequencies fall to
    1 / period after `width / 2 - shift` of them (0: DiT, 1: diffusers).
    """
    half = width // 2
    # the exponent in float32, as official code has it: at t = 1000 another last bit of a frequency would show
    exponent = np.float32(-np.log(period)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if (half, shift, period) == (128, 0, 10_000):
        frequency[list(ROUNDED_UP)] = np.nextafter(frequency[list(ROUNDED_UP)], np.float32(1))
    angles = scale * t[:, None] * frequency  # b d/2
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimestepEmbed(nn.Module):
    """`t [b] -> [b, width]`; `scale` and `shift` as in `sincos`."""

    width: int
    features: int = 256
    scale: float = 1000.0
    shift: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        x = sincos(t, self.features, scale=self.scale, shift=self.shift)  # b features
        x = nn.silu(Linear(self.width, bias=True, dtype=self.dtype, init=normal(0.02), name="hidden")(x))
        return Linear(self.width, bias=True, dtype=self.dtype, init=normal(0.02), name="out")(x)
