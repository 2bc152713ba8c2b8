"""Convolutional tokenizer on shapes: FSQ by default.

    python -m hybridgen.train --config configs/tokenizers/vq.py:tiny --workdir runs/tokenizer

`tiny`: a smoke test. `fsq`, `lfq`, `vq`, `vq_gradient`, `gumbel`: quantisers of about 1024 codes at the demo's size, to
compare at equal steps; `autoencoder`: none. For pictures at 256: `f16`, 256 tokens of 16,384 codes (as LlamaGen's), and
`f8_latent`, a latent of 32 x 32 x 4. `model.quantizer` are the options of the quantiser (nn/quantizers).

After 400 steps (--config.steps=400 --config.eval.every=400 --config.eval.batches=8; one to two minutes each on two
cores), usage, perplexity as a share of the codebook, and dB of 512 validation pictures: fsq 1.00, 0.73, 24.9; lfq 1.00,
0.94, 23.1; vq 1.00, 0.69, 25.2; vq_gradient 1.00, 0.95, 23.6; gumbel 1.00, 0.90, 23.7.

`gumbel` scores codes by cosines with the codebook (quantizer.sharpness; 60 for 30: the same dB). By an own linear map,
the official form (quantizer.sharpness=0, with quantizer.cooling=300), it has 0.73, 0.13, 18.3: a fresh map's scores are
a third of the noise's size, and lead to places at random. Larger ones (16 times) are no cure, 0.42, 0.24, 19.4; cosines
with rows of their own use all codes, 1.00, 0.73, 19.9; with the codebook's, what a code scores is where it lies. The
temperature is of the gradient, not of the draw: cooling gained nothing, 23.6. Without the entropy term few codes do
most of the work: 0.81, 0.06, 24.0.
"""

from ml_collections import ConfigDict

from configs import common

FAIR = {"codebook_size": 1024, "width": 8}
FSQ = {"kind": "fsq", "levels": (8, 5, 5, 5), "entropy": 0.0, "fill": 0.7}
LFQ = {"kind": "lfq", "bits": 10, "entropy": 0.05, "softness": 0.5, "diversity": 2.0}
GUMBEL = {"kind": "gumbel", "sharpness": 30.0, "cooling": 0, "divergence": 0.0, "entropy": 0.02, "softness": 1.0}
QUANTIZERS = {
    "fsq": FSQ | {"entropy": 0.02, "fill": 0.72},  # 1000 codes
    "lfq": LFQ,
    "vq": {"kind": "vq_ema", "l2": True} | FAIR,
    "vq_gradient": {"kind": "vq_gradient", "l2": True, "entropy": 0.02, "softness": 0.01} | FAIR,
    "gumbel": GUMBEL | FAIR,
    "autoencoder": {"kind": "none", "width": 8},
}


def get_config(variant: str = ""):
    model = {"resolution": "auto", "patch": 4, "channels": (64, 128), "blocks": 1, "attention": True, "local": False}
    model |= {"quantizer": QUANTIZERS.get(variant, FSQ), "mse": 1.0, "l1": 0.0}
    config = common.stage("tokenizers.vq", model, common.shapes(), steps=1000, optim__lr=3e-3)
    if variant == "tiny":
        config.steps, config.batch = 20, 8
        config.model.channels = (32, 32)
    elif variant == "f16":
        config.data.resolution = 256
        config.model.update(patch=2, channels=(128, 256, 256, 512), blocks=2, dtype="bfloat16")
        config.model.quantizer = ConfigDict({"kind": "vq_ema", "codebook_size": 16_384, "width": 8})
    elif variant == "f8_latent":
        config.data.resolution = 256
        config.model.update(patch=2, channels=(128, 256, 512), blocks=2, attention=False, dtype="bfloat16")
        config.model.quantizer = ConfigDict({"kind": "none", "width": 4})
    elif variant and variant not in QUANTIZERS:
        raise common.unknown(variant, "tiny", *QUANTIZERS, "f16", "f8_latent")
    return config
