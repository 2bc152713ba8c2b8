"""Convolutional tokenizer on shapes: FSQ by default.

    python -m hybridgen.train --config configs/tokenizers/vq.py:tiny --workdir runs/tokenizer

`tiny`: a smoke test. `vq`, `vq_gradient`, `autoencoder`: other quantisers at the demo's size.
"""

from configs import common


def get_config(variant: str = ""):
    model = {"resolution": "auto", "patch": 4, "channels": (64, 128), "blocks": 1, "attention": True}
    model |= {"quantizer": "fsq", "levels": (8, 5, 5, 5), "entropy": 0.0, "l1": 0.0}
    config = common.stage("tokenizers.vq", model, common.shapes(), steps=1000, optim__lr=3e-3)
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.channels = (32, 32)
    elif variant == "vq":
        config.model.update(quantizer="vq", codes=1024, width=8)
    elif variant == "vq_gradient":
        config.model.update(quantizer="vq", codes=1024, width=8, moving=False)
    elif variant == "autoencoder":
        config.model.update(quantizer="none", width=8)
    elif variant:
        raise common.unknown(variant, "tiny", "vq", "vq_gradient", "autoencoder")
    return config
