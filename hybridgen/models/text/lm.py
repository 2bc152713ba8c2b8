"""A causal language model in the manner of Llama (Touvron et al. 2023): the trunk of unified models.

RMSNorm, gated feed-forward, rotary positions, grouped queries; a head of its own or the table of the tokens. What
enters are ids `[b, n]` or, from elsewhere, embeddings `[b, n, d]`. Padding may stand anywhere, usually on the left: a
mask hides it, and a token's position is the number of real tokens before it.

Roles: a prior over text (`prefill`, `step`, `score`, `features`, `plan`) and a text tower (`encode`).

cond: {"text" b l int or b l d, "text_mask" b l bool}, a prompt of at least one real token a row.

Letters: b batch, l prompt positions, n tokens, t positions of a chunk, d width, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core.sharding import shard
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.models.text.transformer import round_up
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock
from hybridgen.nn.linear import Embed, Linear, cast_for_inference, fan_in
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import rotary
from hybridgen.nn.stack import Stack, layers_are_unstacked, unstack_layers
from hybridgen.sampling import decode


class LM(nn.Module):
    """`__call__` gives hidden states behind the last norm; `cached` continues a cache by a chunk of any length."""

    text_vocab: int
    text_length: int  # prompt and continuation
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
    base: float = 10_000.0  # of the rotary frequencies
    scaling: Mapping = FrozenDict()  # and their stretching, see nn/position.py
    tied: bool = False  # logits by the table of the tokens
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

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
        """The most positions of a prompt with its continuation."""
        return self.text_length

    def enter(self, text: jax.Array) -> jax.Array:
        """Embeddings `[b, n, d]` of ids, or as they are."""
        return text if jnp.issubdtype(text.dtype, jnp.floating) else self.tokens(text)

    def rotary(self, positions: jax.Array) -> Any:
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
        logits = self.tokens.attend(hidden) if self.tied else self.head(hidden)
        return shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    def forward(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.logits(self(text, mask))

    def score(self, tokens: jax.Array, cond: dict) -> jax.Array:
        """Hidden states `[b, n, d]` from which each of `tokens [b, n]` behind the prompt is predicted."""
        prompt, seen = self.enter(cond["text"]), cond["text_mask"]
        x = jnp.concatenate([prompt, self.enter(tokens[:, :-1])], 1)  # b l+n-1 d
        mask = jnp.pad(seen, ((0, 0), (0, tokens.shape[1] - 1)), constant_values=True)
        hidden = self(x, mask)
        return jnp.concatenate([last(hidden[:, : seen.shape[1]], seen)[:, None], hidden[:, seen.shape[1] :]], 1)

    def cached(self, cache: kv.Cache, text: jax.Array, seen: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Hidden states `[b, t, d]` of a chunk that continues the cache; `seen [b, t]`: which of it is real."""
        table = self.rotary(before(seen) + cache["valid"].sum(-1, keepdims=True))
        x, cache = self.blocks(self.enter(text), Mask("causal"), rotary=table, cache=kv.admit(cache, seen))
        return self.norm(x), kv.advance(cache, seen.shape[1])

    def prefill(self, cond: dict, length: int) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, v]` behind the last real token of a prompt, and a cache of `length` positions."""
        x, seen = self.enter(cond["text"]), cond["text_mask"]
        dtype = self.dtype if self.dtype == "bfloat16" else x.dtype
        heads = self.kv_heads or self.heads, self.key_width
        cache = kv.empty(self.depth, x.shape[0], length, *heads, dtype, unstacked=layers_are_unstacked(self.unroll))
        hidden, cache = self.cached(cache, x, seen)
        return self.logits(last(hidden, seen)), cache

    def step(self, cache: kv.Cache, chunk: jax.Array, seen: jax.Array | None = None) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, t, v]` behind each position of a chunk, and the cache."""
        seen = jnp.ones(chunk.shape[:2], bool) if seen is None else seen
        hidden, cache = self.cached(cache, chunk, seen)
        return self.logits(hidden), cache


def before(mask: jax.Array) -> jax.Array:
    """How many real tokens are before each, `[b, n]`."""
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


def conditioning(model: LM, batch: dict, parts: Any) -> dict:
    """The prompt among the entries of a batch."""
    del model, parts
    return {name: batch[name] for name in ("text", "text_mask")}


def loss(
    model: LM, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Cross-entropy in nats of each real token behind a real one, given all before it."""
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
    """Hidden states `[b, l, d]` behind the last norm, and the mask of the positions that mean something."""
    del extra
    seen = jnp.ones(text.shape[:2], bool) if mask is None else mask
    return model.apply({"params": params}, text, mask), seen


def score(model: LM, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Teacher-forced logits `[b, n, v]`: row i predicts token i behind the prompt."""
    return model.apply({"params": params}, features(model, params, extra, tokens, cond), method="logits")


def features(model: LM, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Hidden states `[b, n, d]` from which each token behind the prompt is predicted."""
    del extra
    return model.apply({"params": params}, tokens, cond, method="score")


def prefill(model: LM, params: Any, extra: Any, cond: dict, length: int = 0) -> tuple[jax.Array, kv.Cache]:
    """(logits of the first token behind the prompt `[b, v]`, cache of `length` positions, or the model's)."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cond, length or model.length, method="prefill")


def step(
    model: LM, params: Any, extra: Any, cache: kv.Cache, chunk: jax.Array, seen: jax.Array | None = None
) -> tuple[jax.Array, kv.Cache]:
    """(logits `[b, t, v]`, cache) after a chunk of ids `[b, t]` or embeddings; `seen [b, t]`: which of it is real."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cache, chunk, seen, method="step")


def generate(
    model: LM, params: Any, extra: Any, cond: dict, keys: jax.Array, options: dict
) -> tuple[jax.Array, jax.Array]:
    """Draws `options["steps"]` tokens (or the model's length) behind the prompt, with their log-probabilities.

    options: also "temperature", "top_k", "top_p".
    """
    count = options.get("steps", model.length)
    params = unstack_layers(
        cast_for_inference(params, model.dtype, options.get("gather", 1)), model.unroll
    )  # outside of the loop
    prompt = cond["text"].shape[1]
    logits, cache = prefill(model, params, extra, cond, prompt + decode.parts(count)[0])

    def grow(cache: kv.Cache, drawn: int) -> kv.Cache:
        return kv.grown(cache, prompt + drawn)

    def one(cache: kv.Cache, token: jax.Array) -> tuple[jax.Array, kv.Cache]:
        logits, cache = step(model, params, extra, cache, token[:, None])
        return logits[:, 0], cache

    draw = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    return decode.generate(one, cache, logits, keys, length=count, grow=grow, **draw)


def sample(
    model: LM, params: Any, cond: dict, keys: jax.Array, *, parts: Any, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Continuations of prompts."""
    text, logprob = generate(model, params, extra, conditioning(model, cond, parts), keys, options.get("prior", {}))
    return {"text": text, "logprob": logprob}
