"""DiT (Peebles & Xie 2022): class `DiT` of facebookresearch/DiT models.py, as in the files DiT-XL-2-*.pt.

The config has the arguments of the class and, under `diffusion`, those of `create_diffusion`; missing arguments have
their official defaults. Sampling follows the official script: 250 ancestral steps, guidance at scale 4 of three of the
latent's channels.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule
from hybridgen.weights.tables import About, Plan, _dit

FAMILY = "diffusion.dit_official"

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "squaredcos"}


def preset(size: str, patch: int, side: int) -> dict[str, Any]:
    """A size of the paper, on latents of `side`."""
    depth, width, heads = SIZES[size]
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch, "input_size": side}


ABOUT = About(
    "DiT, class-conditional on ImageNet",
    "CC-BY-NC 4.0",
    "XL/2 at 256 and 512: 675 M parameters; S, B and L at patch 2, 4 and 8 as in the paper",
    {"DiT-XL-2-256": preset("XL", 2, 32), "DiT-XL-2-512": preset("XL", 2, 64)}
    | {f"DiT-{size}-{patch}": preset(size, patch, 32) for size in SIZES for patch in (2, 4, 8)},
    ("ema", "model", "state_dict"),
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        options.only("_class_name", "DiT")
        options.skip("_source")
        side, patch = options.count("input_size", 32), options.count("patch_size", 2)
        channels = options.count("in_channels", 4)
        width, heads = options.count("hidden_size", 1152), options.count("num_heads", 16)
        if width % heads or width % 4 or side % patch:
            raise UserError(
                f"config: hidden_size {width} must divide by 4 and num_heads {heads}, input_size {side} by {patch}"
            )
        learned, drop = options.flag("learn_sigma", True), options.number("class_dropout_prob", 0.1)
        hidden = int(width * options.number("mlp_ratio", 4.0))
        model = {"resolution": side, "channels": channels, "patch": patch, "width": width, "heads": heads}
        model |= {"depth": options.count("depth", 28), "hidden": hidden, "classes": options.count("num_classes", 1000)}
        model |= {"cond_drop_prob": drop, "process": process(options.take("diffusion", {}), learned)}
    rules = (
        *_dit.linear("x_embedder.proj", "patches", _dit.patches(patch)),
        *_dit.linear("t_embedder.mlp.0", "time/hidden"),
        *_dit.linear("t_embedder.mlp.2", "time/out"),
        Rule("y_embedder.embedding_table.weight", "params/labels/table"),
        Rule("pos_embed", "params/position", lambda x: (x[None],)),
        *_dit.linear("blocks.{i}.attn.qkv", "blocks/layers/attention/qkv", _dit.fused, _dit.fused, "i"),
        *_dit.block("blocks.{i}", "adaLN_modulation.1", "attn.proj", "mlp.fc1", "mlp.fc2"),
        *_dit.linear("final_layer.adaLN_modulation.1", "modulation", _dit.rows, _dit.rows),
        *_dit.linear("final_layer.linear", "pixels"),
    )
    sample = _dit.sampling(drop > 0, 3, model["process"]["timesteps"])
    return Plan(FAMILY, model, rules, {"image": (side, side, channels)}, sample=sample)


def process(config: Any, learned: bool) -> dict[str, Any]:
    """The process that the arguments of `create_diffusion` describe."""
    with Options(config, "diffusion") as options:
        options.skip("timestep_respacing")  # the number of sampling steps is not part of the model
        if options.flag("learn_sigma", learned) != learned:
            raise UserError(f"diffusion: learn_sigma must be that of the model, {learned}")
        options.only("use_kl", False)
        options.only("rescale_learned_sigmas", False)
        predicted = "x" if options.flag("predict_xstart", False) else "eps"
        return {
            "timesteps": options.count("diffusion_steps", 1000, least=2),
            "schedule": SCHEDULES[options.only("noise_schedule", *SCHEDULES)],
            "variance": "small" if options.flag("sigma_small", False) else "large",
            "learned_variance": learned,
            "prediction_type": predicted,
            "loss_type": predicted,
        }
