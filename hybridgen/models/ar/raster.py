"""Raster prior: our own transformer that generates image tokens in raster order, after a text prefix or a class.

Llama-style blocks (RMSNorm, SwiGLU, 2D rotary positions, optional qk-norm and grouped queries), as in LlamaGen (Sun et
al. 2024). The sequence is `[text][start][tokens]`: `start` encodes the class, or a dropped condition (then the text is
masked out), so that the unconditional model is the same program.

cond: {"text" b l int, "text_mask" b l bool} and/or {"label" b int}, and optionally "drop" b bool.

Letters: b batch, l text positions, p prefix positions, n image tokens, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import entries, rng
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count
from hybridgen.models.contract import Inputs, Parts
from hybridgen.models.roles import next_token
from hybridgen.models.text.transformer import TextTower, round_up
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock
from hybridgen.nn.linear import Embed, Linear, fan_in
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary, grid_positions, rotary
from hybridgen.nn.stack import Stack

ROLE = "prior"
PARTS = ("tokenizer",)
OPTIONS = {"prior": next_token.OPTIONS}
RANGES = next_token.RANGES | entries.TEXT | {"text_width": count(0, 2**20), "qk_norm": FLAG, "prefix_mask": FLAG}
prefill, step, score, features = next_token.prefill, next_token.step, next_token.score, next_token.features
generate, for_shape = next_token.generate, next_token.for_shape


class Raster(nn.Module):
    """`features` is the forward pass without a cache; `prefill` and `step` use a cache."""

    vocab: int
    grid: tuple[int, int]
    width: int = 192
    depth: int = 4
    heads: int = 3
    kv_heads: int | None = None
    hidden: int = 0  # 0: 8/3 of the width
    qk_norm: bool = False
    text_vocab: int = 0  # 0: no text
    text_length: int = 0
    text_depth: int = 1
    text_width: int = 0  # 0: the width of the prior
    classes: int = 0
    prefix_mask: bool = True  # text positions attend to each other in both directions
    cond_drop_prob: float = 0.1
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    has_unconditional = True

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width, self.dtype)
        self.start = Embed(self.classes + 2, self.width, self.dtype)  # classes, no class, dropped condition
        if self.text_vocab:
            width = self.text_width or self.width
            tower = {"heads": max(width // 64, 1), "unroll": self.unroll, "dtype": self.dtype}
            self.text = TextTower(self.text_vocab, self.text_length, width, self.text_depth, **tower)
            self.text_project = Linear(self.width, dtype=self.dtype)
        block = {
            "heads": self.heads,
            "head_width": self.width // self.heads,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "kv_heads": self.kv_heads,
            "qk_norm": self.qk_norm,
            "dtype": self.dtype,
        }
        self.blocks = Stack(self.depth, LlamaBlock, block, remat=self.remat, unroll=self.unroll)
        self.norm = Norm()
        self.head = Linear(self.vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def length(self) -> int:
        """Image tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Positions p - 1 before the start, from which the first token is predicted."""
        return self.text_length if self.text_vocab else 0

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.kv_heads or self.heads, self.width // self.heads

    def embed_condition(self, cond: dict) -> tuple[jax.Array, jax.Array | None]:
        """The prefix `[b, p, d]`, and which positions of it are visible `[b, p]` (None: all)."""
        b = cond["text" if self.text_vocab else "label"].shape[:1]
        drop = cond.get("drop", jnp.zeros(b, bool))  # b
        kind = cond["label"] if self.classes else jnp.full(drop.shape, self.classes)
        start = self.start(jnp.where(drop, self.classes + 1, kind))[:, None]  # b 1 d
        if not self.text_vocab:
            return start, None
        mask = cond["text_mask"] & ~drop[:, None]  # b l
        text = self.text_project(self.text(cond["text"], mask))  # b l d
        return jnp.concatenate([text, start], 1), jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)

    def rotary(self) -> Rotary:
        """Cosine and sine of the prefix, on the diagonal of the plane, and of the grid after it."""
        positions = grid_positions(*self.grid, prefix=self.prefix + 1)  # `start` has the last diagonal position
        return rotary(positions, self.width // self.heads)

    def embed_positions(
        self, x: jax.Array, at: jax.Array | int = 0, keys: jax.Array | None = None
    ) -> tuple[jax.Array, Rotary]:
        del keys
        return x, next_token.table_rows(self.rotary(), at, x.shape[1])

    def mask(self, valid: jax.Array | None = None) -> Mask:
        square = self.prefix if self.prefix_mask else 0
        return Mask("prefix" if square else "causal", square, valid)

    logits, features = next_token.head_logits, next_token.hidden_states
    prefill, step, grow = next_token.start_cache, next_token.extend_cache, next_token.grow_cache


def build(config: Any) -> Raster:
    model = Raster(**config)
    if not model.text_vocab and not model.classes:
        raise UserError("text_vocab and classes are 0, but this prior needs captions or classes: set one of them")
    return model


def init(model: Raster, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    del specs, parts
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.text_vocab:
        text = jnp.zeros((1, model.text_length), jnp.int32)
        cond |= {"text": text, "text_mask": jnp.ones(text.shape, bool)}
    tokens = jnp.zeros((1, model.length), jnp.int32)
    return {"params": model.init(key, tokens, cond, method=next_token.forward)["params"], "extra": {}}


def inputs(model: Raster) -> Inputs:
    """The entries of a batch that it is conditioned on."""
    return Inputs(bool(model.text_vocab), model.classes)


def conditioning(model: Raster, batch: dict, parts: Parts) -> dict:
    """The entries of a batch that this prior is conditioned on."""
    del parts
    names = (("text", "text_mask") if model.text_vocab else ()) + (("label",) if model.classes else ())
    return {name: batch[name] for name in names}


def loss(
    model: Raster, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy in nats per token."""
    del extra, step
    tokens = next_token.tokens_of(batch, parts)  # b n
    cond = conditioning(model, batch, parts)
    if train:
        cond = next_token.drop_condition(model, cond, rng.sample_keys(key, batch["id"]))
    return next_token.token_loss(model, params, batch, tokens, cond)


def sample(
    model: Raster, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Tokens (drawn, or `cond["tokens"]`), and their picture if there is a tokenizer."""
    cond = cond if "tokens" in cond else conditioning(model, cond, parts)
    return next_token.sample_image(model, params, extra, cond, keys, parts, options)
