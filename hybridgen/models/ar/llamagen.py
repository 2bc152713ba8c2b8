"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): Llama over image tokens, conditioned on a class or a caption.

The sequence is `[class][tokens]`, or `[caption][tokens]`, where the caption is the features of a text tower, projected
by an MLP and padded on the left. Rotary positions are those of the grid; the prefix has none: its rows of the table are
zeros, so its queries and keys become zero. A dropped class is the table's last row, a dropped caption is fixed random
features.

cond: {"label" b int} or {"text_features" b l c, "text_features_mask" b l bool}, and optionally "drop" b bool.

Letters: b batch, l text positions, c width of text features, p prefix positions, n image tokens, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count, number
from hybridgen.models.contract import Inputs, Parts, need
from hybridgen.models.roles import next_token
from hybridgen.models.text.transformer import round_up
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock, dropout
from hybridgen.nn.linear import Embed, Linear, cast, fan_in, normal
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary, grid_positions, rotary
from hybridgen.nn.stack import Stack

ROLE = "prior"
PARTS = ("tokenizer", "text")
OPTIONS = {"prior": next_token.OPTIONS}
RANGES = next_token.RANGES | {name: count(0, 2**20) for name in ("text_length", "text_width", "null_length")}
RANGES |= {"norm_eps": number(0.0, 1.0), "rope_base": number(1.0), "padding_sees_itself": FLAG}
RANGES |= {name: number(0.0, 0.999) for name in ("dropout", "token_dropout")}
prefill, step, score, features = next_token.prefill, next_token.step, next_token.score, next_token.features
generate, for_shape = next_token.generate, next_token.for_shape
INIT_STD = 0.02  # standard deviation of initial kernels and tables; the head starts at zero


class Captions(nn.Module):
    """`features [b, l, c]` -> `[b, l, d]`; rows with `drop [b]` use fixed random features instead."""

    length: int
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array, drop: jax.Array) -> jax.Array:
        c = features.shape[-1]
        # a buffer in official code, so it is never trained; weight decay is selected by path and excludes it
        null = jax.lax.stop_gradient(self.param("null", normal(c**-0.5), (self.length, c)))
        null = null[: features.shape[1]].astype(features.dtype)
        x = cast(jnp.where(drop[:, None, None], null, features), self.dtype)
        x = nn.gelu(Linear(self.width, dtype=self.dtype, name="up")(x))
        return Linear(self.width, dtype=self.dtype, name="down")(x)


