"""DiT of diffusers: class `DiTTransformer2DModel`, the family diffusion.dit_diffusers.

The config does not contain the process, which is that of the published schedulers: 1000 timesteps of linear betas.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, matrix, qkv
from hybridgen.weights.tables import About, Plan, _dit

FAMILY = "diffusion.dit_diffusers"

MLPS = {"gelu-approximate": "gelu", "gelu": "gelu_exact", "geglu": "geglu_exact", "geglu-approximate": "quick_gelu"}
MLPS |= {"swiglu": "swiglu", "linear-silu": "silu"}
XL = {"out_channels": 8}

ABOUT = About(
    "DiT of diffusers, class-conditional on ImageNet",
    "CC-BY-NC 4.0",
    "XL/2 at 256 and 512: 750 M parameters, 75 M of them copies of the embedders in every block",
    {"DiT-XL-2-256": XL, "DiT-XL-2-512": XL | {"sample_size": 64}},
)
OWN = "transformer_blocks.{i}.norm1.emb"


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        options.only("_class_name", "DiTTransformer2DModel", "Transformer2DModel")  # as older files call it
        options.skip("_diffusers_version", "_name_or_path", "dropout", "norm_num_groups", "upcast_attention")
        for name in ("cross_attention_dim", "num_vector_embeds"):
            options.only(name, None)
        for name in ("double_self_attention", "only_cross_attention", "use_linear_projection"):
            options.only(name, False)
        options.only("norm_type", "ada_norm_zero")
        heads, head = options.count("num_attention_heads", 16), options.count("attention_head_dim", 72)
        side, patch = options.count("sample_size", 32), options.count("patch_size", 2)
        width, channels = heads * head, options.count("in_channels", 4)
        if width % 4 or side % patch:
            raise UserError(f"config: width {width} must divide by 4, and sample_size {side} by patch_size {patch}")
        outputs = channels if options.take("out_channels", None) is None else options.count("out_channels")
        mlp, biased = MLPS[options.only("activation_fn", *MLPS)], options.flag("attention_bias", True)
        affine = options.flag("norm_elementwise_affine", False)
        model = {"resolution": side, "channels": channels, "outputs": outputs, "patch": patch, "width": width}
        model |= {"depth": options.count("num_layers", 28), "heads": heads, "hidden": 4 * width, "mlp": mlp}
        model |= {"qkv_bias": biased, "mlp_norm_affine": affine, "mlp_norm_eps": options.number("norm_eps", 1e-5)}
        model |= {"classes": options.count("num_embeds_ada_norm", 1000)}
        model["process"] = {"learned_variance": outputs == 2 * channels}
    rules = rules_of(patch, biased, affine, gate="glu" in mlp)
    return Plan(FAMILY, model, rules, {"image": (side, side, channels)}, sample=_dit.sampling(True, 0))


def rules_of(patch: int, biased: bool, affine: bool, gate: bool) -> tuple[Rule, ...]:
    """Rules of all tensors; the options say which biases and scales exist."""
    one, layers = "transformer_blocks.{i}", "params/blocks/layers"
    return (
        *_dit.linear("pos_embed.proj", "patches", _dit.patches(patch)),
        *_dit.linear(f"{OWN}.timestep_embedder.linear_1", "time/hidden", matrix, stack="i"),
        *_dit.linear(f"{OWN}.timestep_embedder.linear_2", "time/out", matrix, stack="i"),
        Rule(f"{OWN}.class_embedder.embedding_table.weight", "params/labels/table", stack="i"),
        *(
            Rule(tuple(f"{one}.attn1.to_{x}.{kind}" for x in "qkv"), f"{layers}/attention/qkv/{ours}", qkv, stack="i")
            for kind, ours in (("weight", "kernel"), ("bias", "bias"))[: 1 + biased]
        ),
        *_dit.block(one, "norm1.linear", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", gate),
        *(
            Rule(f"{one}.norm3.{kind}", f"{layers}/mlp_norm/{ours}", stack="i")
            for kind, ours in (("weight", "scale"), ("bias", "bias"))[: 2 * affine]
        ),
        *_dit.linear("proj_out_1", "modulation", _dit.rows, _dit.rows),
        *_dit.linear("proj_out_2", "pixels"),
    )
