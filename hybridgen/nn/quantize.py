"""Quantisers as functions on arrays: finite scalar quantisation and vector quantisation, with straight-through
gradients.

FSQ (Mentzer et al. 2023) rounds each channel to one of a few levels: no codebook to learn. VQ (van den Oord et al.
2017) takes the nearest code, plain or on the unit sphere (Yu et al. 2021); its codebook learns by gradient or by moving
averages (Razavi et al. 2019), and codes that fall out of use are revived.

Letters: b batch, n tokens, d code width, v codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.nn.linear import lookup


def fsq_size(levels: tuple[int, ...]) -> int:
    """Number of codes of these levels."""
    return int(np.prod(levels))


def fsq_bound(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Squashes `z [..., d]` into the span of its levels, so that rounding gives exactly `levels[i]` values."""
    # an even number of levels is shifted by a half, so that rounding is symmetric (eq. 2 of the paper's appendix)
    half = (jnp.asarray(levels, z.dtype) - 1) * (1 - 1e-3) / 2
    offset = jnp.where(jnp.asarray(levels) % 2 == 0, 0.5, 0.0).astype(z.dtype)
    shift = jnp.arctanh(offset / half)
    return jnp.tanh(z + shift) * half - offset


def fsq(z: jax.Array, levels: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """`z [..., d] -> (codes [..., d] in [-1, 1] with a straight-through gradient, ids [...])`."""
    bound = fsq_bound(z, levels)
    rounded = bound + jax.lax.stop_gradient(jnp.round(bound) - bound)
    half = jnp.asarray([size // 2 for size in levels], z.dtype)
    basis = jnp.asarray(np.cumprod([1, *levels[:-1]]), jnp.int32)
    digits = jnp.round(jax.lax.stop_gradient(rounded) + half).astype(jnp.int32)  # ... d
    return rounded / half, (digits * basis).sum(-1)


def fsq_codes(ids: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Codes of `ids [...]`: `[..., d]` in [-1, 1]."""
    basis = jnp.asarray(np.cumprod([1, *levels[:-1]]), jnp.int32)
    digits = (ids[..., None] // basis) % jnp.asarray(levels)
    half = jnp.asarray([size // 2 for size in levels], jnp.float32)
    return (digits - half) / half


def fsq_entropy(z: jax.Array, levels: tuple[int, ...], temperature: float = 0.5) -> jax.Array:
    """Entropy in nats of the batch's use of all codes, by soft rounding: `z [n, d]` -> scalar in [0, log v].

    Each token is spread over neighbouring levels by distance; raising this entropy spreads tokens over the codebook
    (the diversity term of LFQ, Yu et al. 2023, on FSQ's product of levels).
    """
    bound = fsq_bound(z, levels)
    usage = jnp.ones((z.shape[0], 1), z.dtype)  # n, product of the levels so far
    for i, size in enumerate(levels[:-1]):
        usage = (usage[:, :, None] * _soft_digit(bound[:, i], size, temperature)[:, None, :]).reshape(z.shape[0], -1)
    last = _soft_digit(bound[:, -1], levels[-1], temperature)
    mean = jnp.einsum("nv,nl->vl", usage, last).reshape(-1) / z.shape[0]  # v
    return -(mean * jnp.log(mean + 1e-12)).sum()


def _soft_digit(x: jax.Array, size: int, temperature: float) -> jax.Array:
    centres = jnp.arange(size, dtype=x.dtype) - size // 2
    return jax.nn.softmax(-jnp.square(x[:, None] - centres) / temperature, -1)  # n level


def normalise(x: jax.Array) -> jax.Array:
    """Rows of `x [..., d]` on the unit sphere."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Ids `[...]` of the nearest rows of `codebook [v, d]` to `z [..., d]` by squared distance."""
    score = jnp.einsum("...d,vd->...v", z, codebook) - 0.5 * jnp.square(codebook).sum(-1)
    return jnp.argmax(score, -1).astype(jnp.int32)


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The value of `codes` with the gradient of `z`, of one shape."""
    return z + jax.lax.stop_gradient(codes - z)


def vq_sums(z: jax.Array, ids: jax.Array, size: int, candidates: int) -> dict[str, jax.Array]:
    """What the moving averages and the revival need of a batch: `z [n, d]`, `ids [n]`.

    Sums over tokens, so they add over microbatches and hosts. `pool` collects `candidates` encoder outputs, spread over
    the batch, for codes to be reborn at; `pool_count` says how many microbatches went into the sum.
    """
    onehot = jax.nn.one_hot(ids, size, dtype=z.dtype)  # n v
    stride = max(z.shape[0] // candidates, 1)
    pool = z[: stride * candidates : stride][jnp.arange(candidates) % min(candidates, z.shape[0])]
    return {
        "count": onehot.sum(0),
        "total": jnp.einsum("nv,nd->vd", onehot, z),
        "pool": pool,
        "pool_count": jnp.ones((), z.dtype),
    }


def vq_usage(count: jax.Array, sums: jax.Array, decay: float) -> jax.Array:
    """Moving average of how many tokens a step each code takes: `[v]`."""
    return decay * count + (1 - decay) * sums


def vq_moving(codebook: jax.Array, count: jax.Array, total: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Codebook from moving sums with Laplace smoothing (Razavi et al. 2019, eq. 3): `count [v]`, `total [v, d]`."""
    v = count.shape[0]
    mass = count.sum()
    smooth = (count + eps) / (mass + v * eps) * mass
    return jnp.where(count[:, None] > eps, total / smooth[:, None], codebook)


def perplexity(count: jax.Array) -> jax.Array:
    """exp(entropy) of code counts `[v]`."""
    p = count / jnp.maximum(count.sum(), 1)
    return jnp.exp(-(p * jnp.log(p + 1e-12)).sum())


def codes_of(ids: jax.Array, codebook: jax.Array) -> jax.Array:
    """Rows of `codebook [v, d]` by `ids [...]`: `[..., d]`."""
    return lookup(codebook, ids)
