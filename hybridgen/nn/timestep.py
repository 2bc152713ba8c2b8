"""Timestep embedding: sine-cosine features of t and a two-layer network (Nichol & Dhariwal 2021; DiT).

Letters: b batch, d width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.nn.linear import Linear, normal

ROUNDED_UP = (13, 44)  # indices of DiT's frequencies that torch's exp rounds up, although just below the midpoint


def sincos(t: jax.Array, width: int, period: float = 10_000.0, scale: float = 1000.0, shift: float = 0.0) -> jax.Array:
    """Features of `t [b]`, cosines first: [b, width].

    scale: factor of t; 1000 maps continuous times in [0, 1] to the range of discrete steps. shift: the frequency with
    index `width / 2 - shift` would be 1 / period (0: DiT, 1: diffusers).
    """
    half = width // 2
    # the exponent is float32 as in official code: at t = 1000, the last bit of a frequency matters
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
