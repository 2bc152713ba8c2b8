"""Convolution with batch normalisation by stored statistics, as in image classifiers; also depthwise.

Mean and variance are statistics of training, not trained by gradients: a family has them in `extra` and merges them
with the other parameters to run the network (`joined`). Nothing here updates them.

Letters: b batch, H W picture, h w grid, c channels in, f channels out.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.nn.linear import affine, cast, fan_in, ones, zeros

STATISTICS = ("mean", "variance")


class ConvNorm(nn.Module):
    """`[b, H, W, c] -> [b, h, w, f]`; parameters `kernel [*size, c, f]`, `scale`, `bias`, `mean`, `variance` `[f]`.

    padding: SAME is TensorFlow's, where an odd number of zeros has one more on the right and below; VALID is none.
    depthwise: f is c, and each channel has its own filter, `kernel [*size, 1, c]`.
    """

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    depthwise: bool = False
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        read = 1 if self.depthwise else x.shape[-1]
        x = cast(x, "float32")
        kernel = cast(self.param("kernel", fan_in(axes=3), (*self.size, read, self.features)), x.dtype)
        scale, bias = (self.param(name, init, (self.features,)) for name, init in (("scale", ones), ("bias", zeros)))
        mean, variance = (self.param(*named, (self.features,)) for named in zip(STATISTICS, (zeros, ones), strict=True))
        if self.depthwise:
            y = depthwise(x, kernel, self.stride, self.padding)
        elif self.size == (1, 1) and self.stride == 1:
            y = affine(x, kernel[0, 0])
        else:
            y = _convolved(x, kernel, self.stride, self.padding)
        factor = scale * jax.lax.rsqrt(variance + self.eps)
        return y * factor + (bias - mean * factor)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """`x [b, H, W, c]` with `kernel [k, k, 1, c]`, one filter per channel -> `[b, h, w, c]`.

    On a CPU it is a sum of shifted pictures, because XLA's grouped convolution takes ten times as long there.
    """
    options = {"stride": stride, "padding": padding}
    shifted, grouped = functools.partial(_shifted, **options), functools.partial(_convolved, **options)
    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)


def _convolved(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    groups = x.shape[-1] // kernel.shape[2]
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, **options)


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    b, _, _, c = x.shape
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    h, w = ((size - k) // stride + 1 for size, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    total = jnp.zeros((b, h, w, c), x.dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            ends = (b, i + (h - 1) * stride + 1, j + (w - 1) * stride + 1, c)
            total += jax.lax.slice(x, (0, i, j, 0), ends, (1, stride, stride, 1)) * kernel[i, j, 0]
    return total


def joined(params: Mapping, extra: Mapping) -> dict[str, Any]:
    """Merges two trees of arrays with disjoint leaves."""
    out = dict(params)
    for name, value in extra.items():
        out[name] = joined(out[name], value) if name in out else value
    return out


def divided(tree: Mapping) -> tuple[dict, dict]:
    """(trained parameters, statistics) of a network's arrays: the inverse of `joined`."""
    learned, stored = {}, {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            for side, part in zip((learned, stored), divided(value), strict=True):
                side |= {name: part} if part else {}
        else:
            (stored if name in STATISTICS else learned)[name] = value
    return learned, stored
