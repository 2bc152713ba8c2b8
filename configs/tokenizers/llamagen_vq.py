"""LlamaGen's tokenizers in their published sizes (Sun et al. 2024): 16,384 codes of 8 channels.

    python -m hybridgen.convert lpips_vgg lpips.pth runs/perceptual --config v0.1
    python -m hybridgen.train --config configs/tokenizers/llamagen_vq.py:f16 --workdir runs/llamagen_vq \
        --config.parts.perceptual=runs/perceptual

`f16`: VQ-16, 256 tokens for an image at 256. `f8`: VQ-8, 1024 tokens. The model options fit the imported official
weights. `tiny`: a smoke test on a CPU.

Losses and their weights, optimizer, learning rate and batch size are the published ones, for 40 epochs of ImageNet:
squared error, LPIPS by the part `perceptual` (`model.perceptual=0`: without), and a discriminator from step
`model.adversarial.start` on, in the optimizer group `disc`; no dropout, and no EMA (the published option is
`ema.decay=0.9999`). Deviations: the discriminator uses group normalization, and unused codes are reset to the data
(`model.revive_below`).

`tiny` starts its discriminator after half of its steps. Its validation images are at least MARGIN dB better than the
mean image, the best prediction without tokens.
"""

from ml_collections import ConfigDict

from configs import common

PUBLISHED = {"f16": (128, 128, 256, 256, 512), "f8": (128, 256, 256, 512)}
TINY = {"channels": (8, 16), "stem": 8, "z": 16, "blocks": 1, "groups": 4, "codebook_size": 64}
GAN = {"weight": 0.5, "start": 20_000, "adaptive": False, "width": 64, "depth": 3, "groups": 32}
MARGIN = 1.0  # dB


def get_config(variant: str = "f16"):
    if variant not in ("", "tiny", *PUBLISHED):
        raise common.unknown(variant, "tiny", *PUBLISHED)
    model = {"resolution": "auto", "channels": PUBLISHED.get(variant, PUBLISHED["f16"]), "stem": 128, "z": 256}
    model |= {"blocks": 2, "groups": 32, "codebook_size": 16_384, "width": 8, "l2": True, "commitment": 0.25}
    model |= {"entropy": 0.0, "revive_below": 0.03, "mse": 1.0, "l1": 0.0, "perceptual": 1.0, "adversarial": GAN}
    model |= {"dtype": "bfloat16"} | (TINY if variant == "tiny" else {})
    config = common.stage("tokenizers.llamagen_vq", model, common.shapes(resolution=256), steps=400_000, batch=128)
    config.optim.update(lr=1e-4, b1=0.9, b2=0.95, clip=1.0, schedule="constant", warmup=0)
    config.optim.groups = ConfigDict({"disc": {"match": "^disc/"}})
    config.health.spike = 0.0  # the gradient norm jumps when the discriminator starts
    if variant == "tiny":
        config.model.update(perceptual=0.0, dtype="float32")
        config.model.adversarial.update(weight=0.1, start=30, width=8, depth=2, groups=4)
        config.data.resolution = 32
        config.update(steps=60, batch=8)
        config.optim.update(lr=5e-3, schedule="cosine")
        config.optim.groups.disc.lr = 1e-3
    return config
