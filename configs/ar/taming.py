"""The transformer of VQGAN (Esser et al. 2021), with learned positions, over the tokens of a trained tokenizer.

    python -m hybridgen.train --config configs/ar/taming.py:imagenet --workdir runs/gpt \
        --config.parts.tokenizer=runs/vqgan --config.data.source=...

`imagenet`: class-conditional, 1.4B parameters, 256 tokens with 16384 codes. `base`: unconditional, 310M parameters, the
size published for faces. A class is a token of the same vocabulary, before the image tokens; there is no guidance. The
model options fit imported official weights (`hybridgen convert taming_gpt`).

The published recipe: AdamW at a constant 4.5e-6 times the batch size, weight decay of 0.01 on matrices only. With
`model.pkeep` below 1, that share of the input tokens is kept and the others are replaced by random ones.

`tiny`: seconds on a CPU. Its final loss is at least `MARGIN` nats per token below the unigram entropy of its tokens.
"""

from configs import common

MARGIN = 0.3
SIZES = {"imagenet": (48, 24, 1536), "base": (24, 16, 1024), "tiny": (2, 2, 64)}  # layers, heads, width


def get_config(variant: str = "imagenet"):
    variant = variant or "imagenet"
    if variant not in SIZES:
        raise common.unknown(variant, *SIZES)
    tiny = variant == "tiny"
    depth, heads, width = SIZES[variant]
    model = {"vocab": "auto", "grid": "auto", "width": width, "depth": depth, "heads": heads, "pkeep": 1.0}
    model |= {"classes": {"imagenet": 1000, "base": 0, "tiny": 10}[variant]}
    model |= {"remat": "none" if tiny else "full", "unroll": -1 if tiny else 1}
    model |= {"dtype": "float32" if tiny else "bfloat16"}
    batch = 16 if tiny else 64
    changes = {"steps": 60 if tiny else 1_000_000, "batch": batch, "optim__lr": 5e-3 if tiny else 4.5e-6 * batch}
    changes |= {"optim__schedule": "constant", "optim__warmup": 0, "optim__decay": 0.01, "optim__decay_on": "kernel$"}
    config = common.stage("ar.taming", model, common.shapes(resolution=32 if tiny else 256), **changes)
    config.optim.clip = 1.0 if tiny else 0.0
    config.parts.tokenizer = "../tokenizer"
    draw = {"guidance": 1.0, "guidance_schedule": "constant", "temperature": 1.0, "top_k": 600, "top_p": 0.92}
    draw |= {"gather": 1}  # gather weights that are sharded over fsdp once for sampling
    config.sample.options = {"prior": draw}
    return config
