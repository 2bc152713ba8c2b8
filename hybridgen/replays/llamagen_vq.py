"""Replay of LlamaGen's image tokenizer.

Letters: v codes, d code width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.nn import codebook
from hybridgen.replays import Case
from hybridgen.replays._codes import Codes


def replay(case: Case) -> None:
    """Compares codes on the unit sphere and the terms of the loss."""
    it = Codes(case)
    it.common()

    def error() -> jax.Array:
        return jnp.square(it.codes(np.asarray(it.quantised[1])) - it.projected).mean()

    def entropy() -> jax.Array:
        codes = it.codes(np.arange(it.model.vocab))  # v d
        value = codebook.distance_entropy(codebook.distances(it.projected, codes))
        return case.config.get("entropy_loss_ratio", 0.0) * value

    case.gives("vq_loss", error)
    case.gives("commit_loss", lambda: it.quantizer.commitment * error())
    case.gives("entropy_loss", entropy)
