"""The cascade on anyone's pictures: a folder with captions in `metadata.jsonl`.

    python -m hybridgen.recipe --config configs/recipes/imagefolder.py:cpu --config.path=FOLDER --workdir runs/mine

`tiny`: a smoke test. `cpu`: about half an hour on two cores, 32 px. `config.path`, `config.text_key` and
`config.length` (prompt tokens) reach every stage.
"""

from ml_collections import ConfigDict

from configs.recipes import shapes


def get_config(variant: str = "cpu"):
    config = shapes.get_config(variant or "cpu")
    config.path = "pictures"
    config.text_key = "text"
    config.length = 24
    for name in ("tokenizer", "prior", "decoder", "cascade"):
        stage = config.stages[name]
        stage.data = ConfigDict(
            {
                "source": "folder",
                "options": {"path": config.get_ref("path"), "text_key": config.get_ref("text_key")},
                "resolution": 32,
                "flip": name in ("tokenizer", "decoder"),
                "workers": 0,
                "threads": 1,
                "text": {"kind": "words", "length": config.get_ref("length")},
            }
        )
    config.stages.evaluation.splits = ("validation",)
    return config
