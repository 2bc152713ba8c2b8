"""The transformer of VQGAN (Esser et al. 2021): class `GPT` of taming/modules/transformer/mingpt.py.

The config has the arguments of `GPT`, or is `model.params` of the published YAML (class `Net2NetTransformer`), which
also gives the condition: a class (`Labelator`), nothing (`SOSProvider`), or codes of another picture. If it describes
`GPT` only, the condition is one token, or as many tokens as the image if `block_size` is that of two squares.
"""

import math
from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Part, Rule, heads, matrix, qkv
from hybridgen.weights.tables import About, Plan

FAMILY = "ar.taming"


def _preset(gpt: tuple[int, ...], condition: dict[str, Any]) -> dict[str, Any]:
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return {"transformer_config": {"params": dict(zip(names, gpt, strict=True))}, "cond_stage_config": condition}


CLASSES = {"target": "Labelator", "params": {"n_classes": 1000}}
ABOUT = About(
    "transformer of VQGAN (taming-transformers)",
    "MIT",
    "1.4 B for ImageNet classes; 310 M with a picture as the condition",
    {
        "imagenet-class": _preset((16384, 256, 48, 24, 1536), CLASSES),
        "imagenet-depth": _preset((1024, 512, 24, 16, 1024), {"target": "VQModel"}),
    },
    ("state_dict.transformer", "transformer", "state_dict"),
)
LAYER, OURS = "blocks.{i}", "params/blocks/layers"
NAMES = ("query", "key", "value")


def _up_bias(x: Any) -> tuple[Part]:
    return (Part(x[0], x.shape[1:]),)


def _norm(official: str, ours: str, stack: str = "") -> tuple[Rule, Rule]:
    weight = Rule(f"{official}.weight", f"{ours}/scale", stack=stack)
    return weight, Rule(f"{official}.bias", f"{ours}/bias", stack=stack)


RULES = (
    Rule("tok_emb.weight", "params/tokens/table"),
    Rule("pos_emb", "params/position/table", lambda x: (x[None],)),
    Rule(tuple(f"{LAYER}.attn.{name}.weight" for name in NAMES), f"{OURS}/attention/qkv/kernel", qkv, stack="i"),
    Rule(tuple(f"{LAYER}.attn.{name}.bias" for name in NAMES), f"{OURS}/attention/qkv/bias", qkv, stack="i"),
    Rule(f"{LAYER}.attn.proj.weight", f"{OURS}/attention/out/kernel", heads, stack="i"),
    Rule(f"{LAYER}.attn.proj.bias", f"{OURS}/attention/out/bias", stack="i"),
    Rule(f"{LAYER}.mlp.0.weight", f"{OURS}/mlp/up/kernel", lambda x: (x[:, 0].T,), stack="i"),
    Rule(f"{LAYER}.mlp.0.bias", f"{OURS}/mlp/up/bias", _up_bias, stack="i"),
    Rule(f"{LAYER}.mlp.2.weight", f"{OURS}/mlp/down/kernel", matrix, stack="i"),
    Rule(f"{LAYER}.mlp.2.bias", f"{OURS}/mlp/down/bias", stack="i"),
    *_norm(f"{LAYER}.ln1", f"{OURS}/attention_norm", "i"),
    *_norm(f"{LAYER}.ln2", f"{OURS}/mlp_norm", "i"),
    *_norm("ln_f", "params/norm"),
    Rule("head.weight", "params/head/kernel", matrix),
)
DROPPED = (r"blocks\.\d+\.attn\.mask",)
NET = ("first_stage_config", "first_stage_key", "cond_stage_key", "ckpt_path", "ignore_keys", "pkeep")
NET += ("downsample_cond_size", "base_learning_rate")


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    kind, classes = "", 0
    if "transformer_config" in config:
        config, kind, classes = network(config)
    with Options(config) as options:
        width, count, block = options.count("n_embd", 256), options.count("n_head", 8), options.count("block_size")
        if width % count:
            raise UserError(f"config: n_embd {width} does not divide by n_head {count}")
        model = {"vocab": options.count("vocab_size"), "width": width, "heads": count, "block_size": block}
        model |= {"depth": options.count("n_layer", 12), "unmasked": options.count("n_unmasked", 0, least=0)}
        options.skip("embd_pdrop", "resid_pdrop", "attn_pdrop")
    if classes > model["vocab"]:
        raise UserError(f"config: n_classes {classes} must not exceed vocab_size {model['vocab']}")
    grid, cond_length = layout(block, kind)
    model |= {"grid": grid, "classes": classes, "cond_length": cond_length}
    draw = {"guidance": 1.0, "guidance_schedule": "constant", "temperature": 1.0, "top_k": 600, "top_p": 0.92}
    inputs = {"image": (16 * grid[0], 16 * grid[1], 3)}
    return Plan(FAMILY, model, RULES, inputs, DROPPED, {"prior": draw}, DROPPED)


def network(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, int]:
    """`Net2NetTransformer` -> (arguments of `GPT`, class of the condition, number of classes)."""
    with Options(config) as options:
        with Options(options.take("transformer_config"), "transformer_config") as inner:
            gpt = inner.take("params")
            inner.skip("target")
        with Options(options.take("cond_stage_config"), "cond_stage_config") as inner:
            kind = str(inner.take("target")).rpartition(".")[2]
            given = inner.take("params", {})
        permuter = options.take("permuter_config", None)
        if permuter is not None and not str(dict(permuter).get("target")).endswith(".Identity"):
            raise UserError("config: permuter_config is not supported, only the raster order (Identity)")
        if options.flag("unconditional", False):
            kind = "SOSProvider"
        options.skip(*NET)
        options.only("sos_token", 0)
    if not isinstance(gpt, Mapping):
        raise UserError("transformer_config: params is not a mapping from option names to values")
    if kind != "Labelator":
        return gpt, kind, 0
    with Options(given, "cond_stage_config.params") as labels:
        classes = labels.count("n_classes")
        labels.skip("quantize_interface")
    return gpt, kind, classes


def layout(block: int, kind: str) -> tuple[tuple[int, int], int]:
    """(grid of image tokens, number of condition tokens) for `block` positions; the last token is never an input."""
    one, two = math.isqrt(block), math.isqrt(block // 2)
    if kind not in ("Labelator", "SOSProvider") and 2 * two**2 == block:
        return (two, two), two**2
    return ((one, one) if one**2 == block else (1, block)), 1
