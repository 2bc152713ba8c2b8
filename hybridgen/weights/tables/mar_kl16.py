"""KL-16, the autoencoder of MAR (Li et al. 2024): class `AutoencoderKL` of models/vae.py.

The official class takes `embed_dim`, `ch_mult` and `use_variational`; options that its encoder and decoder leave at
their defaults may also be given. By default the decoder has attention only in the middle, unlike the encoder.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.weights.options import Options
from hybridgen.weights.tables import About, Plan, _residual

FAMILY = "tokenizers.kl"

SCALE = 0.2325  # factor by which MAR's trainer scales latents

ABOUT = About(
    "KL-16 of MAR",
    "MIT",
    "f16: latents of 16 channels, 67 M parameters",
    {"KL-16": {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4)}},
    ("model", "state_dict"),
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        mult, ch = options.counts("ch_mult"), options.count("ch", 128)
        resolution, width = options.count("resolution", 256), options.count("embed_dim")
        down = options.counts("encoder_attn_resolutions", (16,), some=False)
        up = options.counts("decoder_attn_resolutions", (), some=False)
        residual = {
            "stem": ch,
            "z": width,
            "attend": _residual.levels_at(resolution, len(mult), down),
            "decoder_attend": _residual.levels_at(resolution, len(mult), up, down=False),
            "resample": options.flag("resamp_with_conv", True),
            "read": options.count("in_channels", 3),
            "painted": options.count("out_ch", 3),
        }
        options.only("double_z", True)
        options.only("give_pre_end", False)
        options.skip("dropout", "ckpt_path")
        model = {"resolution": resolution, "channels": tuple(ch * m for m in mult), "width": width, "scale": SCALE}
        model |= {"blocks": options.count("num_res_blocks", 2), "residual": residual}
        model |= {"variational": options.flag("use_variational", True)}
    rules = _residual.rules(_residual.TAMING, {})
    return Plan(FAMILY, model, rules, {"image": (resolution, resolution, residual["read"])}, (r"loss\..+",))
