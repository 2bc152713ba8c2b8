"""Replay of LlamaGen's transformer: teacher-forced logits under condition and null condition, and greedy tokens.

io.npz; inputs:

    class_ids [b]                       model_type "c2i": classes; `num_classes` is the null class
    caption_emb [b, l, c]               model_type "t2i": features of a text, padded on the left
    emb_masks [b, l]                    0 at padding (missing: no padding)
    code_ids [b, n - 1], last_id [b]    the input tokens, and the last token
    valid [b]                           the rows that `loss` includes (missing: all)
    cfg_scale []                        guidance scale
    cfg_interval []                     the last step over the cache that is guided, counted from 0

outputs:

    logits, logits_null [b, n, v]       under the condition, and under the null condition
    loss []                             cross-entropy of `logits`
    cfg_logits [b, n, v]                the two combined
    greedy_nocfg, greedy_cfg, greedy_cfg_interval [b, n]    not guided, guided, and guided in that interval

Letters: b batch, l positions of the condition, c width of text features, n tokens, v vocabulary.
"""

import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.ar.llamagen import LlamaGen
from hybridgen.replays import Case
from hybridgen.replays._tokens import Tokens, take_ids
from hybridgen.sampling import guidance


def replay(case: Case) -> None:
    """Compares all outputs of a fixture."""
    _, part = case.imported
    codes, last = (take_ids(case, name, part.model.vocab) for name in ("code_ids", "last_id"))
    tokens = np.concatenate([codes, last.reshape(-1, 1)], 1)  # b n
    if tokens.shape[1] != part.model.length:
        raise UserError(f"{case.folder / 'io.npz'}: {tokens.shape[1]} tokens, the model needs {part.model.length}")
    it = Tokens(case, part, tokens, conditioning(case, part.model))
    case.gives("logits", lambda: it.logits)
    case.gives("loss", it.loss)
    case.gives("logits_null", lambda: it.null)
    case.gives("greedy_nocfg", it.greedy)
    if not case.has("cfg_scale"):
        return
    scale = float(case.takes("cfg_scale"))
    case.gives("cfg_logits", lambda: guidance.combine(it.logits, it.null, scale))
    strong = max(scale, 1.0)  # official code guides only with scales above 1
    case.gives("greedy_cfg", lambda: it.greedy(strong))
    if case.has("cfg_interval"):
        last_guided = int(case.takes("cfg_interval"))
        case.gives("greedy_cfg_interval", lambda: it.greedy(guidance.until(strong, last_guided, part.model.length)))


def conditioning(case: Case, model: LlamaGen) -> dict:
    """The recorded condition: a class, or the first `text_length` positions of a caption."""
    if not model.text_width:
        return {"label": jnp.asarray(take_ids(case, "class_ids", model.classes + 1))}
    features, length = case.takes("caption_emb"), model.text_length
    if features.ndim != 3 or features.shape[1] < length or features.shape[2] != model.text_width:
        wanted = f"at least {length} positions of width {model.text_width}"
        raise UserError(f"{case.folder / 'io.npz'}: caption_emb has the shape {features.shape}, not {wanted}")
    mask = np.ones(features.shape[:2], bool)
    if case.has("emb_masks"):
        mask = case.takes("emb_masks").reshape(features.shape[:2]) > 0
    return {"text_features": jnp.asarray(features[:, :length]), "text_features_mask": jnp.asarray(mask[:, :length])}
