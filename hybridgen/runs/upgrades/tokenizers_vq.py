"""Old options of `tokenizers.vq`, which was one family for all VQ tokenizers, converted to vq, vqgan or llamagen_vq."""

from collections.abc import Mapping
from typing import Any

# quantizer options by kind: {old name: new name}
USE = {"decay": "decay"}
SOFT = {"entropy": "entropy", "softness": "softness"} | USE
ROWS = {"codes": "codebook_size", "width": "width"} | SOFT
NEAREST = ROWS | {name: name for name in ("l2", "commitment", "revive_below")}
KINDS = {
    "fsq": {"levels": "levels", "fill": "fill"} | SOFT,
    "lfq": {name: name for name in ("bits", "commitment", "diversity", "joint")} | SOFT,
    "vq_ema": NEAREST,  # rounded as ours, where it was `exact`
    "vq_gradient": NEAREST | {name: name for name in ("used", "exact", "legacy")},
    "gumbel": ROWS | {name: name for name in ("used", "sharpness", "temperature", "cooling", "divergence")},
    "none": {"width": "width"} | USE,
}
MOVED = {"quantizer", "moving", "residual"}.union(*KINDS.values())
SHARED = ("resolution", "channels", "blocks", "mse", "l1", "perceptual", "adversarial", "dtype")
# defaults that the new families do not have
DEFAULTS = {"resolution": 32, "channels": (128, 256), "blocks": 1}
LLAMAGEN = {"stem", "z", "attend", "groups", "decoder_channels"}


def upgrade(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Old options -> (family, its options); None if they are current."""
    kind = model.get("quantizer", "fsq")
    if hasattr(kind, "items") or not MOVED & set(model):
        return None
    if kind == "vq":
        kind = "vq_ema" if model.get("moving", True) else "vq_gradient"
    quantizer = {"kind": kind} | {now: model[then] for then, now in KINDS.get(kind, {}).items() if then in model}
    if kind == "vq_ema" and model.get("legacy"):
        quantizer["commitment"] = 1.0  # its effective weight with `legacy`, where the two weights were swapped
    rest = {name: value for name, value in model.items() if name not in MOVED}
    if not model.get("residual"):
        return "tokenizers.vq", rest | {"quantizer": quantizer}
    residual = dict(model["residual"])
    options = DEFAULTS | {name: value for name, value in rest.items() if name in SHARED}
    if _is_llamagen(model, kind, residual):
        del residual["attend"]
        own = ("width", "l2", "commitment", "entropy")
        options |= residual | {name: model[name] for name in own if name in model}
        options |= {"codebook_size": model.get("codes", 1024), "width": model.get("width", 8)}
        return "tokenizers.llamagen_vq", options | {"revive_below": model.get("revive_below", 0.03)}
    if not model.get("attention", True):
        residual["middle"] = False
    return "tokenizers.vqgan", options | {"residual": residual, "quantizer": quantizer}


def _is_llamagen(model: Mapping[str, Any], kind: str, residual: Mapping[str, Any]) -> bool:
    """Whether options are those of LlamaGen's tokenizer, by its losses and its attention levels."""
    losses = kind == "vq_gradient" and model.get("exact") and not model.get("legacy") and model.get("mse", 1.0) > 0
    soft = not model.get("entropy") or model.get("softness", 0.5) == 0.01
    plain = not model.get("used") and model.get("decay", 0.99) == 0.99 and model.get("attention", True)
    last = len(model.get("channels", DEFAULTS["channels"])) - 1
    return bool(losses and soft and plain) and set(residual) <= LLAMAGEN and list(residual.get("attend", ())) == [last]
