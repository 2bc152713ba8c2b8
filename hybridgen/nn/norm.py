"""RMSNorm, LayerNorm and GroupNorm; statistics in at least float32, result in the input's dtype.

Letters: b batch, n tokens, d width, c channels, H W picture.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.nn.linear import at_least_float32, ones, zeros


class Norm(nn.Module):
    """Normalises the last axis. `kind`: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016).

    `affine=False`: no scale and bias (adaLN has its own).
    """

    kind: str = "rms"
    eps: float = 1e-6
    affine: bool = True
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = at_least_float32(x)  # ... d
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        elif self.kind != "rms":
            raise UserError(f"norm kind {self.kind!r} is not one of 'rms', 'layer'")
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.affine:
            y = y * self.param("scale", ones, x.shape[-1:])
            if self.kind == "layer" and self.bias:
                y = y + self.param("bias", zeros, x.shape[-1:])
        return y.astype(x.dtype)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) over pictures `x [b, H, W, c]`."""

    groups: int = 32
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        if c % self.groups:
            raise UserError(f"{c} channels do not divide into {self.groups} groups")
        y = at_least_float32(x).reshape(b, height * width, self.groups, c // self.groups)  # b HW g c/g
        mean = y.mean((1, 3), keepdims=True)
        var = jnp.square(y - mean).mean((1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(var + self.eps)).reshape(x.shape)
        y = y * self.param("scale", ones, (c,)) + self.param("bias", zeros, (c,))
        return y.astype(x.dtype)
