"""Autoregressive decoding over a cache: a `lax.scan` over positions, one token per step, optionally guided.

Shape letters: B pictures, R rows of the model (B, or 2B when guided), n positions, v vocabulary.

`step(cache, token R) -> logits R v, cache` is any callable; this file does not depend on models. With guidance, cache
and logits have the rows of both branches (see "Rows" in guidance.py), and both branches read the same token. Position i
draws from `fold_in(keys, i)`: a picture depends on its own key only.

Every step reads the whole cache. A long sequence is therefore drawn in parts, and the cache grows before each part: two
parts read 3/4 of the bytes that one part would read, four parts 5/8.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.sampling import guidance as guide
from hybridgen.sampling import tokens as tok

PART, PARTS = 128, 4  # least tokens of a part, and largest number of parts: each compiles a loop


def parts(length: int) -> tuple[int, ...]:
    """The number of tokens, of `length`, drawn by the end of each part."""
    count = min(max(length // PART, 1), PARTS)
    return tuple(length * (i + 1) // count for i in range(count))


def generate(
    step: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    cache: Any,
    logits: jax.Array,
    keys: jax.Array,
    *,
    length: int,
    grow: Callable[[Any, int], Any] | None = None,
    guidance: guide.Scale | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
    forced: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws `length` tokens with length - 1 steps: prefill gives the first logits, and the last token is not read.

    Args:
      step: (cache, token R int32) -> (logits R v, cache).
      cache: any pytree, as prefill returned it; with `grow`, it has room for `parts(length)[0]` tokens.
      logits: R v, of the first position.
      keys: B typed keys.
      grow: None, or (cache, n) -> the cache with room for n tokens.
      guidance: None, a scale, or a schedule over position / (length - 1). None or the Python number 1: R = B; else 2B.
      temperature, top_k, top_p: see `tokens.filter_logits`.
      forced: None or (tokens B n int32, mask B n bool): where the mask is True, the given token is used.
    Returns:
      tokens B n int32, logprobs B n float32 (of guided logits, before temperature and filters).
    Raises:
      UserError: the rows of logits do not match keys and guidance, or length is below 1.
    """
    guided = guide.is_on(guidance)
    batch = keys.shape[0]
    rows = batch * (2 if guided else 1)
    if logits.shape[0] != rows:
        raise UserError(f"logits have {logits.shape[0]} rows, but {batch} keys with guidance {guidance} need {rows}")
    if length < 1:
        raise UserError(f"length {length} is below 1")

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    choose = functools.partial(_choose, guidance, length - 1, options)

    def body(carry, inputs):
        cache, token = carry
        logits, cache = step(cache, guide.repeat(token, 2) if guided else token)
        token, logp = choose(logits, *inputs)
        return (cache, token), (token, logp)

    positions = jnp.arange(length, dtype=jnp.int32)
    folded = jax.vmap(lambda i: jax.vmap(jax.random.fold_in, (0, None))(keys, i))(positions)  # n B
    given = None if forced is None else tuple(jnp.moveaxis(jnp.asarray(a), 1, 0) for a in forced)  # n B each
    inputs = (positions, folded, given)
    token, logp = choose(logits, *jax.tree.map(lambda a: a[0], inputs))  # B, B
    drawn, at = [(token[None], logp[None])], 1
    for end in parts(length) if grow else (length,):
        cache = grow(cache, end) if grow else cache
        part = jax.tree.map(lambda a, span=slice(at, end): a[span], inputs)
        (cache, token), some = jax.lax.scan(body, (cache, token), part)  # end-at B each
        drawn, at = [*drawn, some], end
    return tuple(jnp.concatenate(each).T for each in zip(*drawn, strict=True))


def _choose(
    guidance: guide.Scale | None,
    last: int,
    options: Mapping[str, Any],
    logits: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    forced: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """The token B of a position and its log-probability B. last: the last position; logits: R v; keys: B."""
    if guide.is_on(guidance):
        scale = guide.at(guidance, position / max(last, 1))
        logits = guide.combine(*guide.split(logits, 2), scale)  # B v
    token, logp = tok.draw(keys, logits, **options)
    if forced is not None:
        token = jnp.where(forced[1], forced[0].astype(jnp.int32), token)
        logp = tok.logprob(logits, token)
    return token, logp
