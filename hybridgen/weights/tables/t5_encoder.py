"""The encoder of T5, T5 1.1 and Flan-T5: class `T5EncoderModel` of transformers, or the encoder of a whole T5.

A file names the token embedding `shared`, `encoder.embed_tokens`, or both (one tensor twice).
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, heads, matrix, qkv
from hybridgen.weights.tables import About, Plan, _transformers

FAMILY = "text.t5"

PUBLISHED = {"feed_forward_proj": "gated-gelu", "d_kv": 64, "num_layers": 24, "vocab_size": 32128}

ABOUT = About(
    "text encoders of T5: Imagen, DeepFloyd, PixArt, SD3, Flux",
    "Apache-2.0",
    "4.76 G (XXL), 1.22 G (XL)",
    {
        "T5-XXL": PUBLISHED | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
        "Flan-T5-XL": PUBLISHED | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    },
)
TABLE = ("shared.weight", "encoder.embed_tokens.weight")
OTHERS = (r"decoder\..+", r"lm_head\.weight")
LONGEST = 512  # training truncated texts to this length; the encoder itself has no limit


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        _transformers.common(options, "t5")
        buckets = options.count("relative_attention_num_buckets", 32, least=4)
        farthest = options.count("relative_attention_max_distance", 128)
        if farthest <= buckets // 4:
            key = f"relative_attention_max_distance {farthest}"
            raise UserError(f"config: {key} must be above a quarter of relative_attention_num_buckets {buckets}")
        gated, mlp = _feed_forward(options)
        model = {
            "vocab": options.count("vocab_size", 32128),
            "width": options.count("d_model", 512),
            "depth": options.count("num_layers", 6),
            "heads": options.count("num_heads", 8),
            "head_width": options.count("d_kv", 64),
            "hidden": options.count("d_ff", 2048),
            "mlp": mlp,
            "norm_eps": options.number("layer_norm_epsilon", 1e-6),
            "buckets": buckets,
            "farthest": farthest,
        }
        options.skip("num_decoder_layers", "dropout_rate", "classifier_dropout", "scale_decoder_outputs")
        options.skip("eos_token_id", "tie_word_embeddings", "n_positions", "output_past")
    names = [name for name in TABLE if name in shapes] or TABLE[:1]
    return Plan(FAMILY, model, _rules(tuple(names), gated), {"text": (LONGEST,)}, OTHERS)


def _feed_forward(options: Options) -> tuple[bool, str]:
    """(gated, our name). "gated-gelu" is the tanh approximation, unlike "gelu"."""
    known = [f"{begin}{name}" for begin in ("", "gated-") for name in _transformers.ACTIVATIONS]
    gated, _, name = f"-{options.only('feed_forward_proj', 'relu', *known)}".rpartition("-")
    name = "gelu_new" if gated and name == "gelu" else name
    options.only("dense_act_fn", name)
    options.only("is_gated_act", bool(gated))
    return bool(gated), _transformers.ACTIVATIONS[name][bool(gated)]


def _rules(table: tuple[str, ...], gated: bool) -> tuple[Rule, ...]:
    attention, forward = (f"encoder.block.{{i}}.layer.{part}" for part in ("0", "1"))
    ours = "params/blocks/layers"
    up = ("wi_0", "wi_1") if gated else ("wi",)
    return (
        Rule(table[0], "params/words/table", copies=table[1:]),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "params/relative"),
        Rule(
            tuple(f"{attention}.SelfAttention.{part}.weight" for part in "qkv"),
            f"{ours}/attention/qkv/kernel",
            qkv,
            stack="i",
        ),
        Rule(f"{attention}.SelfAttention.o.weight", f"{ours}/attention/out/kernel", heads, stack="i"),
        Rule(f"{attention}.layer_norm.weight", f"{ours}/attention_norm/scale", stack="i"),
        Rule(
            tuple(f"{forward}.DenseReluDense.{part}.weight" for part in up),
            f"{ours}/mlp/up/kernel",
            _transformers.branches,
            stack="i",
        ),
        Rule(f"{forward}.DenseReluDense.wo.weight", f"{ours}/mlp/down/kernel", matrix, stack="i"),
        Rule(f"{forward}.layer_norm.weight", f"{ours}/mlp_norm/scale", stack="i"),
        Rule("encoder.final_layer_norm.weight", "params/norm/scale"),
    )
