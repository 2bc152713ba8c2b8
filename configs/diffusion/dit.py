"""DiT decoder on shapes: pixels from the tokens of a trained tokenizer and its draft of them.

    python -m hybridgen.train --config configs/diffusion/dit.py:tiny --workdir runs/decoder --config.parts.tokenizer=runs/tokenizer

`tiny`: a smoke test.
"""

from configs import common


def get_config(variant: str = ""):
    model = {"resolution": "auto", "plan_width": "auto", "patch": 4, "width": 192, "depth": 4, "heads": 3}
    model |= {"draft": True, "cross": False, "kind": "x", "loss_kind": "velocity", "schedule": "flow"}
    model |= {"time_mean": 0.0, "time_std": 1.0, "time_min": 0.05, "drop_plan": 0.1, "corrupt": 0.1}
    model |= {"remat": "none", "unroll": -1, "dtype": "float32"}
    config = common.stage("diffusion.dit", model, common.shapes(), steps=1000, optim__lr=2e-3)
    config.parts.tokenizer = "../tokenizer"
    config.ema.decay = 0.99
    config.sample.options = {"decoder": {"guidance": 1.0, "solver": "euler", "steps": 8, "shift": 1.0}}
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.update(width=64, depth=2, heads=1)
    elif variant:
        raise common.unknown(variant, "tiny")
    return config
