"""Raster prior: a transformer that writes an image as tokens, row by row, after a text prefix or a class.

Llama-style blocks (RMSNorm, SwiGLU, rotary positions in the plane, optional qk-norm and grouped queries), as LlamaGen
(Sun et al. 2024). The sequence is `[text][start][tokens]`: `start` has the class and says whether the condition was
dropped (then the text is masked out), so that the unconditional model is the same program. `prefixed` names other
prefixes, those of official models (conditions.py); the options below it make LlamaGen and the GPT of VQGAN (Esser et
al. 2021) exactly.

cond: {"text" b l int, "text_mask" b l bool} and/or {"label" b int}, and optionally "drop" b bool; of other prefixes
{"text_features" b l c, "text_features_mask" b l bool} or {"cond_tokens" b l int}.

Letters: b batch, l text positions, p prefix positions, n image tokens, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.core.sharding import shard
from hybridgen.models.ar import conditions
from hybridgen.models.contract import Parts, Shape, need
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.models.text.transformer import TextTower, round_up
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import Block, dropout
from hybridgen.nn.linear import Embed, Linear, cast_for_inference, fan_in, zeros
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import grid_positions, rotary
from hybridgen.nn.stack import Stack, layers_are_unstacked, unstack_layers
from hybridgen.sampling import decode, guidance


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
    prefixed: str = "start"  # one of conditions.PREFIXES
    cond_length: int = 1  # condition tokens, of prefix "codes"
    null_length: int = 0  # positions of a dropped caption that there are, of which text_length are read; 0: those
    unmasked: int = 0  # positions that see each other in both directions, also those of tokens, as taming's n_unmasked
    own_seen: bool = False  # padding sees itself (LlamaGen's; of left-padded text nobody reads it)
    positions: str = "plane"  # "image": LlamaGen's, none in the prefix; "learned": a table
    places: int = 0  # rows of that table; 0: as many as there are positions
    rope_base: float = 10_000.0
    norm_kind: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    bias: bool = False
    dropout: float = 0.0  # of both branches of a block, in training
    token_dropout: float = 0.0  # of what enters the first block
    keep: float = 1.0  # share of input tokens kept in training; others are random ones (taming's pkeep)
    std: float = 0.0  # of kernels and tables at the start; 0: by fan-in
    zero_head: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width, self.dtype)
        if self.prefixed == "start":
            self.start = Embed(self.classes + 2, self.width, self.dtype)  # classes, given text, dropped
        elif self.prefixed == "class":
            self.start = Embed(self.classes + (self.drop > 0), self.width, self.dtype)  # classes, dropped
        elif self.prefixed == "caption":
            self.caption = conditions.Captions(self.null_length or self.text_length, self.width, self.dtype)
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
        if self.positions == "learned":
            self.position = Embed(self.places or self.prefix + self.length, self.width, self.dtype, zeros)
        block = {
            "heads": self.heads,
            "head_width": self.width // self.heads,
            "hidden": self.hidden or round_up(self.width * 8 / 3),
            "kv_heads": self.kv_heads,
            "qk_norm": self.qk_norm,
            "mlp": self.mlp,
            "norm": self.norm_kind,
            "norm_eps": self.norm_eps,
            "bias": self.bias,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        self.blocks = Stack(self.depth, Block, block, remat=self.remat, unroll=self.unroll)
        self.norm = Norm(self.norm_kind, self.norm_eps)
        self.head = Linear(self.vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def length(self) -> int:
        """Image tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Positions p - 1 before the one from which the first token is predicted."""
        if self.prefixed == "start":
            return self.text_length if self.text_vocab else 0
        return {"class": 1, "caption": self.text_length, "codes": self.cond_length}[self.prefixed] - 1

    @property
    def unconditional(self) -> bool:
        """Whether it knows a dropped condition, which guidance needs."""
        return self.prefixed in ("start", "caption") or (self.prefixed == "class" and self.drop > 0)

    def conditioning(self, cond: dict) -> tuple[jax.Array, jax.Array | None]:
        """Prefix as features `[b, p, d]`, and which positions of it are visible `[b, p]` (None: all)."""
        if self.prefixed == "codes":
            ids = cond["label"][:, None] if self.classes else cond["cond_tokens"]  # b p
            return self.tokens(ids), None
        given = {"class": "label", "caption": "text_features", "start": "text" if self.text_vocab else "label"}
        any_of = cond[given[self.prefixed]]
        drop = cond.get("drop", jnp.zeros(any_of.shape[:1], bool))  # b
        if self.prefixed == "caption":
            # where dropped the prompt's own padding stays hidden, as in official code
            return self.caption(any_of, drop), cond["text_features_mask"]
        kind = cond["label"] if self.classes else jnp.full(drop.shape, self.classes)
        null = self.classes + (self.prefixed == "start")
        start = self.start(jnp.where(drop, null, kind))[:, None]  # b 1 d
        if not self.text_vocab:
            return start, None
        mask = cond["text_mask"] & ~drop[:, None]  # b l
        text = self.text_project(self.text(cond["text"], mask))  # b l d
        return jnp.concatenate([text, start], 1), jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)

    def rotary(self) -> Any:
        head_width = self.width // self.heads
        if self.positions == "learned":
            return None
        if self.positions == "image":
            # LlamaGen fills up its table with zeros for cosine and sine: queries and keys of the prefix vanish
            table = rotary(grid_positions(*self.grid), head_width, self.rope_base)
            return tuple(jnp.pad(part, ((self.prefix + 1, 0), (0, 0))) for part in table)
        # the start position takes the last place on the text's diagonal
        return rotary(grid_positions(*self.grid, prefix=self.prefix + 1), head_width, self.rope_base)

    def mask(self, valid: jax.Array | None = None) -> Mask:
        square = self.unmasked or (self.prefix if self.prefix_mask else 0)
        return Mask("prefix" if square else "causal", square, valid, own=self.own_seen)

    def entered(self, x: jax.Array, at: jax.Array | int = 0, keys: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """`x [b, t, d]` from position `at` on as it enters the blocks, and its rotary table."""
        t, table = x.shape[1], self.rotary()
        if self.positions == "learned":
            x = x + self.position(at + jnp.arange(t))
        elif isinstance(at, int):
            table = tuple(part[:t] for part in table)
        else:
            table = tuple(jax.lax.dynamic_slice_in_dim(part, at, t) for part in table)
        return dropout(x, keys, "tokens", rate=self.token_dropout), table

    def __call__(self, tokens: jax.Array, cond: dict, keys: jax.Array | None = None) -> jax.Array:
        """Hidden states `[b, n, d]` from which token i is predicted; `tokens [b, n]` (the last is not read).

        `keys [b]`: of the dropout.
        """
        prefix, seen = self.conditioning(cond)
        x = jnp.concatenate([prefix, self.tokens(tokens[:, :-1])], 1)  # b p+n-1 d
        valid = seen  # without what hides keys, kernels have less to do
        if seen is not None:
            valid = jnp.pad(seen, ((0, 0), (0, x.shape[1] - seen.shape[1])), constant_values=True)
        x, table = self.entered(x, keys=keys)
        x, _ = self.blocks(x, self.mask(valid), rotary=table, keys=keys)
        return self.norm(x[:, self.prefix :])

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = self.head(hidden)
        return shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    def forward(self, tokens: jax.Array, cond: dict, keys: jax.Array | None = None) -> jax.Array:
        return self.logits(self(tokens, cond, keys))

    def cached(self, cache: kv.Cache, x: jax.Array, seen: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Hidden states `[b, t, d]` of a chunk `x [b, t, d]` that continues the cache."""
        x, table = self.entered(x, cache["index"])
        cache = kv.admit(cache, seen)
        x, cache = self.blocks(x, self.mask(), rotary=table, cache=cache)
        return self.norm(x), kv.advance(cache, seen.shape[1])

    def prefill(self, cond: dict, room: int) -> tuple[jax.Array, kv.Cache]:
        """Logits of the first token `[b, v]`, and the cache, with room for so many tokens."""
        prefix, seen = self.conditioning(cond)
        heads = self.kv_heads or self.heads, self.width // self.heads
        dtype = self.dtype if self.dtype == "bfloat16" else prefix.dtype
        length = self.prefix + room
        cache = kv.empty(
            self.depth, prefix.shape[0], length, *heads, dtype, unstacked=layers_are_unstacked(self.unroll)
        )
        hidden, cache = self.cached(cache, prefix, jnp.ones(prefix.shape[:2], bool) if seen is None else seen)
        return self.logits(hidden[:, -1]), cache

    def step(self, cache: kv.Cache, chunk: jax.Array) -> tuple[jax.Array, kv.Cache]:
        """Logits `[b, t, v]` after each token of `chunk [b, t]`, and the cache."""
        hidden, cache = self.cached(cache, self.tokens(chunk), jnp.ones(chunk.shape, bool))
        return self.logits(hidden), cache


