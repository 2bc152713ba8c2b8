"""Gradient accumulation over parts of a batch."""

from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import sharding


def accumulate(weighted_loss: Any, trainable: Any, batch: dict, parts: int) -> tuple[Any, Any]:
    """Gradient and sums of `weighted_loss` over `parts` microbatches, each of every `parts`-th row."""
    gradient = jax.grad(weighted_loss, has_aux=True)
    if parts == 1:
        return gradient(trainable, batch)
    # strided, so that every device has rows of each microbatch
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    micro = jax.tree.map(lambda x: sharding.shard(x, None, "batch", *(None,) * (x.ndim - 2)), micro)
    first = jax.tree.map(lambda x: x[0], micro)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, trainable, first))

    def add(total: Any, batch: dict) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, batch)), None

    return jax.lax.scan(add, start, micro)[0]
