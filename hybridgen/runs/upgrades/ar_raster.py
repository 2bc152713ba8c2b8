"""Old options of `ar.raster`, one family for three systems by its option `prefixed`: ours, LlamaGen, VQGAN."""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError

# the old options, besides vocab and grid, with their defaults
SIZES = {"width": 192, "depth": 4, "heads": 3, "kv_heads": None, "hidden": 0, "classes": 0, "cond_length": 1}
TEXT = {"text_vocab": 0, "text_length": 0, "text_depth": 1, "text_width": 0, "null_length": 0}
TRAINING = {"drop": 0.1, "dropout": 0.0, "token_dropout": 0.0, "keep": 1.0, "std": 0.0, "zero_head": False}
BLOCK = {"norm_kind": "rms", "norm_eps": 1e-6, "mlp": "swiglu", "bias": False, "qk_norm": False}
MASK = {"prefixed": "start", "prefix_mask": True, "unmasked": 0, "own_seen": False}
POSITIONS = {"positions": "plane", "places": 0, "rope_base": 10_000.0}
LAYOUT = {"remat": "none", "unroll": 1, "dtype": "float32"}
DEFAULTS = SIZES | TEXT | TRAINING | BLOCK | MASK | POSITIONS | LAYOUT

RENAMED = {"drop": "cond_drop_prob", "own_seen": "padding_sees_itself", "places": "block_size", "keep": "pkeep"}
COMMON = ("vocab", "grid", "width", "depth", "heads", "classes", *LAYOUT)
RASTER = (*COMMON, "kv_heads", "hidden", "qk_norm", "text_vocab", "text_length", "text_depth", "text_width")
RASTER += ("prefix_mask", "drop")
LLAMAGEN = (*COMMON, "kv_heads", "hidden", "norm_eps", "rope_base", "drop", "dropout", "token_dropout", "own_seen")
CAPTION = (*LLAMAGEN, "text_length", "text_width", "null_length")
TAMING = (*COMMON, "cond_length", "places", "unmasked", "keep")


def upgrade(model: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """See upgrades/__init__.py."""
    gone = set(DEFAULTS) - set(RASTER) | {"drop"}
    if not gone & set(model) or not set(model) <= {"vocab", "grid", *DEFAULTS}:
        return None  # current options, or unknown ones, which the family refuses
    old = DEFAULTS | model
    square = {"prefix_mask": old["prefix_mask"]}  # has no effect on a prefix of one position
    if old["prefixed"] == "start":
        return "ar.raster", _kept(model, RASTER, {})
    if old["prefixed"] == "class":
        return "ar.llamagen", _kept(old, LLAMAGEN, {"positions": "image"} | square)
    if old["prefixed"] == "caption":
        return "ar.llamagen", _kept(old, CAPTION, {"positions": "image", "prefix_mask": False})
    fixed = {"positions": "learned", "norm_kind": "layer", "norm_eps": 1e-5, "mlp": "gelu_exact", "bias": True}
    fixed |= {"hidden": 4 * old["width"], "drop": old["drop"]} | (square if old["cond_length"] == 1 else {})
    return "ar.taming", _kept(old, TAMING, {"prefix_mask": False} | fixed)


def _kept(old: Mapping[str, Any], names: tuple[str, ...], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The options `names`, renamed. Raises UserError if another has neither its `fixed` nor its default value."""
    free = ("prefixed", "std", "zero_head")  # the system, and the initialization of new parameters
    for name, value in old.items():
        if name not in (*names, *free) and value != {**DEFAULTS, **fixed}[name]:
            raise UserError(
                f"ar.raster with {name} {value!r} of an earlier version is no longer supported; import official "
                "weights again: hybridgen convert llamagen_gpt (or taming_gpt) IN OUT"
            )
    return {RENAMED.get(name, name): value for name, value in old.items() if name in names}
