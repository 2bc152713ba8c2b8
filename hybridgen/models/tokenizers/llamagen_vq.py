"""LlamaGen's image tokenizer (Sun et al. 2024, arXiv 2406.06525): VQGAN with low-dimensional codes on the unit sphere.

The residual autoencoder has attention on its lowest level. Codes and outputs are l2-normalised before they are compared
(Yu et al. 2021). The codebook's loss is the squared distance to the outputs that chose each code; the encoder's loss is
`commitment` times that and, with `entropy`, the entropies of its soft codes. The squared and perceptual errors and the
adversarial terms are those of gan_loss.py.

Letters: b batch, H W picture, h w grid, d code width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core.entries import WEIGHT
from hybridgen.core.ranges import FLAG, count, share
from hybridgen.models.contract import Shape
from hybridgen.models.roles import tokenizer
from hybridgen.models.tokenizers import gan_loss
from hybridgen.nn import autoencoder
from hybridgen.nn.autoencoder import Autoencoder
from hybridgen.nn.quantizers import vq_gradient

ROLE = "tokenizer"
PARTS = ("perceptual",)
RANGES = tokenizer.RANGES | gan_loss.RANGES | autoencoder.RANGES
RANGES |= {"codebook_size": count(1, 2**24), "width": count(1, 2**16), "l2": FLAG}
RANGES |= {"commitment": WEIGHT, "entropy": WEIGHT, "revive_below": share()}
init, loss, merge, sample = tokenizer.init, tokenizer.loss, tokenizer.merge, tokenizer.sample
encode, embed, decode, for_shape = tokenizer.encode, tokenizer.embed, tokenizer.decode, tokenizer.for_shape
SOFTNESS = 0.01  # temperature of the soft codes


class LlamaGenVQ(nn.Module):
    """`raw`: image -> the encoder's outputs; `features`: on the unit sphere; `picture`: grid of codes -> image."""

    resolution: int | Shape = 256  # side of a square, or height and width
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_channels: tuple[int, ...] = ()  # if they differ
    stem: int = 128
    z: int = 256  # channels between the networks and the 1x1 convolutions around a code
    blocks: int = 2
    groups: int = 32
    codebook_size: int = 16384
    width: int = 8
    l2: bool = True  # codes on the unit sphere
    commitment: float = 0.25
    entropy: float = 0.0
    revive_below: float = 0.0  # ours: a code used less than this share of the mean is pulled to encoder outputs
    mse: float = 1.0  # weights of the squared error, ...
    l1: float = 0.0  # ... the absolute error, ...
    perceptual: float = 0.0  # ... and the distance of the part `perceptual`
    adversarial: Mapping = FrozenDict()  # options of gan_loss.Adversarial; empty: no discriminator
    dtype: str = "float32"

    def setup(self) -> None:
        channels, up = tuple(self.channels), tuple(self.decoder_channels)
        options = {"blocks": self.blocks, "groups": self.groups, "attend": (len(channels) - 1,), "dtype": self.dtype}
        self.net = Autoencoder(channels, self.stem, self.z, self.width, decoder_channels=up, **options)

    grid = property(tokenizer.grid)
    length = property(tokenizer.length)
    vocab = property(tokenizer.vocab)
    code_width = property(tokenizer.code_width)

    @property
    def reduction(self) -> int:
        """Ratio of the sides of picture and grid."""
        return 2 ** (len(self.channels) - 1)

    @property
    def quantizer(self) -> vq_gradient.Quantizer:
        """Vector quantisation with a codebook trained by gradients, with the rounding of official code."""
        options = {"commitment": self.commitment, "entropy": self.entropy, "revive_below": self.revive_below}
        options |= {"l2": self.l2, "exact": True, "softness": SOFTNESS}
        return vq_gradient.Quantizer(self.codebook_size, self.width, **options)

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


def build(config: Any) -> LlamaGenVQ:
    return LlamaGenVQ(**config)
