"""Quantisers as functions on arrays: finite scalar, lookup-free and vector quantisation, with straight-through
gradients.

FSQ (Mentzer et al. 2023) rounds each channel to one of a few levels: no codebook to learn. LFQ (Yu et al. 2023,
MAGVIT-v2) keeps the sign of each channel, a bit of the code's number. VQ (van den Oord et al. 2017) takes the nearest
code, plain or on the unit sphere (Yu et al. 2021); its codebook learns by gradient or by moving averages (Razavi et al.
2019), and codes that fall out of use are revived. Gumbel (Jang et al. 2016) draws a code from logits.

Letters: b batch, n tokens, d code width, v codes, s slots of the pool of candidates.
"""

from collections.abc import Mapping

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
    margin = jnp.asarray([1 + 1e-3 if size == 2 else 1 - 1e-3 for size in levels], z.dtype)
    half = (jnp.asarray(levels, z.dtype) - 1) * margin / 2
    offset = jnp.where(jnp.asarray(levels) % 2 == 0, 0.5, 0.0).astype(z.dtype)
    # bound(0) = 0; of two levels, -1 and 0, that would be the very end of the tanh: there the sign of z decides
    shift = jnp.where(jnp.asarray(levels) == 2, 0.0, jnp.arctanh(offset / half)).astype(z.dtype)
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
    return _joint_entropy([_soft_digit(bound[:, i], size, temperature) for i, size in enumerate(levels)])


def _joint_entropy(digits: list[jax.Array]) -> jax.Array:
    """Entropy in nats of the mean over tokens of what independent digits `[n, level]` make together."""
    n = digits[0].shape[0]
    usage = jnp.ones((n, 1), digits[0].dtype)  # n, product of the levels so far
    for digit in digits[:-1]:
        usage = (usage[:, :, None] * digit[:, None, :]).reshape(n, -1)
    mean = jnp.einsum("nv,nl->vl", usage, digits[-1]).reshape(-1) / n  # v
    return -(mean * jnp.log(mean + 1e-12)).sum()


def _soft_digit(x: jax.Array, size: int, temperature: float) -> jax.Array:
    centres = jnp.arange(size, dtype=x.dtype) - size // 2
    return jax.nn.softmax(-jnp.square(x[:, None] - centres) / temperature, -1)  # n level


