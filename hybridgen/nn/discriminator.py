"""PatchGAN: a discriminator of overlapping patches of a picture (Isola et al. 2017).

As used by VQGAN (Esser et al. 2021): `depth` convolutions that halve the picture, one that does not, and one to a logit
per position. BatchNorm is replaced by GroupNorm, so that the logits of a picture do not depend on other pictures,
microbatches or devices, and there are no statistics to store.

Letters: b batch, H W picture, h w grid of patches, c channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.core.sharding import shard
from hybridgen.nn.linear import at_least_float32, cast, normal, zeros
from hybridgen.nn.norm import GroupNorm


class _Conv(nn.Module):
    """4 x 4 convolution with zero padding of 1: `[b, h, w, c] -> [b, .., .., features]`."""

    features: int
    stride: int
    bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", normal(0.02), (4, 4, x.shape[-1], self.features))
        x, kernel = cast(x, self.dtype), cast(kernel, self.dtype)
        wide = jnp.promote_types(x.dtype, kernel.dtype)
        strides, padding, numbers = (self.stride,) * 2, [(1, 1)] * 2, ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x.astype(wide), kernel.astype(wide), strides, padding, dimension_numbers=numbers
        )
        if self.bias:
            y = y + cast(self.param("bias", zeros, (self.features,)), self.dtype)
        return shard(y, "batch", None, None, None)


class PatchGAN(nn.Module):
    """`image [b, H, W, c]` -> logits `[b, h, w]`, high where a patch looks real. UserError for too small images."""

    width: int = 64  # channels after the first convolution; each further one doubles them, up to 8 times `width`
    depth: int = 3
    groups: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        least = 3 * 2**self.depth  # the two convolutions with stride 1 each shorten the sides by 1
        if min(image.shape[1:3]) < least:
            raise UserError(
                f"pictures of {image.shape[1]} x {image.shape[2]}: the discriminator needs {least} x {least}"
            )
        x = image
        for level in range(self.depth + 1):
            features = self.width * min(2**level, 8)
            conv = _Conv(features, 2 if level < self.depth else 1, not level, self.dtype, name=f"conv_{level}")
            x = conv(x)
            if level:  # the norm has the bias
                x = GroupNorm(self.groups, name=f"norm_{level}")(x)
            x = jax.nn.leaky_relu(x, 0.2)
        return at_least_float32(_Conv(1, 1, True, self.dtype, name="conv_out")(x)[..., 0])
