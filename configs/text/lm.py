"""Causal language model on the captions of shapes.

    python -m hybridgen.train --config configs/text/lm.py:tiny --workdir runs/lm

`tiny`: a smoke test, seconds on two cores; its final loss is at least MARGIN nats per token below the unigram entropy
of the captions' words. `1b`: layers of Llama 3.2 1B's size over bytes, for a v5e:4x4 or more; they can be initialized
from imported ones (`init_from.blocks=RUN:blocks`).
"""

from configs import common

MARGIN = 1.8  # nats: the unigram entropy is 3.37; `tiny` ends at 1.25, and at 1.11 after a thousand steps


def get_config(variant: str = ""):
    model = {"text_vocab": "auto", "text_length": "auto", "width": 192, "depth": 4, "heads": 3, "head_width": 0}
    model |= {"kv_heads": None, "hidden": 0, "norm_eps": 1e-5, "base": 10_000.0, "tied": True}
    model |= {"remat": "none", "unroll": -1, "dtype": "float32"}
    config = common.stage("text.lm", model, common.shapes(resolution=16), steps=1000, optim__lr=2e-3)
    config.sample.options = {"prior": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "gather": 1}}
    if variant == "tiny":
        config.steps, config.batch = 60, 16
        config.optim.update(lr=1e-2, warmup=5)
        config.model.update(width=64, depth=2, heads=2)
    elif variant == "1b":
        config.data.text.update(kind="bytes", length=2048)
        config.steps, config.batch, config.accumulate = 100_000, 512, 2
        config.optim.update(lr=3e-4, warmup=2000, decay=0.1)
        config.model.update(width=2048, depth=16, heads=32, head_width=64, kv_heads=8, hidden=8192, base=5e5)
        config.model.update(remat="full", unroll=1, dtype="bfloat16")
        config.mesh.update(data=-1, fsdp=16)
    elif variant:
        raise common.unknown(variant, "tiny", "1b")
    return config
