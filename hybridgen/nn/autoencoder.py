"""The residual convolutional autoencoder that official tokenizers share: VQGAN, LlamaGen, Stable Diffusion, MAR.

Esser et al. 2021 (VQGAN), from the UNet of Ho et al. 2020 without its skips: a stem, residual blocks at every level,
halving between levels, and in the middle two blocks around one attention. The decoder mirrors it, with one more block
per level. Published checkpoints differ only in the options below, so this module represents all of them.

Letters: b batch, H W picture, h w grid, c channels. Level l has `channels[l]`, 0 being the full size, in the encoder
and in the decoder alike.
"""

import flax.linen as nn
import jax

from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count, one_of
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.conv import ACTIVATIONS, Conv, ResBlock
from hybridgen.nn.linear import Linear
from hybridgen.nn.norm import GroupNorm


class Place(nn.Module):
    """GroupNorm and full self-attention with one head over the positions of `x [b, h, w, c]`, with a residual."""

    groups: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, name="norm")(x).reshape(b, h * w, c)
        y, _ = Attention(1, c, bias=True, dtype=self.dtype, out_scale=0.1, name="attention")(y, Mask())
        return x + y.reshape(x.shape)


class Half(nn.Module):
    """One side of the autoencoder: the encoder if `down`, otherwise the decoder. `x [b, h, w, c]` -> `[.., features]`.

    `hidden=True` returns the input of the last norm, for tests: a norm with one channel per group hides biases.
    """

    features: int
    down: bool
    stem: int  # channels after the first convolution
    channels: tuple[int, ...]
    blocks: int
    attend: tuple[int, ...] = ()  # levels with attention after every block
    middle: bool = True  # attention in the middle
    resample: bool = True  # a convolution where the size changes; False: average pool and nearest upsampling only
    groups: int = 32
    activation: str = "silu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, hidden: bool = False) -> jax.Array:
        x = Conv(self.stem, dtype=self.dtype, name="conv_in")(x)
        if not self.down:
            x = self._middle(x)
        levels = range(len(self.channels))
        for level in levels if self.down else reversed(levels):
            for i in range(self.blocks):
                x = self._block(x, self.channels[level], f"block_{level}_{i}")
                if level in self.attend:
                    x = Place(self.groups, self.dtype, name=f"attend_{level}_{i}")(x)
            if level != (levels[-1] if self.down else 0):
                x = self._resized(x, level)
        if self.down:
            x = self._middle(x)
        if hidden:
            return x
        x = nn.silu(GroupNorm(self.groups, name="norm")(x))  # silu for any activation of the blocks
        return Conv(self.features, dtype=self.dtype, name="conv_out")(x)

    def _block(self, x: jax.Array, width: int, name: str) -> jax.Array:
        return ResBlock(width, self.groups, self.dtype, self.activation, skip_bias=True, name=name)(x)

    def _middle(self, x: jax.Array) -> jax.Array:
        x = self._block(x, x.shape[-1], "middle_0")
        if self.middle:
            x = Place(self.groups, self.dtype, name="attend_middle")(x)
        return self._block(x, x.shape[-1], "middle_1")

    def _resized(self, x: jax.Array, level: int) -> jax.Array:
        if not self.down:
            x = x.repeat(2, 1).repeat(2, 2)
            return Conv(x.shape[-1], dtype=self.dtype, name=f"conv_up_{level}")(x) if self.resample else x
        if self.resample:
            return Conv(x.shape[-1], dtype=self.dtype, halves=True, name=f"conv_down_{level}")(x)
        return nn.avg_pool(x, (2, 2), (2, 2))


RANGES = {
    "stem": count(1, 2**16),
    "z": count(1, 2**16),
    "groups": count(1, 2**16),
    "decoder_channels": count(1, 2**16, most=16, alone=False),
}
RESIDUAL = RANGES | {
    "attend": count(0, 15, most=16, alone=False),
    "decoder_attend": count(0, 15, most=16, alone=False, none=True),
    "middle": FLAG,
    "resample": FLAG,
    "double": FLAG,
    "activation": one_of(*ACTIVATIONS),
    "quant": count(-1, 2**16),
    "post_quant": FLAG,
    "read": count(1, 2**10),
    "painted": count(1, 2**10),
}
OPEN = {f"residual.{name}": known for name, known in RESIDUAL.items()}  # of a family with these as a group


class Autoencoder(nn.Module):
    """`encode`: image `[b, H, W, read]` -> code `[b, h, w, ..]`; `decode`: code -> image `[b, H, W, painted]`."""

    channels: tuple[int, ...]
    stem: int
    z: int  # input channels of the decoder; the encoder has as many outputs, or twice as many with `double`
    code: int  # channels of a code; `encode` returns as many, or twice as many with `double`
    double: bool = False  # the encoder predicts means and log-variances
    blocks: int = 2
    decoder_channels: tuple[int, ...] = ()  # if they differ
    attend: tuple[int, ...] = ()
    decoder_attend: tuple[int, ...] | None = None  # if they differ
    middle: bool = True
    resample: bool = True
    groups: int = 32
    activation: str = "silu"
    quant: int = -1  # width of the 1x1 convolution after the encoder; 0: none; -1: `code`, or twice that with `double`
    post_quant: bool = True  # a 1x1 convolution before the decoder
    read: int = 3
    painted: int = 3
    dtype: str = "float32"

    def setup(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        names = ("middle", "resample", "groups", "activation", "dtype")
        options = {name: getattr(self, name) for name in names}
        channels, ways = self.decoder_channels or self.channels, 1 + self.double
        attend = self.attend if self.decoder_attend is None else self.decoder_attend
        for widths, levels in ((self.channels, self.attend), (channels, attend)):
            if not widths or any(width % self.groups for width in (*widths, self.stem)):
                raise UserError(f"channels {widths} and {self.stem} do not divide into {self.groups} groups")
            if not set(levels) <= set(range(len(widths))):
                raise UserError(f"attention levels {levels} are not within 0 and {len(widths) - 1}")
        self.encoder = Half(self.z * ways, True, self.stem, self.channels, self.blocks, self.attend, **options)
        self.decoder = Half(self.painted, False, channels[-1], channels, self.blocks + 1, attend, **options)
        width = self.code * ways if self.quant < 0 else self.quant
        self.quant_map = Linear(width, bias=True, dtype=self.dtype) if width else None
        self.post_map = Linear(self.z, bias=True, dtype=self.dtype) if self.post_quant else None

    def encoded(self, image: jax.Array, hidden: bool = False) -> jax.Array:
        """The output of the encoder without the 1x1 convolution, or with `hidden` the input of its last norm."""
        return self.encoder(image, hidden)

    def encode(self, image: jax.Array) -> jax.Array:
        x = self.encoder(image)
        return self.quant_map(x) if self.quant_map else x

    def decode(self, code: jax.Array) -> jax.Array:
        return self.decoder(self.post_map(code) if self.post_map else code)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.decode(self.encode(image)[..., : self.code])