def build(config: Any) -> Raster:
    model = Raster(**config)
    known = {"prefixed": conditions.PREFIXES, "positions": ("plane", "image", "learned")}
    for name, kinds in known.items():
        if getattr(model, name) not in kinds:
            raise UserError(f"{name} {getattr(model, name)!r} is not one of {', '.join(map(repr, kinds))}")
    if model.prefixed == "class" and not model.classes:
        raise UserError("a prefix of a class needs 'classes', which is 0")
    if model.places and model.places < model.prefix + model.length:
        raise UserError(f"{model.prefix + model.length} positions do not fit a table of {model.places}")
    return model


def for_shape(model: Raster, shape: Shape, parts: Parts) -> Raster:
    """The model for pictures of `shape`, on the same arrays: its grid is the tokenizer's."""
    del shape
    if model.positions == "learned":
        raise UserError("model.positions 'learned' is a table of one grid, 'plane' and 'image' are not")
    return model.clone(grid=need(parts, "tokenizer", "a prior on pictures of several shapes").model.grid)


def init(model: Raster, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del specs, parts
    tokens = jnp.zeros((1, model.length), jnp.int32)
    params = model.init(key, tokens, conditions.example(model), method="forward")["params"]
    return {"params": conditions.redrawn(params, key, model.std, model.zero_head) if model.std else params, "extra": {}}


def conditioning(model: Raster, batch: dict, parts: Any) -> dict:
    """The entries of a batch that this prior is conditioned on; of a caption, its features by the part "text"."""
    return conditions.conditioning(model, batch, parts)


def tokens_of(batch: dict, parts: Any) -> jax.Array:
    """Image tokens `[b, n]`: cached in the batch, or from the frozen tokenizer."""
    if "tokens" in batch:
        return batch["tokens"]
    return jax.lax.stop_gradient(need(parts, "tokenizer", "a prior on pictures").call("encode", batch["image"]))


def loss(
    model: Raster, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy in nats a token."""
    del step, extra
    tokens = read = tokens_of(batch, parts)  # b n
    cond = conditioning(model, batch, parts)
    keys = rng.sample_keys(key, batch["id"]) if train else None  # b
    if train and model.drop and model.unconditional:
        cond["drop"] = rng.bernoulli(rng.named(keys, "drop"), model.drop)
    if train and model.keep < 1:
        kept = rng.bernoulli(rng.named(keys, "keep"), model.keep, tokens.shape[1:])  # b n
        read = jnp.where(kept, tokens, rng.randint(rng.named(keys, "random"), tokens.shape[1:], 0, model.vocab))
    logits = model.apply({"params": params}, read, cond, keys, method="forward")
    each = cross_entropy(logits, tokens)  # b n
    scalar, weight = weighted(each, rows(batch, each))
    # by the greatest logit and not its place, which the CPU backend looks for one by one: 2 ms of a step of 67
    best = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] >= logits.max(-1)  # b n
    accuracy, _ = weighted(best.astype(each.dtype), rows(batch, each))
    return scalar, {"metrics": {"nll": scalar, "accuracy": accuracy}, "weight": weight, "extra": {}}


def score(model: Raster, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Teacher-forced logits `[b, n, v]`: row i predicts token i."""
    del extra
    return model.apply({"params": params}, tokens, cond, method="forward")


def features(model: Raster, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Hidden states `[b, n, d]` from which each token is predicted."""
    del extra
    return model.apply({"params": params}, tokens, cond)


def prefill(model: Raster, params: Any, extra: Any, cond: dict, room: int | None = None) -> tuple[jax.Array, kv.Cache]:
    """(logits of the first token `[b, v]`, cache with room for `room` tokens, or all)."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cond, room or model.length, method="prefill")


def step(model: Raster, params: Any, extra: Any, cache: kv.Cache, chunk: jax.Array) -> tuple[jax.Array, kv.Cache]:
    """(logits `[b, t, v]`, cache) after `chunk [b, t]`."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cache, chunk, method="step")


def generate(
    model: Raster, params: Any, extra: Any, cond: dict, keys: jax.Array, options: dict
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens `[b, n]` with their log-probabilities: a prefill, then a scan over the cache, which grows in parts.

    options: "guidance" (number, or a schedule of sampling.guidance), "temperature", "top_k", "top_p",
    "gather" (0: weights that are divided over `fsdp` are sent anew for every token, for a model that fits no device).
    """
    scale = options.get("guidance", 1.0)
    if guidance.is_on(scale):
        if not model.unconditional:
            raise UserError(f"this prior knows no dropped condition: guidance must be 1, and is {scale}")
        cond = guidance.repeat(cond, 2)
        kept_rows = jnp.zeros(keys.shape[:1], bool)  # b
        cond = cond | {"drop": guidance.join([kept_rows, ~kept_rows])}
    params = unstack_layers(
        cast_for_inference(params, model.dtype, options.get("gather", 1)), model.unroll
    )  # outside of the loop
    logits, cache = prefill(model, params, extra, cond, decode.parts(model.length)[0])

    def grow(cache: kv.Cache, count: int) -> kv.Cache:
        return kv.grown(cache, model.prefix + count)

    def one(cache: kv.Cache, token: jax.Array) -> tuple[jax.Array, kv.Cache]:
        logits, cache = step(model, params, extra, cache, token[:, None])
        return logits[:, 0], cache

    draw = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    return decode.generate(one, cache, logits, keys, length=model.length, grow=grow, guidance=scale, **draw)


def sample(
    model: Raster, params: Any, cond: dict, keys: jax.Array, *, parts: Any, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Tokens (or those of `cond["tokens"]`), and the tokenizer's picture of them where there is a tokenizer."""
    if "tokens" in cond:
        out = {"tokens": cond["tokens"]}
    else:
        tokens, logprob = generate(
            model, params, extra, conditioning(model, cond, parts), keys, options.get("prior", {})
        )
        out = {"tokens": tokens, "logprob": logprob}
    if "tokenizer" in parts:
        codes = parts["tokenizer"].call("embed", out["tokens"])
        out["image"] = jnp.clip(parts["tokenizer"].call("decode", codes), -1, 1)
    return out
