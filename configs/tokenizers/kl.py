"""KL autoencoders at the sizes that are published: latents for diffusion (Rombach et al. 2022).

    python -m hybridgen.train --config configs/tokenizers/kl.py:f8 --workdir runs/kl

`f8`: Stable Diffusion's, latents of 4 channels; `f8_wide`: SD3's, of 16 channels and without maps around them; `f16`:
MAR's KL-16. Imported weights of each fit the model options here. `tiny`: a smoke test on CPU.

Trained for absolute error and divergence alone: published checkpoints have seen a perceptual and an adversarial loss
too.
"""

from configs import common

F16 = {"channels": (128, 128, 256, 256, 512), "width": 16, "scale": 0.2325}
PUBLISHED = {
    "f8": {"channels": (128, 256, 512, 512), "width": 4, "scale": 0.18215},
    "f8_wide": {"channels": (128, 256, 512, 512), "width": 16, "scale": 1.5305, "shift": 0.0609},
    "f16": F16 | {"residual": {"attend": (4,), "decoder_attend": ()}},
}
PUBLISHED["f8_wide"]["residual"] = {"quant": 0, "post_quant": False}
TINY = {"channels": (16, 16, 32), "width": 4, "residual": {"groups": 8}}


def get_config(variant: str = "f8"):
    if variant not in ("", "tiny", *PUBLISHED):
        raise common.unknown(variant, "tiny", *PUBLISHED)
    model = {"resolution": "auto", "blocks": 1 if variant == "tiny" else 2, "residual": {}, "l2": 0.0}
    model |= {"divergence": 1e-6, "dtype": "bfloat16"} | (TINY if variant == "tiny" else PUBLISHED[variant or "f8"])
    # as latent diffusion: Adam, 4.5e-6 times the batch
    changes = {"steps": 500_000, "batch": 12, "optim__lr": 5.4e-5, "optim__b1": 0.5, "optim__b2": 0.9}
    changes |= {"optim__schedule": "constant", "optim__warmup": 1000}
    config = common.stage("tokenizers.kl", model, common.shapes(resolution=256), **changes)
    if variant == "tiny":
        config.model.dtype = "float32"
        config.data.resolution = 32
        config.update(steps=20, batch=8)
        config.optim.update(lr=3e-3, warmup=0)
    return config
