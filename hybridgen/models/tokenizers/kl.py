"""KL autoencoder: pictures to a grid of continuous latents and back (Rombach et al. 2022, latent diffusion).

The encoder predicts mean and log-variance of a Gaussian for each latent; the loss decodes a sample of it and adds a
small KL divergence from a standard normal. Diffusion models use `(latent - shift) * scale`: `encode` returns the mean
in this form or, with keys, a sample, and `decode` takes this form. The autoencoders of Stable Diffusion, SD3, Flux and
MAR are this family with the options set by their tables in weights/; the convolutions are those of nn/autoencoder.py.
With `adversarial` a discriminator is trained too (gan_loss.py).

Letters: b batch, H W picture, h w grid, d channels of the latent.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core import rng
from hybridgen.core.entries import WEIGHT
from hybridgen.core.ranges import FLAG, count, number
from hybridgen.models.contract import Parts, Shape, sides
from hybridgen.models.losses import rows, weighted
from hybridgen.models.roles import tokenizer
from hybridgen.models.tokenizers import gan_loss
from hybridgen.nn import autoencoder
from hybridgen.nn.autoencoder import Autoencoder

ROLE = "tokenizer"
PARTS = ("perceptual",)
RANGES = tokenizer.RANGES | gan_loss.RANGES | autoencoder.OPEN | {"attention": FLAG, "width": count(1, 2**16)}
RANGES |= {"scale": number(1e-6, 1e6), "shift": number(-1e6, 1e6), "variational": FLAG, "divergence": WEIGHT}
for_shape = tokenizer.for_shape


class KL(nn.Module):
    """`moments`: image -> mean and log-variance; `picture`: unscaled latent -> image."""

    resolution: int | Shape = 32  # side of a square, or height and width
    channels: tuple[int, ...] = (128, 256)
    blocks: int = 2
    attention: bool = True  # in the middle
    width: int = 4
    residual: Mapping = FrozenDict()  # further options of nn/autoencoder.py: stem, z, groups, ...
    scale: float = 1.0
    shift: float = 0.0
    variational: bool = True  # False: the encoder predicts means only, and log-variances are 1 (an option of MAR)
    divergence: float = 1e-6  # weight of a picture's summed KL relative to its summed error
    mse: float = 0.0  # weights of the squared error, ...
    l1: float = 1.0  # ... the absolute error, ...
    perceptual: float = 0.0  # ... and the distance of the part `perceptual`
    adversarial: Mapping = FrozenDict()  # options of gan_loss.Adversarial; empty: no discriminator
    dtype: str = "float32"

    def setup(self) -> None:
        options = {"double": True, "z": self.width, "stem": self.channels[0], "middle": self.attention}
        options |= dict(self.residual)
        if not self.variational:
            options["quant"] = self.width
        self.net = Autoencoder(tuple(self.channels), code=self.width, blocks=self.blocks, dtype=self.dtype, **options)

    grid = property(tokenizer.grid)
    length = property(tokenizer.length)
    vocab = 0  # no codes

    @property
    def code_width(self) -> int:
        """Channels d of a latent."""
        return self.width

    @property
    def reduction(self) -> int:
        """Ratio of the sides of picture and grid."""
        return 2 ** (len(self.channels) - 1)

    @property
    def picture_loss(self) -> gan_loss.PictureLoss:
        """The loss of a decoded picture; the published objective sums over a picture's values."""
        values = 3 * math.prod(sides(self.resolution))
        return gan_loss.PictureLoss.of(self, "net/decoder/conv_out/kernel", values)

    def encoded(self, image: jax.Array, hidden: bool = False) -> jax.Array:
        return self.net.encoded(image, hidden)

    def raw(self, image: jax.Array) -> jax.Array:
        z = self.net.encode(image).astype(jnp.promote_types(image.dtype, jnp.float32))  # b h w 2d
        return z if self.variational else jnp.concatenate([z, jnp.ones_like(z)], -1)

    def moments(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_variance = jnp.split(self.raw(image), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def picture(self, latent: jax.Array) -> jax.Array:
        return self.net.decode(latent).astype(latent.dtype)  # b H W 3

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.picture(self.moments(image)[0])


def build(config: Any) -> KL:
    return KL(**config)


def init(model: KL, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del parts
    return {"params": tokenizer.init_networks(model, key, specs), "extra": {}}


def divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL in nats from a standard normal, summed over a latent: mean and log-variance `[b, h, w, d]` -> `[b]`."""
    each = jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * each.reshape(each.shape[0], -1).sum(-1)


def draw_latent(mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """A sample of the latent's Gaussian, from standard normal noise; all `[b, h, w, d]`."""
    return mean + jnp.exp(0.5 * log_variance) * noise


def scaled(model: KL, latent: jax.Array) -> jax.Array:
    """A latent in the form that diffusion models use: shifted and scaled."""
    return (latent - model.shift) * model.scale


def loss(
    model: KL, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """The loss of the picture (gan_loss.py) plus the weighted KL divergence, both per value of the picture."""
    del extra
    image = batch["image"]  # b H W 3
    mean, log_variance = model.apply({"params": params}, image, method="moments")  # b h w d
    noise = rng.normal(rng.sample_keys(key, batch["id"]), mean.shape[1:], mean.dtype) if train else 0.0
    latent = draw_latent(mean, log_variance, noise)

    def decode(params: Any) -> jax.Array:
        return model.apply({"params": params}, latent, method="picture")

    reconstruction, metrics = model.picture_loss(params, batch, decode, parts=parts, step=step, train=train)
    each = divergence(mean, log_variance)  # b
    nats, weight = weighted(each, rows(batch, each))
    metrics |= {"divergence": nats, "latent_std": scaled(model, mean).std()}
    scalar = reconstruction + model.divergence * nats / image[0].size
    return scalar, {"metrics": metrics, "weight": weight, "extra": {}}


def encode(model: KL, params: Any, extra: Any, image: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`image [b, H, W, 3]` -> latent `[b, h, w, d]`, shifted and scaled: the mean, or with `keys [b]` a sample."""
    del extra
    mean, log_variance = model.apply({"params": params}, image, method="moments")
    if keys is None:
        return scaled(model, mean)
    return scaled(model, draw_latent(mean, log_variance, rng.normal(keys, mean.shape[1:], mean.dtype)))


def moments(model: KL, params: Any, extra: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance `[b, h, w, d]` of the Gaussian of `image [b, H, W, 3]`, not shifted or scaled."""
    del extra
    return model.apply({"params": params}, image, method="moments")


def decode(model: KL, params: Any, extra: Any, codes: jax.Array) -> jax.Array:
    """A latent `[b, h, w, d]` in the form of `encode` -> image `[b, H, W, 3]`."""
    del extra
    return model.apply({"params": params}, codes / model.scale + model.shift, method="picture")


def sample(
    model: KL, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Reconstructions of `cond["image"]`."""
    del keys, parts, options
    latent = encode(model, params, extra, cond["image"])
    return {"image": jnp.clip(decode(model, params, extra, latent), -1, 1)}
