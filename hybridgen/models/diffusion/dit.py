"""Our DiT decoder: a diffusion transformer that renders pixels (or latents) from a plan of image tokens.

DiT (Peebles & Xie 2022) with Llama's components: RMSNorm, rotary positions, SwiGLU. The plan enters in three ways: its
codes are added to the patches, resized to the patch grid; their mean is a condition of adaLN; and with `cross` the
blocks attend to them. With `draft` the tokenizer's reconstruction of the plan is an input too, and an "x" prediction is
added to it: at initialisation the output equals the draft, and training only has to improve it. The blocks may also
attend to text, and a label may be a condition of adaLN.

cond: see roles/denoiser.py. Letters: b batch, H W picture or latent, c channels, h w plan grid, n patches, l text
positions, d width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import entries
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count
from hybridgen.models.contract import Shape, sides
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.models.roles.denoiser import Denoiser
from hybridgen.models.text.transformer import TextTower, round_up
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import AdaLNBlock, modulate
from hybridgen.nn.conv import patchify, unpatchify
from hybridgen.nn.linear import Embed, Linear, cast, zeros
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import grid_positions, learned, rotary, sincos_2d
from hybridgen.nn.stack import Stack
from hybridgen.nn.timestep import TimestepEmbed

ROLE = "decoder"
PARTS = ("tokenizer", "autoencoder")
OPTIONS = {"decoder": denoiser.OPTIONS}
RANGES = denoiser.RANGES | entries.TEXT | {"plan_width": count(0, 2**20), "draft": FLAG, "cross": FLAG}
init, inputs, loss, sample = denoiser.init, denoiser.inputs, denoiser.loss, denoiser.sample
conditioning, plan_conditioning = denoiser.conditioning, denoiser.plan_conditioning
corrupt_tokens, decoder_loss = denoiser.corrupt_tokens, denoiser.decoder_loss
predict, render, for_shape = denoiser.predict, denoiser.render, denoiser.for_shape


class DiT(nn.Module):
    """`network(x [b, H, W, c], t [b], cond) -> prediction [b, H, W, c]`."""

    resolution: int | Shape = 32  # of the picture or latent: side of a square, or height and width
    channels: int = 3
    patch: int = 4
    width: int = 192
    depth: int = 4
    heads: int = 3
    hidden: int = 0  # 0: 8/3 of the width
    plan_width: int = 0  # width of the plan's codes; 0: no plan
    draft: bool = False
    draft_residual: bool = False  # the draft is added to the output
    cross: bool = False
    text_vocab: int = 0  # 0: no text
    text_length: int = 0
    text_depth: int = 1
    classes: int = 0  # 0: no label
    null_class: bool = True  # adds a label for the dropped class
    time_scale: float = 1000.0  # factor of t; 1 for timesteps
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        if self.text_vocab:
            heads = max(self.width // 64, 1)
            size = self.text_vocab, self.text_length, self.width, self.text_depth
            self.text = TextTower(*size, heads, dtype=self.dtype)

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
        draft = denoiser.kept_draft(cond) if self.draft else None
        pixels = x if draft is None else jnp.concatenate([x, draft.astype(x.dtype)], -1)
        y = Linear(self.width, bias=True, dtype=self.dtype, name="patches")(patchify(pixels, self.patch))
        y = y + cast(jnp.asarray(sincos_2d(*self.grid, self.width)), self.dtype).reshape(*self.grid, -1)
        vector = self._time_and_label(t, cond)  # b d
        context = None
        if self.plan_width:
            on_grid, pooled, plan = self._plan(cond)
            y, vector = y + on_grid, vector + pooled
            context = (plan, None) if self.cross else None
        if self.text_vocab:
            features = cond["features"] if "features" in cond else self.encode_text(cond)  # b l d
            valid = cond["text_mask"] & ~denoiser.dropped(cond, "text", b)[:, None]
            context = _joined(context, features, valid)
        y = y.reshape(b, self.length, self.width)  # b n d
        options = {"heads": self.heads, "head_width": self.width // self.heads, "dtype": self.dtype}
        options["hidden"] = self.hidden or round_up(self.width * 8 / 3)
        stack = Stack(self.depth, AdaLNBlock, options, remat=self.remat, unroll=self.unroll, name="blocks")
        table = rotary(grid_positions(*self.grid), self.width // self.heads)
        y, _ = stack(y, Mask(), rotary=table, context=context, condition=vector)
        ends = Linear((2, self.width), bias=True, dtype=self.dtype, init=zeros, name="modulation")(nn.silu(vector))
        y = modulate(Norm(affine=False, name="norm")(y), ends[:, 0, None], ends[:, 1, None])
        y = Linear(self.channels * self.patch**2, bias=True, dtype=self.dtype, init=zeros, name="pixels")(y)
        y = unpatchify(y.reshape(b, *self.grid, -1), self.patch).astype(wide)
        return y + draft if self.draft_residual else y

    def _time_and_label(self, t: jax.Array, cond: dict) -> jax.Array:
        """Embedding of time and label, `[b, d]`."""
        vector = TimestepEmbed(self.width, scale=self.time_scale, dtype=self.dtype, name="time")(t)
        if not self.classes:
            return vector
        label = denoiser.label_ids(cond, self.classes, self.null_class)
        return vector + Embed(self.classes + self.null_class, self.width, self.dtype, name="labels")(label)

    def _plan(self, cond: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The plan on the patch grid `[b, s, s, d]`, its mean for adaLN `[b, d]`, and as a sequence `[b, h*w, d]`."""
        plan = Linear(self.width, bias=True, dtype=self.dtype, name="plan")(cond["plan"])  # b h w d
        b, h, w, d = plan.shape
        null = self.param("null_plan", nn.initializers.normal(0.02), (1, self.width))
        gone = denoiser.dropped(cond, "plan", b)[:, None, None, None]
        plan = jnp.where(gone, cast(null, self.dtype), plan)
        placed = plan + cast(learned(self, "plan_position", 0.02, (h, w), self.width), self.dtype)
        pooled = Linear(self.width, bias=True, dtype=self.dtype, name="plan_pool")(
            Norm(name="plan_norm")(nn.silu(placed)).mean((1, 2))
        )
        if (h, w) != self.grid:
            method = "nearest" if h <= self.grid[0] else "linear"
            plan = jax.image.resize(plan, (b, *self.grid, d), method)
        return plan, pooled, placed.reshape(b, h * w, d)

    def encode_text(self, cond: dict) -> jax.Array:
        """The text as features `[b, l, d]`."""
        return self.text(cond["text"], cond["text_mask"])


def _joined(plan: tuple[jax.Array, None] | None, features: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The context of the blocks and its valid positions: the plan, if they attend to it, then the text."""
    if plan is None:
        return features, valid
    codes, _ = plan
    seen = jnp.ones(codes.shape[:2], bool)
    return jnp.concatenate([codes, features], 1), jnp.concatenate([seen, valid], 1)


def for_plan(model: Denoiser, width: int) -> Denoiser:
    """The model for plans of that width, such as a prior's hidden states."""
    return dataclasses.replace(model, network=model.network.clone(plan_width=width))


def build(config: Any) -> Denoiser:
    options, process, training = denoiser.split_options(config, Process())
    if process.learned_variance:
        raise UserError("process.learned_variance is not supported by this network; use diffusion.dit_official")
    options["draft_residual"] = options.get("draft", False) and process.prediction_type == "x"
    options["null_class"] = training["cond_drop_prob"] > 0
    options["time_scale"] = 1.0 if process.timesteps else 1000.0
    return Denoiser(DiT(**options), process, **training)
