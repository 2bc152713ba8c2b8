"""VQGAN with the nearest code (taming-transformers)."""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.replays import Case
from hybridgen.replays._codes import Codes


def replay(case: Case) -> None:
    """VQGAN with the nearest code; its loss has the two weights swapped, which its value does not show."""
    it = Codes(case)
    it.common()

    def loss() -> jax.Array:
        error = jnp.square(it.codes(np.asarray(it.quantised[1])) - it.raw).mean()
        return error + it.quantizer.commitment * error

    case.gives("vq_loss", loss)
