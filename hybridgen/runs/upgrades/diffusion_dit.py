"""Old options of `diffusion.dit`, which was one family for every DiT, converted to its three successors.

Our DiT keeps its name; the original one is `diffusion.dit_official`, that of diffusers `diffusion.dit_diffusers`.
Arrays keep their paths and shapes.
"""

from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.models.text.transformer import round_up

SIZES = ("resolution", "channels", "patch", "width", "depth", "heads", "hidden", "classes", "remat", "unroll", "dtype")
KEPT = (*SIZES, "posterior", "plan_width", "draft", "cross", "text_vocab", "text_length", "text_depth")
RENAMED = {"drop_plan": "plan_drop_prob", "drop_text": "cond_drop_prob", "corrupt": "token_corruption"}
PROCESS = {
    name: name for name in ("schedule", "relative", "time_mean", "time_std", "time_min", "timesteps", "variance")
}
PROCESS |= {"kind": "prediction_type", "loss_kind": "loss_type"}

# defaults of the old options
OLD = {"resolution": 32, "channels": 3, "patch": 4, "width": 192, "depth": 4, "heads": 3, "hidden": 0, "classes": 0}
OLD |= {"remat": "none", "unroll": 1, "dtype": "float32", "posterior": "mean", "drop_text": 0.1, "outputs": 0}
OLD |= {"plan_width": 0, "draft": False, "cross": False, "text_vocab": 0, "relative": False}
OLD |= {"kind": "x", "schedule": "flow", "timesteps": 0, "variance": "large", "loss_kind": "velocity"}
OWN = {"position": "rows", "rotary": True, "time_shift": 0.0, "own_embedders": False}  # of our DiT
OLD |= OWN
BLOCK = {"mlp": "swiglu", "norm": "rms", "norm_eps": 1e-6, "mlp_norm_eps": 0.0, "mlp_norm_affine": False}
BLOCK |= {"qk_norm": False, "bias": False, "mlp_bias": None, "qkv_bias": True, "scale": 0.0, "dropout": 0.0}
BLOCK |= {"kv_heads": None}

# the values of the old options that the other two families correspond to
PLAIN = {"rotary": False, "plan_width": 0, "draft": False, "cross": False, "text_vocab": 0, "relative": False}
OFFICIAL = PLAIN | {"position": "stored", "time_shift": 0.0, "own_embedders": False}
DIFFUSERS = PLAIN | {"position": "columns", "time_shift": 1.0, "own_embedders": True}
LAYER = {"norm": "layer", "bias": True}
BLOCK_OPTIONS = ("mlp", "qkv_bias", "mlp_norm_eps", "mlp_norm_affine")  # of a block of diffusers


def upgrade(model: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Old options -> (family, its options); None if they are current.

    Raises UserError for a combination that no family has.
    """
    known = {*RENAMED, *PROCESS, *OWN, "outputs", "block"}
    if "process" in model or not known & model.keys():
        return None
    old, block = OLD | model, BLOCK | dict(model.get("block", {}))
    if old["own_embedders"]:
        return "diffusion.dit_diffusers", _diffusers(old, block)
    if old["position"] == "stored":
        return "diffusion.dit_official", _official(old, block)
    _check("dit", old, OWN | {"outputs": old["outputs"] if old["outputs"] == old["channels"] else 0})
    _check("dit", block, BLOCK)
    options = {name: model[name] for name in KEPT if name in model}
    options |= {ours: model[name] for name, ours in RENAMED.items() if name in model}
    process = {ours: model[name] for name, ours in PROCESS.items() if name in model}
    if old["timesteps"]:
        process |= {"loss_type": old["kind"], "solver": "ddpm", "steps": 250}
    return "diffusion.dit", options | {"process": process}


def _official(old: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    channels, outputs = old["channels"], old["outputs"] or old["channels"]
    _check("dit_official", old, OFFICIAL | {"outputs": old["outputs"] if outputs == channels else 2 * channels})
    _check("dit_official", block, BLOCK | LAYER | {"mlp": "gelu"})
    return _discrete("dit_official", old)


def _diffusers(old: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    _check("dit", old, DIFFUSERS)
    _check("dit", block, BLOCK | LAYER | {name: block[name] for name in BLOCK_OPTIONS})
    own = {name: block[name] for name in BLOCK_OPTIONS}
    own["mlp_norm_eps"] = own["mlp_norm_eps"] or block["norm_eps"]
    return _discrete("dit", old) | own | {"outputs": old["outputs"] or old["channels"]}


def _discrete(source: str, old: dict[str, Any]) -> dict[str, Any]:
    """Sizes, training and process of a class-conditional network of discrete timesteps."""
    for name in ("timesteps", "classes"):
        if not old[name]:
            raise _refusal(source, f"{name} 0")
    options = {name: old[name] for name in SIZES} | {"posterior": old["posterior"], "cond_drop_prob": old["drop_text"]}
    options["hidden"] = old["hidden"] or round_up(old["width"] * 8 / 3)
    process = {name: old[name] for name in ("schedule", "timesteps", "variance")}
    process |= {"prediction_type": old["kind"], "loss_type": old["kind"]}
    return options | {"process": process | {"learned_variance": old["outputs"] == 2 * old["channels"]}}


def _check(source: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises UserError for an option that is not as expected."""
    for name, value in expected.items():
        if found[name] != value:
            raise _refusal(source, f"{name} {found[name]!r}")


def _refusal(source: str, option: str) -> UserError:
    command = f"hybridgen convert {source} IN OUT"
    return UserError(
        f"diffusion.dit with {option}, which an earlier version had, is no longer supported: "
        f"import official weights again ({command}), or train again"
    )
