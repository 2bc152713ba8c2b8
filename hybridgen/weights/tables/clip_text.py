"""CLIP's text tower, of OpenAI and of OpenCLIP: classes `CLIPTextModel` and `CLIPTextModelWithProjection` of
transformers, and the text half of a `CLIPModel`.

In files of older versions, and in those with the projection, names begin with "text_model.". An end token of 2, as in
older configs, stands for the largest id of the text.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, heads, matrix, qkv
from hybridgen.weights.tables import About, Plan, _transformers

FAMILY = "text.clip"

PUBLISHED = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}


def _size(width: int, depth: int, count: int, act: str) -> dict[str, Any]:
    """A published config; the pooled vector has the width of the tower."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width, "hidden_act": act}
    return PUBLISHED | sizes | {"num_hidden_layers": depth, "num_attention_heads": count}


ABOUT = About(
    "text towers of CLIP: Stable Diffusion, SDXL, SD3, Flux",
    "by checkpoint: MIT (OpenAI's, OpenCLIP's)",
    "123 M (L), 354 M (H), 695 M (bigG)",
    {
        "CLIP-L": _size(768, 12, 12, "quick_gelu"),
        "CLIP-H": _size(1024, 24, 16, "gelu"),
        "CLIP-bigG": _size(1280, 32, 20, "gelu"),
    },
    roots=("cond_stage_model.transformer", "conditioner.embedders.0.transformer"),
)
OTHERS = (r"vision_model\..+", r"visual_projection\.weight", "logit_scale")


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    whole = isinstance(config, Mapping) and config.get("text_config") is not None
    with Options(config["text_config"] if whole else config, "text_config" if whole else "config") as options:
        model, length = _model(options)
        projection = options.count("projection_dim", 512)
        bare = options.take("architectures", None) == ["CLIPTextModel"]
    if whole:
        projection = _of_both(config)
    if not (bare if not shapes else "text_projection.weight" not in shapes):
        model["projection"] = projection
    begin = "" if "embeddings.token_embedding.weight" in shapes else "text_model."
    return Plan(FAMILY, model, _rules(begin), {"text": (length,)}, (rf"{begin}embeddings\.position_ids", *OTHERS))


def _model(options: Options) -> tuple[dict[str, Any], int]:
    """(options of the model without its projection, the longest text)."""
    _transformers.common(options, "clip_text_model", "clip")
    width, count = options.count("hidden_size", 512), options.count("num_attention_heads", 8)
    if width % count:
        raise UserError(f"config: hidden_size {width} does not divide over {count} num_attention_heads")
    length, end = options.count("max_position_embeddings", 77), options.count("eos_token_id", 49407, least=0)
    model = {
        "vocab": options.count("vocab_size", 49408),
        "length": length,
        "width": width,
        "depth": options.count("num_hidden_layers", 12),
        "heads": count,
        "hidden": options.count("intermediate_size", 2048),
        "activation": _transformers.activation(options, "hidden_act", "quick_gelu", gated=False),
        "norm_eps": options.number("layer_norm_eps", 1e-5),
        "end": -1 if end == 2 else end,
    }
    options.skip("tie_word_embeddings")
    return model, length


def _of_both(config: Mapping[str, Any]) -> int:
    """Width of the projection of a `CLIPModel`, whose config has both halves; the vision half is not checked."""
    with Options(config) as options:
        options.only("model_type", "clip")
        options.skip("text_config", "vision_config", "text_config_dict", "vision_config_dict", "logit_scale_init_value")
        options.skip("tie_word_embeddings", *_transformers.SILENT)
        return options.count("projection_dim", 512)


def _rules(begin: str) -> tuple[Rule, ...]:
    layer, ours = f"{begin}encoder.layers.{{i}}", "params/blocks/layers"
    qkv_names = tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
    rules = [
        Rule(f"{begin}embeddings.token_embedding.weight", "params/words/table"),
        Rule(f"{begin}embeddings.position_embedding.weight", "params/position"),
        Rule(f"{layer}.self_attn.out_proj.weight", f"{ours}/attention/out/kernel", heads, stack="i"),
        Rule(f"{layer}.self_attn.out_proj.bias", f"{ours}/attention/out/bias", stack="i"),
        Rule(f"{layer}.mlp.fc1.weight", f"{ours}/mlp/up/kernel", _transformers.branches, stack="i"),
        Rule(f"{layer}.mlp.fc1.bias", f"{ours}/mlp/up/bias", _transformers.branches, stack="i"),
        Rule(f"{layer}.mlp.fc2.weight", f"{ours}/mlp/down/kernel", matrix, stack="i"),
        Rule(f"{layer}.mlp.fc2.bias", f"{ours}/mlp/down/bias", stack="i"),
        Rule("text_projection.weight", "params/project/kernel", matrix),
    ]
    for official, kind in (("weight", "kernel"), ("bias", "bias")):
        names = tuple(f"{name}.{official}" for name in qkv_names)
        rules.append(Rule(names, f"{ours}/attention/qkv/{kind}", qkv, stack="i"))
    for official, kind in (("weight", "scale"), ("bias", "bias")):
        rules.append(Rule(f"{layer}.layer_norm1.{official}", f"{ours}/attention_norm/{kind}", stack="i"))
        rules.append(Rule(f"{layer}.layer_norm2.{official}", f"{ours}/mlp_norm/{kind}", stack="i"))
        rules.append(Rule(f"{begin}final_layer_norm.{official}", f"params/norm/{kind}"))
    return tuple(rules)
