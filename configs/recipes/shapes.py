"""The whole cascade on the built-in shapes: tokenizer, prior, decoder, cascade, evaluation with a grid.

    python -m hybridgen.recipe --config configs/recipes/shapes.py:cpu --workdir runs/shapes

`tiny`: a smoke test of about a minute. `cpu`: the README's demo, on two cores. `cpu_long`: the same images with all
paraphrases, about 90 minutes on two cores. `base`: 64 px, all shapes, sizes, counts and backgrounds, English and
Chinese, for an accelerator.
"""

from ml_collections import ConfigDict

from configs import common
from configs.ar import raster
from configs.diffusion import dit
from configs.hybrid import cascade
from configs.tokenizers import vq

VARIANTS = ("tiny", "cpu", "cpu_long", "base")


def get_config(variant: str = ""):
    variant = variant or "cpu"
    if variant not in VARIANTS:
        raise common.unknown(variant, *VARIANTS)
    small = "tiny" if variant == "tiny" else ""
    stages = {
        "tokenizer": vq.get_config(small),
        "prior": raster.get_config(small),
        "decoder": dit.get_config(small),
        "cascade": cascade.get_config(),
    }
    if variant != "tiny":
        data = {"cpu": common.DEMO | {"length": 12}, "cpu_long": common.DEMO | {"templates": None}, "base": common.FULL}
        data = data[variant]
        for stage in stages.values():
            stage.data = ConfigDict(common.shapes(**data), convert_dict=True)
        {"cpu": _cpu, "cpu_long": _cpu_long, "base": _base}[variant](**stages)
    count = {"tiny": 16, "cpu": 256}.get(variant, 1024)
    evaluation = {"evaluate": "../cascade", "splits": ("validation", "holdout"), "count": count, "seed": 0}
    evaluation |= {"batch": min(count, 64)}
    config = ConfigDict()
    config.order = (*stages, "evaluation")
    config.stages = ConfigDict({**stages, "evaluation": evaluation})
    return config


def _local(tokenizer):
    # with local tokens a prior can combine objects that it learned separately; with global ones it learns each pair
    tokenizer.model.local = True
    tokenizer.model.quantizer.update(entropy=0.02, fill=0.72)


def _cpu(tokenizer, prior, decoder, cascade):
    for stage in (tokenizer, prior, decoder):
        stage.optim.kind = "muon"
        # relations are learned last, and only from images with two objects: with three in four, after half the steps
        stage.data.options.objects = (1, 2, 2, 2)
    cascade.data.options.objects = (1, 2)
    _local(tokenizer)
    tokenizer.steps, tokenizer.optim.lr = 700, 5e-3
    # without layers for the text alone, unseen pairs of a shape and a colour are right more often
    prior.model.update(width=128, heads=2, text_depth=0)
    prior.steps, prior.optim.lr = 1200, 3e-3
    decoder.model.update(width=128, heads=2, depth=3)
    with decoder.model.ignore_type():  # it reads the caption, which says what a small or blurred object of the draft is
        decoder.model.update(text_vocab="auto", text_length="auto")
    decoder.steps, decoder.optim.lr = 300, 4e-3
    for stage in (prior, cascade):
        stage.sample.options.prior.update(guidance=1.5, temperature=0.4)


def _cpu_long(tokenizer, prior, decoder, cascade):
    _local(tokenizer)
    tokenizer.steps, tokenizer.optim.lr = 5000, 5e-3
    prior.steps, prior.optim.lr, prior.ema.decay = 5000, 2e-3, 0.999
    decoder.steps, decoder.optim.lr, decoder.ema.decay = 2000, 2e-3, 0.999
    for stage in (tokenizer, prior, decoder):
        stage.eval.every, stage.sample.every = 500, 1000
        stage.checkpoint.keep_every = 1000  # for the curve: hybridgen evaluate --checkpoint


def _base(tokenizer, prior, decoder, cascade):
    for stage in (tokenizer, prior, decoder):
        stage.model.dtype = "bfloat16"
        stage.batch, stage.optim.warmup, stage.ema.decay = 256, 500, 0.9995
    tokenizer.model.update(channels=(128, 256), blocks=2, local=True)
    tokenizer.model.quantizer.update(entropy=0.02, fill=0.75, levels=(8, 8, 8, 5))
    tokenizer.steps, tokenizer.optim.lr = 20_000, 2e-3
    prior.model.update(width=512, depth=12, heads=8, text_depth=4)
    prior.steps, prior.optim.lr, prior.optim.decay = 30_000, 6e-4, 0.05
    decoder.model.update(width=512, depth=12, heads=8)
    decoder.steps, decoder.optim.lr = 30_000, 5e-4
    cascade.sample.options.decoder.steps = 16
