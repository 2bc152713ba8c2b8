"""Attention on a TPU: the splash kernel that comes with JAX (block-sparse flash attention), fitted to our masks.

FlashAttention (Dao et al. 2022) never writes the t x s weights to memory, and splash leaves out the blocks that a mask
hides. It is taken from JAX itself: tokamax's TPU kernel descends from it, and would be one more dependency, of version
0.0. What it does not take is done here: any length (padded to a block of 128, the padding hidden), keys that are not
valid (as segments), rows that see no key (zero, also their gradient), and a mesh: XLA cannot divide a kernel by itself,
so it runs in shard_map, batch and heads divided as the table of activations says.

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

LANES = 128  # what lengths are padded to
BLOCK = 512  # the largest block of positions that one turn of the kernel works on


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

    `kind`, `prefix` and `offset` are those of attention.Mask; `seen [b, t]` says which rows see any key (None: all).
    Counted by hybridgen.cost.flops under the name of this function. interpret: run by the interpreter, on any device.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
        return _local(q, k, v, valid, visible(kind, prefix, offset, q.shape[1], k.shape[1]), interpret)

    out = _over_mesh(local, q, k, v, valid)
    # a row that sees no key is a mean over hidden ones; zero here, it also sends nothing back
    return out if seen is None else jnp.where(seen[:, :, None, None, None], out, 0)


def visible(kind: str, prefix: int, offset: int, t: int, s: int) -> np.ndarray:
    """Which keys a query sees `[t, s]`, padded to whole blocks: padded keys are hidden, padded queries see one."""
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
    # a kernel's results say nothing of the axes they vary along: not checked
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
