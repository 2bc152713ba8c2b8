"""EfficientNet-Lite: an image classifier without squeeze-and-excitation, its swish replaced by ReLU6 (Tan & Le 2019).

`encode` returns the pooled features before the classifier. Pictures of any size are resized to `resolution` bilinearly
(with antialiasing when they shrink) and scaled as in training: (pixel - 127) / 128 for pixels in 0 to 255. Padding is
TensorFlow's; the official PyTorch code fixes the padding for one picture size, for which both are equal.

Letters: b batch, H W picture, h w grid, c channels, v classes.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.nn.convnorm import ConvNorm, divided, joined
from hybridgen.nn.linear import Linear

ROLE = "features"
PARTS = ()

# (blocks, kernel, stride, expansion, channels) of each stage of the smallest network
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
STAGES += ((1, 3, 1, 6, 320),)
STEM, TOP = 32, 1280  # channels of the first and last convolution, the same in all network sizes


class Block(nn.Module):
    """Inverted bottleneck: expansion, depthwise convolution, projection; with a skip if the shape does not change."""

    features: int
    kernel: int
    stride: int
    expansion: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, y = x.shape[-1] * self.expansion, x
        if self.expansion != 1:
            y = nn.relu6(ConvNorm(wide, eps=self.eps, name="expand")(y))
        size = (self.kernel, self.kernel)
        y = nn.relu6(ConvNorm(wide, size, self.stride, depthwise=True, eps=self.eps, name="depthwise")(y))
        y = ConvNorm(self.features, eps=self.eps, name="project")(y)
        return x + y if x.shape == y.shape and self.stride == 1 else y


class EfficientNet(nn.Module):
    """`image [b, H, W, 3]` in [-1, 1] -> features `[b, 1280]`, logits `[b, v]`.

    `width_factor` and `depth_factor` multiply the channels and blocks of the stages, as in larger EfficientNets.
    """

    width_factor: float = 1.0
    depth_factor: float = 1.0
    resolution: int = 224
    classes: int = 1000
    eps: float = 1e-3

    @property
    def feature_width(self) -> int:
        """Length of a picture's features."""
        return TOP

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, _, _, c = image.shape
        x = jax.image.resize(image, (b, self.resolution, self.resolution, c), "bilinear")
        x = ((x + 1) * 127.5 - 127) / 128
        x = nn.relu6(ConvNorm(STEM, (3, 3), 2, eps=self.eps, name="stem")(x))
        number = 0
        for place, (blocks, kernel, stride, expansion, features) in enumerate(STAGES):
            ends = place in (0, len(STAGES) - 1)  # the same number of blocks in all network sizes
            for i in range(blocks if ends else math.ceil(self.depth_factor * blocks)):
                options = (kernel, 1 if i else stride, expansion, self.eps)
                x = Block(rounded(self.width_factor * features), *options, name=f"block_{number}")(x)
                number += 1
        x = nn.relu6(ConvNorm(TOP, eps=self.eps, name="top")(x)).mean((1, 2))  # b 1280
        return x, Linear(self.classes, bias=True, name="head")(x)


def rounded(channels: float) -> int:
    """`channels` rounded to a multiple of 8, at least 8, and to at least 90 % of `channels`."""
    out = max(8, int(channels + 4) // 8 * 8)
    return out + 8 if out < 0.9 * channels else out


def build(config: Any) -> EfficientNet:
    return EfficientNet(**config)


def init(model: nn.Module, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del parts
    params, extra = divided(model.init(key, jnp.zeros((1, *specs["image"].shape[1:])))["params"])
    return {"params": params, "extra": extra}


def _applied(model: nn.Module, params: Any, extra: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):  # metrics must be comparable between machines
        return model.apply({"params": joined(params, extra)}, image)


def encode(model: nn.Module, params: Any, extra: Any, image: jax.Array) -> jax.Array:
    """`image [b, H, W, 3]` in [-1, 1] -> features `[b, d]`."""
    return _applied(model, params, extra, image)[0]


def logits(model: nn.Module, params: Any, extra: Any, image: jax.Array) -> jax.Array:
    """`image [b, H, W, 3]` in [-1, 1] -> logits `[b, v]` of the classes that the network was trained on."""
    return _applied(model, params, extra, image)[1]
