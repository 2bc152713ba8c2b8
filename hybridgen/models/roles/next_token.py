"""Functions shared by next-token priors: families that predict a sequence token by token with a KV cache.

A family takes `prefill, step, score, features, generate` from here and declares `OPTIONS = {"prior": OPTIONS}`. Its
module has the fields `depth`, `unroll` (1 if it has no stack) and `dtype`, and

    width                          width of the hidden states
    length                         number of tokens of a picture, or largest number of positions of a text
    cond_drop_prob                 probability of dropping a condition in training
    has_unconditional              whether it supports a dropped condition, which guidance needs
    cache_heads                    (key heads, head width) of its cache
    features(tokens, cond, keys)   hidden states `[b, n, d]` from which each of `tokens [b, n]` is predicted
    prefill(cond, room)            logits `[b, v]` of the first token, and a cache with room for `room` tokens
    step(cache, chunk, valid)      logits `[b, t, v]` after each position of a chunk, and the cache
    grow(cache, more)              the cache with room for `more` tokens in addition
    logits(hidden)                 `[b, t, d] -> [b, t, v]`

The cache is any pytree whose arrays do not depend on other rows, with a row per image; a network whose state has a
fixed size, such as a recurrent one, ignores `room` and returns the cache from `grow` as it is.

If the sequence is `[prefix][tokens]`, the last five may be `hidden_states`, `start_cache`, `extend_cache`, `grow_cache`
and `head_logits`, which need a module with

    prefix                         positions p - 1 before the one from which the first token is predicted
    embed_condition(cond)          the prefix `[b, p, d]`, and its visible positions `[b, p]` (None: all)
    embed_positions(x, at, keys)   the blocks' input for `x [b, t, d]` at positions from `at` on, and its rotary table
    mask(valid)                    the attention mask
    tokens, blocks, norm, head     token embedding, stack of layers, last norm, linear layer to logits

Letters: b batch, p prefix positions, n tokens, t positions of a chunk, d width, v vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core import entries, rng
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import count
from hybridgen.core.sharding import shard
from hybridgen.models.contract import Option, Parts, Shape, need
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.nn import cache as kv
from hybridgen.nn.linear import cast_for_inference
from hybridgen.nn.position import Rotary
from hybridgen.nn.stack import layers_are_unstacked, unstack_layers
from hybridgen.sampling import decode, guidance

DRAW = ("temperature", "top_k", "top_p")
TEXT_OPTIONS = {
    "temperature": Option(1.0, "sampling temperature (0: greedy)", 0.0, 100.0, off=0),
    "top_k": Option(0, "keep the k most likely tokens (0: all)", 0, 1_000_000, off=0),
    "top_p": Option(1.0, "keep the most likely tokens up to this probability mass (1: all)", 1e-6, 1.0, off=1),
    "gather": Option(1, "gather parameters once before the loop (1) or in every step (0)", 0, 1),
}
OPTIONS = {
    "guidance": Option(1.0, "classifier-free guidance scale of the prior (1: none)", 0.0, 100.0, off=1),
    "guidance_schedule": Option("constant", "schedule of guidance over the tokens", choices=tuple(guidance.RAMPS)),
    "guidance_until": Option(1.0, "share of the tokens to guide, from the first on", 0.0, 1.0),
    **TEXT_OPTIONS,
}
RANGES = entries.TRANSFORMER | entries.CLASSES
RANGES |= {
    "vocab": count(1, 2**24),
    "grid": count(1, 2**16, least=2, most=2, alone=False),
    "kv_heads": count(1, 2**14, none=True),
}


# ---------------------------------------------------------------- on a bound module


def hidden_states(module: nn.Module, tokens: jax.Array, cond: dict, keys: jax.Array | None = None) -> jax.Array:
    """Hidden states `[b, n, d]`, from row i of which token i is predicted, without a cache; the last token is not read.

    keys `[b]`: dropout keys.
    """
    prefix, valid = module.embed_condition(cond)
    x = jnp.concatenate([prefix, module.tokens(tokens[:, :-1])], 1)  # b p+n-1 d
    if valid is not None:  # kernels are faster without a mask of valid keys
        valid = jnp.pad(valid, ((0, 0), (0, x.shape[1] - valid.shape[1])), constant_values=True)
    x, table = module.embed_positions(x, keys=keys)
    x, _ = module.blocks(x, module.mask(valid), rotary=table, keys=keys)
    return module.norm(x[:, module.prefix :])


def start_cache(module: nn.Module, cond: dict, room: int) -> tuple[jax.Array, kv.Cache]:
    """Logits of the first token `[b, v]`, and a cache of the prefix with room for `room` tokens."""
    prefix, valid = module.embed_condition(cond)
    cache = empty_cache(module, prefix, module.prefix + room)
    hidden, cache = _cached(module, cache, prefix, jnp.ones(prefix.shape[:2], bool) if valid is None else valid)
    return module.logits(hidden[:, -1]), cache


def extend_cache(
    module: nn.Module, cache: kv.Cache, chunk: jax.Array, valid: jax.Array | None = None
) -> tuple[jax.Array, kv.Cache]:
    """Logits `[b, t, v]` after each token of `chunk [b, t]`, and the cache; `valid [b, t]`: visible to later tokens."""
    x = module.tokens(chunk)
    hidden, cache = _cached(module, cache, x, jnp.ones(chunk.shape, bool) if valid is None else valid)
    return module.logits(hidden), cache


def grow_cache(module: nn.Module, cache: kv.Cache, more: int) -> kv.Cache:
    """The cache with room for `more` tokens in addition."""
    del module
    return kv.grown(cache, cache["valid"].shape[1] + more)


def _cached(module: nn.Module, cache: kv.Cache, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, kv.Cache]:
    """Hidden states `[b, t, d]` of a chunk `x [b, t, d]` that continues the cache."""
    x, table = module.embed_positions(x, cache["index"])
    cache = kv.admit(cache, valid)
    x, cache = module.blocks(x, module.mask(), rotary=table, cache=cache)
    return module.norm(x), kv.advance(cache, valid.shape[1])


def empty_cache(module: nn.Module, like: jax.Array, length: int) -> kv.Cache:
    """A cache of `length` positions for the rows of `like [b, ...]`."""
    dtype = module.dtype if module.dtype == "bfloat16" else like.dtype
    unstacked = layers_are_unstacked(module.unroll)
    return kv.empty(module.depth, like.shape[0], length, *module.cache_heads, dtype, unstacked=unstacked)


def table_rows(table: Rotary, at: jax.Array | int, t: int) -> Rotary:
    """The `t` rows of a rotary table from position `at` on; with a cache, `at` is traced."""
    if isinstance(at, int):
        return tuple(part[at : at + t] for part in table)
    return tuple(jax.lax.dynamic_slice_in_dim(part, at, t) for part in table)


def shard_logits(logits: jax.Array) -> jax.Array:
    """Logits `[b, ..., v]`, sharded over rows and vocabulary."""
    return shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")


def head_logits(module: nn.Module, hidden: jax.Array) -> jax.Array:
    """Logits `[b, t, v]` of hidden states `[b, t, d]`."""
    return shard_logits(module.head(hidden))


def forward(module: nn.Module, tokens: jax.Array, cond: dict, **options: Any) -> jax.Array:
    """Teacher-forced logits `[b, n, v]`; options: those of `features`."""
    return module.logits(module.features(tokens, cond, **options))


# ---------------------------------------------------------------- functions of the role


def score(model: nn.Module, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Teacher-forced logits `[b, n, v]`: row i predicts token i."""
    del extra
    return model.apply({"params": params}, tokens, cond, method=forward)