def lfq(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`z [..., d] -> (signs [..., d] with a straight-through gradient, ids [...])`; zero counts as minus."""
    bits = z > 0
    ids = (bits * _places(z.shape[-1])).sum(-1, dtype=jnp.int32)
    return straight_through(z, jnp.where(bits, 1.0, -1.0).astype(z.dtype)), ids


def lfq_codes(ids: jax.Array, bits: int) -> jax.Array:
    """Codes of `ids [...]`: `[..., bits]` of -1 and 1, the most significant bit first."""
    return jnp.where(ids[..., None] & _places(bits), 1.0, -1.0)


def _places(bits: int) -> jax.Array:
    return jnp.asarray([2**i for i in reversed(range(bits))], jnp.int32)


def lfq_entropy(z: jax.Array, temperature: float, joint: int) -> tuple[jax.Array, jax.Array]:
    """Mean entropy of a token's soft code, and entropy of the batch's use of all codes: `z [n, d]` -> nats, twice.

    A token is spread over the 2^d codes by softmax(-distance^2 / temperature), a product over its bits: so the first is
    a sum over bits. The second is exact within every `joint` bits, and a sum over these groups (an upper bound, equal
    where groups are independent), which keeps its cost at n * 2^joint.
    """
    up, down = jax.nn.sigmoid(4 * z / temperature), jax.nn.sigmoid(-4 * z / temperature)  # n d
    logs = jax.nn.log_sigmoid(4 * z / temperature), jax.nn.log_sigmoid(-4 * z / temperature)
    of_token = -(up * logs[0] + down * logs[1]).sum(-1).mean()
    soft = jnp.stack([down, up], -1)  # n d 2
    groups = [range(i, min(i + joint, z.shape[-1])) for i in range(0, z.shape[-1], joint)]
    return of_token, sum(_joint_entropy([soft[:, i] for i in group]) for group in groups)


def normalise(x: jax.Array) -> jax.Array:
    """Rows of `x [..., d]` on the unit sphere."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Ids `[...]` of the nearest rows of `codebook [v, d]` to `z [..., d]` by squared distance."""
    score = jnp.einsum("...d,vd->...v", z, codebook) - 0.5 * jnp.square(codebook).sum(-1)
    return jnp.argmax(score, -1).astype(jnp.int32)


def unit(x: jax.Array) -> jax.Array:
    """Rows of `x [..., d]` on the unit sphere, where official code puts them: over the length, 1e-12 at the least."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(square, 1e-30)), 1e-12)  # the inner floor: no gradient is NaN


def distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances of `z [..., d]` and `codebook [v, d]`, rounded as official code rounds them: `[..., v]`."""
    product = jnp.einsum("...d,vd->...v", z, codebook)
    return jnp.square(z).sum(-1, keepdims=True) + jnp.square(codebook).sum(-1) - 2 * product


def distance_entropy(distance: jax.Array, temperature: float = 0.01) -> jax.Array:
    """Mean entropy of a token's soft codes less the entropy of their mean (LlamaGen's): `[..., v]` -> scalar."""
    logits = (-distance / temperature).reshape(-1, distance.shape[-1])  # n v
    p = jax.nn.softmax(logits, -1)
    mean = p.mean(0)
    return (-(p * jax.nn.log_softmax(logits, -1)).sum(-1)).mean() + (mean * jnp.log(mean + 1e-5)).sum()


def gumbel(logits: jax.Array, noise: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A code by `logits + noise [..., v]` -> (one-hot `[..., v]` with the gradient of the soft one, ids `[...]`)."""
    soft = jax.nn.softmax((logits + noise) / temperature, -1)
    ids = jnp.argmax(soft, -1).astype(jnp.int32)
    return soft + jax.lax.stop_gradient(jax.nn.one_hot(ids, logits.shape[-1], dtype=soft.dtype) - soft), ids


def cosine_scores(z: jax.Array, codebook: jax.Array, sharpness: float) -> jax.Array:
    """Logits of codes by their cosines with outputs, `z [..., d]` and `codebook [v, d]` of unit rows: `[..., v]`.

    The likeliest code is the nearest one, and every code is the likeliest somewhere. Where codes lie densely the
    expected one moves as z does: it hands z nearly the straight-through gradient, at any temperature.
    """
    return sharpness * jnp.einsum("...d,vd->...v", z, codebook)


def cooled(step: jax.Array, warm: float, cold: float, steps: int) -> jax.Array:
    """Temperature at `step` of half a cosine from `warm` to `cold` over `steps`; 0 steps: `warm` throughout."""
    done = jnp.clip(step / steps, 0.0, 1.0) if steps else 0.0
    return cold + (warm - cold) * (1 + jnp.cos(jnp.pi * done)) / 2


def prior_divergence(logits: jax.Array, size: int) -> jax.Array:
    """KL in nats of the codes' distribution from the even one over `size` codes: `logits [..., v]` -> `[...]`."""
    p = jax.nn.softmax(logits, -1)
    return (p * jnp.log(p * size + 1e-10)).sum(-1)


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The value of `codes` with the gradient of `z`, of one shape."""
    return z + jax.lax.stop_gradient(codes - z)


def vq_sums(z: jax.Array, ids: jax.Array, size: int) -> dict[str, jax.Array]:
    """Tokens of each code, `count [v]`, and their sum, `total [v, d]`, of `z [n, d]` with `ids [n]`.

    Sums over tokens, so they add over microbatches and hosts.
    """
    return {
        "count": jnp.zeros((size,), z.dtype).at[ids].add(1.0),
        "total": jnp.zeros((size, z.shape[-1]), z.dtype).at[ids].add(z),
    }


def vq_pool(z: jax.Array, u: jax.Array, size: int) -> dict[str, jax.Array]:
    """Encoder outputs for dead codes to be reborn at: `z [n, d]`, `u [n]` in [0, 1) -> `pool [s, d]`, `hits [s]`.

    These too are sums, over microbatches and hosts, and yet single outputs must come back: a token is added to one
    slot, and a slot that was hit once holds an output as it is. Slots are drawn unevenly, log-uniform over e^-10 of
    densities, so that however many tokens there are, about a tenth of the slots lie where one hit is to be expected.
    """
    density = 10.0
    slot = jnp.minimum(-jnp.log1p(-u) * (size / density), size - 1).astype(jnp.int32)  # n
    return {
        "pool": jnp.zeros((size, z.shape[-1]), z.dtype).at[slot].add(z),
        "hits": jnp.zeros((size,), z.dtype).at[slot].add(1.0),
    }


def vq_born(dead: jax.Array, sums: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Who is reborn and where: `dead [v]` and the sums of `vq_pool` -> (`[v]` bool, `[v, d]`).

    Every code gets an output of its own, in a random order; where there are too few, the others wait for the next step.
    """
    single = sums["hits"] == 1  # s
    order = jnp.argsort(jnp.where(single, jax.random.uniform(key, single.shape), 2.0))  # s, single ones first
    rank = jnp.cumsum(dead) - 1  # v
    places = order[jnp.clip(rank, 0, single.size - 1)]
    return dead & (rank < single.sum()), sums["pool"][places]


def vq_usage(count: jax.Array, sums: jax.Array, decay: float) -> jax.Array:
    """Moving average of how many tokens a step each code takes: `[v]`."""
    return decay * count + (1 - decay) * sums


def vq_moving(codebook: jax.Array, count: jax.Array, total: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Codebook from moving sums with Laplace smoothing (Razavi et al. 2019, eq. 3): `count [v]`, `total [v, d]`."""
    v = count.shape[0]
    mass = count.sum()
    smooth = (count + eps) / (mass + v * eps) * mass
    return jnp.where(count[:, None] > eps, total / smooth[:, None], codebook)


def in_use(usage: jax.Array, decay: float) -> jax.Array:
    """Share of codes that took a token within the last 1 / (1 - decay) steps, or many shortly before: `usage [v]`.

    `usage` is the moving average of tokens a step, from zero on: one token adds 1 - decay, and a window later e^-1 of
    it is left.
    """
    return (usage > (1 - decay) * jnp.exp(-1.0)).mean()


def perplexity(count: jax.Array) -> jax.Array:
    """exp(entropy) of code counts `[v]`, of any scale; 1 before anything was counted."""
    p = count / jnp.maximum(count.sum(), 1e-9)
    return jnp.exp(-(p * jnp.log(p + 1e-12)).sum())


def codes_of(ids: jax.Array, codebook: jax.Array) -> jax.Array:
    """Rows of `codebook [v, d]` by `ids [...]`: `[..., d]`."""
    return lookup(codebook, ids)
