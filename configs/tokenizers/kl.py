"""KL autoencoders in their published sizes: latents for diffusion (Rombach et al. 2022).

    python -m hybridgen.convert lpips_vgg lpips.pth runs/perceptual --config v0.1
    python -m hybridgen.train --config configs/tokenizers/kl.py:f8 --workdir runs/kl \
        --config.parts.perceptual=runs/perceptual

`f8`: Stable Diffusion's, latents of 4 channels; `f8_wide`: SD3's, 16 channels without quant convolutions; `f16`: MAR's
KL-16. The model options fit the imported official weights. `tiny`: a smoke test on a CPU.

Losses and their weights, optimizer, learning rate and batch size are those of latent diffusion: absolute error, LPIPS
by the part `perceptual` (`model.perceptual=0`: without), KL divergence, and a discriminator from step
`model.adversarial.start` on, in the optimizer group `disc`; no dropout, no EMA. Deviation: the discriminator uses group
normalization.

`tiny` starts its discriminator after half of its steps. Its validation images are at least MARGIN dB better than the
mean image, the best prediction without latents.
"""

from configs import common

F16 = {"channels": (128, 128, 256, 256, 512), "width": 16, "scale": 0.2325}
PUBLISHED = {
    "f8": {"channels": (128, 256, 512, 512), "width": 4, "scale": 0.18215},
    "f8_wide": {"channels": (128, 256, 512, 512), "width": 16, "scale": 1.5305, "shift": 0.0609},
    "f16": F16 | {"residual": {"attend": (4,), "decoder_attend": ()}},
}
PUBLISHED["f8_wide"]["residual"] = {"quant": 0, "post_quant": False}
TINY = {"channels": (8, 16), "width": 4, "residual": {"groups": 4}}
GAN = {"weight": 0.5, "start": 50_001, "adaptive": True, "width": 64, "depth": 3, "groups": 32}
MARGIN = 1.0  # dB


def get_config(variant: str = "f8"):
    if variant not in ("", "tiny", *PUBLISHED):
        raise common.unknown(variant, "tiny", *PUBLISHED)
    model = {"resolution": "auto", "blocks": 1 if variant == "tiny" else 2, "residual": {}, "l1": 1.0, "mse": 0.0}
    model |= {"perceptual": 1.0, "adversarial": GAN, "divergence": 1e-6, "dtype": "bfloat16"}
    model |= TINY if variant == "tiny" else PUBLISHED[variant or "f8"]
    # as in latent diffusion: Adam, learning rate 4.5e-6 times the batch size
    changes = {"steps": 500_000, "batch": 12, "optim__lr": 5.4e-5, "optim__b1": 0.5, "optim__b2": 0.9}
    changes |= {"optim__schedule": "constant", "optim__warmup": 0, "optim__clip": 0.0}
    # the gradient norm jumps when the discriminator starts
    changes |= {"optim__groups": {"disc": {"match": "^disc/"}}, "health__spike": 0.0}
    config = common.stage("tokenizers.kl", model, common.shapes(resolution=256), **changes)
    if variant == "tiny":
        config.model.update(perceptual=0.0, dtype="float32")
        config.model.adversarial.update(weight=0.1, start=30, width=8, depth=2, groups=4)
        config.data.resolution = 32
        config.update(steps=60, batch=8)
        config.optim.update(lr=5e-3, b1=0.9, b2=0.95, clip=1.0, schedule="cosine")
        config.optim.groups.disc.lr = 1e-3
    return config
