"""Raster prior: a transformer that writes an image as tokens, row by row, after a text prefix or a class.

Llama-style blocks (RMSNorm, SwiGLU, rotary positions in the plane, optional qk-norm and grouped queries), as LlamaGen
(Sun et al. 2024). The sequence is [text][start][tokens]: `start` carries the class and says whether the condition was
dropped (then the text is masked out), so that the unconditional model is the same program.

cond: {"text" b l int, "text_mask" b l bool} and/or {"label" b int}, and optionally "drop" b bool.

Letters: b batch, l text positions, n image tokens, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen import rng
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.models.parts import need
from hybridgen.models.text.transformer import TextTower, round_up
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask
from hybridgen.nn.linear import Embed, Linear, fan_in
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import grid_positions, rotary
from hybridgen.nn.stack import Stack
from hybridgen.sampling import decode, guidance
from hybridgen.sharding import shard


class Raster(nn.Module):
    """`__call__` is the uncached forward; `prefill` and `step` run over a cache."""

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
    text_width: int = 0  # 0: the prior's
    classes: int = 0
    prefix_mask: bool = True  # text positions see each other in both directions
    drop: float = 0.1  # share of conditions dropped in training
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width, self.dtype)
        self.start = Embed(self.classes + 2, self.width, self.dtype)  # classes, given text, dropped
        if self.text_vocab:
            width = self.text_width or self.width
            self.text = TextTower(
                self.text_vocab,
                self.text_length,
                width,
                self.text_depth,
                heads=max(width // 64, 1),
                unroll=self.unroll,
                dtype=self.dtype,
            )
            self.text_project = Linear(self.width, dtype=self.dtype)
        block = {
            "heads": self.heads,
            "head_width": self.width // self.heads,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "kv_heads": self.kv_heads,
            "qk_norm": self.qk_norm,
            "dtype": self.dtype,
        }
        self.blocks = Stack(self.depth, tuple(block.items()), remat=self.remat, unroll=self.unroll)
        self.norm = Norm()
        self.head = Linear(self.vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def length(self) -> int:
        """Image tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Positions before the start position."""
        return self.text_length if self.text_vocab else 0

    def condition(self, cond: dict) -> tuple[jax.Array, jax.Array]:
        """Prefix and start as features `[b, l + 1, d]`, and which of them are visible `[b, l + 1]`."""
        any_of = cond["text"] if self.text_vocab else cond["label"]
        drop = cond.get("drop", jnp.zeros(any_of.shape[:1], bool))  # b
        kind = cond["label"] if self.classes else jnp.full(drop.shape, self.classes)
        start = self.start(jnp.where(drop, self.classes + 1, kind))[:, None]  # b 1 d
        seen = jnp.ones((drop.shape[0], 1), bool)
        if not self.text_vocab:
            return start, seen
        mask = cond["text_mask"] & ~drop[:, None]  # b l
        text = self.text_project(self.text(cond["text"], mask))  # b l d
        return jnp.concatenate([text, start], 1), jnp.concatenate([mask, seen], 1)

    def rotary(self) -> Any:
        # the start position takes the last place on the text's diagonal
        return rotary(grid_positions(*self.grid, prefix=self.prefix + 1), self.width // self.heads)

    def mask(self, valid: jax.Array | None = None) -> Mask:
        return Mask("prefix" if self.prefix_mask and self.prefix else "causal", self.prefix, valid)

    def __call__(self, tokens: jax.Array, cond: dict) -> jax.Array:
        """Hidden states `[b, n, d]` from which token i is predicted; `tokens [b, n]` (the last is not read)."""
        prefix, seen = self.condition(cond)
        x = jnp.concatenate([prefix, self.tokens(tokens[:, :-1])], 1)  # b l+n d
        valid = jnp.pad(seen, ((0, 0), (0, x.shape[1] - seen.shape[1])), constant_values=True)
        cos, sin = self.rotary()
        x, _ = self.blocks(x, self.mask(valid), rotary=(cos[: x.shape[1]], sin[: x.shape[1]]))
        return self.norm(x[:, self.prefix :])

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = self.head(hidden)
        return shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    def forward(self, tokens: jax.Array, cond: dict) -> jax.Array:
        return self.logits(self(tokens, cond))

    def cached(self, cache: kv.Cache, x: jax.Array, seen: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Hidden states `[b, t, d]` of a chunk `x [b, t, d]` that continues the cache."""
        t = x.shape[1]
        cos, sin = (jax.lax.dynamic_slice_in_dim(table, cache["index"], t) for table in self.rotary())
        cache = kv.admit(cache, seen)
        x, cache = self.blocks(x, self.mask(), rotary=(cos, sin), cache=cache)
        return self.norm(x), kv.advance(cache, t)

    def prefill(self, cond: dict) -> tuple[jax.Array, kv.Cache]:
        """Logits of the first token `[b, v]`, and the cache."""
        prefix, seen = self.condition(cond)
        width = (self.kv_heads or self.heads) * (self.width // self.heads)
        dtype = self.dtype if self.dtype == "bfloat16" else prefix.dtype
        cache = kv.empty(self.depth, prefix.shape[0], self.prefix + self.length, width, dtype)
        hidden, cache = self.cached(cache, prefix, seen)
        return self.logits(hidden[:, -1]), cache

    def step(self, cache: kv.Cache, chunk: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, t, v]` after each token of `chunk [b, t]`, and the cache."""
        hidden, cache = self.cached(cache, self.tokens(chunk), jnp.ones(chunk.shape, bool))
        return self.logits(hidden), cache


def build(config: Any) -> Raster:
    return Raster(**config)


def init(model: Raster, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del specs, parts
    tokens = jnp.zeros((1, model.length), jnp.int32)
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.text_vocab:
        cond |= {"text": jnp.zeros((1, model.text_length), jnp.int32)}
        cond |= {"text_mask": jnp.ones((1, model.text_length), bool)}
    return {"params": model.init(key, tokens, cond, method="forward")["params"], "extra": {}}


def condition(model: Raster, batch: dict) -> dict:
    """The entries of a batch that this prior is conditioned on."""
    names = (("text", "text_mask") if model.text_vocab else ()) + (("label",) if model.classes else ())
    return {name: batch[name] for name in names}


def tokens_of(batch: dict, parts: Any) -> jax.Array:
    """Image tokens `[b, n]`: cached in the batch, or from the frozen tokenizer."""
    if "tokens" in batch:
        return batch["tokens"]
    return jax.lax.stop_gradient(need(parts, "tokenizer", "a prior on pictures").call("encode", batch["image"]))


def loss(
    model: Raster, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy in nats a token."""
    del step
    tokens = tokens_of(batch, parts)  # b n
    cond = condition(model, batch)
    if train and model.drop:
        keys = rng.sample_keys(key, batch["id"])
        cond["drop"] = rng.bernoulli(rng.named(keys, "drop"), model.drop)
    logits = score(model, params, extra, tokens, cond)
    each = cross_entropy(logits, tokens)  # b n
    scalar, weight = weighted(each, rows(batch, each))
    accuracy, _ = weighted((logits.argmax(-1) == tokens).astype(each.dtype), rows(batch, each))
    return scalar, {"metrics": {"nll": scalar, "accuracy": accuracy}, "weight": weight, "extra": {}}


def score(model: Raster, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Teacher-forced logits `[b, n, v]`: row i predicts token i."""
    del extra
    return model.apply({"params": params}, tokens, cond, method="forward")


def features(model: Raster, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Hidden states `[b, n, d]` from which each token is predicted."""
    del extra
    return model.apply({"params": params}, tokens, cond)


def prefill(model: Raster, params: Any, extra: Any, cond: dict) -> tuple[jax.Array, kv.Cache]:
    """(logits of the first token `[b, v]`, cache)."""
    del extra
    return model.apply({"params": params}, cond, method="prefill")


def step(model: Raster, params: Any, extra: Any, cache: kv.Cache, chunk: jax.Array) -> tuple[jax.Array, kv.Cache]:
    """(logits `[b, t, v]`, cache) after `chunk [b, t]`."""
    del extra
    return model.apply({"params": params}, cache, chunk, method="step")


def plan(
    model: Raster, params: Any, extra: Any, cond: dict, keys: jax.Array, options: dict
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens `[b, n]` with their log-probabilities; one prefill and one scan over the cache.

    options: "guidance" (number, or a schedule of sampling.guidance), "temperature", "top_k", "top_p".
    """
    scale = options.get("guidance", 1.0)
    if guidance.is_on(scale):
        cond = guidance.repeat(cond, 2)
        b = keys.shape[0]
        cond = cond | {"drop": jnp.arange(2 * b) >= b}
    logits, cache = prefill(model, params, extra, cond)

    def one(cache: kv.Cache, token: jax.Array) -> tuple[jax.Array, kv.Cache]:
        logits, cache = step(model, params, extra, cache, token[:, None])
        return logits[:, 0], cache

    draw = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    return decode.generate(one, cache, logits, keys, length=model.length, guidance=scale, **draw)


def sample(
    model: Raster, params: Any, cond: dict, keys: jax.Array, *, parts: Any, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Tokens (or those of `cond["tokens"]`), and the tokenizer's picture of them where there is a tokenizer."""
    if "tokens" in cond:
        out = {"tokens": cond["tokens"]}
    else:
        tokens, logprob = plan(model, params, extra, condition(model, cond), keys, options.get("prior", {}))
        out = {"tokens": tokens, "logprob": logprob}
    if "tokenizer" in parts:
        codes = parts["tokenizer"].call("embed", out["tokens"])
        out["image"] = jnp.clip(parts["tokenizer"].call("decode", codes), -1, 1)
    return out
