"""Losses: functions on arrays, in at least float32.

A loss returns one number per sample or token; `weighted` takes the mean, with weight 0 for masked samples.

Letters: b batch, n tokens, v vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-log p(target)` in nats: `logits [..., v]`, `targets [...] int` -> `[...]`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def per_sample(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first: `[b, ...] -> [b]`."""
    return x.reshape(x.shape[0], -1).mean(-1)


def weighted(values: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(weighted mean, sum of the weights); `values` and `weights` have the same shape."""
    if weights is None:
        return values.mean(), jnp.asarray(values.size, values.dtype)
    weights = weights.astype(values.dtype)
    total = weights.sum()
    return (values * weights).sum() / jnp.maximum(total, 1e-9), total


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """A discriminator's hinge loss per picture: logits of real and of generated pictures `[b, ...]` -> `[b]`."""
    return 0.5 * (per_sample(jax.nn.relu(1 - real)) + per_sample(jax.nn.relu(1 + fake)))


def attached(value: jax.Array, slopes: Any, leaves: Any) -> jax.Array:
    """`value`, whose gradient with respect to `leaves` is `slopes`, a tree of arrays of the same shapes."""
    still = jax.lax.stop_gradient
    each = jax.tree.map(lambda slope, leaf: (still(slope) * (leaf - still(leaf))).sum(), slopes, leaves)
    return still(value) + sum(jax.tree.leaves(each))


def rows(batch: dict, like: jax.Array) -> jax.Array | None:
    """The batch's `valid` (False for padding of a partial last batch), broadcast to the shape of `like [b, ...]`."""
    if "valid" not in batch:
        return None
    valid = batch["valid"].reshape(-1, *(1,) * (like.ndim - 1))
    return jnp.broadcast_to(valid, like.shape)
