"""DiT as published (Peebles & Xie 2022, arXiv 2212.09748): class `DiT` of facebookresearch/DiT.

A plain transformer over patches of a latent, class-conditional by adaLN-zero, with LayerNorm, GELU and biases. It takes
integer timesteps and predicts noise and the variance of a step (variance.py); its last label is the dropped class.

Letters: b batch, H W latent, c channels, n patches, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.core.ranges import count
from hybridgen.models.contract import Parts, Shape, sides
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.models.roles.denoiser import Denoiser
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import AdaLNBlock, modulate
from hybridgen.nn.conv import patchify, unpatchify
from hybridgen.nn.linear import Embed, Linear, cast, zeros
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import sincos_2d
from hybridgen.nn.stack import Stack
from hybridgen.nn.timestep import TimestepEmbed

# the defaults of `create_diffusion`
PROCESS = Process(
    schedule="linear",
    prediction_type="eps",
    loss_type="eps",
    timesteps=1000,
    learned_variance=True,
    solver="ddpm",
    steps=250,
)
ROLE = "decoder"
PARTS = ("autoencoder",)
OPTIONS = {"decoder": denoiser.options_of(PROCESS)}
RANGES = denoiser.RANGES | {"hidden": count(1, 2**24)}
init, inputs, loss, sample = denoiser.init, denoiser.inputs, denoiser.loss, denoiser.sample
conditioning, plan_conditioning = denoiser.conditioning, denoiser.plan_conditioning
corrupt_tokens, decoder_loss = denoiser.corrupt_tokens, denoiser.decoder_loss
predict, render = denoiser.predict, denoiser.render


class DiT(nn.Module):
    """`network(x [b, H, W, c], t [b] timesteps, cond) -> prediction [b, H, W, c or 2c]`."""

    resolution: int = 32  # side of the latent
    channels: int = 4
    outputs: int = 8  # twice the channels: the prediction, then variances
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    hidden: int = 4608
    classes: int = 1000
    null_class: bool = True  # adds a label for the dropped class
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = sides(self.resolution)
        return height // self.patch, width // self.patch

    @property
    def length(self) -> int:
        """Patches n."""
        return self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        b, wide = x.shape[0], jnp.promote_types(x.dtype, jnp.float32)
        y = Linear(self.width, bias=True, dtype=self.dtype, name="patches")(patchify(x, self.patch))
        y = y + cast(self._positions(), self.dtype).reshape(*self.grid, -1)

        vector = TimestepEmbed(self.width, scale=1.0, dtype=self.dtype, name="time")(t)
        label = denoiser.label_ids(cond, self.classes, self.null_class)
        vector = vector + Embed(self.classes + self.null_class, self.width, self.dtype, name="labels")(label)  # b d

        options = {"heads": self.heads, "head_width": self.width // self.heads, "hidden": self.hidden}
        options |= {"norm": "layer", "mlp": "gelu", "bias": True, "dtype": self.dtype}
        stack = Stack(self.depth, AdaLNBlock, options, remat=self.remat, unroll=self.unroll, name="blocks")
        y, _ = stack(y.reshape(b, self.length, self.width), Mask(), condition=vector)

        ends = Linear((2, self.width), bias=True, dtype=self.dtype, init=zeros, name="modulation")(nn.silu(vector))
        y = modulate(Norm("layer", affine=False, name="norm")(y), ends[:, 0, None], ends[:, 1, None])
        y = Linear(self.outputs * self.patch**2, bias=True, dtype=self.dtype, init=zeros, name="pixels")(y)
        return unpatchify(y.reshape(b, *self.grid, -1), self.patch).astype(wide)

    def _positions(self) -> jax.Array:
        """Sines and cosines `[n, d]`, columns before rows: an array of the checkpoint that is not trained."""
        table = np.roll(sincos_2d(*self.grid, self.width), self.width // 2, -1)
        return jax.lax.stop_gradient(self.param("position", lambda key, shape: jnp.asarray(table), table.shape))


def build(config: Any) -> Denoiser:
    options, process, training = denoiser.split_options(config, PROCESS)
    if not process.timesteps:
        raise UserError("process.timesteps is 0, but the published DiT needs discrete timesteps: set it above 0")
    options["outputs"] = options.get("channels", DiT.channels) * (1 + process.learned_variance)
    options["null_class"] = training["cond_drop_prob"] > 0
    network = DiT(**options)
    if network.classes < 1:
        raise UserError(f"model.classes is {network.classes}, but the published DiT needs labels: set it to at least 1")
    return Denoiser(network, process, **training)


def for_shape(model: Denoiser, shape: Shape, parts: Parts) -> Denoiser:
    """Raises UserError: the network supports latents of one shape only."""
    raise UserError("its position table is for one grid only")
