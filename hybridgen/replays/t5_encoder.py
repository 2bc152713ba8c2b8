"""Replay of T5's encoder: T5EncoderModel, with and without the recorded mask.

io.npz; inputs:

    in_ids, in_mask [b, l]      token ids, and which of them are attended to

outputs, all [b, l, d]:

    out_last, out_last_nomask   after the final norm, with and without the mask
    out_last_faint              without the mask, for embeddings times 0.01, which tests the epsilon of the norms
    out_hidden1, ..             after single layers, with the mask

Letters: b texts, l positions, d width.
"""

from typing import Any

import jax
import numpy as np

from hybridgen.replays import Case
from hybridgen.replays._texts import FAINT, Texts


def replay(case: Case) -> None:
    """Compares all outputs of a fixture."""
    it = Texts(case)

    def last(mask: np.ndarray | None = None, params: Any = None) -> jax.Array:
        return it.apply("__call__", it.ids(it.model.vocab), mask, params=params)

    def faint() -> jax.Array:
        words = {"table": FAINT * it.params["words"]["table"]}
        return last(params=it.params | {"words": words})

    case.gives("out_last", lambda: last(it.mask("in_mask")))
    case.gives("out_last_nomask", last)
    case.gives("out_last_faint", faint)
    it.layers(lambda: it.apply("states", it.ids(it.model.vocab), it.mask("in_mask")))
