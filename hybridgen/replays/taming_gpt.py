"""Replay of the transformer of VQGAN: teacher-forced logits, and greedy tokens with their logits.

io.npz; inputs:

    cond_ids [b, l] or [b]      condition tokens, from the same vocabulary
    code_ids [b, n]             tokens of the picture
    valid [b]                   the rows that `loss` includes (missing: all)

outputs:

    logits [b, n, v], loss []   teacher-forced, and their cross-entropy
    greedy_ids [b, n]           greedy tokens over a cache
    greedy_logits [b, n, v]     their logits

Letters: b batch, l positions of the condition, n tokens, v vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part
from hybridgen.replays import Case
from hybridgen.replays._tokens import Tokens, take_ids


def replay(case: Case) -> None:
    """Compares all outputs of a fixture."""
    _, part = case.imported
    ids, tokens = (take_ids(case, name, part.model.vocab) for name in ("cond_ids", "code_ids"))
    ids = ids.reshape(len(tokens), -1)  # b l
    size = part.model.block_size
    if ids.shape[1] + tokens.shape[1] - 1 > size:
        raise UserError(f"{case.folder / 'io.npz'}: cond_ids and code_ids have more tokens than block_size {size}")
    # in official code the lengths of condition and picture are inputs, and no array depends on them
    model = part.model.clone(grid=(1, tokens.shape[1]), cond_length=ids.shape[1], classes=0)
    it = Tokens(case, dataclasses.replace(part, model=model), tokens, {"cond_tokens": jnp.asarray(ids)})
    case.gives("logits", lambda: it.logits)
    case.gives("loss", it.loss)
    case.gives("greedy_ids", it.greedy)
    case.gives("greedy_logits", lambda: logits_along(it.part, it.greedy(), it.cond))


def logits_along(part: Part, tokens: jax.Array, cond: dict) -> jax.Array:
    """Logits `[b, n, v]` over a cache along `tokens [b, n]`."""

    def one(cache: dict, token: jax.Array) -> tuple[dict, jax.Array]:
        logits, cache = part.call("step", cache, token[:, None])
        return cache, logits[:, 0]

    start, cache = part.call("prefill", cond)
    _, rest = jax.lax.scan(one, cache, tokens[:, :-1].T)
    return jnp.concatenate([start[None], rest]).swapaxes(0, 1)
