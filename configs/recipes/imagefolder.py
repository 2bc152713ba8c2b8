"""The cascade on your own images: a folder with captions in `metadata.jsonl`.

    python -m hybridgen.recipe --config configs/recipes/imagefolder.py:cpu --config.path=FOLDER --workdir runs/mine

`tiny`: a smoke test. `cpu`, `cpu_long`, `base`: as in shapes.py, at 32 px (`base`: 64), but `cpu` and `cpu_long` have
four times the tokens, so they take longer. `config.path`, `config.text_key`, `config.length` (prompt tokens) and
`config.resolution` reach every stage.
"""

from ml_collections import ConfigDict

from configs.recipes import shapes


def get_config(variant: str = "cpu"):
    config = shapes.get_config(variant or "cpu")
    config.path = "pictures"
    config.text_key = "text"
    config.length = 24
    config.resolution = 64 if variant == "base" else 32
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
    if variant not in ("tiny", "base"):
        # four times the tokens of shapes.py, since general images contain more information
        config.stages.tokenizer.model.patch = 2
    config.stages.evaluation.splits = ("validation",)
    return config
