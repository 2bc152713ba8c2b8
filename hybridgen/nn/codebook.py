"""Functions shared by quantisers: nearest codes, straight-through gradients, entropies of soft codes, codebook use.

Letters: b batch, n tokens, d code width, v codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.nn.linear import Linear, normal


class Codebook(nn.Module):
    """Parameters of a trained codebook: `codebook [v, d]` and, with `score`, a linear layer to logits of codes."""

    size: int
    width: int
    score: bool = False

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        self.param("codebook", normal(1.0), (self.size, self.width))
        return scores(self.size, name="score")(z) if self.score else z


def scores(size: int, name: str | None = None) -> Linear:
    """The linear layer `[..., d] -> [..., v]` to logits of codes, in at least float32."""
    return Linear(size, bias=True, wide=True, name=name)


def normalise(x: jax.Array) -> jax.Array:
    """Rows of `x [..., d]`, normalised to length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def unit(x: jax.Array) -> jax.Array:
    """Rows of `x [..., d]`, normalised as in official code: divided by max(length, 1e-12)."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(square, 1e-30)), 1e-12)  # the inner floor avoids a NaN gradient


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Ids `[...]` of the nearest rows of `codebook [v, d]` to `z [..., d]` by squared distance."""
    score = jnp.einsum("...d,vd->...v", z, codebook) - 0.5 * jnp.square(codebook).sum(-1)
    return jnp.argmax(score, -1).astype(jnp.int32)


def distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances of `z [..., d]` and `codebook [v, d]`, with the rounding of official code: `[..., v]`."""
    product = jnp.einsum("...d,vd->...v", z, codebook)
    return jnp.square(z).sum(-1, keepdims=True) + jnp.square(codebook).sum(-1) - 2 * product


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """The value of `codes` with the gradient of `z`; both have the same shape."""
    return z + jax.lax.stop_gradient(codes - z)


def per_picture(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first: `[b, ...] -> [b]`."""
    return x.reshape(x.shape[0], -1).mean(-1)


# ---------------------------------------------------------------- entropies


def joint_entropy(digits: list[jax.Array]) -> jax.Array:
    """Entropy in nats of the mean over tokens of the joint distribution of independent digits `[n, level]`."""
    n = digits[0].shape[0]
    usage = jnp.ones((n, 1), digits[0].dtype)  # n, product of the levels so far
    for digit in digits[:-1]:
        usage = (usage[:, :, None] * digit[:, None, :]).reshape(n, -1)
    mean = jnp.einsum("nv,nl->vl", usage, digits[-1]).reshape(-1) / n  # v
    return -(mean * jnp.log(mean + 1e-12)).sum()


def distance_entropy(distance: jax.Array, temperature: float = 0.01) -> jax.Array:
    """Mean entropy of a token's soft codes minus the entropy of their mean (LlamaGen): `[..., v]` -> scalar."""
    logits = (-distance / temperature).reshape(-1, distance.shape[-1])  # n v
    p = jax.nn.softmax(logits, -1)
    mean = p.mean(0)
    return (-(p * jax.nn.log_softmax(logits, -1)).sum(-1)).mean() + (mean * jnp.log(mean + 1e-5)).sum()


# ---------------------------------------------------------------- use


def counts(ids: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Number of tokens with each code `[v]`, for `ids [...]`: a sum, so microbatches and hosts can be added."""
    return jnp.zeros((size,), dtype).at[ids.reshape(-1)].add(1.0)


def moving_average(average: jax.Array, value: jax.Array, decay: float) -> jax.Array:
    """The moving average after a step with `value`; both have the same shape."""
    return decay * average + (1 - decay) * value


def in_use(usage: jax.Array, decay: float) -> jax.Array:
    """Share of codes with a token in the last 1 / (1 - decay) steps, or with many shortly before: `usage [v]`.

    `usage` is the moving average of tokens per step, starting at zero: one token adds 1 - decay, and after 1 / (1 -
    decay) steps e^-1 of it is left.
    """
    return (usage > (1 - decay) * jnp.exp(-1.0)).mean()


def perplexity(count: jax.Array) -> jax.Array:
    """exp(entropy) of code counts `[v]` of any scale; 1 if all are zero."""
    p = count / jnp.maximum(count.sum(), 1e-9)
    return jnp.exp(-(p * jnp.log(p + 1e-12)).sum())
