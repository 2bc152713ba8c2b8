"""Convolutional tokenizer on shapes: FSQ by default.

    python -m hybridgen.train --config configs/tokenizers/vq.py:tiny --workdir runs/tokenizer

`tiny`: a smoke test. `vq`, `vq_gradient`, `autoencoder`: other quantisers at the demo's size. For pictures at 256:
`f16`, 256 tokens of 16,384 codes (as LlamaGen's), and `f8_latent`, a latent of 32 x 32 x 4.
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
    elif variant in ("f16", "f8_latent"):
        config.data.update(resolution=256)
        config.model.update(patch=2, blocks=2, attention=False, dtype="bfloat16")
        if variant == "f16":
            config.model.update(channels=(128, 256, 256, 512), attention=True, quantizer="vq", codes=16_384, width=8)
        else:
            config.model.update(channels=(128, 256, 512), quantizer="none", width=4)
    elif variant:
        raise common.unknown(variant, "tiny", "vq", "vq_gradient", "autoencoder", "f16", "f8_latent")
    return config
