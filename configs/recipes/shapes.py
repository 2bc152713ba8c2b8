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
    if variant not in ("tiny", "cpu"):
        raise common.unknown(variant, "tiny", "cpu")
    small = "tiny" if variant == "tiny" else ""
    stages = {
        "tokenizer": vq.get_config(small),
        "prior": raster.get_config(small),
        "decoder": dit.get_config(small),
        "cascade": cascade.get_config(),
    }
    if variant == "cpu":
        for stage in stages.values():
            stage.data = ConfigDict(common.shapes(**common.DEMO), convert_dict=True)
        tokenizer, prior, decoder = (stages[name] for name in ("tokenizer", "prior", "decoder"))
        tokenizer.model.update(attention=True, local=True, entropy=0.02, fill=0.75)
        tokenizer.steps, tokenizer.optim.lr = 950, 5e-3
        prior.model.update(width=128, heads=2)
        prior.steps, prior.optim.lr = 1100, 3e-3
        decoder.model.update(width=128, heads=2, depth=3, loss_kind="x", drop_plan=0.02, corrupt=0.03)
        decoder.steps, decoder.optim.lr = 350, 2e-3
        stages["cascade"].sample.options.decoder.steps = 8
    count = 16 if small else 256
    evaluation = {"evaluate": "../cascade", "splits": ("validation", "holdout"), "count": count, "batch": min(count, 64), "seed": 0}
    config = ConfigDict()
    config.order = (*stages, "evaluation")
    config.stages = ConfigDict({**stages, "evaluation": evaluation})
    return config