def features(model: nn.Module, params: Any, extra: Any, tokens: jax.Array, cond: dict) -> jax.Array:
    """Hidden states `[b, n, d]` from which each token is predicted."""
    del extra
    return model.apply({"params": params}, tokens, cond, method="features")


def prefill(model: nn.Module, params: Any, extra: Any, cond: dict, room: int | None = None) -> tuple[jax.Array, Any]:
    """(logits of the first token `[b, v]`, cache with room for `room` tokens; None: `model.length`)."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cond, room or model.length, method="prefill")


def step(
    model: nn.Module, params: Any, extra: Any, cache: Any, chunk: jax.Array, valid: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """(logits `[b, t, v]`, cache) after `chunk [b, t]`; `valid [b, t]`: visible to later tokens (None: all)."""
    del extra
    return model.apply({"params": unstack_layers(params, model.unroll)}, cache, chunk, valid, method="step")


def generate(
    model: nn.Module, params: Any, extra: Any, cond: dict, keys: jax.Array, options: dict
) -> tuple[jax.Array, jax.Array]:
    """Samples tokens `[b, n]` with their log-probabilities: a prefill, then scans with a cache that grows in parts.

    options: those of `OPTIONS`; "guidance" is a number or a schedule of sampling.guidance; "steps": number of tokens
    (0: `model.length`). Raises UserError for guidance of a model that does not support a dropped condition.
    """
    scale = options.get("guidance", 1.0)
    if guidance.is_on(scale):
        if not model.has_unconditional:
            raise UserError("guidance must be 1 (off): this prior has no unconditional mode")
        cond = with_unconditional_rows(cond, keys.shape[0])
    # outside the loop
    params = unstack_layers(cast_for_inference(params, model.dtype, options.get("gather", 1)), model.unroll)
    count = options.get("steps", 0) or model.length
    room = decode.parts(count)[0]
    logits, cache = prefill(model, params, extra, cond, room)

    ends = decode.parts(count)
    more = dict(zip(ends, np.diff((room, *ends)).tolist(), strict=True))  # what each part adds to the room

    def grow(cache: Any, end: int) -> Any:
        return model.apply({"params": params}, cache, more[end], method="grow")

    def one(cache: Any, token: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = step(model, params, extra, cache, token[:, None])
        return logits[:, 0], cache

    draw = {name: options[name] for name in DRAW if name in options}
    return decode.generate(one, cache, logits, keys, length=count, grow=grow, guidance=scale, **draw)


def with_unconditional_rows(cond: dict, b: int) -> dict:
    """The condition of `b` pictures, each followed by a row in which it is dropped, as guidance needs it."""
    cond = guidance.repeat(cond, 2)
    kept = jnp.zeros((b,), bool)
    return cond | {"drop": guidance.join([kept, ~kept])}


def for_shape(model: nn.Module, shape: Shape, parts: Parts) -> nn.Module:
    """The model for pictures of `shape`, with the same arrays: its grid is the tokenizer's."""
    del shape
    return model.clone(grid=need(parts, "tokenizer", "a prior on pictures of several shapes").model.grid)


