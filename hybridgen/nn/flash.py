"""Attention on a TPU: JAX's splash kernel (block-sparse flash attention), adapted to our masks.

FlashAttention (Dao et al. 2022) never writes the t x s weights to memory, and splash skips blocks that a mask hides. We
use JAX's kernel: tokamax's TPU kernel is derived from it and would be one more dependency, at version 0.0. This file
adds what the kernel does not support: any length (padded to a multiple of 128, with the padding hidden), invalid keys
(as segments), queries without visible keys (zeros, also in their gradient), and meshes: XLA cannot partition a kernel,
so it runs in shard_map, with batch and heads sharded as in the table of activations (core/sharding.py).

Letters: b batch, t query positions, s key positions, h key heads, g queries per key head, k head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from hybridgen.core.sharding import LOGICAL

LANES = 128  # lengths are padded to a multiple of this
BLOCK = 512  # the largest block of positions of one kernel iteration


@functools.partial(jax.jit, static_argnames=("kind", "prefix", "offset", "interpret"))
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    seen: jax.Array | None,
    *,
    kind: str,
    prefix: int,
    offset: int,
    interpret: bool = False,
) -> jax.Array:
    """`q [b, t, h, g, k]`, `k, v [b, s, h, k]`, `valid [b, s]` -> `[b, t, h, g, k]`.

    kind, prefix, offset: as in attention.Mask. seen `[b, t]`: True for queries with a visible key (None: all).
    interpret: runs in the interpreter, on any device. hybridgen.cost.flops counts FLOPs by this function's name.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
        return _local(q, k, v, valid, visible(kind, prefix, offset, q.shape[1], k.shape[1]), interpret)

    out = _over_mesh(local, q, k, v, valid)
    # a row without visible keys would be a mean over hidden ones: zero here, also in its gradient
    return out if seen is None else jnp.where(seen[:, :, None, None, None], out, 0)


def visible(kind: str, prefix: int, offset: int, t: int, s: int) -> np.ndarray:
    """Visible keys of each query `[t, s]`, padded to whole blocks: padded keys are hidden, padded queries see key 0."""
    query, key = offset + np.arange(t)[:, None], np.arange(s)[None]
    seen = np.ones((t, s), bool)
    if kind != "full":
        seen = key <= query
    if kind == "prefix":
        seen |= (key < prefix) & (query < prefix)
    out = np.pad(seen, ((0, -t % LANES), (0, -s % LANES)))
    out[t:, 0] = True
    return out


def _over_mesh(local: Any, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`local(q, k, v, valid)` on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, valid)

    def axes(name: str, size: int) -> tuple[str, ...] | None:
        return LOGICAL[name] if size % math.prod(mesh.shape[axis] for axis in LOGICAL[name]) == 0 else None

    rows, heads = axes("batch", q.shape[0]), axes("heads", q.shape[2])
    keys = PartitionSpec(rows, None, heads, None)
    queries = PartitionSpec(rows, None, heads, None, None)
    given = (queries, keys, keys, PartitionSpec(rows, None))
    # a kernel's results do not declare the mesh axes along which they vary, so that is not checked
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=queries, check_vma=False)(q, k, v, valid)


def _local(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, seen: np.ndarray, interpret: bool
) -> jax.Array:
    b, t, h, g, width = q.shape
    s, (rows, columns) = k.shape[1], seen.shape
    q = (q * width**-0.5).reshape(b, t, h * g, width).swapaxes(1, 2)  # b hg t k
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - t), (0, 0)))
    k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, columns - s), (0, 0))) for x in (k, v))  # b h s k
    over, under = _block(rows), _block(columns)
    blocks = splash.BlockSizes(
        block_q=over,
        block_kv=under,
        block_q_dkv=over,
        block_kv_dkv=under,
        block_q_dq=over,
        block_kv_dq=under,
    )
    one = splash.NumpyMask(seen)
    masks = splash.MultiHeadMask([one] * (h * g))
    kernel = splash.make_splash_mha(masks, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
    if valid is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        segments = splash.SegmentIds(
            q=jnp.ones((b, rows), jnp.int32),
            kv=jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, columns - s))),
        )
        out = jax.vmap(kernel)(q, k, v, segments)
    return out[:, :, :t].swapaxes(1, 2).reshape(b, t, h, g, width).astype(q.dtype)


def _block(length: int) -> int:
    """The largest block that divides a padded length."""
    return max(size for size in range(LANES, min(length, BLOCK) + 1, LANES) if length % size == 0)
