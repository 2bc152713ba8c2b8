"""LlamaGen's transformer (Sun et al. 2024): class `Transformer` of autoregressive/models/gpt.py.

The config has the fields of its `ModelArgs`; `model_type` is "c2i" (class-conditional) or "t2i" (text-conditional).
Official heads rotate the pairs (2i, 2i + 1), ours (i, i + k/2), so the rows of queries and keys are reordered.
"""

import math
from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, heads, interleaved_qkv, matrix
from hybridgen.weights.tables import About, Plan

FAMILY = "ar.llamagen"

SIZES = {  # layers, heads, width
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


def _preset(size: str, resolution: int, **changes: Any) -> dict[str, Any]:
    config = dict(zip(("n_layer", "n_head", "dim"), SIZES[size], strict=True))
    return config | {"vocab_size": 16384, "block_size": (resolution // 16) ** 2, "model_type": "c2i"} | changes


TEXT = {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048}
PRESETS = {f"c2i-{size}-{resolution}": _preset(size, resolution) for size in SIZES for resolution in (256, 384)}
PRESETS |= {f"t2i-XL-{resolution}": _preset("XL", resolution, **TEXT) for resolution in (256, 512)}

ABOUT = About(
    "LlamaGen's transformer over image tokens, conditioned on a class or a text",
    "MIT",
    "B 111 M, L 343 M, XL 775 M, XXL 1.4 B, 3B; text-conditional XL",
    PRESETS,
    ("model", "module", "state_dict"),
)
LAYER, OURS = "layers.{i}", "params/blocks/layers"
RULES = (
    Rule("tok_embeddings.weight", "params/tokens/table"),
    Rule("cls_embedding.embedding_table.weight", "params/start/table"),
    Rule("cls_embedding.cap_proj.fc1.weight", "params/caption/up/kernel", matrix),
    Rule("cls_embedding.cap_proj.fc2.weight", "params/caption/down/kernel", matrix),
    Rule("cls_embedding.uncond_embedding", "params/caption/null"),
    Rule(f"{LAYER}.attention.wqkv.weight", f"{OURS}/attention/qkv/kernel", interleaved_qkv, stack="i"),
    Rule(f"{LAYER}.attention.wo.weight", f"{OURS}/attention/out/kernel", heads, stack="i"),
    Rule(
        (f"{LAYER}.feed_forward.w1.weight", f"{LAYER}.feed_forward.w3.weight"),
        f"{OURS}/mlp/up/kernel",
        lambda x: (x[:, 0].T, x[:, 1].T),  # gate, value
        stack="i",
    ),
    Rule(f"{LAYER}.feed_forward.w2.weight", f"{OURS}/mlp/down/kernel", matrix, stack="i"),
    Rule(f"{LAYER}.attention_norm.weight", f"{OURS}/attention_norm/scale", stack="i"),
    Rule(f"{LAYER}.ffn_norm.weight", f"{OURS}/mlp_norm/scale", stack="i"),
    Rule("norm.weight", "params/norm/scale"),
    Rule("output.weight", "params/head/kernel", matrix),
)
DROPPED = (r"layers\.\d+\.attention\.kv_cache\.[kv]_cache", "freqs_cis", "causal_mask")
TRAINING = ("initializer_range", "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p")
TRAINING += ("drop_path_rate", "max_batch_size", "max_seq_len")


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        dim, count, block = options.count("dim", 4096), options.count("n_head", 32), options.count("block_size", 256)
        side, kv = math.isqrt(block), options.take("n_kv_head", None)
        if dim % count or dim // count % 4:
            raise UserError(f"config: dim {dim} does not divide into n_head {count} heads with a width divisible by 4")
        if side**2 != block:
            raise UserError(f"config: block_size {block} is not a square number of tokens")
        model = {"vocab": options.count("vocab_size", 16384), "grid": (side, side), "width": dim, "heads": count}
        model |= {"depth": options.count("n_layer", 32), "kv_heads": None if kv is None else options.count("n_kv_head")}
        model |= {"hidden": hidden(options, dim), "norm_eps": options.number("norm_eps", 1e-5)}
        model |= {"rope_base": options.number("rope_base", 10000.0)}
        model |= {"cond_drop_prob": options.number("class_dropout_prob", 0.1)}
        text = options.only("model_type", "c2i", "t2i") == "t2i"
        if text:
            options.skip("num_classes")
            model |= {"text_length": options.count("cls_token_num", 1), "padding_sees_itself": True}
            model |= {"text_width": options.count("caption_dim", 2048)}
            # the number of rows that official code always makes, even if it reads fewer
            model |= {"null_length": (*shapes.get("cls_embedding.uncond_embedding", ()), 120)[0]}
        else:
            options.only("cls_token_num", 1)
            options.skip("caption_dim")
            model |= {"classes": options.count("num_classes", 1000)}
        options.skip(*TRAINING)
    draw = {"guidance": 7.5, "top_k": 1000} if text else {"guidance": 4.0, "top_k": 2000}
    draw |= {"guidance_schedule": "constant", "temperature": 1.0, "top_p": 1.0}
    if not text and not model["cond_drop_prob"]:
        draw["guidance"] = 1.0  # the table has no row for the dropped class
    inputs = {"image": (16 * side, 16 * side, 3)}  # image size of its tokenizer VQ-16
    return Plan(FAMILY, model, RULES, inputs, DROPPED, {"prior": draw})


def hidden(options: Options, dim: int) -> int:
    """Width of the feed-forward layers, rounded as in official code."""
    size, multiple, factor = int(2 * (4 * dim) / 3), options.count("multiple_of", 256), None
    if options.take("ffn_dim_multiplier", None) is not None:
        factor = options.number("ffn_dim_multiplier")
        size = int(factor * size)
    if size < 1:
        raise UserError(f"config: ffn_dim_multiplier {factor} makes the feed-forward width 0")
    return -(-size // multiple) * multiple
