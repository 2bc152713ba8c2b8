"""Vector quantisation with a codebook of moving averages (van den Oord et al. 2017; Razavi et al. 2019).

A code is the mean of the outputs that chose it, over the last 1 / (1 - decay) steps. An unused (dead) code is revived:
it is set to an encoder output of the batch. With `l2` codes and outputs are compared by cosines (Yu et al. 2021).

`extra`: `codebook [v, d]` and the moving sums whose ratio it is, `total [v, d]` and `count [v]`; a revived code starts
with the mean count.

Letters: b batch, h w grid, n tokens, d code width, v codes, s slots of the pool of candidates.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.nn import codebook
from hybridgen.nn.linear import lookup
from hybridgen.nn.quantizers import Training, check_ranges

POOL = 1024  # least number of slots for encoder outputs to which dead codes may be set


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """The nearest row of a codebook that is not trained by gradients."""

    codebook_size: int = 1024
    width: int = 8
    l2: bool = True  # codes on the unit sphere
    commitment: float = 0.25
    entropy: float = 0.0  # weight of the entropy of a token's soft code minus that of the batch's use
    softness: float = 0.5  # temperature of the soft codes
    revive_below: float = 0.03  # a code used less than this share of the mean is dead
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("commitment", "entropy"), (0.0, 1e6)) | {"softness": (1e-6, 1e6)}
        shares = {"revive_below": (0.0, 1.0), "decay": (0.0, 1.0)}
        check_ranges(self, codebook_size=(1, 2**24), width=(1, 2**16), **weights, **shares)

    @property
    def size(self) -> int:
        return self.codebook_size

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Random codes; those without a token are revived from step 1 on."""
        table = jax.random.normal(jax.random.split(key)[1], (self.size, self.width))
        table = codebook.normalise(table) if self.l2 else table
        # zero weight: a code with tokens becomes their mean at once, one without stays or is revived
        zeros = {"total": jnp.zeros_like(table), "count": jnp.zeros((self.size,))}
        return {}, {"use": jnp.zeros((self.size,)), "codebook": table} | zeros

    def project(self, z: jax.Array) -> jax.Array:
        return codebook.normalise(z) if self.l2 else z

    def encode(
        self, params: Any, extra: Any, z: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del params, training
        table = self.project(extra["codebook"])
        ids = codebook.nearest(*jax.lax.stop_gradient((z, table)))
        return codebook.straight_through(z, lookup(table, ids)), ids

    def codes(self, params: Any, extra: Any, ids: jax.Array) -> jax.Array:
        del params
        return lookup(self.project(extra["codebook"]), ids)

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        del params
        terms, still, table = jnp.zeros(z.shape[:1], z.dtype), jax.lax.stop_gradient, self.project(extra["codebook"])
        terms = terms + self.commitment * codebook.per_picture(jnp.square(z - still(lookup(table, ids))))
        if self.entropy:
            terms = terms + self.entropy * codebook.distance_entropy(codebook.distances(z, table), self.softness)
        flat = still(z).reshape(-1, self.width)  # (b n) d
        sums = token_sums(flat, ids.reshape(-1), self.size)
        if training is not None:
            u = rng.uniform(training.keys(), (math.prod(z.shape[1:-1]),))  # b n
            sums |= candidates(still(z).reshape(-1, self.width), u.reshape(-1), max(self.size, POOL))
        return terms, sums, {}

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        """Updates the moving averages and sets dead codes to encoder outputs of the batch."""
        del step
        use = codebook.moving_average(extra["use"], sums["count"], self.decay)
        count = codebook.moving_average(extra["count"], sums["count"], self.decay)
        total = codebook.moving_average(extra["total"], sums["total"], self.decay)
        table = smoothed(extra["codebook"], count, total)
        dead = count < self.revive_below * count.mean()  # v
        reborn, places = revived(dead, sums, key)  # v, v d
        fresh = count.mean()
        return {
            "use": use,
            "count": jnp.where(reborn, fresh, count),
            "total": jnp.where(reborn[:, None], places * fresh, total),
            "codebook": jnp.where(reborn[:, None], places, table),
        }


def token_sums(z: jax.Array, ids: jax.Array, size: int) -> dict[str, jax.Array]:
    """Number of tokens of each code, `count [v]`, and sum of their outputs, `total [v, d]`, of `z [n, d]`, `ids [n]`.

    These are sums over tokens, so microbatches and hosts can be added.
    """
    return {
        "count": codebook.counts(ids, size, z.dtype),
        "total": jnp.zeros((size, z.shape[-1]), z.dtype).at[ids].add(z),
    }


def candidates(z: jax.Array, u: jax.Array, size: int) -> dict[str, jax.Array]:
    """Candidate outputs for dead codes: `z [n, d]`, `u [n]` in [0, 1) -> `pool [s, d]`, `hits [s]`.

    These are sums too (over microbatches and hosts), but single outputs must be recovered: each token is added to one
    slot, and a slot with exactly one hit contains that output. Slots are chosen with log-uniform densities over a range
    of e^10, so for any number of tokens about a tenth of the slots have an expected count near one.
    """
    density = 10.0
    slot = jnp.minimum(-jnp.log1p(-u) * (size / density), size - 1).astype(jnp.int32)  # n
    return {
        "pool": jnp.zeros((size, z.shape[-1]), z.dtype).at[slot].add(z),
        "hits": jnp.zeros((size,), z.dtype).at[slot].add(1.0),
    }


def revived(dead: jax.Array, sums: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The revived codes and their new values: `dead [v]` and the sums of `candidates` -> (`[v]` bool, `[v, d]`).

    Every code gets a different output, in random order; if there are too few, the other codes stay dead in this step.
    """
    single = sums["hits"] == 1  # s
    order = jnp.argsort(jnp.where(single, jax.random.uniform(key, single.shape), 2.0))  # s, single ones first
    rank = jnp.cumsum(dead) - 1  # v
    places = order[jnp.clip(rank, 0, single.size - 1)]
    return dead & (rank < single.sum()), sums["pool"][places]


def smoothed(table: jax.Array, count: jax.Array, total: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Codebook `[v, d]` from the moving sums `count [v]` and `total [v, d]`, with Laplace smoothing.

    (Razavi et al. 2019, eq. 3.) A code that was never used keeps its value in `table [v, d]`.
    """
    v = count.shape[0]
    mass = count.sum()
    smooth = (count + eps) / (mass + v * eps) * mass
    return jnp.where(count[:, None] > eps, total / smooth[:, None], table)
