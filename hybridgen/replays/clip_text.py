"""Replay of CLIP's text tower: CLIPTextModel, with projection or without.

io.npz; inputs:

    in_ids [b, l]               token ids
    in_mask [b, l]              which of them are attended to (missing: all, as in official pipelines)

outputs:

    out_last, out_penultimate [b, l, d]     after the final norm; after the second to last layer, without that norm
    out_hidden1, .. [b, l, d]               after single layers
    out_pooled [b, d]                       the end token's state after the final norm
    out_text_embeds [b, p]                  that state, projected into the space shared with pictures

Letters: b texts, l positions, d width, p width of the pooled vector.
"""

from typing import Any

import jax

from hybridgen.core.errors import UserError
from hybridgen.replays import Case
from hybridgen.replays._texts import Texts


def replay(case: Case) -> None:
    """Compares all outputs of a fixture."""
    it = Texts(case)
    if case.has("out_text_embeds") and not it.model.projection:
        raise UserError(f"{case.folder / 'io.npz'} has 'out_text_embeds', but the weights have no projection")

    def of(method: str, **options: Any) -> jax.Array:
        mask = it.mask("in_mask") if case.has("in_mask") else None
        return it.apply(method, it.ids(it.model.vocab), mask, **options)

    case.gives("out_last", lambda: of("__call__"))
    case.gives("out_penultimate", lambda: of("states")[-2])
    case.gives("out_pooled", lambda: of("pooled", mapped=False))
    case.gives("out_text_embeds", lambda: of("pooled"))
    it.layers(lambda: of("states")[1:])
