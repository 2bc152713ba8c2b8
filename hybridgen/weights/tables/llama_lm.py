"""Llama 1 to 3.2 and models of the same architecture: class `LlamaForCausalLM` of transformers.

A head tied to the token embedding is the same tensor; some files contain it twice.

Rotary frequencies are given by `rope_parameters`, in older configs by `rope_theta` and `rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, heads, matrix, qkv
from hybridgen.weights.tables import About, Plan, _rotary, _transformers

FAMILY = "text.lm"

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LONG = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5}
SMALL = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}

ABOUT = About(
    "language models with the Llama architecture",
    "by checkpoint: Llama Community Licence (Llama 2, 3, 3.1, 3.2)",
    "6.74 G (2 7B), 8.03 G (3.1 8B), 1.24 G (3.2 1B)",
    {
        "Llama-2-7B": WIDE | {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 4096},
        "Llama-3.1-8B": WIDE | LONG | {"intermediate_size": 14_336, "rope_parameters": LLAMA3 | {"factor": 8.0}},
        "Llama-3.2-1B": SMALL
        | LONG
        | {"intermediate_size": 8192, "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    },
)
HEAD = "lm_head.weight"


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        _transformers.common(options, "llama")
        options.skip("eos_token_id", "pretraining_tp")
        width, count = options.count("hidden_size", 4096), options.count("num_attention_heads", 32)
        if width % count:
            raise UserError(f"config: hidden_size {width} does not divide over {count} num_attention_heads")
        length = options.count("max_position_embeddings", 2048)
        head = _transformers.optional(options, "head_dim", width // count)
        base, scaling = _rotary.scaling(options, length, head)
        model = {
            "text_vocab": options.count("vocab_size", 32_000),
            "text_length": length,
            "width": width,
            "depth": options.count("num_hidden_layers", 32),
            "heads": count,
            "head_width": head,
            "kv_heads": _transformers.optional(options, "num_key_value_heads", None),
            "hidden": options.count("intermediate_size", 11_008),
            "mlp": _transformers.activation(options, "hidden_act", "silu", gated=True),
            "bias": options.flag("attention_bias", False),
            "mlp_bias": options.flag("mlp_bias", False),
            "norm_eps": options.number("rms_norm_eps", 1e-6),
            "base": base,
            "scaling": scaling,
            "tied": options.flag("tie_word_embeddings", False),
        }
    dropped = (r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq",)
    copies = tuple({HEAD} & set(shapes)) if model["tied"] else ()
    rules = (Rule("model.embed_tokens.weight", "params/tokens/table", copies=copies), *_rules())
    rules += () if model["tied"] else (Rule(HEAD, "params/head/kernel", matrix),)
    return Plan(FAMILY, model, rules, {"text": (length,)}, dropped, kept=dropped)


def _rules() -> tuple[Rule, ...]:
    layer, ours = "model.layers.{i}", "params/blocks/layers"
    rules = [
        Rule("model.norm.weight", "params/norm/scale"),
        Rule(f"{layer}.input_layernorm.weight", f"{ours}/attention_norm/scale", stack="i"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{ours}/mlp_norm/scale", stack="i"),
        Rule(f"{layer}.self_attn.o_proj.weight", f"{ours}/attention/out/kernel", heads, stack="i"),
        Rule(f"{layer}.self_attn.o_proj.bias", f"{ours}/attention/out/bias", stack="i"),
        Rule(f"{layer}.mlp.down_proj.weight", f"{ours}/mlp/down/kernel", matrix, stack="i"),
        Rule(f"{layer}.mlp.down_proj.bias", f"{ours}/mlp/down/bias", stack="i"),
    ]
    for official, kind in (("weight", "kernel"), ("bias", "bias")):
        names = tuple(f"{layer}.self_attn.{part}_proj.{official}" for part in "qkv")
        rules.append(Rule(names, f"{ours}/attention/qkv/{kind}", qkv, stack="i"))
        names = tuple(f"{layer}.mlp.{part}_proj.{official}" for part in ("gate", "up"))
        rules.append(Rule(names, f"{ours}/mlp/up/{kind}", _transformers.branches, stack="i"))
    return tuple(rules)
