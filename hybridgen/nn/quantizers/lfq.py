"""Lookup-free quantisation (Yu et al. 2023, MAGVIT-v2): the sign of each channel is a bit of the code's id.

Soft codes are a softmax over the negative squared distances to all 2^d codes, which factorises over bits. `entropy` is
the weight of the entropy of a token's soft code minus `diversity` times that of the batch's use.

Letters: b batch, h w grid, n tokens, d bits, v = 2^d codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.nn import codebook
from hybridgen.nn.quantizers import Training, check_ranges


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Codes of -1 and 1; the first channel is the id's most significant bit; an output of zero gives -1."""

    bits: int = 10
    commitment: float = 0.25
    entropy: float = 0.0
    diversity: float = 1.0
    softness: float = 0.5  # temperature of the soft codes
    joint: int = 10  # bits per group for the batch's entropy, which is exact in a group; groups count as independent
    decay: float = 0.99

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("commitment", "entropy", "diversity"), (0.0, 1e6))
        check_ranges(self, bits=(1, 24), softness=(1e-6, 1e6), joint=(1, 24), decay=(0.0, 1.0), **weights)

    @property
    def size(self) -> int:
        return 2**self.bits

    @property
    def width(self) -> int:
        return self.bits

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        del key
        return {}, {"use": jnp.zeros((self.size,))}

    def project(self, z: jax.Array) -> jax.Array:
        return z

    def encode(
        self, params: Any, extra: Any, z: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, jax.Array]:
        del params, extra, training
        bits = z > 0
        ids = (bits * self._places()).sum(-1, dtype=jnp.int32)
        return codebook.straight_through(z, jnp.where(bits, 1.0, -1.0).astype(z.dtype)), ids

    def codes(self, params: Any, extra: Any, ids: jax.Array) -> jax.Array:
        del params, extra
        return jnp.where(ids[..., None] & self._places(), 1.0, -1.0)

    def _places(self) -> jax.Array:
        return jnp.asarray([2**i for i in reversed(range(self.bits))], jnp.int32)

    def entropies(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean entropy of a token's soft code, entropy of the batch's use of all codes) of `z [n, d]`, in nats.

        The first is a sum over bits. The second is exact within each group of `joint` bits and summed over groups (an
        upper bound, equal if groups are independent), so its cost is n * 2^joint.
        """
        up, down = jax.nn.sigmoid(4 * z / self.softness), jax.nn.sigmoid(-4 * z / self.softness)  # n d
        logs = jax.nn.log_sigmoid(4 * z / self.softness), jax.nn.log_sigmoid(-4 * z / self.softness)
        of_token = -(up * logs[0] + down * logs[1]).sum(-1).mean()
        soft = jnp.stack([down, up], -1)  # n d 2
        groups = [range(i, min(i + self.joint, z.shape[-1])) for i in range(0, z.shape[-1], self.joint)]
        return of_token, sum(codebook.joint_entropy([soft[:, i] for i in group]) for group in groups)

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: jax.Array, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        flat, sums = z.reshape(-1, self.width), {"count": codebook.counts(ids, self.size, z.dtype)}
        codes = jax.lax.stop_gradient(self.encode(params, extra, z)[0])
        terms = self.commitment * codebook.per_picture(jnp.square(z - codes))
        if not self.entropy:
            return terms, sums, {}
        doubt, use = self.entropies(flat)
        return terms + self.entropy * (doubt - self.diversity * use), sums, {"entropy": use, "doubt": doubt}

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return extra | {"use": codebook.moving_average(extra["use"], sums["count"], self.decay)}
