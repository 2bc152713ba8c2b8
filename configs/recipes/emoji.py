"""The cascade on emoji at 64 px: two drawing styles, with captions in English and Chinese that name the style.

    python -m hybridgen.data.prepare.emoji --packages FOLDER --out emoji
    python -m hybridgen.recipe --config configs/recipes/emoji.py:cpu --config.path=emoji --workdir runs/emoji

Captions are "red heart, noto" and "红心, twemoji": the image's name in one of the two languages, chosen at random in
each epoch, and the style. Concepts in validation are in training in neither style.

`tiny`: a smoke test. `cpu`: 64 tokens per image. `base`: 256 tokens, for an accelerator; not run in full yet.
`config.path` and `config.length` (prompt tokens) reach every stage.

`cpu` took 14, 51 and 33 minutes on two cores that a dozen other programs kept busy (prior and decoder at the same
time), and 3.7 GiB. Final loss of the prior: 0.05 nats per token in training, 9.6 in validation (5.6 after 300 of its
1,200 steps): it memorizes its images and is sampled greedily. PSNR from reference tokens in validation: draft 22.2,
render 21.6 (sharper; 1,200 steps are few); all of the 2,560 codes are in use, with a perplexity of 77 %.
"""

from ml_collections import ConfigDict

from configs import common
from configs.recipes import shapes

VARIANTS = ("tiny", "cpu", "base")


def get_config(variant: str = ""):
    variant = variant or "cpu"
    if variant not in VARIANTS:
        raise common.unknown(variant, *VARIANTS)
    config = shapes.get_config(variant)
    config.path = "emoji"
    config.length = 16  # the longest caption
    options = {"path": config.get_ref("path"), "text_key": ("text", "text_zh"), "style_key": "style"}
    options |= {"split_key": "split"}
    for name in ("tokenizer", "prior", "decoder", "cascade"):
        stage = config.stages[name]
        stage.data = ConfigDict(
            {
                "source": "folder",
                "options": options,
                "resolution": 64,
                "flip": False,  # mirroring would change flags, arrows and letters
                "workers": 0,
                "threads": 1,
                "retry": 120.0,
                "text": {"kind": "words", "length": config.get_ref("length")},
            }
        )
    {"tiny": _tiny, "cpu": _cpu, "base": _base}[variant](**{name: config.stages[name] for name in config.order[:3]})
    if variant == "cpu":
        for name in ("prior", "cascade"):
            # memorized images: after one wrong token the prior continues from an image outside its training data
            config.stages[name].sample.options.prior.update(guidance=1.0, temperature=0.0)
        for name in ("decoder", "cascade"):
            config.stages[name].sample.options.decoder.steps = 4
    config.stages.evaluation.splits = ("validation", "train")
    return config


def _tiny(tokenizer, prior, decoder):
    decoder.model.patch = 8


def _cpu(tokenizer, prior, decoder):
    # as many tokens as patches, 8 x 8; with Muon the models memorize 3,458 images in twenty epochs
    tokenizer.model.update(patch=4, channels=(64, 128), l1=0.5)
    tokenizer.model.quantizer.update(levels=(8, 8, 8, 5), fill=0.75)
    decoder.model.patch = 8
    tokenizer.steps, prior.steps, decoder.steps = 900, 1200, 1200
    tokenizer.optim.kind, decoder.optim.lr = "adamw", 2e-3
    prior.model.update(width=192, heads=3)
    decoder.model.update(width=192, heads=3, depth=4)
    with decoder.model.ignore_type():
        decoder.model.update(text_vocab=0, text_length=0)
    for stage in (tokenizer, prior, decoder):
        stage.ema.decay = 0.995
        stage.eval.every, stage.sample.every = 300, 900


def _base(tokenizer, prior, decoder):
    # 16 x 16 tokens; 3,458 images are memorized soon: few steps, weight decay and dropped captions
    tokenizer.model.update(patch=2, l1=0.5)
    decoder.model.patch = 4
    prior.model.update(width=384, depth=8, heads=6, cond_drop_prob=0.15)
    prior.optim.decay, decoder.optim.decay = 0.1, 0.05
    tokenizer.steps, prior.steps, decoder.steps = 15_000, 10_000, 20_000
    for stage in (tokenizer, prior, decoder):
        stage.eval.every, stage.sample.every = 500, 2500
