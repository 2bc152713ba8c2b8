"""Tokenizers with codes at the sizes that are published, on the residual autoencoder of VQGAN (Esser et al. 2021).

    python -m hybridgen.convert lpips_vgg lpips.pth runs/perceptual --config v0.1
    python -m hybridgen.train --config configs/tokenizers/vqgan.py:f16 --workdir runs/vqgan \
        --config.parts.perceptual=runs/perceptual

`f16`: VQGAN, 256 tokens of a picture at 256, 1024 codes. `f8_gumbel`: 1024 tokens, 8192 codes drawn from logits.
`llamagen_f16`, `llamagen_f8`: LlamaGen's, 16384 codes of 8 channels on the unit sphere. Imported weights of each fit
the model options here. `tiny`: a smoke test on CPU.

Losses, weights, optimiser, rate and batch are the published ones: an error (absolute, LlamaGen's squared), LPIPS by the
part `perceptual` (`model.perceptual=0` goes without), and a discriminator from step `model.adversarial.start` on, in
the optimiser group `disc`; no dropout, no average of the parameters (LlamaGen's optional one is `ema.decay=0.9999`).
Ours: the discriminator normalises by groups, and codes that fall out of use are drawn to the data (`revive_below`).

`tiny` meets its discriminator half way. Its pictures of the validation split are at least MARGIN dB better than the
mean picture, the best that needs no tokens.
"""

from configs import common

PUBLISHED = {
    "f16": {"channels": (128, 128, 256, 256, 512), "z": 256, "attend": (4,), "codes": 1024, "width": 256, "l2": False},
    "f8_gumbel": {"channels": (128, 128, 256, 512), "z": 256, "attend": (3,), "codes": 8192, "width": 256},
    "llamagen_f16": {"channels": (128, 128, 256, 256, 512), "z": 256, "attend": (4,), "codes": 16384, "width": 8},
    "llamagen_f8": {"channels": (128, 256, 256, 512), "z": 256, "attend": (3,), "codes": 16384, "width": 8},
}
TINY = {"channels": (8, 16), "z": 16, "attend": (1,), "codes": 64, "width": 8, "l2": True, "groups": 4}
GAME = {"weight": 0.8, "start": 250_001, "adaptive": True, "width": 64, "depth": 3, "groups": 32}
LLAMAGEN = GAME | {"weight": 0.5, "start": 20_000, "adaptive": False}
MARGIN = 1.0  # dB


def get_config(variant: str = "f16"):
    if variant not in ("", "tiny", *PUBLISHED):
        raise common.unknown(variant, "tiny", *PUBLISHED)
    options = dict(TINY if variant == "tiny" else PUBLISHED[variant or "f16"])
    residual = {"stem": options["channels"][0], "z": options.pop("z"), "attend": options.pop("attend")}
    residual |= {"groups": options.pop("groups", 32)}
    llamagen = variant.startswith("llamagen")
    model = {"resolution": "auto", "patch": 1, "blocks": 1 if variant == "tiny" else 2, "attention": True}
    model |= {"residual": residual, "quantizer": "gumbel" if variant == "f8_gumbel" else "vq", "moving": False}
    model |= {"exact": True, "revive_below": 0.03, "mse": float(llamagen), "l1": float(not llamagen)}
    model |= {"perceptual": 1.0, "adversarial": LLAMAGEN if llamagen else GAME, "dtype": "bfloat16"} | options
    # published: 4.5e-6 times the batch for VQGAN; LlamaGen's 40 epochs of ImageNet
    changes = {"steps": 400_000 if llamagen else 500_000, "batch": 128 if llamagen else 12}
    changes |= {"optim__lr": 1e-4 if llamagen else 5.4e-5, "optim__b1": 0.9 if llamagen else 0.5}
    changes |= {"optim__b2": 0.95 if llamagen else 0.9, "optim__clip": float(llamagen)}
    changes |= {"optim__schedule": "constant", "optim__warmup": 0, "optim__groups": {"disc": {"match": "^disc/"}}}
    # where the discriminator sets in, the gradient's norm leaps
    config = common.stage("tokenizers.vq", model, common.shapes(resolution=256), health__spike=0.0, **changes)
    config.model.legacy = variant in ("", "f16")
    if variant == "f8_gumbel":
        config.model.update(divergence=1e-8, cooling=100_000)
    elif variant == "tiny":
        config.model.update(perceptual=0.0, dtype="float32")
        config.model.adversarial.update(weight=0.1, start=30, width=8, depth=2, groups=4)
        config.data.resolution = 32
        config.update(steps=60, batch=8)
        config.optim.update(lr=5e-3, b1=0.9, b2=0.95, clip=1.0, schedule="cosine")
        config.optim.groups.disc.lr = 1e-3
    return config