class LlamaGen(nn.Module):
    """`features` is the forward pass without a cache; `prefill` and `step` use a cache."""

    vocab: int
    grid: tuple[int, int]
    width: int = 768
    depth: int = 12
    heads: int = 12
    kv_heads: int | None = None
    hidden: int = 0  # 0: 8/3 of the width
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    classes: int = 0  # number of classes of a class prefix
    text_length: int = 0  # positions of a caption
    text_width: int = 0  # width of its features; 0: a class prefix
    null_length: int = 0  # rows of a dropped caption, of which text_length are read; 0: text_length
    padding_sees_itself: bool = False  # as in official code; the outputs at padding are not used
    cond_drop_prob: float = 0.1
    dropout: float = 0.0  # rate in both branches of a block, in training
    token_dropout: float = 0.0  # rate at the input of the first block
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width, self.dtype)
        if self.text_width:
            self.caption = Captions(self.null_length or self.text_length, self.width, self.dtype)
        else:
            self.start = Embed(self.classes + (self.cond_drop_prob > 0), self.width, self.dtype)  # classes, null class
        block = {
            "heads": self.heads,
            "head_width": self.width // self.heads,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "kv_heads": self.kv_heads,
            "norm_eps": self.norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        self.blocks = Stack(self.depth, LlamaBlock, block, remat=self.remat, unroll=self.unroll)
        self.norm = Norm(eps=self.norm_eps)
        self.head = Linear(self.vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def length(self) -> int:
        """Image tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Positions p - 1 before the one from which the first token is predicted."""
        return self.text_length - 1 if self.text_width else 0

    @property
    def has_unconditional(self) -> bool:
        return self.text_width > 0 or self.cond_drop_prob > 0

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.kv_heads or self.heads, self.width // self.heads

    def embed_condition(self, cond: dict) -> tuple[jax.Array, jax.Array | None]:
        """The prefix `[b, p, d]`, and which positions of it are visible `[b, p]` (None: all)."""
        given = cond["text_features" if self.text_width else "label"]
        drop = cond.get("drop", jnp.zeros(given.shape[:1], bool))  # b
        if self.text_width:
            # a dropped caption keeps the prompt's padding mask, as in official code
            return self.caption(given, drop), cond["text_features_mask"]
        return self.start(jnp.where(drop, self.classes, given))[:, None], None

    def rotary(self) -> Rotary:
        """Cosine and sine, zeros for the prefix."""
        table = rotary(grid_positions(*self.grid), self.width // self.heads, self.rope_base)
        return tuple(jnp.pad(part, ((self.prefix + 1, 0), (0, 0))) for part in table)

    def embed_positions(
        self, x: jax.Array, at: jax.Array | int = 0, keys: jax.Array | None = None
    ) -> tuple[jax.Array, Rotary]:
        table = next_token.table_rows(self.rotary(), at, x.shape[1])
        return dropout(x, keys, "tokens", rate=self.token_dropout), table

    def mask(self, valid: jax.Array | None = None) -> Mask:
        return Mask("causal", valid=valid, own=self.padding_sees_itself)

    logits, features = next_token.head_logits, next_token.hidden_states
    prefill, step, grow = next_token.start_cache, next_token.extend_cache, next_token.grow_cache


def build(config: Any) -> LlamaGen:
    model = LlamaGen(**config)
    if (model.classes > 0) == (model.text_width > 0):
        given = f"classes {model.classes} and text_width {model.text_width}"
        raise UserError(f"{given}: LlamaGen takes either a class or a text, so exactly one of them must be 0")
    return model


def init(model: LlamaGen, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    del specs, parts
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.text_width:
        text = jnp.zeros((1, model.text_length, model.text_width))
        cond = {"text_features": text, "text_features_mask": jnp.ones(text.shape[:2], bool)}
    tokens = jnp.zeros((1, model.length), jnp.int32)
    params = model.init(key, tokens, cond, method=next_token.forward)["params"]
    params = next_token.redraw(params, key, INIT_STD)
    return {"params": params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}, "extra": {}}


def inputs(model: LlamaGen) -> Inputs:
    """Labels only; captions are read as features from the part "text"."""
    return Inputs(classes=model.classes)


def conditioning(model: LlamaGen, batch: dict, parts: Parts) -> dict:
    """The class; or text features, cached in the batch or from the part "text", and their mask, padded on the left.

    Raises UserError for features of another size.
    """
    if not model.text_width:
        return {"label": batch["label"]}
    if "text_features" in batch:
        features, mask = batch["text_features"], batch["text_features_mask"]
    else:
        tower = need(parts, "text", "a prior on text features")
        features, mask = tower.call("encode", batch["text"], batch["text_mask"])
    features = jax.lax.stop_gradient(features)
    if features.shape[1:] != (model.text_length, model.text_width):
        given, wanted = "x".join(map(str, features.shape[1:])), f"{model.text_length}x{model.text_width}"
        hint = "" if features.shape[1] == model.text_length else " (data.text.length sets the positions)"
        raise UserError(f"text features are {given} (positions x width), but this prior needs {wanted}{hint}")
    order = jnp.argsort(mask, axis=1, stable=True)  # b l: padding first, both in their order
    moved = jnp.take_along_axis(features, order[..., None], 1)
    return {"text_features": moved, "text_features_mask": jnp.take_along_axis(mask, order, 1)}


def loss(
    model: LlamaGen, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy in nats per token."""
    del extra, step
    tokens = next_token.tokens_of(batch, parts)  # b n
    cond = conditioning(model, batch, parts)
    keys = rng.sample_keys(key, batch["id"]) if train else None  # b
    if train:
        cond = next_token.drop_condition(model, cond, keys)
    return next_token.token_loss(model, params, batch, tokens, cond, keys)


def sample(
    model: LlamaGen, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Tokens (drawn, or `cond["tokens"]`), and their picture if there is a tokenizer."""
    cond = cond if "tokens" in cond else conditioning(model, cond, parts)
    return next_token.sample_image(model, params, extra, cond, keys, parts, options)
