"""Raster prior on shapes, over the tokens of a trained tokenizer.

    python -m hybridgen.train --config configs/ar/raster.py:tiny --workdir runs/prior --config.parts.tokenizer=runs/tokenizer

`tiny`: a smoke test. `3b`: LlamaGen's 3B shape over 256 tokens of a 16,384 codebook, for preflight.
"""

from configs import common


def get_config(variant: str = ""):
    model = {"vocab": "auto", "grid": "auto", "text_vocab": "auto", "text_length": "auto"}
    model |= {"width": 192, "depth": 4, "heads": 3, "kv_heads": None, "qk_norm": True, "text_depth": 1, "drop": 0.1}
    model |= {"remat": "none", "unroll": -1, "dtype": "float32"}
    config = common.stage("ar.raster", model, common.shapes(), steps=2000, optim__lr=2e-3)
    config.parts.tokenizer = "../tokenizer"
    config.sample.options = {"prior": {"guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}}
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.update(width=64, depth=2, heads=1)
    elif variant:
        raise common.unknown(variant, "tiny")
    return config
