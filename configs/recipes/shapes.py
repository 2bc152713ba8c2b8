"""The whole cascade on the built-in shapes: tokenizer, prior, decoder, cascade, evaluation with a grid.

    python -m hybridgen.recipe --config configs/recipes/shapes.py:cpu --workdir runs/shapes

`tiny`: about a minute, a smoke test. `cpu`: the README's demo.
"""

from ml_collections import ConfigDict

from configs import common
from configs.ar import raster
from configs.diffusion import dit
from configs.hybrid import cascade
from configs.tokenizers import vq


def get_config(variant: str = "cpu"):
    small = "tiny" if variant == "tiny" else ""
    config = ConfigDict()
    config.order = ("tokenizer", "prior", "decoder", "cascade", "evaluation")
    config.stages = ConfigDict(
        {
            "tokenizer": vq.get_config(small),
            "prior": raster.get_config(small),
            "decoder": dit.get_config(small),
            "cascade": cascade.get_config(),
        }
    )
    count = 16 if small else 256
    config.stages.evaluation = ConfigDict(
        {"evaluate": "../cascade", "splits": ("validation", "holdout"), "count": count, "batch": min(count, 64), "seed": 0}
    )
    if variant not in ("tiny", "cpu"):
        raise common.unknown(variant, "tiny", "cpu")
    return config
