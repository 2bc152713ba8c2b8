"""The cascade on shapes: assembled from a trained prior and decoder, or trained jointly.

    python -m hybridgen.train --config configs/hybrid/cascade.py --workdir runs/cascade  # parts in ../prior, ../decoder

`""`: no training, only assembly: a run folder to sample and evaluate. `joint`: prior and decoder trained together from
scratch; `joint,model.mode=soft` and `features` choose how they are coupled. `tiny`: joint, a smoke test. `large`:
joint, the 3B prior and the DiT-XL decoder for images at 256, for a v6e:16x16 or more. `xl`: an untrained 775M prior and
DiT-XL with 25 steps, both guided, for images at 256: the sampling benchmark for accelerators.
"""

from configs import common
from configs.ar import raster
from configs.diffusion import dit


def get_config(variant: str = ""):
    config = common.stage("hybrid.cascade", {"mode": "tokens"}, common.shapes(), steps=0)
    config.parts.update(tokenizer="../tokenizer", prior="../prior", decoder="../decoder")
    sizes = {"tiny": ("tiny", "tiny"), "large": ("3b", "xl"), "xl": ("775m", "xl")}.get(variant, ("", ""))
    prior, decoder = raster.get_config(sizes[0]), dit.get_config(sizes[1])
    config.sample.options = {**prior.sample.options.to_dict(), **decoder.sample.options.to_dict()}
    if variant in ("joint", "tiny", "large"):
        config.model.update(own=0.25, rollout_every=0)
        config.model.prior = {"family": prior.family, "model": prior.model}
        config.model.decoder = {"family": decoder.family, "model": decoder.model}
        del config.parts.prior, config.parts.decoder
        config.optim.lr, config.ema.decay = 2e-3, 0.99
        config.steps, config.batch = (20, 8) if variant == "tiny" else (2000, 64)
        if variant == "large":
            config.data, config.mesh = prior.data, prior.mesh
            config.parts.update(decoder.parts)
            config.steps, config.batch = 300_000, 1024
            config.optim.update(lr=1e-4, warmup=5000)
            config.ema.decay = 0.9999
    elif variant == "xl":
        config.data, config.parts = prior.data, decoder.parts
        config.parts.update(prior="configs/ar/raster.py:775m", decoder="configs/diffusion/dit.py:xl")
        config.sample.count = 64
    elif variant:
        raise common.unknown(variant, "joint", "tiny", "large", "xl")
    return config
