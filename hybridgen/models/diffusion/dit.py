"""DiT decoder: a diffusion transformer that renders pixels (or latents) from a plan of image tokens.

DiT (Peebles & Xie 2022) with flow matching or eps / v prediction. The plan reaches it three ways: its codes are added
on the patch grid, at whatever ratio the two grids have; their mean goes through adaLN; and, if asked, cross-attention
reads them. With `draft` it also sees the tokenizer's own reconstruction of the plan, and an "x" prediction is a
correction of it: at initialisation the decoder is the tokenizer's, and training only has to improve it. In training,
tokens are corrupted and dropped at random, so that it forgives a prior's mistakes.

cond: "plan" b h w d codes, "draft" b H W c, "text" and "text_mask" (with "features" b l d, if they are known already),
"label", and "drop_plan", "drop_text", "drop_label" b bool.

With `timesteps` it is the network of a discrete process, told whole timesteps, that may say the variance of its steps
too (variance.py): with blocks and positions set as there, the published DiT.

Letters: b batch, H W picture or latent, c channels, h w plan grid, n patches, d width.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Parts, Shape, divided, need, sides
from hybridgen.models.diffusion import process, variance
from hybridgen.models.losses import per_sample, rows, weighted
from hybridgen.models.text.transformer import TextTower, round_up
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import Block, modulate
from hybridgen.nn.conv import patchify, unpatchify
from hybridgen.nn.linear import Embed, Linear, cast, cast_for_inference, zeros
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import grid_positions, learned, rotary, sincos_2d
from hybridgen.nn.stack import Stack
from hybridgen.nn.timestep import TimestepEmbed


class DiT(nn.Module):
    """`(x [b, H, W, c], t [b], cond) -> prediction [b, H, W, c]`, in the parameterisation `kind`."""

    resolution: int | Shape = 32  # of the picture, or of the latent: of a square, or height and width
    channels: int = 3
    patch: int = 4
    width: int = 192
    depth: int = 4
    heads: int = 3
    hidden: int = 0  # 0: 8/3 of the width
    plan_width: int = 0  # 0: no plan
    draft: bool = False
    cross: bool = False
    text_vocab: int = 0
    text_length: int = 0
    text_depth: int = 1
    classes: int = 0
    block: Mapping = FrozenDict()  # options of nn.stack.Block that are not its defaults
    position: str = "rows"  # fixed table, rows first; "columns": columns first; "stored": an array that does not train
    rotary: bool = True
    time_shift: float = 0.0  # of the frequencies that t is told in, see nn.timestep
    own_embedders: bool = False  # every block has its own of time and label (diffusers repeats them)
    outputs: int = 0  # channels of what it says; twice `channels`: variances behind the prediction; 0: `channels`
    timesteps: int = 0  # of a discrete process; 0: times are continuous
    variance: str = "large"  # of ancestral steps along timesteps, where it is not said: "large" (beta) or "small"
    kind: str = "x"
    loss_kind: str = "velocity"
    schedule: str = "flow"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_min: float = 0.05
    drop_plan: float = 0.1
    drop_text: float = 0.1
    relative: bool = False  # errors count in units of the draft's, so that wrong drafts do not drown the fine work
    corrupt: float = 0.0  # each picture's tokens are replaced at a rate drawn from [0, corrupt]
    posterior: str = "mean"  # of what an autoencoder sees, a Gaussian, training takes the "mean", or a "sample"
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        if self.text_vocab:
            heads = max(self.width // 64, 1)
            size = self.text_vocab, self.text_length, self.width, self.text_depth
            self.text = TextTower(*size, heads, dtype=self.dtype)

    @property
    def shape(self) -> Shape:
        """(H, W) of what is rendered."""
        return sides(self.resolution)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.shape[0] // self.patch, self.shape[1] // self.patch

    @property
    def length(self) -> int:
        """Patches n."""
        return self.sides[0] * self.sides[1]

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        b, wide = x.shape[0], jnp.promote_types(x.dtype, jnp.float32)
        draft = self.seen_draft(cond) if self.draft else None
        pixels = x if draft is None else jnp.concatenate([x, draft.astype(x.dtype)], -1)
        y = Linear(self.width, bias=True, dtype=self.dtype, name="patches")(patchify(pixels, self.patch))
        y = y + cast(self._positions(), self.dtype).reshape(*self.sides, -1)
        vector = self._time_and_label(t, cond)  # b d, or l b d
        context = None
        if self.plan_width:
            on_grid, pooled, plan = self._plan(cond)
            y, vector = y + on_grid, vector + pooled
            context = (plan, None) if self.cross else None
        if self.text_vocab:
            features = cond["features"] if "features" in cond else self.read(cond)  # b l d
            context = self._join(context, features, cond["text_mask"] & ~self._dropped(cond, "text", b)[:, None])
        y = y.reshape(b, self.length, self.width)  # b n d
        options = {
            "heads": self.heads,
            "head_width": self.width // self.heads,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "modulated": True,
            "dtype": self.dtype,
        } | dict(self.block)
        stack = Stack(self.depth, Block, options, remat=self.remat, unroll=self.unroll, name="blocks")
        table = rotary(grid_positions(*self.sides), self.width // self.heads) if self.rotary else None
        each, inputs = ({"condition": vector}, {}) if self.own_embedders else ({}, {"condition": vector})
        y, _ = stack(y, Mask(), rotary=table, context=context, each=each, **inputs)
        ends = Linear((2, self.width), bias=True, dtype=self.dtype, init=zeros, name="modulation")(
            nn.silu(vector[0] if self.own_embedders else vector)  # the last layer has the first block's
        )
        y = modulate(Norm(options.get("norm", "rms"), affine=False, name="norm")(y), ends[:, 0, None], ends[:, 1, None])
        values = (self.outputs or self.channels) * self.patch**2
        y = Linear(values, bias=True, dtype=self.dtype, init=zeros, name="pixels")(y)
        y = unpatchify(y.reshape(b, *self.sides, -1), self.patch).astype(wide)
        return y + draft if draft is not None and self.kind == "x" else y

    def _positions(self) -> jax.Array:
        """Where each patch is, `[n, d]`."""
        if self.position not in ("rows", "columns", "stored"):
            raise UserError(f"model.position {self.position!r} is not one of 'rows', 'columns', 'stored'")
        table = sincos_2d(*self.sides, self.width)
        if self.position != "rows":
            table = np.roll(table, self.width // 2, -1)
        if self.position != "stored":
            return jnp.asarray(table)
        return jax.lax.stop_gradient(self.param("position", lambda key, shape: jnp.asarray(table), table.shape))

    def _time_and_label(self, t: jax.Array, cond: dict) -> jax.Array:
        """Time and label, `[b, d]`; `[l, b, d]` for each block."""
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        own = functools.partial(nn.vmap, **axes, axis_size=self.depth) if self.own_embedders else lambda layer: layer
        options = {"scale": 1.0 if self.timesteps else 1000.0, "shift": self.time_shift, "dtype": self.dtype}
        vector = own(TimestepEmbed)(self.width, **options, name="time")(t)
        if not self.classes:
            return vector
        label = cond["label"]
        if "drop_label" in cond:
            if not self.drop_text:
                raise UserError("labels are never dropped (model.drop_text is 0): there is no guidance against them")
            label = jnp.where(cond["drop_label"], self.classes, label)
        known = self.classes + (self.drop_text > 0)  # the last one stands for none
        return vector + own(Embed)(known, self.width, self.dtype, name="labels")(label)

    def _dropped(self, cond: dict, name: str, b: int) -> jax.Array:
        return cond.get(f"drop_{name}", jnp.zeros((b,), bool))

    def seen_draft(self, cond: dict) -> jax.Array:
        """`cond["draft"] [b, H, W, c]`, zero where the plan is dropped."""
        draft = cond["draft"]
        keep = ~self._dropped(cond, "plan", draft.shape[0])
        return draft * keep[:, None, None, None]

    def _plan(self, cond: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The plan on the patch grid `[b, s, s, d]`, its mean for adaLN `[b, d]`, and as a sequence `[b, h*w, d]`."""
        plan = Linear(self.width, bias=True, dtype=self.dtype, name="plan")(cond["plan"])  # b h w d
        b, h, w, d = plan.shape
        null = self.param("null_plan", nn.initializers.normal(0.02), (1, self.width))
        dropped = self._dropped(cond, "plan", b)[:, None, None, None]
        plan = jnp.where(dropped, cast(null, self.dtype), plan)
        placed = plan + cast(learned(self, "plan_position", 0.02, (h, w), self.width), self.dtype)
        pooled = Linear(self.width, bias=True, dtype=self.dtype, name="plan_pool")(
            Norm(name="plan_norm")(nn.silu(placed)).mean((1, 2))
        )
        if (h, w) != self.sides:
            method = "nearest" if h <= self.sides[0] else "linear"
            plan = jax.image.resize(plan, (b, *self.sides, d), method)
        return plan, pooled, placed.reshape(b, h * w, d)

    def read(self, cond: dict) -> jax.Array:
        """The text as features `[b, l, d]`: the same at every step of a solver, so that `draw` makes them once."""
        return self.text(cond["text"], cond["text_mask"])

    def _join(self, context: Any, features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        if context is None:
            return features, mask
        plan, _ = context
        seen = jnp.ones(plan.shape[:2], bool)
        return jnp.concatenate([plan, features], 1), jnp.concatenate([seen, mask], 1)


def build(config: Any) -> DiT:
    model = DiT(**config)
    if model.posterior not in ("mean", "sample"):
        raise UserError(f"model.posterior {model.posterior!r} is not one of 'mean', 'sample'")
    if model.outputs not in (0, model.channels) and (model.draft or not model.timesteps):
        sizes = f"model.outputs is {model.outputs} and model.channels {model.channels}"
        raise UserError(f"{sizes}: variances are said along discrete timesteps (model.timesteps) and without a draft")
    return model


def for_shape(model: DiT, shape: Shape, parts: Parts) -> DiT:
    """The model for pictures of `shape`, on the same arrays."""
    if model.position == "stored":
        raise UserError("model.position 'stored' is an array of one grid, 'rows' and 'columns' are not")
    shape = parts["autoencoder"].model.grid if "autoencoder" in parts else shape
    divided(shape, model.patch)
    return model.clone(resolution=shape)


def init(model: DiT, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    shape = (1, *model.shape, model.channels)
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.plan_width:
        h, w = need(parts, "tokenizer", "a decoder with a plan").model.grid
        cond |= {"plan": jnp.zeros((1, h, w, model.plan_width)), "draft": jnp.zeros(shape)}
    if model.text_vocab:
        text = jnp.zeros((1, model.text_length), jnp.int32)
        cond |= {"text": text, "text_mask": text == 0}
    params = model.init(key, jnp.zeros(shape), jnp.zeros((1,)), cond)["params"]
    return {"params": params, "extra": {}}


def predict(model: DiT, params: Any, extra: Any, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
    """The network's prediction at `t [b]` in [0, 1], in the parameterisation `model.kind`."""
    del extra
    return model.apply({"params": params}, x, variance.timestep(model, t) if model.timesteps else t, cond)


def clean(model: DiT, batch: dict, parts: Parts, keys: jax.Array | None = None) -> jax.Array:
    """What is rendered, clean `[b, H, W, c]`: the cached latent, an autoencoder's latent, or the picture.

    keys `[b]`: the latent is drawn, if `model.posterior` says so; a cached one its source has drawn already.
    """
    if "latent" in batch:
        return batch["latent"]
    if "autoencoder" not in parts:
        return batch["image"]
    auto, draws = parts["autoencoder"], model.posterior == "sample" and keys is not None
    if draws and not hasattr(auto.model, "moments"):
        raise UserError(f"model.posterior is 'sample', and a {auto.family} sees no Gaussian: set it to 'mean'")
    noise = {"keys": rng.named(keys, "posterior")} if draws else {}
    return jax.lax.stop_gradient(auto.call("encode", batch["image"], **noise))


def conditioning(model: DiT, batch: dict, parts: Parts, tokens: jax.Array | None = None) -> dict:
    """cond from a batch: codes and draft of its tokens (given, cached or from the tokenizer), text and label."""
    names = (("text", "text_mask") if model.text_vocab else ()) + (("label",) if model.classes else ())
    cond = {name: batch[name] for name in names}
    if model.plan_width:
        tokenizer = need(parts, "tokenizer", "a decoder with a plan")
        if tokens is None:
            tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])
        cond |= plan_conditioning(model, tokenizer.call("embed", tokens), parts)
    return jax.lax.stop_gradient(cond)


def plan_conditioning(model: DiT, codes: jax.Array, parts: Parts) -> dict:
    """The entries of cond that follow from codes `[b, h, w, d]`; gradients flow back to soft codes."""
    cond = {"plan": codes}
    if model.draft:
        picture = parts["tokenizer"].call("decode", codes)
        cond["draft"] = parts["autoencoder"].call("encode", picture) if "autoencoder" in parts else picture
    return cond


def loss(
    model: DiT, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Error of the prediction at random times, on true tokens with corruption."""
    del step
    keys = rng.sample_keys(key, batch["id"])  # b
    tokens = None
    if model.plan_width:
        tokenizer = need(parts, "tokenizer", "a decoder with a plan")
        tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])
        if train and model.corrupt:
            tokens = corrupt_tokens(tokens, keys, tokenizer.model.vocab, model.corrupt)
    cond = conditioning(model, batch, parts, tokens)
    return decoder_loss(model, params, batch, cond, keys, parts, train)


def decoder_loss(
    model: DiT, params: Any, batch: dict, cond: dict, keys: jax.Array, parts: Parts, train: bool
) -> tuple[jax.Array, dict]:
    """The loss given its conditions, some of them dropped in training."""
    if train:
        cond |= {"drop_plan": rng.bernoulli(rng.named(keys, "drop plan"), model.drop_plan)}
        unconditional = rng.bernoulli(rng.named(keys, "drop text"), model.drop_text)
        cond |= {"drop_text": unconditional} | ({"drop_label": unconditional} if model.drop_text else {})
    x = clean(model, batch, parts, keys if train else None)
    each, metrics = process.errors(model, lambda x, t, cond: predict(model, params, {}, x, t, cond), x, keys, cond)
    if model.relative:
        each = each / (draft_error(model, x, cond) + 1e-4)
    valid = rows(batch, each)
    scalar, weight = weighted(each, valid)
    report = {name: weighted(value, valid)[0] for name, value in metrics.items()}
    return scalar, {"metrics": report, "weight": weight, "extra": {}}


def draft_error(model: DiT, x: jax.Array, cond: dict) -> jax.Array:
    """Squared error `[b]` of what the decoder starts from, the draft, or nothing where the plan is dropped, to `x`."""
    if not model.draft:
        raise UserError("model.relative needs model.draft: errors are measured in units of the draft's")
    draft = model.seen_draft(cond)
    return jax.lax.stop_gradient(per_sample(jnp.square(draft - x)))


def corrupt_tokens(tokens: jax.Array, keys: jax.Array, vocab: int, most: float) -> jax.Array:
    """`tokens [b, n]` with some replaced at random, at a rate of its own for each picture, uniform in [0, most]."""
    n = tokens.shape[1]
    rate = most * rng.uniform(rng.named(keys, "corruption rate"))  # b
    hit = rng.uniform(rng.named(keys, "corrupted places"), (n,)) < rate[:, None]  # b n
    return jnp.where(hit, rng.randint(rng.named(keys, "corrupted codes"), (n,), 0, vocab), tokens)


def render(model: DiT, params: Any, extra: Any, cond: dict, keys: jax.Array, parts: Parts, options: dict) -> jax.Array:
    """Renders `[b, H, W, 3]` in [-1, 1] from cond."""
    shape = (*model.shape, model.channels)
    if model.text_vocab:
        cond = cond | {"features": model.apply({"params": params}, cond, method="read")}
    params = cast_for_inference(params, model.dtype, options.get("gather", 1))  # outside of the loop
    x = process.render(model, lambda x, t, cond: predict(model, params, extra, x, t, cond), cond, keys, shape, options)
    if "autoencoder" in parts:
        x = parts["autoencoder"].call("decode", x)
    return jnp.clip(x, -1, 1)[..., :3]  # of latents nobody decodes, three channels as colours


def sample(
    model: DiT, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Renders of `cond["tokens"]`, or of the tokens of `cond["image"]`, or from text and label alone."""
    ready = conditioning(model, cond, parts)
    return {"image": render(model, params, extra, ready, keys, parts, options.get("decoder", {}))} | (
        {"draft": jnp.clip(ready["draft"], -1, 1)} if "draft" in ready and "autoencoder" not in parts else {}
    )
