"""The KV cache: a pytree that takes chunks of any length (prefill, one token, a whole scale, a speculative draft).

`{"k", "v": [layers, b, s, h*k], "valid": [b, s] bool, "index": int32 scalar}`; heads and head width are stored as one
axis (a head of 64 alone would be padded to 128 on a TPU). It is carried through the layer scan and written at
(layer, position): as scanned input and output it would exist twice.

Letters: b batch, s cached positions, t new positions, h heads, k head width.
"""

import jax
import jax.numpy as jnp

from hybridgen.sharding import shard

Cache = dict[str, jax.Array]


def empty(layers: int, b: int, length: int, width: int, dtype: str = "float32") -> Cache:
    """A cache of `length` positions; `width` is kv heads x head width."""
    return {
        "k": jnp.zeros((layers, b, length, width), dtype),
        "v": jnp.zeros((layers, b, length, width), dtype),
        "valid": jnp.zeros((b, length), bool),
        "index": jnp.zeros((), jnp.int32),
    }


def write(cache: Cache, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
    """Stores `k, v [b, t, h, k]` of one layer at the cache's index; returns the cache and all keys and values of it."""
    b, t, h, width = k.shape
    new = dict(cache)
    out = []
    start = [jnp.asarray(place, jnp.int32) for place in (layer, 0, cache["index"], 0)]  # all of one type
    for name, chunk in (("k", k), ("v", v)):
        chunk = chunk.reshape(1, b, t, h * width).astype(cache[name].dtype)
        grown = jax.lax.dynamic_update_slice(cache[name], chunk, start)
        new[name] = shard(grown, None, "batch", None, "heads")
        rows = jax.lax.dynamic_index_in_dim(new[name], layer, 0, keepdims=False)  # b s hk
        out.append(rows.reshape(b, rows.shape[1], h, width))
    return new, out[0], out[1]


def admit(cache: Cache, valid: jax.Array) -> Cache:
    """Marks the next `valid.shape[1]` positions as visible where `valid [b, t]`; once per chunk, before the layers."""
    return cache | {"valid": jax.lax.dynamic_update_slice_in_dim(cache["valid"], valid, cache["index"], axis=1)}


def advance(cache: Cache, t: int) -> Cache:
    """Moves the write position on by a chunk of `t`; once per chunk, after the layers."""
    return cache | {"index": cache["index"] + t}
