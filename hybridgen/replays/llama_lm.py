"""Replay of LlamaForCausalLM: whole texts, padded ones, and greedy continuations over a cache.

io.npz; inputs:

    in_ids [b, l]                       token ids
    in_pad_mask [b, l]                  False at padding; used for `out_padded_logits` only

outputs:

    out_logits [b, l, v], out_loss []   without a mask, and the mean cross-entropy of all tokens but the first
    out_hidden1, .. [b, l, d]           after single layers
    out_greedy_ids [b, n]               the greedy continuation
    out_greedy_logits [b, n, v]         the logits of each of its tokens
    out_padded_logits [b, l, v]         with the mask; zeros at the padding
    out_faint_logits [b, l, v]          for embeddings times 0.01, which tests the epsilon of the norms

Letters: b texts, l positions, n tokens, d width, v vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.models.losses import cross_entropy
from hybridgen.models.text import lm
from hybridgen.replays import Case
from hybridgen.replays._texts import FAINT, Texts


def replay(case: Case) -> None:
    """Compares all outputs of a fixture."""
    it = Texts(case)

    def ids() -> np.ndarray:
        return it.ids(it.model.text_vocab)

    def loss() -> jax.Array:
        return cross_entropy(it.apply("forward", ids())[:, :-1], jnp.asarray(ids()[:, 1:])).mean()

    def padded() -> jax.Array:
        mask = it.mask("in_pad_mask")
        logits = it.apply("forward", np.where(mask, ids(), 0), mask)
        return jnp.where(mask[..., None], logits, 0)

    def faint() -> jax.Array:
        return it.apply("forward", FAINT * it.apply("enter", ids()))

    def greedy() -> tuple[jax.Array, jax.Array]:
        """(ids `[b, n]`, their logits `[b, n, v]`), as many as were recorded."""
        name = "out_greedy_ids" if case.has("out_greedy_ids") else "out_greedy_logits"
        cond = {"text": ids(), "text_mask": np.ones(ids().shape, bool)}
        return _continued(it.model, it.params, cond, case.arrays[name].shape[1])

    case.gives("out_logits", lambda: it.apply("forward", ids()))
    it.layers(lambda: it.apply("states", ids()))
    case.gives("out_loss", loss)
    case.gives("out_greedy_ids", lambda: greedy()[0])
    case.gives("out_greedy_logits", lambda: greedy()[1])
    case.gives("out_padded_logits", padded)
    case.gives("out_faint_logits", faint)


def _continued(model: lm.LM, params: Any, cond: dict, count: int) -> tuple[jax.Array, jax.Array]:
    """(greedy ids `[b, n]`, their logits `[b, n, v]`) after a prompt."""
    logits, cache = jax.jit(lambda params, cond: lm.prefill(model, params, {}, cond, count))(params, cond)
    step = jax.jit(lambda params, cache, token: lm.step(model, params, {}, cache, token))
    each = [logits]
    for _ in range(count - 1):
        logits, cache = step(params, cache, each[-1].argmax(-1)[:, None])
        each.append(logits[:, 0])
    return jnp.stack([one.argmax(-1) for one in each], 1), jnp.stack(each, 1)
