"""LPIPS: a perceptual distance of pictures from the features of a classifier (Zhang et al. 2018, version 0.1).

The features are those of VGG16 (Simonyan & Zisserman 2014) after the last convolution of each of its five stages,
normalised to length one at every position. The weights of their squared differences were fitted to human judgements.
They are imported (`hybridgen convert lpips_vgg`); a tokenizer's loss takes them as its part `perceptual`:

    distance(image, other) -> one number per picture; 0 for equal pictures

Letters: b batch, H W picture, h w grid, c channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.nn.conv import Conv
from hybridgen.nn.linear import Linear, at_least_float32

ROLE = "features"
PARTS = ()

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # per channel, for pictures in [-1, 1]
STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # of each stage: channels in units of `width`, convolutions


class Perceptual(nn.Module):
    """`features`: image -> normalised features of five stages; `distance`: of two pictures, `[b]`."""

    width: int = 64
    dtype: str = "float32"

    def setup(self) -> None:
        self.convs = {
            f"{stage}_{i}": Conv(ways * self.width, dtype=self.dtype, name=f"conv_{stage}_{i}")
            for stage, (ways, count) in enumerate(STAGES)
            for i in range(count)
        }
        self.heads = [Linear(1, wide=True, name=f"lin_{stage}") for stage in range(len(STAGES))]

    def features(self, image: jax.Array) -> list[jax.Array]:
        """`image [b, H, W, 3]` in [-1, 1] -> five grids `[b, h, w, c]` of vectors with length one."""
        x, seen = (image - jnp.asarray(MEAN, image.dtype)) / jnp.asarray(STD, image.dtype), []
        for stage, (_, count) in enumerate(STAGES):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(count):
                x = nn.relu(self.convs[f"{stage}_{i}"](x))
            wide = at_least_float32(x)
            square = jnp.square(wide).sum(-1, keepdims=True)
            # the inner floor: without it the gradient of zero features is NaN
            seen.append(wide / (jnp.sqrt(jnp.maximum(square, 1e-30)) + 1e-10))
        return seen

    def distance(self, image: jax.Array, other: jax.Array) -> jax.Array:
        pairs = zip(self.heads, self.features(image), self.features(other), strict=True)
        return sum(head(jnp.square(a - b)).mean((1, 2, 3)) for head, a, b in pairs)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.distance(image, image)


def build(config: Any) -> Perceptual:
    return Perceptual(**config)


def init(model: Perceptual, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del parts
    image = jnp.zeros((1, *specs["image"].shape[1:]), specs["image"].dtype)
    return {"params": model.init(key, image)["params"], "extra": {}}


def distance(model: Perceptual, params: Any, extra: Any, image: jax.Array, other: jax.Array) -> jax.Array:
    """LPIPS distance of two batches of pictures `[b, H, W, 3]` in [-1, 1]: `[b]`."""
    del extra
    return model.apply({"params": params}, image, other, method="distance")
