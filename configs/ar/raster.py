"""Raster prior on shapes, over the tokens of a trained tokenizer.

    python -m hybridgen.train --config configs/ar/raster.py:tiny --workdir runs/prior \
        --config.parts.tokenizer=runs/tokenizer

`tiny`: a smoke test. `bench`: width 512, 12 layers, 256 tokens, the benchmark for CPUs. `1b`: 0.98B parameters over 256
tokens with 16,384 codes, the benchmark for accelerators, on a single H100 or v5p; `775m`: the size of LlamaGen's XL.
`3b`: 2.9B, for a v5e:16x16 or more (LlamaGen's 3B is 3200 wide with heads of width 100; here they have 128, which a TPU
does not pad). `20b`: 20B parameters, the size of Parti's largest (Yu et al. 2022), over 1024 tokens, here of images at
512, for a v5p:8x8x4 or more.
"""

from configs import common


def get_config(variant: str = ""):
    model = {"vocab": "auto", "grid": "auto", "text_vocab": "auto", "text_length": "auto"}
    model |= {"classes": "auto", "cond_drop_prob": 0.1, "text_depth": 1}
    model |= {"width": 192, "depth": 4, "heads": 3, "kv_heads": None, "qk_norm": True}
    model |= {"remat": "none", "unroll": -1, "dtype": "float32"}
    config = common.stage("ar.raster", model, common.shapes(), steps=2000, optim__lr=2e-3)
    config.parts.tokenizer = "../tokenizer"
    draw = {"guidance": 2.0, "guidance_schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "gather": 1}
    config.sample.options = {"prior": draw}
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.update(width=64, depth=2, heads=1)
    elif variant == "bench":
        config.batch = 4
        config.model.update(width=512, depth=12, heads=8)
        config.parts.tokenizer = common.UNTRAINED_256
    elif variant in ("775m", "1b", "3b", "20b"):
        config.data.update(resolution=512 if variant == "20b" else 256)
        config.data.text.length = 64
        config.steps, config.batch = 300_000, 1024
        config.optim.update(lr=2e-4, warmup=5000, decay=0.05)
        config.model.update(width=3072, depth=24, heads=24, hidden=8192, text_depth=0)
        config.model.update(remat="full", unroll=1, dtype="bfloat16")
        config.mesh.update(data=-1, fsdp=16)
        config.parts.tokenizer = "configs/tokenizers/vq.py:f16"
        if variant == "20b":
            config.optim.lr = 1e-4
            config.model.update(width=6144, depth=44, heads=48, hidden=16384)
            config.mesh.update(fsdp=64)
        elif variant in ("775m", "1b"):
            width, depth, hidden = (1280, 36, 3584) if variant == "775m" else (2048, 18, 5504)
            config.batch = 64
            config.model.update(width=width, depth=depth, heads=width // 128, hidden=hidden, remat="dots", unroll=-1)
            config.mesh.update(fsdp=1)
    elif variant:
        raise common.unknown(variant, "tiny", "bench", "775m", "1b", "3b", "20b")
    return config
