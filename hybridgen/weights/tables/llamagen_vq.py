"""LlamaGen's image tokenizer (Sun et al. 2024): class `VQModel` of tokenizer/tokenizer_image/vq_model.py.

The config has the fields of its `ModelArgs`, and `ch` and `num_res_blocks`, which official code fixes at 128 and 2.
`resolution` is added: the side of the pictures that it is used for (256; a prior of 24x24 tokens needs 384).
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule
from hybridgen.weights.tables import About, Plan, _residual

FAMILY = "tokenizers.llamagen_vq"

VQ16 = {"codebook_size": 16384, "codebook_embed_dim": 8, "z_channels": 256}
VQ16 |= {"encoder_ch_mult": (1, 1, 2, 2, 4), "decoder_ch_mult": (1, 1, 2, 2, 4)}

ABOUT = About(
    "image tokenizer of LlamaGen",
    "MIT",
    "VQ-16 and VQ-8: 16384 codes of 8, 72 M and 70 M parameters",
    {f"VQ-16-{side}": VQ16 | {"resolution": side} for side in (384, 512)}
    | {"VQ-16": VQ16, "VQ-8": VQ16 | {"encoder_ch_mult": (1, 2, 2, 4), "decoder_ch_mult": (1, 2, 2, 4)}},
    ("ema", "model", "state_dict", "module"),
)
NAMES = _residual.Names(
    "encoder.conv_blocks.{l}",
    "decoder.conv_blocks.{l}",  # counted from the lowest resolution
    ("mid.0", "mid.1", "mid.2"),
    block="res",
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        down, up = (options.counts(f"{side}_ch_mult", (1, 1, 2, 2, 4)) for side in ("encoder", "decoder"))
        if len(down) != len(up):
            raise UserError(f"config: encoder_ch_mult and decoder_ch_mult have {len(down)} and {len(up)} levels")
        ch, resolution = options.count("ch", 128), options.count("resolution", 256)
        model = {"resolution": resolution, "channels": tuple(ch * m for m in down), "stem": ch}
        model |= {"decoder_channels": tuple(ch * m for m in up), "z": options.count("z_channels", 256)}
        model |= {"blocks": options.count("num_res_blocks", 2), "l2": options.flag("codebook_l2_norm", True)}
        model |= {"codebook_size": options.count("codebook_size", 16384)}
        model |= {"width": options.count("codebook_embed_dim", 8)}
        model |= {"commitment": options.number("commit_loss_beta", 0.25)}
        options.number("entropy_loss_ratio", 0.0)
        options.skip("codebook_show_usage", "dropout_p")
    rules = (*_residual.rules(NAMES, {"l": len(down)}), Rule("quantize.embedding.weight", "params/codebook"))
    dropped = (r"quantize\.codebook_used",)  # official code's ids of the last 65536 tokens, a statistic
    return Plan(FAMILY, model, rules, {"image": (resolution, resolution, 3)}, dropped, kept=dropped)
