"""The KV cache: a pytree that takes chunks of any length (prefill, one token, a whole scale, a speculative draft).

`{"k", "v", "valid": [b, s] bool, "index": int32 scalar}`. For a scan over layers "k" and "v" are `[l, b, s, h*k]`: they
are carried through the scan and written at (layer, position), because as input and output of the scan they would exist
twice. For unstacked layers they are lists with one array per layer, which a step does not copy. Heads and head width
are stored as one axis (a TPU would pad a head width of 64 to 128); on a CPU, which does not pad, the arrays of
unstacked layers are `[b, h, s, k]`, the layout that attention reads.

Letters: l layers, b batch, s cached positions, t new positions, h heads, k head width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core.meshes import platform
from hybridgen.core.sharding import shard

Cache = dict[str, Any]


def empty(
    layers: int, b: int, length: int, heads: int, width: int, dtype: str = "float32", *, unstacked: bool = False
) -> Cache:
    """An empty cache of `length` positions, for `heads` key heads of `width`; unstacked: one array per layer."""
    shape = (b, heads, length, width) if unstacked and platform() == "cpu" else (b, length, heads * width)

    def made() -> Any:
        return [jnp.zeros(shape, dtype) for _ in range(layers)] if unstacked else jnp.zeros((layers, *shape), dtype)

    return {"k": made(), "v": made(), "valid": jnp.zeros((b, length), bool), "index": jnp.zeros((), jnp.int32)}


def grown(cache: Cache, length: int) -> Cache:
    """The cache, extended to `length` positions. Growing in parts avoids reading positions that are not used yet."""
    more = length - cache["valid"].shape[1]

    def longer(rows: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(rows, [(0, more if i == axis else 0) for i in range(rows.ndim)])

    def each(stored: Any) -> Any:
        if isinstance(stored, list):
            return [longer(rows, rows.ndim - 2) for rows in stored]  # b h s k, or b s hk
        return longer(stored, 2)

    valid = longer(cache["valid"], 1)
    return cache | {"k": each(cache["k"]), "v": each(cache["v"]), "valid": valid}


def write(cache: Cache, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
    """Stores `k, v [b, t, h, k]` of a layer at the cache's index -> (cache, all keys and all values of the layer)."""
    new = dict(cache)
    store = _store_unstacked if isinstance(cache["k"], list) else _stacked
    out = []
    for name, chunk in (("k", k), ("v", v)):
        new[name], rows = store(cache[name], layer, cache["index"], chunk)
        out.append(rows)
    return new, out[0], out[1]


def _stacked(
    stored: jax.Array, layer: jax.Array | int, index: jax.Array, chunk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    b, t, h, width = chunk.shape
    start = [jnp.asarray(place, jnp.int32) for place in (layer, 0, index, 0)]  # must have the same type
    stored = jax.lax.dynamic_update_slice(stored, chunk.reshape(1, b, t, h * width).astype(stored.dtype), start)
    stored = shard(stored, None, "batch", None, "heads")
    rows = jax.lax.dynamic_index_in_dim(stored, layer, 0, keepdims=False)  # b s hk
    return stored, rows.reshape(b, -1, h, width)


def _store_unstacked(stored: list, layer: int, index: jax.Array, chunk: jax.Array) -> tuple[list, jax.Array]:
    b, t, h, width = chunk.shape
    rows = stored[layer]
    if rows.ndim == 4:
        chunk = chunk.swapaxes(1, 2).astype(rows.dtype)  # b h t k
        rows = jax.lax.dynamic_update_slice_in_dim(rows, chunk, index, 2)
        rows = shard(rows, "batch", "heads", None, None)
        seen = rows.swapaxes(1, 2)
    else:
        chunk = chunk.reshape(b, t, h * width).astype(rows.dtype)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, chunk, index, 1)
        rows = shard(rows, "batch", None, "heads")
        seen = rows.reshape(b, -1, h, width)
    return [*stored[:layer], rows, *stored[layer + 1 :]], seen


def admit(cache: Cache, valid: jax.Array) -> Cache:
    """Marks the next `t` positions as visible where `valid [b, t]`; called once per chunk, before the layers."""
    return cache | {"valid": jax.lax.dynamic_update_slice_in_dim(cache["valid"], valid, cache["index"], axis=1)}


def advance(cache: Cache, t: int) -> Cache:
    """Advances the write position by `t`; called once per chunk, after the layers."""
    return cache | {"index": cache["index"] + t}
