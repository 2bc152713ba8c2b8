"""The cascade on shapes: assembled from a trained prior and decoder, or trained jointly.

    python -m hybridgen.train --config configs/hybrid/cascade.py --workdir runs/cascade  # parts in ../prior, ../decoder

`""`: no training, only assembly: a run folder to sample and evaluate. `joint`: prior and decoder in one step, from
scratch; `joint,model.mode=soft` and `features` choose what flows between them. `tiny`: joint, a smoke test.
"""

from configs import common
from configs.ar import raster
from configs.diffusion import dit


def get_config(variant: str = ""):
    config = common.stage("hybrid.cascade", {"mode": "tokens"}, common.shapes(), steps=0)
    config.parts.update(tokenizer="../tokenizer", prior="../prior", decoder="../decoder")
    prior, decoder = raster.get_config(), dit.get_config()
    config.sample.options = {**prior.sample.options.to_dict(), **decoder.sample.options.to_dict()}
    if variant in ("joint", "tiny"):
        if variant == "tiny":
            prior, decoder = raster.get_config("tiny"), dit.get_config("tiny")
        config.model.update(own=0.25, rollout_every=0)
        config.model.prior = {"family": prior.family, "model": prior.model}
        config.model.decoder = {"family": decoder.family, "model": decoder.model}
        del config.parts.prior, config.parts.decoder
        config.optim.lr, config.ema.decay = 2e-3, 0.99
        config.steps, config.batch = (20, 8) if variant == "tiny" else (2000, 64)
    elif variant:
        raise common.unknown(variant, "joint", "tiny")
    return config
