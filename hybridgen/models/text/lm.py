"""A causal language model with the Llama architecture (Touvron et al. 2023): the trunk of unified models.

RMSNorm, gated feed-forward, rotary positions, grouped queries; the head may be tied to the token embedding. Inputs are
ids `[b, n]` or embeddings `[b, n, d]`. Padding may be anywhere, usually on the left: a mask hides it, and a token's
position is the number of real tokens before it.

Roles: a prior over text (`prefill`, `step`, `score`, `features`, `generate`) and a text tower (`encode`).

cond: {"text" b l int or b l d, "text_mask" b l bool}, a prompt with at least one real token per row.

Letters: b batch, l prompt positions, n tokens, t positions of a chunk, d width, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core import entries
from hybridgen.core.ranges import FLAG, count, number, one_of
from hybridgen.models.contract import Inputs, Option
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.models.roles import next_token
from hybridgen.models.text.transformer import round_up
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock
from hybridgen.nn.linear import Embed, Linear, fan_in
from hybridgen.nn.mlp import KINDS
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary, rotary
from hybridgen.nn.stack import Stack

ROLE = ("prior", "text")
PARTS = ()
STEPS = Option(0, "number of tokens to generate (0: as many as the model has positions)", 0, 1_000_000)
OPTIONS = {"prior": next_token.TEXT_OPTIONS | {"steps": STEPS}}
RANGES = entries.TRANSFORMER | {"text_vocab": count(1, 2**24), "text_length": count(1, 2**20)}
RANGES |= {"head_width": count(0, 2**16), "kv_heads": count(1, 2**14, none=True), "mlp": one_of(*KINDS)}
RANGES |= {"bias": FLAG, "mlp_bias": FLAG, "norm_eps": number(0.0, 1.0), "base": number(1.0), "tied": FLAG}
prefill, step, score, features = next_token.prefill, next_token.step, next_token.score, next_token.features
generate = next_token.generate


class LM(nn.Module):
    """`__call__` returns hidden states after the last norm; `cached` extends a cache by a chunk of any length."""

    text_vocab: int
    text_length: int  # largest number of positions of a prompt with its continuation
    width: int = 192
    depth: int = 4
    heads: int = 3
    head_width: int = 0  # 0: width / heads
    kv_heads: int | None = None
    hidden: int = 0  # 0: 8/3 of the width
    mlp: str = "swiglu"
    bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    base: float = 10_000.0  # base of the rotary frequencies
    scaling: Mapping = FrozenDict()  # rotary scaling, see nn/position.py
    tied: bool = False  # logits from the token embedding
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    has_unconditional = False
    cond_drop_prob = 0.0

    def setup(self) -> None:
        self.tokens = Embed(self.text_vocab, self.width, self.dtype)
        block = {
            "heads": self.heads,
            "head_width": self.key_width,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "kv_heads": self.kv_heads,
            "mlp": self.mlp,
            "bias": self.bias,
            "mlp_bias": self.mlp_bias,
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
        }
        self.blocks = Stack(self.depth, LlamaBlock, block, remat=self.remat, unroll=self.unroll)
        self.norm = Norm(eps=self.norm_eps)
        if not self.tied:
            self.head = Linear(self.text_vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def key_width(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def length(self) -> int:
        """The largest number of positions of a prompt with its continuation."""
        return self.text_length

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.kv_heads or self.heads, self.key_width

    def enter(self, text: jax.Array) -> jax.Array:
        """Embeddings `[b, n, d]` of ids; embeddings are returned unchanged."""
        return text if jnp.issubdtype(text.dtype, jnp.floating) else self.tokens(text)

    def rotary(self, positions: jax.Array) -> Rotary:
        return rotary(positions[..., None], self.key_width, self.base, self.scaling)

    def states(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The output of each layer, `[depth, b, n, d]`."""
        return self.trunk(text, mask, every=True)

    def trunk(self, text: jax.Array, mask: jax.Array | None, every: bool = False) -> jax.Array:
        x = self.enter(text)  # b n d
        table = self.rotary(jnp.arange(x.shape[1]) if mask is None else before(mask))
        return self.blocks(x, Mask("causal", valid=mask), rotary=table, every=every)[0]

    def __call__(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.norm(self.trunk(text, mask))

    def logits(self, hidden: jax.Array) -> jax.Array:
        return next_token.shard_logits(self.tokens.attend(hidden) if self.tied else self.head(hidden))

    def forward(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.logits(self(text, mask))

    def features(self, tokens: jax.Array, cond: dict) -> jax.Array:
        """Hidden states `[b, n, d]` from which each of `tokens [b, n]`, which follow the prompt, is predicted."""
        prompt, valid = self.enter(cond["text"]), cond["text_mask"]
        x = jnp.concatenate([prompt, self.enter(tokens[:, :-1])], 1)  # b l+n-1 d
        mask = jnp.pad(valid, ((0, 0), (0, tokens.shape[1] - 1)), constant_values=True)
        hidden = self(x, mask)
        return jnp.concatenate([last(hidden[:, : valid.shape[1]], valid)[:, None], hidden[:, valid.shape[1] :]], 1)

    def cached(self, cache: kv.Cache, text: jax.Array, valid: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Hidden states `[b, t, d]` of a chunk that continues the cache; `valid [b, t]`: False for padding."""
        table = self.rotary(before(valid) + cache["valid"].sum(-1, keepdims=True))
        x, cache = self.blocks(self.enter(text), Mask("causal"), rotary=table, cache=kv.admit(cache, valid))
        return self.norm(x), kv.advance(cache, valid.shape[1])

    def prefill(self, cond: dict, room: int) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, v]` after the last real token of a prompt, and a cache with room for `room` tokens."""
        x, valid = self.enter(cond["text"]), cond["text_mask"]
        cache = next_token.empty_cache(self, x, x.shape[1] + room)
        hidden, cache = self.cached(cache, x, valid)
        return self.logits(last(hidden, valid)), cache

    def step(self, cache: kv.Cache, chunk: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, t, v]` after each position of a chunk of ids or embeddings, and the cache."""
        valid = jnp.ones(chunk.shape[:2], bool) if valid is None else valid
        hidden, cache = self.cached(cache, chunk, valid)
        return self.logits(hidden), cache

    grow = next_token.grow_cache


def before(mask: jax.Array) -> jax.Array:
    """The number of real tokens before each position, `[b, n]`."""
    return jnp.cumsum(mask, -1, dtype=jnp.int32) - mask


def last(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """`hidden [b, n, d]` at the last real token, `[b, d]`."""
    place = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], -1)  # b
    return jnp.take_along_axis(hidden, place[:, None, None], 1)[:, 0]


def build(config: Any) -> LM:
    return LM(**config)


def init(model: LM, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del specs, parts
    return {"params": model.init(key, jnp.zeros((1, 1), jnp.int32), method="forward")["params"], "extra": {}}


def inputs(model: LM) -> Inputs:
    """The entries of a batch that it is conditioned on."""
    del model
    return Inputs(text=True)


def conditioning(model: LM, batch: dict, parts: Any) -> dict:
    """The entries of a batch that are the prompt."""
    del model, parts
    return {name: batch[name] for name in ("text", "text_mask")}


def loss(
    model: LM, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Cross-entropy in nats of each real token that follows a real one, given all tokens before it."""
    del key, parts, extra, step, train
    text, mask = batch["text"], batch["text_mask"]  # b n
    logits = model.apply({"params": params}, text[:, :-1], mask[:, :-1], method="forward")
    each = cross_entropy(logits, text[:, 1:])  # b n-1
    there = mask[:, 1:] & mask[:, :-1]
    valid = rows(batch, each)
    scalar, weight = weighted(each, there if valid is None else there & valid)
    return scalar, {"metrics": {"nll": scalar}, "weight": weight, "extra": {}}


def encode(
    model: LM, params: Any, extra: Any, text: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states `[b, l, d]` after the last norm, and the mask of valid positions."""
    del extra
    valid = jnp.ones(text.shape[:2], bool) if mask is None else mask
    return model.apply({"params": params}, text, mask), valid


def sample(
    model: LM, params: Any, cond: dict, keys: jax.Array, *, parts: Any, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Continuations of prompts."""
    text, logprob = generate(model, params, extra, conditioning(model, cond, parts), keys, options.get("prior", {}))
    return {"text": text, "logprob": logprob}
