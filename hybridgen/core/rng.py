"""Random numbers: one seed for a run, one key for a step and purpose, one key for a sample.

`key = fold_in(fold_in(seed, step), name)`: the training state contains no random state, so a resumed run draws the same
numbers as an uninterrupted one. Noise is drawn **per sample**, each row from its own key, so a row does not depend on
the other rows, the batch size or the sharding. Keys are new-style typed keys (`jax.random.key`).

Shape letters: b samples (one key each).
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def name_hash(name: str) -> np.uint32:
    """The hash of a name, the same in every process (unlike Python's `hash` of a str)."""
    return np.uint32(int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little"))


def step_key(seed: jax.Array, step: int | jax.Array, name: str) -> jax.Array:
    """The key of a step and a purpose. seed: typed key; step may be traced -> typed key."""
    return jax.random.fold_in(jax.random.fold_in(seed, step), name_hash(name))


def sample_keys(key: jax.Array, ids: jax.Array | np.ndarray) -> jax.Array:
    """One key a sample. key: typed key; ids: b integers (a batch's global `id`) -> keys b."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids).astype(jnp.uint32))


def fold_in(keys: jax.Array, data: int | np.integer | jax.Array) -> jax.Array:
    """The same integer folded into every key. keys: b; data may be traced -> keys b."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def named(keys: jax.Array, name: str) -> jax.Array:
    """Keys for one purpose, folded with its name. keys: b -> keys b.

    Two users of a picture's keys (a prior's tokens, a decoder's noise) need different names: both fold in step numbers,
    and so does `jax.random.split`: in JAX, `split(key)[i]` is `fold_in(key, i)`.
    """
    return fold_in(keys, name_hash(name))


def normal(keys: jax.Array, shape: tuple[int, ...] = (), dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal. keys: b; shape: of one sample -> b, *shape."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def uniform(
    keys: jax.Array,
    shape: tuple[int, ...] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
    minval: float | jax.Array = 0.0,
    maxval: float | jax.Array = 1.0,
) -> jax.Array:
    """Uniform in [minval, maxval). keys: b; shape: of one sample -> b, *shape."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, minval, maxval))(keys)


def bernoulli(keys: jax.Array, p: float | jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """True with probability p, one for all samples. keys: b; p: scalar -> b, *shape bool."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, p, shape))(keys)


def randint(keys: jax.Array, shape: tuple[int, ...], minval: int | jax.Array, maxval: int | jax.Array) -> jax.Array:
    """Integers in [minval, maxval). keys: b; shape: of one sample -> b, *shape int32."""
    return jax.vmap(lambda key: jax.random.randint(key, shape, minval, maxval))(keys)


def categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One draw from each softmax over the last axis. keys: b; logits: b ... v -> b ... int32."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
