"""Replay of VQGAN with the nearest code (taming-transformers)."""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.replays import Case
from hybridgen.replays._codes import Codes


def replay(case: Case) -> None:
    """Compares the outputs; official code swaps the two weights of the loss, which does not change its value."""
    it = Codes(case)
    it.common()

    def loss() -> jax.Array:
        error = jnp.square(it.codes(np.asarray(it.quantised[1])) - it.raw).mean()
        return error + it.quantizer.commitment * error

    case.gives("vq_loss", loss)
