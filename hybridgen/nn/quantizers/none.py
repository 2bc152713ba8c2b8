"""No quantiser: a continuous latent, standardised to mean 0 and variance 1, as noise schedules assume.

`extra`: `mean [d]` and `square [d]`, the moving averages of the latent's first two moments.

Letters: b batch, h w grid, d channels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.nn import codebook
from hybridgen.nn.quantizers import Training, check_ranges


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Returns outputs unchanged; it has no codes."""

    width: int = 8
    decay: float = 0.99

    def __post_init__(self) -> None:
        check_ranges(self, width=(1, 2**16), decay=(0.0, 1.0))

    @property
    def size(self) -> int:
        return 0

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        del key
        return {}, {"mean": jnp.zeros((self.width,)), "square": jnp.ones((self.width,))}

    def project(self, z: jax.Array) -> jax.Array:
        return z

    def encode(self, params: Any, extra: Any, z: jax.Array, training: Training | None = None) -> tuple[jax.Array, None]:
        del params, extra, training
        return z, None

    def standardise(self, extra: Any, z: jax.Array) -> jax.Array:
        """Outputs `[..., d]`, scaled to mean 0 and variance 1."""
        mean, deviation = self.moments(extra)
        return (z - mean) / deviation

    def restore(self, extra: Any, latent: jax.Array) -> jax.Array:
        """The inverse of `standardise`: the decoder's input, `[..., d]`."""
        mean, deviation = self.moments(extra)
        return latent * deviation + mean

    def moments(self, extra: Any) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation `[d]` of the latent."""
        return extra["mean"], jnp.sqrt(jnp.maximum(extra["square"] - jnp.square(extra["mean"]), 1e-6))

    def loss(
        self, params: Any, extra: Any, z: jax.Array, ids: None, training: Training | None = None
    ) -> tuple[jax.Array, dict, dict]:
        del params, extra, ids, training
        flat, terms = jax.lax.stop_gradient(z.reshape(-1, self.width)), jnp.zeros(z.shape[:1], z.dtype)
        sums = {"mean": flat.sum(0), "square": jnp.square(flat).sum(0), "places": jnp.asarray(flat.shape[0], z.dtype)}
        return terms, sums, {}

    def merge(self, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return {name: codebook.moving_average(extra[name], sums[name] / sums["places"], self.decay) for name in extra}
