"""VQGAN in its published sizes (Esser et al. 2021).

    python -m hybridgen.convert lpips_vgg lpips.pth runs/perceptual --config v0.1
    python -m hybridgen.train --config configs/tokenizers/vqgan.py:f16 --workdir runs/vqgan \
        --config.parts.perceptual=runs/perceptual

`f16`: 256 tokens for an image at 256, 1024 codes. `f8_gumbel`: 1024 tokens, 8192 codes, Gumbel quantizer. The model
options fit the imported official weights. `tiny`: a smoke test on a CPU.

Losses and their weights, optimizer, learning rate and batch size are the published ones: absolute error, LPIPS by the
part `perceptual` (`model.perceptual=0`: without), and a discriminator from step `model.adversarial.start` on, in the
optimizer group `disc`; no dropout, no EMA. Deviations: the discriminator uses group normalization, and unused codes are
reset to the data (`quantizer.revive_below`).

`tiny` starts its discriminator after half of its steps. Its validation images are at least MARGIN dB better than the
mean image, the best prediction without tokens.
"""

from ml_collections import ConfigDict

from configs import common

NEAREST = {"kind": "vq_gradient", "l2": False, "exact": True, "legacy": True, "revive_below": 0.03}
GUMBEL = {"kind": "gumbel", "divergence": 1e-8, "cooling": 100_000}
PUBLISHED = {
    "f16": {
        "channels": (128, 128, 256, 256, 512),
        "residual": {"stem": 128, "z": 256, "attend": (4,), "groups": 32},
        "quantizer": NEAREST | {"codebook_size": 1024, "width": 256},
    },
    "f8_gumbel": {
        "channels": (128, 128, 256, 512),
        "residual": {"stem": 128, "z": 256, "attend": (3,), "groups": 32},
        "quantizer": GUMBEL | {"codebook_size": 8192, "width": 256},
    },
    "tiny": {
        "channels": (8, 16),
        "residual": {"stem": 8, "z": 16, "attend": (1,), "groups": 4},
        "quantizer": NEAREST | {"l2": True, "legacy": False, "codebook_size": 64, "width": 8},
    },
}
GAN = {"weight": 0.8, "start": 250_001, "adaptive": True, "width": 64, "depth": 3, "groups": 32}
MARGIN = 1.0  # dB


def get_config(variant: str = "f16"):
    if variant and variant not in PUBLISHED:
        raise common.unknown(variant, "tiny", "f16", "f8_gumbel")
    model = {"resolution": "auto", "blocks": 2, "mse": 0.0, "l1": 1.0, "perceptual": 1.0, "adversarial": GAN}
    model |= {"dtype": "bfloat16"} | PUBLISHED[variant or "f16"]
    config = common.stage("tokenizers.vqgan", model, common.shapes(resolution=256), steps=500_000, batch=12)
    # published: Adam, 4.5e-6 times the batch
    config.optim.update(lr=5.4e-5, b1=0.5, b2=0.9, clip=0.0, schedule="constant", warmup=0)
    config.optim.groups = ConfigDict({"disc": {"match": "^disc/"}})
    config.health.spike = 0.0  # the gradient norm jumps when the discriminator starts
    if variant == "tiny":
        config.model.update(blocks=1, perceptual=0.0, dtype="float32")
        config.model.adversarial.update(weight=0.1, start=30, width=8, depth=2, groups=4)
        config.data.resolution = 32
        config.update(steps=60, batch=8)
        config.optim.update(lr=5e-3, b1=0.9, b2=0.95, clip=1.0, schedule="cosine")
        config.optim.groups.disc.lr = 1e-3
    return config
