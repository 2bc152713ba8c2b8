"""Codes sampled from logits (Gumbel-softmax, Jang et al. 2016), as in DALL-E and in VQGAN with Gumbel codes (Esser et
al. 2021).

Training samples with Gumbel noise, and the encoder gets the gradient of the soft code, at a temperature that may be
annealed; otherwise a picture is encoded by the most likely codes. Logits are a linear layer of the output (the official
form) or, with `sharpness`, that factor times the cosines of the output and the codes: with a linear layer, a code's
score is unrelated to its vector until they have been trained.

`params`: `codebook [v, d]` and `score`, the linear layer. `extra`: with `used`, the codebook rows `used [v]` that have
a token (the remap of taming-transformers).

Letters: b batch, h w grid, d code width, v codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.nn import codebook
from hybridgen.nn.linear import lookup
from hybridgen.nn.quantizers import Training, check_ranges


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A row of a trained codebook, selected by logits."""

    codebook_size: int = 1024
    width: int = 8
    used: int = 0  # number of codebook rows that have a token; 0: all
    sharpness: float = 0.0  # factor of cosines as logits; 0: logits from a linear layer
    temperature: tuple[float, float] = (1.0, 0.0625)  # first and last temperature of the gradient's soft code ...
    cooling: int = 0  # ... and the steps of its annealing; 0: constant
    divergence: float = 5e-4  # weight of the KL divergence of a token's distribution from the uniform one
    # computed per microbatch, so accumulation differs from a large batch
    entropy: float = 0.0  # weight of the entropy of a token's distribution minus that of the batch's use
    softness: float = 0.5  # temperature of the distributions for these entropies
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("sharpness", "divergence", "entropy"), (0.0, 1e6))
        heat = dict.fromkeys(("temperature", "softness"), (1e-6, 1e6)) | {"cooling": (0, 2**32 - 1)}
        sizes = {"codebook_size": (1, 2**24), "width": (1, 2**16), "used": (0, 2**24)}
        check_ranges(self, decay=(0.0, 1.0), **sizes, **weights, **heat)
        if len(self.temperature) != 2:
            raise UserError(f"quantizer.temperature {self.temperature} is not a pair (first, last)")

    @property
    def size(self) -> int:
        return self.used or self.codebook_size

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        learned = codebook.Codebook(self.codebook_size, self.width, score=not self.sharpness)
        params = learned.init(jax.random.split(key)[0], jnp.zeros((1, self.width)))["params"]
        return params, {"use": jnp.zeros((self.size,))} | ({"used": jnp.arange(self.used)} if self.used else {})

    def project(self, z: jax.Array) -> jax.Array:
        return codebook.normalise(z) if self.sharpness else z

    def table(self, params: Any, extra: Any) -> jax.Array:
        """The codes that have a token: `[v, d]`."""
        return self.project(lookup(params["codebook"], extra["used"]) if self.used else params["codebook"])

    def all_logits(self, params: Any, z: jax.Array) -> jax.Array:
        """Logits of all rows of the codebook for projected outputs `z [..., d]`: `[..., codebook_size]`."""
        if not self.sharpness:
            return codebook.scores(self.codebook_size).apply({"params": params["score"]}, z)
        return cosine_logits(z, self.project(params["codebook"]), self.sharpness)

    def logits(self, params: Any, extra: Any, z: jax.Array) -> jax.Array:
        """Logits of the codes that have a token: `z [..., d]` -> `[..., v]`."""
        logits = self.all_logits(params, z)
        return logits[..., extra["used"]] if self.used else logits

    def encode(
        self, params: Any, extra: Any, z: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if training is not None:
            return self._drawn(params, extra, z, training)
        table = self.table(params, extra)
        ids = jnp.argmax(self.logits(params, extra, z), -1).astype(jnp.int32)
        return lookup(table, ids), ids

    def _drawn(self, params: Any, extra: Any, z: jax.Array, training: Training) -> tuple[jax.Array, jax.Array]:
        logits = self.logits(params, extra, z)  # b h w v
        u = rng.uniform(training.keys(), logits.shape[1:])
        noise = -jnp.log(-jnp.log(jnp.clip(u, 1e-20, 1 - 1e-7)))
        temperature = cooled(training.step, *self.temperature, self.cooling)
        one_hot, ids = draw(logits, noise.astype(logits.dtype), temperature)
        return jnp.einsum("...v,vd->...d", one_hot, self.table(params, extra)), ids

    def codes(self, params: Any, extra: Any, ids: jax.Array) -> jax.Array:
        return lookup(self.table(params, extra), ids)

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        del training
        sums, logits = {"count": codebook.counts(ids, self.size, z.dtype)}, self.logits(params, extra, z)
        terms = self.divergence * codebook.per_picture(prior_divergence(logits, self.codebook_size))
        if self.entropy:
            terms = terms + self.entropy * codebook.distance_entropy(-logits, self.softness)
        return terms, sums, {}

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return extra | {"use": codebook.moving_average(extra["use"], sums["count"], self.decay)}


def draw(logits: jax.Array, noise: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples codes by `logits + noise [..., v]` -> (one-hot `[..., v]` with the soft code's gradient, ids `[...]`)."""
    soft = jax.nn.softmax((logits + noise) / temperature, -1)
    ids = jnp.argmax(soft, -1).astype(jnp.int32)
    return soft + jax.lax.stop_gradient(jax.nn.one_hot(ids, logits.shape[-1], dtype=soft.dtype) - soft), ids


def cosine_logits(z: jax.Array, table: jax.Array, sharpness: float) -> jax.Array:
    """Logits of codes from their cosines with outputs; `z [..., d]` and `table [v, d]` have unit rows: `[..., v]`.

    The most likely code is the nearest one, and every code is the most likely one somewhere. If codes are dense, the
    expected code follows z, so the gradient is close to the straight-through one at any temperature.
    """
    return sharpness * jnp.einsum("...d,vd->...v", z, table)


def cooled(step: jax.Array, warm: float, cold: float, steps: int) -> jax.Array:
    """Temperature at `step` of a half-cosine schedule from `warm` to `cold` over `steps`; 0 steps: always `warm`."""
    done = jnp.clip(step / steps, 0.0, 1.0) if steps else 0.0
    return cold + (warm - cold) * (1 + jnp.cos(jnp.pi * done)) / 2


def prior_divergence(logits: jax.Array, size: int) -> jax.Array:
    """KL in nats of softmax(logits) from the uniform distribution over `size` codes: `[..., v]` -> `[...]`."""
    p = jax.nn.softmax(logits, -1)
    return (p * jnp.log(p * size + 1e-10)).sum(-1)
