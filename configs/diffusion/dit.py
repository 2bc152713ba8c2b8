"""DiT decoder on shapes: generates pixels from the tokens of a trained tokenizer and its draft.

    python -m hybridgen.train --config configs/diffusion/dit.py:tiny --workdir runs/decoder \
        --config.parts.tokenizer=runs/tokenizer

`tiny`: a smoke test. `bench`: width 512, 12 layers, 256 patches, the benchmark for CPUs. `xl`: DiT-XL/2 on latents of
32 x 32 x 4 of images at 256, from 256 tokens, for a v5e:16x16 or more. `1b`: the same with 1.02B parameters, the
benchmark for accelerators, on a single H100 or v5p.
"""

from configs import common


def get_config(variant: str = ""):
    model = {"resolution": "auto", "plan_width": "auto", "patch": 4, "width": 192, "depth": 4, "heads": 3}
    model |= {"draft": True, "cross": False, "text_vocab": 0, "text_length": 0, "classes": "auto"}
    model |= {"plan_drop_prob": 0.05, "cond_drop_prob": 0.1, "token_corruption": 0.05}
    model |= {"remat": "none", "unroll": -1, "dtype": "float32"}
    model["process"] = {"schedule": "flow", "prediction_type": "x", "loss_type": "x", "relative": True}
    model["process"] |= {"time_mean": 0.0, "time_std": 1.0, "time_min": 0.05}
    config = common.stage("diffusion.dit", model, common.shapes(), steps=1000, optim__lr=2e-3)
    config.parts.tokenizer = "../tokenizer"
    config.ema.decay = 0.99
    draw = {"guidance": 1.0, "guidance_schedule": "constant", "solver": "euler", "steps": 16, "shift": 1.0, "gather": 1}
    config.sample.options = {"decoder": draw}
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.update(width=64, depth=2, heads=1)
    elif variant == "bench":
        config.batch = 4
        config.model.update(patch=2, width=512, depth=12, heads=8)
        config.parts.tokenizer = common.UNTRAINED_256
    elif variant in ("xl", "1b"):
        config.data.update(resolution=256)
        config.steps, config.batch = 400_000, 1024
        config.optim.update(lr=1e-4, schedule="constant", warmup=1000)
        config.ema.decay = 0.9999
        config.model.update(channels=4, patch=2, width=1152, depth=28, heads=16)
        with config.model.ignore_type():  # that of the latent; "auto" would be that of the data
            config.model.resolution = 32
        config.model.update(draft=False, plan_drop_prob=0.1, token_corruption=0.1)
        config.model.update(remat="full", unroll=1, dtype="bfloat16")
        config.model.process.update(prediction_type="velocity", loss_type="velocity", relative=False, time_min=0.0)
        config.mesh.update(data=-1, fsdp=16)
        config.sample.options.decoder.update(guidance=1.5, steps=25)
        config.parts.update(tokenizer="configs/tokenizers/vq.py:f16", autoencoder="configs/tokenizers/vq.py:f8_latent")
        if variant == "1b":
            config.batch = 128
            config.model.update(width=1536, depth=24, heads=12, remat="dots", unroll=-1)
            config.mesh.update(fsdp=1)
    elif variant:
        raise common.unknown(variant, "tiny", "bench", "xl", "1b")
    return config
