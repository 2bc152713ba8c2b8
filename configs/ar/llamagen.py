"""LlamaGen (Sun et al. 2024): a transformer over the tokens of a trained tokenizer, with the published recipe.

    python -m hybridgen.train --config configs/ar/llamagen.py:b --workdir runs/gpt \
        --config.parts.tokenizer=runs/vq --config.data.source=...

Class-conditional: `b` 111M, `l` 343M, `xl` 775M, `xxl` 1.4B, `3b` 3.1B parameters, 256 tokens for an image at 256.
Text-conditional: `t2i_xl`, on 120 features of Flan-T5-XL, from the part `text` or cached in the batch. The model
options fit imported official weights (`hybridgen convert llamagen_gpt`), so `init_from` can continue a published
checkpoint.

The published recipe: AdamW at a constant 1e-4 without warmup, weight decay on all matrices and embedding tables, batch
256, 300 epochs of ImageNet, dropout, one condition in ten dropped, no EMA.

`tiny`: seconds on a CPU. Its final loss is at least `MARGIN` nats per token below the unigram entropy of its tokens; so
is that of `t2i_tiny`, with captions encoded by a small language model (`--config.parts.text=RUN` of
configs/text/lm.py:tiny).
"""

from configs import common

MARGIN = 0.2
SIZES = {  # layers, heads, width, hidden
    "b": (12, 12, 768, 2048),
    "l": (24, 16, 1024, 2816),
    "xl": (36, 20, 1280, 3584),
    "xxl": (48, 24, 1536, 4096),
    "3b": (24, 32, 3200, 8704),
}
OFFICIAL = {"norm_eps": 1e-5, "cond_drop_prob": 0.1, "dropout": 0.1, "token_dropout": 0.1}


def get_config(variant: str = "b"):
    variant = variant or "b"
    if variant not in ("tiny", "t2i_tiny", *SIZES, "t2i_xl"):
        raise common.unknown(variant, "tiny", "t2i_tiny", *SIZES, "t2i_xl")
    text, tiny = variant.startswith("t2i"), variant.endswith("tiny")
    depth, heads, width, hidden = SIZES.get(variant, SIZES["xl"])
    model = {"vocab": "auto", "grid": "auto", "width": width, "depth": depth, "heads": heads, "hidden": hidden}
    model |= {"classes": 10 if tiny else 1000} | OFFICIAL
    model |= {"remat": "full", "unroll": 1, "dtype": "bfloat16"}
    data = common.shapes(resolution=256, length=120 if variant == "t2i_xl" else 16)
    changes = {"steps": 1_500_000, "batch": 256, "optim__lr": 1e-4, "optim__schedule": "constant", "optim__warmup": 0}
    changes |= {"optim__decay": 0.05, "optim__decay_on": "(kernel|table)$", "optim__clip": 1.0}
    config = common.stage("ar.llamagen", model, data, **changes)
    config.parts.tokenizer = "../tokenizer"
    draw = {"guidance": 2.0, "guidance_schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "gather": 1}
    if text:
        config.model.update(classes=0, text_length=120, text_width=2048, null_length=120)
        config.parts.text = "../text"
        draw |= {"guidance": 7.5, "top_k": 1000}
    if tiny:
        config.model.update(width=64, depth=2, heads=1, hidden=192, remat="none", unroll=-1)
        config.model.update(dtype="float32", dropout=0.0, token_dropout=0.0)  # too few steps to overfit
        config.data.resolution = 32
        config.update(steps=200, batch=16)
        config.optim.lr = 5e-3
        if text:
            config.model.update(text_length=16, null_length=16, text_width=64)  # of that language model
            draw |= {"guidance": 2.0, "top_k": 0}
    config.sample.options = {"prior": draw}
    return config
