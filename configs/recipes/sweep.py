"""Cost and quality of tokens: their number, the codebook size, and continuous latents, in one table of all points.

    python -m hybridgen.recipe --config configs/recipes/sweep.py:cpu --workdir runs/sweep

A point is a tokenizer and a prior on its tokens; the prior generates images for the validation captions. The points are
4, 16, 64 and 256 tokens with 1000 codes; 16 tokens with 64, 240, 1000 and 4375 codes; and latents of a KL autoencoder,
16 positions of 8 channels and 64 of 4, whose prior is a DiT conditioned on the caption alone. The stage `table` reads
the logs and reports of the runs; `--config.order="('table',)"` makes it again, also while points are missing.

All points have the same images (the demo's), batch, steps and seed, the same width and depth of the priors and of the
DiT, and the same learning rates among the points with codes and among those with latents. They differ in the code
itself and in the tokenizers: at 64 tokens these are half as wide as at 4 and 16, and at 256 they have one level instead
of two, so that a step takes about the same FLOPs (at 4 tokens a quarter). The cost of a prior's step depends on its
sequence: with 256 tokens it is nine times that with 16. With so few steps, the table shows how fast a prior learns each
code, as much as what it could reach.

`tiny`: a smoke test of three points. `cpu`: the table in docs/results.md; training took 112 minutes in total on two
cores that other programs kept busy, 48 of them for 256 tokens.
"""

from ml_collections import ConfigDict

from configs import common
from configs.ar import raster
from configs.diffusion import dit
from configs.tokenizers import kl, vq

VARIANTS = ("tiny", "cpu")
# side of the token grid: (patch, channels) of the tokenizer
GRIDS = {2: (8, (64, 128)), 4: (4, (64, 128)), 8: (2, (32, 64)), 16: (2, (64,))}
LEVELS = {64: (4, 4, 4), 240: (8, 6, 5), 1000: (8, 5, 5, 5), 4375: (7, 5, 5, 5, 5)}
# side of the latent's grid: channels of the autoencoder
LATENTS = {4: (16, 32, 64, 64), 8: (16, 32, 64)}
# (side, codes, 0) or (side, 0, channels)
POINTS = {"tiny": ((2, 64, 0), (4, 64, 0), (4, 0, 8))}
POINTS["cpu"] = ((4, 1000, 0), (2, 1000, 0), (4, 64, 0), (8, 1000, 0), (4, 0, 8), (4, 4375, 0))
POINTS["cpu"] += ((16, 1000, 0), (8, 0, 4), (4, 240, 0))
STEPS = {"tokenizer": 800, "prior": 800}


def get_config(variant: str = ""):
    variant = variant or "cpu"
    if variant not in VARIANTS:
        raise common.unknown(variant, *VARIANTS)
    count = 16 if variant == "tiny" else 256
    stages, points = {}, {}
    for side, codes, width in POINTS[variant]:
        label = f"{side**2}x{codes}" if codes else f"{side**2}x{width}_latent"
        names = {role: f"{role}_{label}" for role in ("tokenizer", "prior", "reconstructed", "drawn")}
        tokenizer, prior = _codes(side, codes) if codes else _latent(side, width)
        prior.parts = ConfigDict({"tokenizer" if codes else "autoencoder": f"../{names['tokenizer']}"})
        stages |= {names["tokenizer"]: tokenizer, names["prior"]: prior}
        measured = {"drawn": "prior"} | ({"reconstructed": "tokenizer"} if width else {})
        for role, run in measured.items():
            stages[names[role]] = {"evaluate": f"../{names[run]}", "splits": ("validation",), "count": count}
            stages[names[role]] |= {"seed": 0, "batch": min(count, 64)}
        points[label] = {"tokenizer": f"../{names['tokenizer']}", "prior": f"../{names['prior']}"}
        points[label]["pictures"] = tuple(f"../{names[role]}" for role in measured)
    for name, stage in stages.items():
        if "family" in stage:
            _finish(stage, variant, name.partition("_")[0])
    stages["table"] = {"compare": points, "split": "validation"}
    config = ConfigDict()
    config.order = tuple(stages)
    config.stages = ConfigDict(stages, convert_dict=True)
    return config


def _codes(side: int, codes: int):
    """Tokenizer and prior with side x side tokens."""
    tokenizer, prior = vq.get_config(), raster.get_config()
    patch, channels = GRIDS[side]
    tokenizer.model.update(patch=patch, channels=channels, local=True)
    tokenizer.model.quantizer.update(levels=LEVELS[codes], entropy=0.02, fill=0.72)
    tokenizer.optim.lr = 5e-3
    prior.model.update(width=128, heads=2)
    prior.optim.lr = 3e-3
    return tokenizer, prior


def _latent(side: int, width: int):
    """Autoencoder and DiT of a latent of side x side positions with `width` channels."""
    autoencoder, prior = kl.get_config("tiny"), dit.get_config()
    # squared error, and a divergence weight of twice its variance: an evidence bound at 33 dB, with latents of unit
    # variance
    autoencoder.model.update(channels=LATENTS[side], width=width, l1=0.0, mse=1.0, divergence=4e-3)
    autoencoder.model.residual.groups = 8
    del autoencoder.model.adversarial
    autoencoder.optim.groups = ConfigDict()
    autoencoder.optim.update(lr=3e-3, warmup=50)
    prior.model.update(channels=width, patch=1, draft=False, token_corruption=0.0, width=128, heads=2)
    prior.model.process.update(prediction_type="velocity", loss_type="velocity", relative=False, time_min=0.0)
    with prior.model.ignore_type():  # no tokens, the resolution of the latent, and text
        prior.model.update(plan_width=0, resolution=side, text_vocab="auto", text_length="auto")
    prior.sample.options.decoder.guidance = 2.0  # as the other priors
    return autoencoder, prior


def _finish(stage, variant: str, role: str):
    stage.data = ConfigDict(common.shapes(**common.DEMO), convert_dict=True)
    stage.batch, stage.steps = 32, STEPS[role]
    if variant == "tiny":
        stage.batch, stage.steps = 8, 20
        if stage.family == "tokenizers.vq":
            stage.model.channels = (32, 32)
        elif role == "prior":
            stage.model.update(width=64, depth=2, heads=1)
    stage.eval.every, stage.eval.batches = stage.steps, 16 if variant == "cpu" else 2
