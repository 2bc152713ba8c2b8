"""DiT as published (Peebles & Xie 2022): class-conditional, on latents of a KL autoencoder, with learned variances.

    python -m hybridgen.train --config configs/diffusion/dit_official.py:xl --workdir runs/dit \
        --config.parts.autoencoder=runs/vae

The default data are shapes at the right size, which have one class. For a folder whose metadata has classes, add:

        --config.data.source=folder --config.data.options.path=FOLDER --config.data.options.label_key=label \
        --config.data.options.text_key=none --config.data.workers=4 --config.model.classes=auto

`s`, `b`, `l`, `xl`: the paper's sizes, 33, 130, 458 and 675 M parameters, at patch 2 (`--config.model.patch=4`, or 8)
on latents of 32 x 32 x 4 of images at 256; `xl_512`: on 64 x 64. AdamW at a constant 1e-4, batch 256, 1000 linear
timesteps, mean squared error plus the variational bound. The paper's XL/2: FID 19.5 after 400,000 steps without
guidance, 2.27 after 7 M at scale 1.5. As in the paper, latents are sampled in every step from the autoencoder's
Gaussian (`model.posterior=mean`: its mean); unlike in the paper, matmuls are in bfloat16. `convert dit_official
--export` writes a run as official weights.

`tiny`: images of shapes at 16 px in place of latents, 300 steps, a minute on one core. Its squared error of the noise
is at most 0.8 of that of a Gaussian model with the mean image and the variance of each value.
"""

from ml_collections import ConfigDict

from configs import common

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}  # depth, width, heads
VARIANTS = (*SIZES, "xl_512")


def get_config(variant: str = ""):
    if variant not in ("", "tiny", *VARIANTS):
        raise common.unknown(variant, "tiny", *VARIANTS)
    side = 512 if variant == "xl_512" else 256
    depth, width, heads = SIZES.get(variant, SIZES["xl"])
    model = {"resolution": side // 8, "channels": 4, "patch": 2, "width": width, "depth": depth, "heads": heads}
    model |= {"hidden": 4 * width, "classes": 1000, "cond_drop_prob": 0.1, "posterior": "sample"}
    model |= {"remat": "none", "unroll": 1, "dtype": "bfloat16"}
    model["process"] = {"timesteps": 1000, "schedule": "linear", "prediction_type": "eps", "loss_type": "eps"}
    model["process"] |= {"learned_variance": True}
    changes = {"steps": 400_000, "batch": 256, "optim__lr": 1e-4, "optim__schedule": "constant", "optim__warmup": 0}
    changes |= {"optim__clip": 0.0, "optim__b2": 0.999, "ema__decay": 0.9999}
    config = common.stage("diffusion.dit_official", model, common.shapes(resolution=side), **changes)
    config.data.flip = True
    with config.model.ignore_type():  # or "auto": the number of classes of the data
        config.model.classes = 1000
    config.parts.autoencoder = "configs/tokenizers/kl.py:f8"
    draw = {"solver": "ddpm", "steps": 250, "guidance": 1.5, "guidance_channels": 3, "gather": 1}
    config.sample.options = {"decoder": draw}
    if variant == "tiny":
        config.parts = ConfigDict()
        config.data.resolution = 16
        config.update(steps=300, batch=16)
        config.optim.update(lr=2e-3)
        config.ema.decay = 0.98
        config.model.update(resolution=16, channels=3, classes=1, patch=4, width=64, depth=2, heads=2, hidden=256)
        config.model.update(dtype="float32", unroll=-1)
        config.sample.options.decoder.update(steps=10)
    return config
