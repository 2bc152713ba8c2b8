"""VQGAN of taming-transformers (Esser et al. 2021): class `VQModel` of taming/models/vqgan.py.

The config is that of the published YAML under `model.params`.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule
from hybridgen.weights.tables import About, Plan, _residual

FAMILY = "tokenizers.vqgan"

F16 = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
F16 |= {"ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,), "dropout": 0.0}

ABOUT = About(
    "VQGAN of taming-transformers",
    "MIT",
    "f16: 1024 or 16384 codes of 256, 72 M parameters in the autoencoder",
    {f"f16-{codes}": {"ddconfig": F16, "n_embed": codes, "embed_dim": 256} for codes in (1024, 16384)},
    ("state_dict",),
)
DROPPED = (r"loss\..+", "colorize")


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        net, image = network(options)
        used = remap(options, shapes)
        options.skip("sane_index_shape")  # the shape of returned indices
        quantizer = {"kind": "vq_gradient", "l2": False, "exact": True, "legacy": True, "commitment": 0.25}
        quantizer |= {"codebook_size": options.count("n_embed"), "width": options.count("embed_dim")}
        quantizer |= {"used": used, "revive_below": 0.0}
        model = {"resolution": image[0]} | net | {"quantizer": quantizer}
    rules = (*_residual.rules(_residual.TAMING, {}), Rule("quantize.embedding.weight", "params/codebook"), *REMAP)
    return Plan(FAMILY, model, rules, {"image": image}, DROPPED)


REMAP = (Rule("quantize.used", "extra/used", dtype="int64"),)


def remap(options: Options, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of codebook rows that have a token: 0 (all), or the length of the tensor `quantize.used`."""
    if options.take("remap", None) is None:
        return 0
    return (*shapes.get("quantize.used", ()), 1)[0]


def network(options: Options) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(options of the model, shape of a picture) of `ddconfig` and of the arguments that all classes share."""
    options.skip("lossconfig", "ckpt_path", "ignore_keys", "image_key", "monitor", "colorize_nlabels")
    with Options(options.take("ddconfig"), "ddconfig") as dd:
        mult, ch = dd.counts("ch_mult", (1, 2, 4, 8)), dd.count("ch")
        resolution, at = dd.count("resolution"), dd.counts("attn_resolutions", some=False)
        dd.only("double_z", False)  # the official default, true, does not work with its own quantiser
        dd.only("give_pre_end", False)
        dd.only("attn_type", "vanilla")
        dd.only("use_linear_attn", False)
        dd.skip("dropout")
        residual = {
            "stem": ch,
            "z": dd.count("z_channels"),
            "attend": _residual.levels_at(resolution, len(mult), at),
            "decoder_attend": _residual.levels_at(resolution, len(mult), at, down=False),
            "resample": dd.flag("resamp_with_conv", True),
            "read": dd.count("in_channels"),
            "painted": dd.count("out_ch"),
        }
        blocks = dd.count("num_res_blocks")
    model = {"channels": tuple(ch * m for m in mult), "blocks": blocks, "residual": residual}
    return model, (resolution, resolution, residual["read"])
