"""Vector quantisation with a codebook trained by gradients (van den Oord et al. 2017), also VQGAN's and LlamaGen's.

The loss pulls codes to the outputs that chose them. Ours also pulls an unused (dead) code to an encoder output of the
batch (`revive_below`; 0 for the official form).

`params`: `codebook [v, d]`. `extra`: with `used`, the codebook rows `used [v]` that have a token (the remap of
taming-transformers).

Letters: b batch, h w grid, n tokens, d code width, v codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.nn import codebook
from hybridgen.nn.linear import lookup
from hybridgen.nn.quantizers import Training, check_ranges


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """The nearest row of a codebook that is a parameter."""

    codebook_size: int = 1024
    width: int = 8
    used: int = 0  # number of codebook rows that have a token; 0: all
    l2: bool = True  # codes on the unit sphere
    exact: bool = False  # nearest codes with the rounding of official code
    legacy: bool = False  # VQGAN's loss, whose two weights are swapped
    commitment: float = 0.25
    # computed per microbatch, like the pull on dead codes, so accumulation differs from a large batch
    entropy: float = 0.0  # weight of the entropy of a token's soft code minus that of the batch's use
    softness: float = 0.5  # temperature of the soft codes
    revive_below: float = 0.03  # a code used less than this share of the mean is dead
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("commitment", "entropy"), (0.0, 1e6)) | {"softness": (1e-6, 1e6)}
        shares = {"revive_below": (0.0, 1.0), "decay": (0.0, 1.0)}
        check_ranges(self, codebook_size=(1, 2**24), width=(1, 2**16), used=(0, 2**24), **weights, **shares)

    @property
    def size(self) -> int:
        return self.used or self.codebook_size

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        learned = codebook.Codebook(self.codebook_size, self.width)
        params = learned.init(jax.random.split(key)[0], jnp.zeros((1, self.width)))["params"]
        return params, {"use": jnp.zeros((self.size,))} | ({"used": jnp.arange(self.used)} if self.used else {})

    def project(self, z: jax.Array) -> jax.Array:
        if not self.l2:
            return z
        return codebook.unit(z) if self.exact else codebook.normalise(z)

    def table(self, params: Any, extra: Any) -> jax.Array:
        """The codes that have a token, in the form that is compared: `[v, d]`."""
        return self.project(lookup(params["codebook"], extra["used"]) if self.used else params["codebook"])

    def encode(
        self, params: Any, extra: Any, z: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del training
        table = self.table(params, extra)
        points = jax.lax.stop_gradient((z, table))
        if self.exact:
            ids = jnp.argmin(codebook.distances(*points), -1).astype(jnp.int32)
        else:
            ids = codebook.nearest(*points)
        return codebook.straight_through(z, lookup(table, ids)), ids

    def codes(self, params: Any, extra: Any, ids: jax.Array) -> jax.Array:
        return lookup(self.table(params, extra), ids)

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        del training
        terms, still, table = jnp.zeros(z.shape[:1], z.dtype), jax.lax.stop_gradient, self.table(params, extra)
        chosen = lookup(table, ids)  # b h w d
        of_encoder, of_codes = (1.0, self.commitment) if self.legacy else (self.commitment, 1.0)
        terms = terms + of_encoder * codebook.per_picture(jnp.square(z - still(chosen)))
        if self.entropy:
            terms = terms + self.entropy * codebook.distance_entropy(codebook.distances(z, table), self.softness)
        flat = still(z).reshape(-1, self.width)  # (b n) d
        terms = terms + of_codes * codebook.per_picture(jnp.square(still(z) - chosen))
        terms = terms + self.pull_on_dead(extra, table, flat)
        return terms, {"count": codebook.counts(ids, self.size, z.dtype)}, {}

    def pull_on_dead(self, extra: Any, table: jax.Array, flat: jax.Array) -> jax.Array:
        """Loss term that pulls dead codes, which no token chooses, to outputs of this batch `flat [n, d]`: a scalar."""
        candidates = min(self.size, flat.shape[0])
        places = jnp.arange(self.size) % candidates * (flat.shape[0] // candidates)  # v, spread over the batch
        target = flat[places]  # v d
        dead = extra["use"] < self.revive_below * extra["use"].mean()  # v
        return (dead[:, None] * jnp.square(table - target)).sum() / flat.shape[0]

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return extra | {"use": codebook.moving_average(extra["use"], sums["count"], self.decay)}
