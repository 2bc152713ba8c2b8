"""Codes drawn from logits (Jang et al. 2016), as DALL-E and VQGAN with Gumbel codes have them (Esser et al. 2021).

Training draws by Gumbel noise and hands the encoder the gradient of the soft code at a temperature that may fall; the
likeliest code is what a picture is encoded as. Logits are an own linear map of the output (the official form), or with
`sharpness` so many times the cosines of the output and the codes: of an own map a code's score and its place have
nothing to do with each other until training has joined them.

`params`: `codebook [v, d]` and `score`, the linear map. `extra`: with `used`, the rows `used [v]` of the codebook that
tokens number (the remap of taming-transformers).

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
    """A row of a learned codebook, by logits."""

    codebook_size: int = 1024
    width: int = 8
    used: int = 0  # tokens number so many rows of the codebook; 0: all
    sharpness: float = 0.0  # of logits by cosines; 0: by an own linear map
    temperature: tuple[float, float] = (1.0, 0.0625)  # of the gradient's soft code: from, to ...
    cooling: int = 0  # ... over so many steps; 0: it stays
    divergence: float = 5e-4  # weight of the distance of a token's distribution from an even one
    # of a microbatch: accumulated is not the large batch here
    entropy: float = 0.0  # weight of the entropy of a token's distribution, less that of the batch's use
    softness: float = 0.5  # temperature of the distributions that the entropies are of
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("sharpness", "divergence", "entropy"), (0.0, 1e6))
        heat = dict.fromkeys(("temperature", "softness"), (1e-6, 1e6)) | {"cooling": (0, 2**32 - 1)}
        sizes = {"codebook_size": (1, 2**24), "width": (1, 2**16), "used": (0, 2**24)}
        check_ranges(self, decay=(0.0, 1.0), **sizes, **weights, **heat)
        if len(self.temperature) != 2:
            raise UserError(f"quantizer.temperature {self.temperature} is no pair: from, to")

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
        """The codes that tokens number: `[v, d]`."""
        return self.project(lookup(params["codebook"], extra["used"]) if self.used else params["codebook"])

    def all_logits(self, params: Any, z: jax.Array) -> jax.Array:
        """Logits of every row of the codebook, by projected outputs `z [..., d]`: `[..., codebook_size]`."""
        if not self.sharpness:
            return codebook.scores(self.codebook_size).apply({"params": params["score"]}, z)
        return cosine_logits(z, self.project(params["codebook"]), self.sharpness)

    def logits(self, params: Any, extra: Any, z: jax.Array) -> jax.Array:
        """Logits of the codes that tokens number: `z [..., d]` -> `[..., v]`."""
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
    """A code by `logits + noise [..., v]` -> (one-hot `[..., v]` with the gradient of the soft one, ids `[...]`)."""
    soft = jax.nn.softmax((logits + noise) / temperature, -1)
    ids = jnp.argmax(soft, -1).astype(jnp.int32)
    return soft + jax.lax.stop_gradient(jax.nn.one_hot(ids, logits.shape[-1], dtype=soft.dtype) - soft), ids


def cosine_logits(z: jax.Array, table: jax.Array, sharpness: float) -> jax.Array:
    """Logits of codes by their cosines with outputs, `z [..., d]` and `table [v, d]` of unit rows: `[..., v]`.

    The likeliest code is the nearest one, and every code is the likeliest somewhere. Where codes lie densely the
    expected one moves as z does: it hands z nearly the straight-through gradient, at any temperature.
    """
    return sharpness * jnp.einsum("...d,vd->...v", z, table)


def cooled(step: jax.Array, warm: float, cold: float, steps: int) -> jax.Array:
    """Temperature at `step` of half a cosine from `warm` to `cold` over `steps`; 0 steps: `warm` throughout."""
    done = jnp.clip(step / steps, 0.0, 1.0) if steps else 0.0
    return cold + (warm - cold) * (1 + jnp.cos(jnp.pi * done)) / 2


def prior_divergence(logits: jax.Array, size: int) -> jax.Array:
    """KL in nats of the codes' distribution from the even one over `size` codes: `logits [..., v]` -> `[...]`."""
    p = jax.nn.softmax(logits, -1)
    return (p * jnp.log(p * size + 1e-10)).sum(-1)
