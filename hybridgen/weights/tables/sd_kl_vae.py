"""The autoencoders of Stable Diffusion, SD3 and Flux: class `AutoencoderKL` of diffusers.

SD3's and Flux's have 16 channels, a shift, and no 1x1 convolutions around the latent. Older files name the projections
of attention query, key, value and proj_attn; such files are read and written too.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.tables import About, Plan, _residual

FAMILY = "tokenizers.kl"

BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
BLOCKS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
WIDE = BLOCKS | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}

ABOUT = About(
    "autoencoders of Stable Diffusion, SD3 and Flux",
    "by checkpoint: CreativeML Open RAIL-M (SD), Stability Community (SD3), Apache-2.0 (Flux schnell)",
    "f8: latents of 4 or 16 channels, 84 M parameters",
    {
        "SD": BLOCKS | {"scaling_factor": 0.18215},
        "SDXL": BLOCKS | {"scaling_factor": 0.13025, "sample_size": 1024},
        "SD3": WIDE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "Flux": WIDE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    },
)
NAMES = _residual.Names(
    "encoder.down_blocks.{l}",
    "decoder.up_blocks.{l}",  # counted from the lowest resolution
    ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    block="resnets",
    shortcut="conv_shortcut",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    attend="attentions",
    norm="conv_norm_out",
    place_norm="group_norm",
    qkv=("to_q", "to_k", "to_v"),
    out="to_out.0",
    convs=False,
)
OLD = NAMES._replace(qkv=("query", "key", "value"), out="proj_attn")


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        options.only("_class_name", "AutoencoderKL")
        options.skip("_diffusers_version", "_name_or_path", "force_upcast")
        channels = options.counts("block_out_channels", (64,))
        down, up = (
            _attending(options, key, names, len(channels))
            for key, names in (
                ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
                ("up_block_types", ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
            )
        )
        width, quant = options.count("latent_channels", 4), options.flag("use_quant_conv", True)
        residual = {
            "attend": down,
            "decoder_attend": tuple(sorted(len(channels) - 1 - level for level in up)),
            "groups": options.count("norm_num_groups", 32),
            "activation": options.only("act_fn", "silu", "swish", "mish", "gelu", "relu"),
            "quant": -1 if quant else 0,
            "post_quant": options.flag("use_post_quant_conv", True),
            "read": options.count("in_channels", 3),
            "painted": options.count("out_channels", 3),
        }
        options.only("latents_mean", None)
        options.only("latents_std", None)
        side = options.take("sample_size", 32)
        side = max(side) if isinstance(side, list | tuple) and side else side
        if type(side) is not int or side < 1:
            raise UserError(f"config: sample_size {side!r} is not the side of a picture")
        shift = options.take("shift_factor", None)
        model = {"resolution": side, "channels": channels, "width": width, "residual": residual}
        model |= {"blocks": options.count("layers_per_block", 1), "scale": options.number("scaling_factor", 0.18215)}
        model |= {"shift": options.number("shift_factor") if shift is not None else 0.0}
        model |= {"attention": options.flag("mid_block_add_attention", True)}
    old = any(name.endswith(".proj_attn.weight") for name in shapes)
    rules = _residual.rules(OLD if old else NAMES, {"l": len(channels)})
    return Plan(FAMILY, model, rules, {"image": (side, side, residual["read"])})


def _attending(options: Options, key: str, names: tuple[str, str], levels: int) -> tuple[int, ...]:
    """The indices of the block type with attention in a list of block types."""
    kinds = options.take(key, names[:1])
    if not isinstance(kinds, list | tuple) or len(kinds) != levels or not all(kind in names for kind in kinds):
        raise UserError(f"config: {key} {kinds!r} is not supported, only {levels} of {', '.join(names)}")
    return tuple(i for i, kind in enumerate(kinds) if kind == names[1])
