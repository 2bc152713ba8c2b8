"""Draws a token from logits: temperature, then top-k, then top-p (the order of Hugging Face's warpers), then a sample.

Shape letters: B rows, v vocabulary.

Filters keep tokens by *value*: every logit of at least a threshold is kept, including ties, so the result does not
depend on the order of the vocabulary. Thresholds are found exactly and without a sort, by bisection over the 32 bits of
a float: 32 passes over the logits, about ten times faster than sorting on a CPU. A filter that is off by a Python
number (top_k 0, top_p 1) is not compiled; options may also be traced.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError


def _static(value):
    return isinstance(value, (int, float, np.number))


def filter_logits(
    logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    """logits: B v -> B v float32, divided by temperature, -inf for tokens that are filtered out.

    temperature: 0 is greedy (0 at the first maximum, -inf elsewhere). top_k: keeps the k largest; 0 is off. top_p:
    keeps the smallest set of most likely tokens whose mass, after temperature and top-k, reaches top_p; 1 is off; at
    least one token is kept. Raises UserError if an option that is a Python number is out of range.
    """
    _check(temperature=(temperature, 0, np.inf), top_k=(top_k, 0, np.inf), top_p=(top_p, 0, 1))
    logits = logits.astype(jnp.float32)  # B v
    if _static(temperature):
        return _greedy(logits) if temperature == 0 else _keep_top(logits / temperature, top_k, top_p)
    cold = temperature == 0
    warm = _keep_top(logits / jnp.where(cold, 1.0, temperature), top_k, top_p)
    return jnp.where(cold, _greedy(logits), warm)


def _check(**options):
    for name, (value, low, high) in options.items():
        if _static(value) and not low <= value <= high:
            raise UserError(f"{name} {value} is not within {low} and {high}")


def _greedy(logits):
    best = jnp.argmax(logits, axis=-1, keepdims=True)  # B 1
    return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf).astype(logits.dtype)


def _keep_top(logits, top_k, top_p):
    if not (_static(top_k) and not 0 < top_k < logits.shape[-1]):
        logits = _keep(logits, _kth_largest(logits, top_k), top_k > 0)
    if not (_static(top_p) and top_p >= 1):
        logits = _keep(logits, _nucleus_edge(logits, top_p), top_p < 1)
    return logits


def _keep(logits, floor, on):
    return jnp.where((logits >= floor) | jnp.logical_not(on), logits, -jnp.inf)


def _kth_largest(logits, k):
    """The k-th largest logit of each row, counting ties. logits: B v; k: int, may be traced -> B 1."""
    return _largest(logits, lambda above: jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32) >= k)


def _nucleus_edge(logits, top_p):
    """The least likely logit that top_p keeps. logits: B v -> B 1.

    A token is kept if the strictly more likely ones have a mass below top_p, so the edge is the largest logit such that
    it and all larger ones have a mass of at least top_p.
    """
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # B v
    enough = top_p * jnp.sum(mass, axis=-1, keepdims=True)  # B 1
    return _largest(logits, lambda above: jnp.sum(jnp.where(above, mass, 0), axis=-1, keepdims=True) >= enough)


def _largest(logits, holds):
    """The largest float such that `holds(logits >= it)`. logits: B v; holds: B v bool -> B 1 bool, monotone -> B 1.

    The bits of floats sort like integers if those of negative floats are flipped; the result is built bit by bit.
    """
    order = _flip(jax.lax.bitcast_convert_type(logits, jnp.int32))  # B v

    def try_bit(i, best):
        higher = best + (jnp.int32(1) << (30 - i))
        return jnp.where(holds(order >= higher), higher, best)

    best = jnp.where(holds(order >= 0), jnp.int32(0), jnp.iinfo(jnp.int32).min)  # B 1, the sign
    best = jax.lax.fori_loop(0, 31, try_bit, best)
    # if `holds` is true for every bound or for none (top_p 0, or a mass rounded below top_p): an extreme logit, not NaN
    best = jnp.clip(best, jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True))
    return jax.lax.bitcast_convert_type(_flip(best), jnp.float32)


def _flip(bits):
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p of tokens B under softmax(logits B v), without temperature and filters -> B float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]  # B
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def draw(
    keys: jax.Array,
    logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One token per row, each row from its own key. keys: B; logits: B v -> tokens B int32, logprobs B float32.

    Gumbel-max: a token changes only if two scores are nearly equal, so logits that differ by rounding (another batch
    size, a cache) almost always give the same tokens. The log-probability is that before temperature and filters.
    """
    score = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)  # B v
    if not (_static(temperature) and temperature == 0):
        score = score + jax.vmap(lambda key: jax.random.gumbel(key, score.shape[-1:], score.dtype))(keys)
    # On a CPU argmax would be fused with the random bits into a loop that is not vectorised, 2.5 times slower.
    tokens = jax.lax.platform_dependent(score, cpu=lambda s: jax.lax.top_k(s, 1)[1][..., 0], default=_argmax)
    tokens = tokens.astype(jnp.int32)  # B
    return tokens, logprob(logits, tokens)


def _argmax(score):
    return jnp.argmax(score, axis=-1).astype(jnp.int32)
