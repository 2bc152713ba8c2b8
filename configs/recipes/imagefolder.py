"""The cascade on your own images: a folder with captions in `metadata.jsonl`.

    python -m hybridgen.recipe --config configs/recipes/imagefolder.py:cpu --config.path=FOLDER --workdir runs/mine

`tiny`: a smoke test. `cpu`: 32 px and 64 tokens an image, on two CPU cores. `cpu_64`: 64 px and 64 tokens.
`cpu_long`: as `cpu`, with more steps and wider networks. `base`: 64 px, for an accelerator. `config.path`,
`config.text_key`, `config.length` (prompt tokens) and `config.resolution` reach every stage.
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes import shapes

VARIANTS = ("tiny", "cpu", "cpu_64", "cpu_long", "base")


def get_config(variant: str = ""):
    variant = variant or "cpu"
    if variant not in VARIANTS:
        raise common.unknown(variant, *VARIANTS)
    config = shapes.get_config("cpu" if variant == "cpu_64" else variant)
    config.path = "pictures"
    config.text_key = "text"
    config.length = 24
    config.resolution = 64 if variant in ("base", "cpu_64") else 32
    for name in ("tokenizer", "prior", "decoder", "cascade"):
        stage = config.stages[name]
        stage.data = ConfigDict(
            {
                "source": "folder",
                "options": {"path": config.get_ref("path"), "text_key": config.get_ref("text_key")},
                "resolution": config.get_ref("resolution"),
                "flip": name in ("tokenizer", "decoder"),
                "workers": 0,
                "threads": 1,
                "retry": 120.0,
                "text": {"kind": "words", "length": config.get_ref("length")},
            }
        )
    stages = config.stages
    if variant in ("cpu", "cpu_long"):
        # four times the tokens of shapes.py, since general images contain more information
        stages.tokenizer.model.patch = 2
    elif variant == "cpu_64":
        # also 8 x 8 tokens, of twice the side; as many patches in the decoder
        stages.decoder.model.patch = 8
        stages.tokenizer.steps, stages.prior.steps, stages.decoder.steps = 1500, 2000, 1500
        stages.prior.model.update(width=192, heads=3)
        stages.decoder.model.update(width=192, heads=3, depth=4)
    if variant in ("cpu", "cpu_64"):
        for stage in (stages.prior, stages.cascade):
            stage.sample.options.prior.update(guidance=2.0, temperature=1.0)  # less would be less varied
    stages.evaluation.splits = ("validation", "train")  # a small folder has few images for validation
    return config
