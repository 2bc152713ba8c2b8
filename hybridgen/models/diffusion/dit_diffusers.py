"""DiT of diffusers: class `DiTTransformer2DModel`.

It differs from the published network (dit_official.py). Every block has its own embedders of time and label, and the
last layer uses those of the first block; time frequencies are spaced by 1/127 instead of 1/128; the second norm of a
block has its own epsilon and optionally scale and bias; activation and attention biases are options. The class does not
define a process: it is trained and sampled like the published network.

Letters: b batch, H W latent, c channels, n patches, l layers, d width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count, number, one_of
from hybridgen.core.sharding import shard
from hybridgen.models.contract import Shape, sides
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.models.roles.denoiser import Denoiser
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.blocks import adaln, modulate
from hybridgen.nn.conv import patchify, unpatchify
from hybridgen.nn.linear import Embed, Linear, cast, zeros
from hybridgen.nn.mlp import KINDS, MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import sincos_2d
from hybridgen.nn.stack import Stack
from hybridgen.nn.timestep import TimestepEmbed

PROCESS = Process(
    schedule="linear",
    prediction_type="eps",
    loss_type="eps",
    timesteps=1000,
    learned_variance=True,
    variance="small",
    solver="ddpm",
    steps=250,
)
ROLE = "decoder"
PARTS = ("autoencoder",)
OPTIONS = {"decoder": denoiser.options_of(PROCESS)}
RANGES = denoiser.RANGES | {"outputs": count(1, 2**16), "mlp": one_of(*KINDS), "hidden": count(1, 2**24)}
RANGES |= {"qkv_bias": FLAG, "mlp_norm_eps": number(0.0, 1.0), "mlp_norm_affine": FLAG}
init, inputs, loss, sample = denoiser.init, denoiser.inputs, denoiser.loss, denoiser.sample
conditioning, plan_conditioning = denoiser.conditioning, denoiser.plan_conditioning
corrupt_tokens, decoder_loss = denoiser.corrupt_tokens, denoiser.decoder_loss
predict, render, for_shape = denoiser.predict, denoiser.render, denoiser.for_shape


class DiTBlock(nn.Module):
    """`BasicTransformerBlock` with ada_norm_zero: `x [b, n, d] -> [b, n, d]`, modulated by a condition `[b, d]`."""

    heads: int
    head_width: int
    hidden: int
    mlp: str
    qkv_bias: bool
    mlp_norm_eps: float
    mlp_norm_affine: bool
    dtype: str
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Mask, *, condition: jax.Array, cache: Any = None, layer: Any = 0, keys: Any = None
    ) -> tuple[jax.Array, Any]:
        del layer, keys  # passed by the stack, not used
        options: dict[str, Any] = {"bias": True, "dtype": self.dtype, "out_scale": self.out_scale}
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = adaln(condition, x.shape[-1], self.dtype)
        y = modulate(Norm("layer", affine=False, name="attention_norm")(x), shift_a, scale_a)
        attend = Attention(self.heads, self.head_width, qkv_bias=self.qkv_bias, name="attention", **options)
        x = x + gate_a * attend(y, mask)[0]
        norm = Norm("layer", self.mlp_norm_eps, affine=self.mlp_norm_affine, name="mlp_norm")
        y = modulate(norm(x), shift_m, scale_m)
        x = x + gate_m * MLP(self.hidden, self.mlp, name="mlp", **options)(y)
        return shard(x, "batch", None, None), cache


class DiTTransformer2DModel(nn.Module):
    """`network(x [b, H, W, c], t [b] timesteps, cond) -> prediction [b, H, W, outputs]`."""

    resolution: int | Shape = 32  # of the latent: side of a square, or height and width
    channels: int = 4
    outputs: int = 8  # twice the channels: the prediction, then variances
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    hidden: int = 4608
    mlp: str = "gelu"
    qkv_bias: bool = True
    mlp_norm_eps: float = 1e-5
    mlp_norm_affine: bool = False
    classes: int = 1000  # one more label is the dropped class
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
        positions = np.roll(sincos_2d(*self.grid, self.width), self.width // 2, -1)  # columns before rows
        y = y + cast(jnp.asarray(positions), self.dtype).reshape(*self.grid, -1)

        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        own = functools.partial(nn.vmap, axis_size=self.depth, **options)  # parameters for each block
        vectors = own(TimestepEmbed)(self.width, scale=1.0, shift=1.0, dtype=self.dtype, name="time")(t)
        label = denoiser.label_ids(cond, self.classes, null_class=True)
        vectors = vectors + own(Embed)(self.classes + 1, self.width, self.dtype, name="labels")(label)  # l b d

        names = ("heads", "hidden", "mlp", "qkv_bias", "mlp_norm_eps", "mlp_norm_affine", "dtype")
        block = {name: getattr(self, name) for name in names} | {"head_width": self.width // self.heads}
        stack = Stack(self.depth, DiTBlock, block, remat=self.remat, unroll=self.unroll, name="blocks")
        y, _ = stack(y.reshape(b, self.length, self.width), Mask(), each={"condition": vectors})

        ends = Linear((2, self.width), bias=True, dtype=self.dtype, init=zeros, name="modulation")(nn.silu(vectors[0]))
        y = modulate(Norm("layer", affine=False, name="norm")(y), ends[:, 0, None], ends[:, 1, None])
        y = Linear(self.outputs * self.patch**2, bias=True, dtype=self.dtype, init=zeros, name="pixels")(y)
        return unpatchify(y.reshape(b, *self.grid, -1), self.patch).astype(wide)


def build(config: Any) -> Denoiser:
    options, process, training = denoiser.split_options(config, PROCESS)
    if not process.timesteps:
        raise UserError("process.timesteps is 0, but this network needs discrete timesteps: set it above 0")
    channels = options.get("channels", DiTTransformer2DModel.channels)
    options.setdefault("outputs", channels * (1 + process.learned_variance))
    network = DiTTransformer2DModel(**options)
    if network.classes < 1:
        raise UserError(f"model.classes is {network.classes}, but this network needs labels: set it to at least 1")
    return Denoiser(network, process, **training)
