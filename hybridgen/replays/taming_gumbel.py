"""Replay of VQGAN with Gumbel codes (taming-transformers).

Letters: b pictures, h w grid, v codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.nn.quantizers import gumbel
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.replays._codes import Codes


def replay(case: Case) -> None:
    """Compares the most likely codes, and those drawn with recorded noise (temperature 1)."""
    it = Codes(case)
    it.common()

    def numbered() -> jax.Array:
        return it.quantizer.logits(it.part.params, it.part.extra, it.raw)  # b h w v

    def drawn() -> tuple[jax.Array, jax.Array]:
        one_hot, ids = gumbel.draw(numbered(), jnp.asarray(rows_last(case.takes("gumbel"))), jnp.float32(1.0))
        return one_hot @ it.codes(np.arange(it.model.vocab)), ids

    case.gives("logits", lambda: rows_first(it.quantizer.all_logits(it.part.params, it.raw)))
    case.gives(
        "kl", lambda: it.quantizer.divergence * gumbel.prior_divergence(numbered(), it.quantizer.codebook_size).mean()
    )
    case.gives("gumbel_indices", lambda: drawn()[1])
    case.gives("gumbel_quant", lambda: rows_first(drawn()[0]))
    case.gives("gumbel_recon", lambda: it.picture(drawn()[0]))
