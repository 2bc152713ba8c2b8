"""Convolutions, residual blocks, and the small convolutional encoder and decoder of our own tokenizers.

The autoencoder of official tokenizers is in autoencoder.py. Here the encoder starts with `patch` x `patch`
space-to-depth, then has residual blocks at each level and halves the picture between levels; the decoder mirrors it.
The reduction is `patch * 2 ** (levels - 1)`. The shapes follow VQGAN (Esser et al. 2021), but the first reductions are
space-to-depth, which is much cheaper and equally good at small sizes.

Letters: b batch, H W picture, h w grid, c channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.core.sharding import shard
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Init, Linear, cast, fan_in, zeros
from hybridgen.nn.norm import GroupNorm, Norm
from hybridgen.nn.position import learned


class Conv(nn.Module):
    """`size` x `size` convolution, same padding: `[b, h, w, c] -> [b, h, w, features]`; kernel `[size, size, c, f]`.

    halves: stride 2, with zeros on the right and below only, as in official tokenizers.
    """

    features: int
    size: int = 3
    dtype: str = "float32"
    init: Init = fan_in(axes=3)
    halves: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        x, kernel = cast(x, self.dtype), cast(kernel, self.dtype)
        wide = jnp.promote_types(x.dtype, kernel.dtype)  # unlike a matrix product, this one does not promote
        x, kernel = x.astype(wide), kernel.astype(wide)
        stride, padding = ((2, 2), [(0, 1), (0, 1)]) if self.halves else ((1, 1), "SAME")
        y = jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return shard(y + cast(bias, self.dtype), "batch", None, None, None)


def patchify(x: jax.Array, p: int) -> jax.Array:
    """Space-to-depth: `[b, H, W, c] -> [b, H/p, W/p, p*p*c]`. Raises UserError if the sides do not divide by p."""
    b, height, width, c = x.shape
    if height % p or width % p:
        raise UserError(f"a picture of {height} x {width} pixels does not divide into patches of {p}")
    x = x.reshape(b, height // p, p, width // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // p, width // p, p * p * c)


def unpatchify(x: jax.Array, p: int) -> jax.Array:
    """`[b, h, w, p*p*c] -> [b, h*p, w*p, c]`: the inverse of `patchify`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c // (p * p))


ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}
ACTIVATIONS |= {"swish": nn.silu, "mish": lambda x: x * jnp.tanh(nn.softplus(x))}


class ResBlock(nn.Module):
    """GroupNorm, activation, convolution, twice, with a residual (a 1x1 convolution if the channels change)."""

    features: int
    groups: int = 16
    dtype: str = "float32"
    activation: str = "silu"
    skip_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        y = activate(GroupNorm(self.groups, name="norm_1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv_1")(y)
        y = activate(GroupNorm(self.groups, name="norm_2")(y))
        y = Conv(self.features, dtype=self.dtype, init=fan_in(0.1, axes=3), name="conv_2")(y)
        if x.shape[-1] != self.features:
            x = Linear(self.features, bias=self.skip_bias, dtype=self.dtype, name="skip")(x)
        return x + y


class GridAttention(nn.Module):
    """Full self-attention over the grid `[b, h, w, c]`, with learned positions and a residual."""

    head_width: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        flat = x.reshape(b, h * w, c)
        position = learned(self, "position", 0.02, (h, w), c)
        y = Norm(name="norm")(flat + cast(position, self.dtype).reshape(h * w, c))
        heads = max(c // self.head_width, 1)
        y, _ = Attention(heads, c // heads, dtype=self.dtype, out_scale=0.1, name="attention")(y, Mask())
        return (flat + y).reshape(x.shape)


class Encoder(nn.Module):
    """`image [b, H, W, c] -> [b, h, w, features]`.

    A `local` encoder has no blocks on the last grid, only an MLP of each vector with its position, so that an output
    depends on its neighbourhood only.
    """

    features: int
    channels: tuple[int, ...]
    patch: int = 1
    blocks: int = 2
    attention: bool = False
    local: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(self.channels[0], bias=True, dtype=self.dtype, name="stem")(patchify(x, self.patch))
        for level, width in enumerate(self.channels):
            if level:
                x = Linear(width, bias=True, dtype=self.dtype, name=f"down_{level}")(patchify(x, 2))
            last = self.local and level == len(self.channels) - 1
            for i in range(0 if last else self.blocks):
                x = ResBlock(width, dtype=self.dtype, name=f"block_{level}_{i}")(x)
        if self.local:
            return self._place(x)
        if self.attention:
            x = GridAttention(dtype=self.dtype, name="mix")(x)
            x = ResBlock(x.shape[-1], dtype=self.dtype, name="last")(x)
        x = nn.silu(GroupNorm(16, name="norm")(x))
        return Linear(self.features, bias=True, dtype=self.dtype, name="project")(x)

    def _place(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        x = Norm(name="norm")(x) + cast(learned(self, "position", 0.5, x.shape[1:3], c), self.dtype)
        x = nn.silu(Linear(2 * c, bias=True, dtype=self.dtype, name="hidden")(x))
        return Linear(self.features, bias=True, dtype=self.dtype, name="project")(x)


class Decoder(nn.Module):
    """`z [b, h, w, c] -> image [b, H, W, features]`."""

    features: int
    channels: tuple[int, ...]
    patch: int = 1
    blocks: int = 2
    attention: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        channels = tuple(reversed(self.channels))
        x = Linear(channels[0], bias=True, dtype=self.dtype, name="project")(z)
        if self.attention:
            x = ResBlock(x.shape[-1], dtype=self.dtype, name="first")(x)
            x = GridAttention(dtype=self.dtype, name="mix")(x)
        for level, width in enumerate(channels):
            if level:
                x = unpatchify(Linear(4 * width, bias=True, dtype=self.dtype, name=f"up_{level}")(x), 2)
            for i in range(self.blocks):
                x = ResBlock(width, dtype=self.dtype, name=f"block_{level}_{i}")(x)
        x = nn.silu(GroupNorm(16, name="norm")(x))
        x = Linear(self.features * self.patch**2, bias=True, dtype=self.dtype, name="head_pixels")(x)
        return unpatchify(x, self.patch)
