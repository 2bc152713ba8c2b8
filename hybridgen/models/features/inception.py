"""InceptionV3 for FID (Heusel et al. 2017): TensorFlow's network of 2015 with 1008 classes (Szegedy et al. 2016).

It differs from the usual one in its pools: average pools exclude the padding, and the last block has a max pool. Two
preprocessings are in use; they give different numbers, so each needs its own reference files:

    pytorch_fid   bilinear at pixel centres, pixels scaled to 2 u - 1, u in 0 to 1
    adm           bilinear from pixel corners as in TensorFlow 1, pixels scaled to (p - 128) / 128, p in 0 to 255;
                  used by ADM's evaluator and the original FID code

Neither uses antialiasing. `block` selects the features: 0 is after the first pool (64), 1 after the second (192), 2
before the auxiliary classifier (768), all as means over the grid; 3 is the last pool (2048), which FID uses.

Letters: b batch, H W picture, h w grid, c channels, d features, v classes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.models.features.efficientnet import encode, init, logits
from hybridgen.nn.convnorm import ConvNorm
from hybridgen.nn.linear import Linear

ROLE = "features"
PARTS = ()

__all__ = ["InceptionV3", "build", "encode", "init", "logits"]
SIDE, WIDTHS = 299, (64, 192, 768, 2048)


class Layer(NamedTuple):
    """A convolution of a branch, by its official name."""

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1

    @property
    def module(self) -> ConvNorm:
        padding = "SAME" if self.stride == 1 else "VALID"
        return ConvNorm(self.features, self.size, self.stride, padding, name=self.name)


Chain = tuple[Layer | tuple[Layer, ...], ...]  # layers in sequence; those in a tuple share their input
Options = tuple[tuple[Chain, ...], str, int]  # the fields of a Mixed


class Mixed(nn.Module):
    """Parallel branches, concatenated along channels, and one with a pool: `average`, `max` or `halve` (stride 2)."""

    branches: tuple[Chain, ...]
    pool: str
    pooled: int  # channels of the convolution after the pool, unless it is `halve`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outs = [self._chain(chain, x) for chain in self.branches]
        if self.pool == "halve":
            return jnp.concatenate([*outs, nn.max_pool(x, (3, 3), (2, 2))], -1)
        if self.pool == "max":
            x = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            x = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        return jnp.concatenate([*outs, self._chain((Layer("branch_pool", self.pooled),), x)], -1)

    def _chain(self, chain: Chain, x: jax.Array) -> jax.Array:
        for step in chain:
            layers = (step,) if isinstance(step, Layer) else step
            x = jnp.concatenate([nn.relu(layer.module(x)) for layer in layers], -1)
        return x


def _dbl(first: int, stride: int = 1) -> Chain:
    name, size = "branch3x3dbl", (3, 3)
    return Layer(f"{name}_1", first), Layer(f"{name}_2", 96, size), Layer(f"{name}_3", 96, size, stride)


def _a(pooled: int) -> Options:
    five = (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5)))
    return ((Layer("branch1x1", 64),), five, _dbl(64)), "average", pooled


def _b() -> Options:
    return ((Layer("branch3x3", 384, (3, 3), 2),), _dbl(64, 2)), "halve", 0


def _c(narrow: int) -> Options:
    row, column, one, two = (1, 7), (7, 1), "branch7x7", "branch7x7dbl"
    single = (Layer(f"{one}_1", narrow), Layer(f"{one}_2", narrow, row), Layer(f"{one}_3", 192, column))
    double = (Layer(f"{two}_1", narrow), Layer(f"{two}_2", narrow, column), Layer(f"{two}_3", narrow, row))
    double += (Layer(f"{two}_4", narrow, column), Layer(f"{two}_5", 192, row))
    return ((Layer("branch1x1", 192),), single, double), "average", 192


def _d() -> Options:
    name = "branch7x7x3"
    seven = (Layer(f"{name}_1", 192), Layer(f"{name}_2", 192, (1, 7)), Layer(f"{name}_3", 192, (7, 1)))
    three = (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2))
    return (three, (*seven, Layer(f"{name}_4", 192, (3, 3), 2))), "halve", 0


def _e(pool: str) -> Options:
    def fork(name: str) -> tuple[Layer, Layer]:
        return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))

    three = (Layer("branch3x3_1", 384), fork("branch3x3_2"))
    double = (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3"))
    return ((Layer("branch1x1", 320),), three, double), pool, 192


MIXED = {"5b": _a(32), "5c": _a(64), "5d": _a(64), "6a": _b(), "6b": _c(128), "6c": _c(160), "6d": _c(160)}
MIXED |= {"6e": _c(192), "7a": _d(), "7b": _e("average"), "7c": _e("max")}


class InceptionV3(nn.Module):
    """`image [b, H, W, 3]` in [-1, 1] -> features `[b, d]`, logits `[b, v]`."""

    block: int = 3
    preprocessing: str = "pytorch_fid"
    resize: bool = True  # to 299 x 299; otherwise pictures are not resized and need sides of at least 75 pixels
    classes: int = 1008

    @property
    def feature_width(self) -> int:
        """Length of a picture's features."""
        return WIDTHS[self.block]

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        adm, outs = self.preprocessing == "adm", []
        x = resized(image, SIDE, centres=not adm) if self.resize else image
        x = ((x + 1) * 127.5 - 128) / 128 if adm else x
        for name, features, stride, padding in (("1a", 32, 2, "VALID"), ("2a", 32, 1, "VALID"), ("2b", 64, 1, "SAME")):
            x = nn.relu(ConvNorm(features, (3, 3), stride, padding, name=f"conv_{name}_3x3")(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        outs.append(x)
        x = nn.relu(ConvNorm(80, name="conv_3b_1x1")(x))
        x = nn.max_pool(nn.relu(ConvNorm(192, (3, 3), 1, "VALID", name="conv_4a_3x3")(x)), (3, 3), (2, 2))
        outs.append(x)
        for name, options in MIXED.items():
            x = Mixed(*options, name=f"mixed_{name}")(x)
            if name in ("6e", "7c"):
                outs.append(x)
        last = x.mean((1, 2))  # b 2048
        return outs[self.block].mean((1, 2)), Linear(self.classes, bias=True, name="head")(last)


def resized(image: jax.Array, side: int, centres: bool) -> jax.Array:
    """`[b, H, W, c] -> [b, side, side, c]`, bilinear, no antialiasing. centres: pixel i is at i + 1/2, else at i."""
    rows, columns = (jnp.asarray(_weights(size, side, centres), image.dtype) for size in image.shape[1:3])
    return jnp.einsum("bHWc,hH,wW->bhwc", image, rows, columns)


def _weights(size: int, side: int, centres: bool) -> np.ndarray:
    """Interpolation weights `[side, size]` of a line's pixels for each pixel of the resized line."""
    shift = 0.5 if centres else 0.0
    at = np.clip((np.arange(side) + shift) * (size / side) - shift, 0, size - 1)  # side
    low = np.minimum(at.astype(int), max(size - 2, 0))
    out = np.zeros((side, size))
    np.add.at(out, (np.arange(side), low), 1 - (at - low))
    np.add.at(out, (np.arange(side), np.minimum(low + 1, size - 1)), at - low)
    return out


def build(config: Any) -> InceptionV3:
    return InceptionV3(**config)
