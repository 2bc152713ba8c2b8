"""Tokenizers with codes at the sizes that are published, on the residual autoencoder of VQGAN (Esser et al. 2021).

    python -m hybridgen.train --config configs/tokenizers/vqgan.py:f16 --workdir runs/vqgan

`f16`: VQGAN, 256 tokens of a picture at 256, 1024 codes. `f8_gumbel`: 1024 tokens, 8192 codes drawn from logits.
`llamagen_f16`, `llamagen_f8`: LlamaGen's, 16384 codes of 8 channels on the unit sphere. Imported weights of each fit
the model options here. `tiny`: a smoke test on CPU.

Optimiser, rate and batch are the published ones. Trained for reconstruction and codes alone: published checkpoints have
seen a perceptual and an adversarial loss too.
"""

from configs import common

PUBLISHED = {
    "f16": {"channels": (128, 128, 256, 256, 512), "z": 256, "attend": (4,), "codes": 1024, "width": 256, "l2": False},
    "f8_gumbel": {"channels": (128, 128, 256, 512), "z": 256, "attend": (3,), "codes": 8192, "width": 256},
    "llamagen_f16": {"channels": (128, 128, 256, 256, 512), "z": 256, "attend": (4,), "codes": 16384, "width": 8},
    "llamagen_f8": {"channels": (128, 256, 256, 512), "z": 256, "attend": (3,), "codes": 16384, "width": 8},
}
TINY = {"channels": (16, 16, 32), "z": 16, "attend": (2,), "codes": 64, "width": 8, "l2": True, "groups": 8}


def get_config(variant: str = "f16"):
    if variant not in ("", "tiny", *PUBLISHED):
        raise common.unknown(variant, "tiny", *PUBLISHED)
    options = dict(TINY if variant == "tiny" else PUBLISHED[variant or "f16"])
    residual = {"stem": options["channels"][0], "z": options.pop("z"), "attend": options.pop("attend")}
    residual |= {"groups": options.pop("groups", 32)}
    model = {"resolution": "auto", "patch": 1, "blocks": 1 if variant == "tiny" else 2, "attention": True}
    model |= {"residual": residual, "quantizer": "gumbel" if variant == "f8_gumbel" else "vq", "moving": False}
    model |= {"exact": True, "l1": 1.0, "revive_below": 0.03, "dtype": "bfloat16"} | options
    llamagen = variant.startswith("llamagen")
    # published: 4.5e-6 times the batch for VQGAN, 1e-4 for LlamaGen's; Adam both
    changes = {"steps": 500_000, "batch": 128 if llamagen else 12, "optim__lr": 1e-4 if llamagen else 5.4e-5}
    changes |= {"optim__b1": 0.9 if llamagen else 0.5, "optim__b2": 0.95 if llamagen else 0.9, "optim__clip": 1.0}
    changes |= {"optim__schedule": "constant", "optim__warmup": 1000}
    config = common.stage("tokenizers.vq", model, common.shapes(resolution=256), **changes)
    config.model.legacy = variant in ("", "f16")
    if variant == "f8_gumbel":
        config.model.update(divergence=1e-8, cooling=100_000)
    elif variant == "tiny":
        config.model.dtype = "float32"
        config.data.resolution = 32
        config.update(steps=20, batch=8)
        config.optim.update(lr=3e-3, warmup=0)
    return config
