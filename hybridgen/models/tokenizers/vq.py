"""Our tokenizer: a small convolutional encoder and decoder around any quantiser (VQ-VAE, van den Oord et al. 2017).

`quantizer` has the options of the quantiser (nn/quantizers): finite scalar, lookup-free or vector quantisation, codes
sampled from logits, or none (a plain autoencoder with a continuous latent). With `adversarial` a discriminator is
trained too (gan_loss.py).

Letters: b batch, H W picture, h w grid, d code width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core.ranges import FLAG, count
from hybridgen.models.contract import Shape
from hybridgen.models.roles import tokenizer
from hybridgen.models.tokenizers import gan_loss
from hybridgen.nn import quantizers
from hybridgen.nn.conv import Decoder, Encoder
from hybridgen.nn.quantizers import fsq

ROLE = "tokenizer"
PARTS = ("perceptual",)
RANGES = tokenizer.RANGES | gan_loss.RANGES | {"patch": count(1, 2**12), "attention": FLAG, "local": FLAG}
init, loss, merge, sample = tokenizer.init, tokenizer.loss, tokenizer.merge, tokenizer.sample
encode, embed, decode, for_shape = tokenizer.encode, tokenizer.embed, tokenizer.decode, tokenizer.for_shape


class VQ(nn.Module):
    """`features`: image -> grid of projected outputs; `picture`: grid of codes -> image."""

    resolution: int | Shape = 32  # side of a square, or height and width
    patch: int = 4
    channels: tuple[int, ...] = (128, 256)
    blocks: int = 1
    attention: bool = True
    local: bool = False  # a token depends on its neighbourhood only, which a prior learns faster
    quantizer: Any = fsq.Quantizer()
    mse: float = 1.0  # weights of the squared error, ...
    l1: float = 0.0  # ... the absolute error, ...
    perceptual: float = 0.0  # ... and the distance of the part `perceptual`
    adversarial: Mapping = FrozenDict()  # options of gan_loss.Adversarial; empty: no discriminator
    dtype: str = "float32"

    def setup(self) -> None:
        options = {"channels": tuple(self.channels), "blocks": self.blocks, "dtype": self.dtype}
        options |= {"patch": self.patch, "attention": self.attention}
        self.encoder = Encoder(self.code_width, local=self.local, **options)
        self.decoder = Decoder(3, **options)

    grid = property(tokenizer.grid)
    length = property(tokenizer.length)
    vocab = property(tokenizer.vocab)
    code_width = property(tokenizer.code_width)

    @property
    def reduction(self) -> int:
        """Ratio of the sides of picture and grid."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def picture_loss(self) -> gan_loss.PictureLoss:
        """The loss of a decoded picture."""
        return gan_loss.PictureLoss.of(self, "decoder/head_pixels/kernel")

    def features(self, image: jax.Array) -> jax.Array:
        z = self.encoder(image).astype(jnp.promote_types(image.dtype, jnp.float32))
        return self.quantizer.project(z)  # b h w d

    def picture(self, codes: jax.Array) -> jax.Array:
        return self.decoder(codes).astype(codes.dtype)  # b H W 3

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.picture(self.features(image))


def build(config: Any) -> VQ:
    options = dict(config)
    return VQ(**options | {"quantizer": quantizers.build(options.get("quantizer", {"kind": "fsq"}))})
