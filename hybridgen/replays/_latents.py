"""Shared by the replays of autoencoders with continuous latents: Stable Diffusion, SD3, Flux, and MAR's KL-16.

Recorded pictures are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, h w grid, d channels of a latent.
"""

from typing import Any

import jax
import numpy as np

from hybridgen.replays import Case, rows_first, rows_last


class Latents:
    """The model with compiled methods; pictures are given and returned in the recorded layout."""

    def __init__(self, case: Case):
        _, part = case.imported
        self.model, self.params = part.model, part.params
        self.known: dict[Any, Any] = {}

    def apply(self, method: str, x: np.ndarray, **options: Any) -> Any:
        """A method on `x [b, c, H, W]`; its results have the channels last."""
        key = (method, x.tobytes(), tuple(options))
        if key not in self.known:
            run = jax.jit(lambda params, x: self.model.apply({"params": params}, x, method=method, **options))
            self.known[key] = run(self.params, rows_last(x))
        return self.known[key]

    def moments(self, image: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self.apply("moments", image)

    def decoded(self, latent: Any) -> np.ndarray:
        """Pictures `[b, c, H, W]` of unscaled latents `[b, d, h, w]`."""
        return rows_first(self.apply("picture", np.asarray(latent)))
