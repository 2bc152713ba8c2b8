"""Shared by the replays of class-conditional diffusion transformers: the network with its recorded inputs.

Recorded latents are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, c channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.sampling import guidance


class Network:
    """A DiT with its inputs: latents, timesteps and labels as recorded."""

    def __init__(self, case: Case):
        self.case, (_, part) = case, case.imported
        self.model, self.params = part.model, part.params
        if case.has("in_cfg_scale"):
            case.takes("in_cfg_scale")  # also recorded for a network without a null class, which is not guided
        self.run = jax.jit(lambda params, x, t, y: self.model.network.apply({"params": params}, x, t, {"label": y}))

    def __call__(self, x: Any, t: Any, y: Any) -> jax.Array:
        """The output for `x [b, H, W, c]` at timesteps `t [b]`."""
        return self.run(self.params, jnp.asarray(x), jnp.asarray(t, jnp.float32), jnp.asarray(y))

    @property
    def x(self) -> np.ndarray:
        """Latents `[b, H, W, c]`."""
        return rows_last(self.case.takes("in_x"))

    @property
    def labels(self) -> np.ndarray:
        """Labels `[b]`."""
        return self.case.takes("in_y")

    @property
    def null(self) -> np.ndarray:
        """The null class, `[b]`. Raises UserError if the network has no such class."""
        if not self.model.cond_drop_prob:
            raise UserError("config: class_dropout_prob is 0, so the network has no null class for guided outputs")
        return np.full_like(self.labels, self.model.classes)

    def output(self, y: np.ndarray) -> jax.Array:
        """The output for labels `y [b]` at the recorded timesteps."""
        return self(self.x, self.case.takes("in_t"), y)

    def guided(self, channels: int | None) -> jax.Array:
        """The conditional branch, guided in its first channels."""

        def both(x: jax.Array, t: jax.Array) -> jax.Array:
            return self(x, t, guidance.join([self.labels, self.null]))

        call = guidance.guided(both, float(self.case.takes("in_cfg_scale")), channels)
        return call(jnp.asarray(self.x), jnp.asarray(self.case.takes("in_t"), jnp.float32))

    def common(self) -> None:
        """The outputs that both systems may have."""
        self.case.gives("out_cond", lambda: rows_first(self.output(self.labels)))
        self.case.gives("out_uncond", lambda: rows_first(self.output(self.null)))
