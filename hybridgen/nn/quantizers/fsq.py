"""Finite scalar quantisation (Mentzer et al. 2023): each channel is rounded to one of a few levels.

There is no trained codebook. `entropy` is the weight of a term that keeps codes in use: the amount by which the entropy
of the batch's codes is below that of a uniform use of the share `fill` of them (the diversity term of LFQ, Yu et al.
2023).

Letters: b batch, h w grid, n tokens, d channels, v codes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.nn import codebook
from hybridgen.nn.quantizers import Training, check_ranges


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Codes in [-1, 1]^d. The channels are the digits of the id; the first one is the least significant."""

    levels: tuple[int, ...] = (8, 5, 5, 5)  # number of levels of each channel
    # computed per microbatch, like every entropy of soft codes, so accumulation differs from a large batch
    entropy: float = 0.0
    fill: float = 0.7
    softness: float = 0.5  # temperature of the soft codes for the entropy
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("entropy",), (0.0, 1e6)) | dict.fromkeys(("fill", "softness"), (1e-6, 1e6))
        check_ranges(self, levels=(2, 2**16), decay=(0.0, 1.0), **weights)
        if len(self.levels) > 24 or self.size > 2**24:
            raise UserError(f"quantizer.levels {str(self.levels)[:80]} give more than {2**24} codes")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        return len(self.levels)

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        del key
        return {}, {"use": jnp.zeros((self.size,))}

    def project(self, z: jax.Array) -> jax.Array:
        return z

    def bound(self, z: jax.Array) -> jax.Array:
        """`z [..., d]` squashed into the range of its levels, so that rounding gives exactly `levels[i]` values."""
        # an even number of levels is shifted by 1/2, so that rounding is symmetric (eq. 2 of the paper's appendix)
        margin = jnp.asarray([1 + 1e-3 if size == 2 else 1 - 1e-3 for size in self.levels], z.dtype)
        half = (jnp.asarray(self.levels, z.dtype) - 1) * margin / 2
        offset = jnp.where(jnp.asarray(self.levels) % 2 == 0, 0.5, 0.0).astype(z.dtype)
        # bound(0) = 0; with two levels, -1 and 0, that would be the end of the tanh, so there the sign of z decides
        shift = jnp.where(jnp.asarray(self.levels) == 2, 0.0, jnp.arctanh(offset / half)).astype(z.dtype)
        return jnp.tanh(z + shift) * half - offset

    def encode(
        self, params: Any, extra: Any, z: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del params, extra, training
        bound = self.bound(z)
        rounded = bound + jax.lax.stop_gradient(jnp.round(bound) - bound)
        half = jnp.asarray([size // 2 for size in self.levels], z.dtype)
        digits = jnp.round(jax.lax.stop_gradient(rounded) + half).astype(jnp.int32)  # ... d
        return rounded / half, (digits * self._basis()).sum(-1)

    def codes(self, params: Any, extra: Any, ids: jax.Array) -> jax.Array:
        del params, extra
        digits = (ids[..., None] // self._basis()) % jnp.asarray(self.levels)
        half = jnp.asarray([size // 2 for size in self.levels], jnp.float32)
        return (digits - half) / half

    def _basis(self) -> jax.Array:
        return jnp.asarray(np.cumprod([1, *self.levels[:-1]]), jnp.int32)

    def batch_entropy(self, z: jax.Array) -> jax.Array:
        """Entropy in nats of the batch's use of all codes, by soft rounding: `z [n, d]` -> scalar in [0, log v]."""
        bound = self.bound(z)
        return codebook.joint_entropy([self._soft(bound[:, i], size) for i, size in enumerate(self.levels)])

    def _soft(self, x: jax.Array, size: int) -> jax.Array:
        """Soft assignment of a channel `[n]` to its levels by distance: `[n, size]`."""
        centres = jnp.arange(size, dtype=x.dtype) - size // 2
        return jax.nn.softmax(-jnp.square(x[:, None] - centres) / self.softness, -1)

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        del params, extra, training
        flat, terms = z.reshape(-1, self.width), jnp.zeros(z.shape[:1], z.dtype)  # (b n) d
        sums = {"count": codebook.counts(ids, self.size, z.dtype)}
        if not self.entropy:
            return terms, sums, {}
        use = self.batch_entropy(flat)
        return terms + self.entropy * jnp.maximum(jnp.log(self.fill * self.size) - use, 0.0), sums, {"entropy": use}

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return extra | {"use": codebook.moving_average(extra["use"], sums["count"], self.decay)}