# ---------------------------------------------------------------- training and drawing, for the family's own functions


def tokens_of(batch: dict, parts: Parts) -> jax.Array:
    """Image tokens `[b, n]`: cached in the batch, or from the frozen tokenizer."""
    if "tokens" in batch:
        return batch["tokens"]
    return jax.lax.stop_gradient(need(parts, "tokenizer", "a prior on pictures").call("encode", batch["image"]))


def drop_condition(model: nn.Module, cond: dict, keys: jax.Array) -> dict:
    """The condition, dropped with probability `cond_drop_prob` in each row; `keys [b]`: one per sample."""
    if not model.cond_drop_prob:
        return cond
    return cond | {"drop": rng.bernoulli(rng.named(keys, "drop"), model.cond_drop_prob)}


def token_loss(
    model: nn.Module,
    params: Any,
    batch: dict,
    tokens: jax.Array,
    cond: dict,
    keys: jax.Array | None = None,
    inputs: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy of `tokens [b, n]` in nats per token, and the aux of a family's loss.

    keys: dropout keys, in training. inputs: the tokens to read, if they differ, such as corrupted ones `[b, n]`.
    """
    inputs = tokens if inputs is None else inputs
    logits = model.apply({"params": params}, inputs, cond, keys=keys, method=forward)
    each = cross_entropy(logits, tokens)  # b n
    scalar, weight = weighted(each, rows(batch, each))
    # compares with the largest logit instead of argmax, which is slow on the CPU backend: 2 ms of a 67 ms step
    best = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] >= logits.max(-1)  # b n
    accuracy, _ = weighted(best.astype(each.dtype), rows(batch, each))
    return scalar, {"metrics": {"nll": scalar, "accuracy": accuracy}, "weight": weight, "extra": {}}


def sample_image(
    model: nn.Module, params: Any, extra: Any, cond: dict, keys: jax.Array, parts: Parts, options: dict
) -> dict[str, jax.Array]:
    """Tokens (drawn, or `cond["tokens"]`), and their picture if there is a tokenizer."""
    if "tokens" in cond:
        out = {"tokens": cond["tokens"]}
    else:
        tokens, logprob = generate(model, params, extra, cond, keys, options.get("prior", {}))
        out = {"tokens": tokens, "logprob": logprob}
    if "tokenizer" in parts:
        codes = parts["tokenizer"].call("embed", out["tokens"])
        out["image"] = jnp.clip(parts["tokenizer"].call("decode", codes), -1, 1)
    return out


def redraw(params: Any, key: jax.Array, std: float) -> Any:
    """GPT's initialisation: kernels and tables are normal with deviation `std`; positions and norms are unchanged."""

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        name = "/".join(part.key for part in path)
        if not name.endswith(("kernel", "table")) or name.startswith("position"):
            return leaf
        return std * jax.random.normal(rng.step_key(key, 0, name), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(start, params)
