"""VQGAN with Gumbel codes of taming-transformers: class `GumbelVQ` of taming/models/vqgan.py."""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, pointwise
from hybridgen.weights.tables import About, Plan, _residual
from hybridgen.weights.tables.taming_vqgan import DROPPED, F16, REMAP, network, remap

FAMILY = "tokenizers.vqgan"

F8 = F16 | {"ch_mult": (1, 1, 2, 4), "attn_resolutions": (32,)}

ABOUT = About(
    "VQGAN of taming-transformers with Gumbel codes",
    "MIT",
    "f8: 8192 codes of 256, 69 M parameters in the autoencoder",
    {"f8-8192": {"ddconfig": F8, "n_embed": 8192, "embed_dim": 256, "kl_weight": 1e-8}},
    ("state_dict",),
)
SCORES = (
    Rule("quantize.proj.weight", "params/score/kernel", pointwise),
    Rule("quantize.proj.bias", "params/score/bias"),
    Rule("quantize.embed.weight", "params/codebook"),
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        net, image = network(options)
        used = remap(options, shapes)
        options.skip("temperature_scheduler_config")
        width, z = options.count("embed_dim"), net["residual"]["z"]
        if width != z:  # the official score layer expects z_channels and receives embed_dim
            raise UserError(f"config: embed_dim {width} must equal z_channels {z} for Gumbel codes")
        quantizer = {"kind": "gumbel", "codebook_size": options.count("n_embed"), "width": width, "used": used}
        quantizer |= {"divergence": options.number("kl_weight", 1e-8)}
        model = {"resolution": image[0]} | net | {"quantizer": quantizer}
    rules = (*_residual.rules(_residual.TAMING, {}), *SCORES, *REMAP)
    return Plan(FAMILY, model, rules, {"image": image}, DROPPED)
