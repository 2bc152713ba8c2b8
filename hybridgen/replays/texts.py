"""Replays of text models: CLIP's tower, T5's encoder, Llama.

Letters: b texts, l positions, d width, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.losses import cross_entropy
from hybridgen.models.text import lm
from hybridgen.replays import Case

FAINT = np.float32(0.01)  # of the embeddings in the outputs called so


class Texts:
    """The model with its methods compiled, and the recorded ids."""

    def __init__(self, case: Case):
        self.case, (_, part) = case, case.imported
        self.model, self.params = part.model, part.params
        self.known: dict[Any, Any] = {}

    def apply(self, method: str, *args: Any, params: Any = None, **options: Any) -> jax.Array:
        """A method of the model, compiled once; of other parameters if some are given."""
        run = jax.jit(lambda params, *args: self.model.apply({"params": params}, *args, method=method, **options))
        run = self.known.setdefault((method, *options.items()), run)
        return run(self.params if params is None else params, *args)

    def ids(self, vocab: int, name: str = "in_ids") -> np.ndarray:
        """Recorded ids `[b, l]`. Raises UserError for one outside the vocabulary."""
        ids = self.case.takes(name)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab:
            raise UserError(f"{self.case.folder / 'io.npz'}: {name} are not rows of ids within 0 and {vocab - 1}")
        return ids.astype(np.int32)

    def mask(self, name: str) -> np.ndarray:
        return self.case.takes(name).astype(bool)

    def layers(self, states: Callable[[], jax.Array]) -> None:
        """The outputs of single layers, "out_hidden1" of the first."""
        for i in range(1, self.model.depth + 1):
            self.case.gives(f"out_hidden{i}", lambda i=i: states()[i - 1])


def clip_text(case: Case) -> None:
    """CLIPTextModel, with projection or without. No mask is given, unless one was recorded."""
    it = Texts(case)
    if case.has("out_text_embeds") and not it.model.projection:
        raise UserError(f"{case.folder / 'io.npz'} has 'out_text_embeds', and the weights have no projection")

    def of(method: str, **options: Any) -> jax.Array:
        mask = it.mask("in_mask") if case.has("in_mask") else None
        return it.apply(method, it.ids(it.model.vocab), mask, **options)

    case.gives("out_last", lambda: of("__call__"))
    case.gives("out_penultimate", lambda: of("states")[-2])
    case.gives("out_pooled", lambda: of("pooled", mapped=False))
    case.gives("out_text_embeds", lambda: of("pooled"))
    it.layers(lambda: of("states")[1:])


def t5_encoder(case: Case) -> None:
    """T5EncoderModel, with the recorded mask and without."""
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


def llama_lm(case: Case) -> None:
    """LlamaForCausalLM: whole texts, padded ones, and greedy continuations over a cache."""
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
        """(ids `[b, n]`, logits `[b, n, v]` that each was taken from), as many as were recorded."""
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
    """(likeliest ids `[b, n]`, their logits `[b, n, v]`) behind a prompt."""
    length = cond["text"].shape[1] + count
    logits, cache = jax.jit(lambda params, cond: lm.prefill(model, params, {}, cond, length))(params, cond)
    step = jax.jit(lambda params, cache, token: lm.step(model, params, {}, cache, token))
    each = [logits]
    for _ in range(count - 1):
        logits, cache = step(params, cache, each[-1].argmax(-1)[:, None])
        each.append(logits[:, 0])
    return jnp.stack([one.argmax(-1) for one in each], 1), jnp.stack(each, 1)
