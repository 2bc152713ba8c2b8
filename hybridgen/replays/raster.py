"""Replays of transformers over raster tokens: LlamaGen's, and that of VQGAN.

Letters: b batch, l positions of the condition, c width of text features, n tokens, v vocabulary.
"""

import re
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part
from hybridgen.models.losses import cross_entropy, weighted
from hybridgen.replays import Case
from hybridgen.sampling import guidance

# what recordings call features of a caption, and which of their positions mean something
FEATURES = re.compile(r"(in_)?(caption|cap|text|t5|cond|c)s?(_(emb|embeds?|embeddings?|feature|feat|indices)s?)?")
MASKS = re.compile(r"(in_)?((caption|cap|text|t5|cond|emb|attention|attn|pad|c)s?_)*masks?")


class Tokens:
    """Teacher-forced logits of a prior under a condition, each computed once."""

    def __init__(self, case: Case, part: Part, tokens: np.ndarray, cond: dict):
        self.case, self.part, self.tokens, self.cond = case, part, jnp.asarray(tokens), cond
        for name in ("last_id", "code_ids", "class_ids", "cond_ids"):
            most = part.model.classes + 1 if name == "class_ids" else part.model.vocab
            ids = case.arrays.get(name, np.zeros(1, int))
            if ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= most:
                raise UserError(f"{case.folder / 'io.npz'}: {name} are not within 0 and {most - 1}")

    def score(self, **changes: jax.Array) -> jax.Array:
        run = jax.jit(lambda part, tokens, cond: part.call("score", tokens, cond))
        return run(self.part, self.tokens, self.cond | changes)

    @cached_property
    def logits(self) -> jax.Array:
        return self.score()

    @cached_property
    def null(self) -> jax.Array:
        return self.score(drop=jnp.ones(self.tokens.shape[:1], bool))

    def loss(self) -> jax.Array:
        """Mean over tokens, of the rows that are `valid` where that was recorded."""
        each = cross_entropy(self.logits, self.tokens)
        if not self.case.has("valid"):
            return each.mean()
        valid = self.case.takes("valid").reshape(-1, 1)
        return weighted(each, jnp.broadcast_to(jnp.asarray(valid), each.shape))[0]

    def greedy(self, scale: object = 1.0) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), self.tokens.shape[0])
        options = {"guidance": scale, "temperature": 0.0}
        return jax.jit(lambda part, cond: part.call("generate", cond, keys, options)[0])(self.part, self.cond)


def first(case: Case, names: re.Pattern) -> np.ndarray | None:
    """The first recorded array whose name is such a one."""
    return next((case.takes(name) for name in case.arrays if names.fullmatch(name)), None)


def llamagen_gpt(case: Case) -> None:
    """LlamaGen's transformer: teacher-forced logits under condition and null condition, and greedy tokens."""
    _, part = case.imported
    tokens = np.concatenate([case.takes("code_ids"), case.takes("last_id").reshape(-1, 1)], 1)  # b n
    if tokens.shape[1] != part.model.length:
        raise UserError(f"{case.folder / 'io.npz'}: {tokens.shape[1]} tokens for a block of {part.model.length}")
    it = Tokens(case, part, tokens, caption(case, part.model) if part.model.prefixed == "caption" else label(case))
    case.gives("logits", lambda: it.logits)
    case.gives("loss", it.loss)
    case.gives("logits_null", lambda: it.null)
    case.gives("greedy_nocfg", it.greedy)
    if not case.has("cfg_scale"):
        return
    scale = float(case.takes("cfg_scale"))
    case.gives("cfg_logits", lambda: guidance.combine(it.logits, it.null, scale))
    strong = max(scale, 1.0)  # official code guides above 1 alone
    case.gives("greedy_cfg", lambda: it.greedy(strong))
    if case.has("cfg_interval"):
        last = int(case.takes("cfg_interval"))
        case.gives("greedy_cfg_interval", lambda: it.greedy(guidance.until(strong, last, part.model.length)))


def label(case: Case) -> dict:
    """The condition of a class."""
    return {"label": jnp.asarray(case.takes("class_ids"))}


def caption(case: Case, model: object) -> dict:
    """The condition of a caption: as many positions as the model reads; all of them are seen where no mask is given."""
    features = first(case, FEATURES)
    if features is None or features.ndim != 3:
        raise UserError(f"{case.folder / 'io.npz'} has no features of captions, from which outputs are computed")
    length = model.text_length
    if features.shape[1] < length or features.shape[2] != model.text_width:
        wanted = f"{length}x{model.text_width}"
        raise UserError(f"{case.folder / 'io.npz'}: features {features.shape[1:]} of captions, {wanted} are expected")
    mask = first(case, MASKS)
    mask = np.ones(features.shape[:2], bool) if mask is None else mask.reshape(features.shape[:2]) > 0
    return {"text_features": jnp.asarray(features[:, :length]), "text_features_mask": jnp.asarray(mask[:, :length])}


def taming_gpt(case: Case) -> None:
    """The transformer of VQGAN: teacher-forced logits, and greedy tokens with the logits they are drawn from."""
    _, part = case.imported
    ids, tokens = case.takes("cond_ids"), case.takes("code_ids")
    ids = ids.reshape(len(tokens), -1)  # b l
    places = part.params["position"]["table"].shape[0]
    if ids.shape[1] + tokens.shape[1] - 1 > places:
        raise UserError(f"{case.folder / 'io.npz'}: more tokens than a block of {places} holds")
    # how long condition and image are is official code's input, and no array depends on it
    model = part.model.clone(grid=(1, tokens.shape[1]), cond_length=ids.shape[1], classes=0)
    it = Tokens(case, Part(part.params, part.extra, part.family, model), tokens, {"cond_tokens": jnp.asarray(ids)})
    case.gives("logits", lambda: it.logits)
    case.gives("loss", it.loss)
    case.gives("greedy_ids", it.greedy)
    case.gives("greedy_logits", lambda: followed(it.part, it.greedy(), it.cond))


def followed(part: Part, tokens: jax.Array, cond: dict) -> jax.Array:
    """Logits `[b, n, v]` over a cache along `tokens [b, n]`."""

    def one(cache: dict, token: jax.Array) -> tuple[dict, jax.Array]:
        logits, cache = part.call("step", cache, token[:, None])
        return cache, logits[:, 0]

    start, cache = part.call("prefill", cond)
    _, rest = jax.lax.scan(one, cache, tokens[:, :-1].T)
    return jnp.concatenate([start[None], rest]).swapaxes(0, 1)
