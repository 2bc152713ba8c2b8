"""VQGAN (Esser et al. 2021): the residual autoencoder around vector quantisation, with a discriminator.

taming-transformers published it with a codebook trained by gradients (`VQModel`; quantiser vq_gradient with `exact` and
`legacy`) and with codes sampled from logits (`GumbelVQ`; quantiser gumbel). The absolute and perceptual errors and the
adversarial terms are those of gan_loss.py.

Letters: b batch, H W picture, h w grid, d code width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.models.contract import Shape
from hybridgen.models.roles import tokenizer
from hybridgen.models.tokenizers import gan_loss
from hybridgen.nn import autoencoder, quantizers
from hybridgen.nn.autoencoder import Autoencoder
from hybridgen.nn.quantizers import vq_gradient

ROLE = "tokenizer"
PARTS = ("perceptual",)
RANGES = tokenizer.RANGES | gan_loss.RANGES | autoencoder.OPEN
init, loss, merge, sample = tokenizer.init, tokenizer.loss, tokenizer.merge, tokenizer.sample
encode, embed, decode, for_shape = tokenizer.encode, tokenizer.embed, tokenizer.decode, tokenizer.for_shape


class VQGAN(nn.Module):
    """`raw`: image -> the encoder's outputs; `features`: projected; `picture`: grid of codes -> image."""

    resolution: int | Shape = 256  # side of a square, or height and width
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    residual: Mapping = FrozenDict()  # further options of nn/autoencoder.py: stem, z, attend, groups, ...
    quantizer: Any = vq_gradient.Quantizer(1024, 256, l2=False, exact=True, legacy=True, revive_below=0.0)
    mse: float = 1.0  # weights of the squared error, ...
    l1: float = 0.0  # ... the absolute error, which the published code uses, ...
    perceptual: float = 0.0  # ... and the distance of the part `perceptual`
    adversarial: Mapping = FrozenDict()  # options of gan_loss.Adversarial; empty: no discriminator
    dtype: str = "float32"

    def setup(self) -> None:
        options = {"stem": self.channels[0], "z": self.code_width} | dict(self.residual)
        self.net = Autoencoder(
            tuple(self.channels), code=self.code_width, blocks=self.blocks, dtype=self.dtype, **options
        )

    grid = property(tokenizer.grid)
    length = property(tokenizer.length)
    vocab = property(tokenizer.vocab)
    code_width = property(tokenizer.code_width)

    @property
    def reduction(self) -> int:
        """Ratio of the sides of picture and grid."""
        return 2 ** (len(self.channels) - 1)

    @property
    def picture_loss(self) -> gan_loss.PictureLoss:
        """The loss of a decoded picture."""
        return gan_loss.PictureLoss.of(self, "net/decoder/conv_out/kernel")

    def encoded(self, image: jax.Array, hidden: bool = False) -> jax.Array:
        return self.net.encoded(image, hidden)

    def raw(self, image: jax.Array) -> jax.Array:
        return self.net.encode(image).astype(jnp.promote_types(image.dtype, jnp.float32))  # b h w d

    def features(self, image: jax.Array) -> jax.Array:
        return self.quantizer.project(self.raw(image))

    def picture(self, codes: jax.Array) -> jax.Array:
        return self.net.decode(codes).astype(codes.dtype)  # b H W 3

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.picture(self.features(image))


def build(config: Any) -> VQGAN:
    options = dict(config)
    if "quantizer" in options:
        options["quantizer"] = quantizers.build(options["quantizer"])
    return VQGAN(**options)
