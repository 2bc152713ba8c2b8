"""Convolutional tokenizer on shapes: FSQ by default.

    python -m hybridgen.train --config configs/tokenizers/vq.py:tiny --workdir runs/tokenizer

`tiny`: a smoke test. `fsq`, `lfq`, `vq`, `vq_gradient`, `gumbel`: quantizers with about 1024 codes at the demo's size,
to compare at equal steps; `autoencoder`: no quantizer. For images at 256: `f16`, 256 tokens with 16,384 codes (as
LlamaGen), and `f8_latent`, a latent of 32 x 32 x 4. `model.quantizer` has the options of the quantizer (nn/quantizers).

After 400 steps (--config.steps=400 --config.eval.every=400 --config.eval.batches=8; one to two minutes each on two
cores), the usage of the codebook, perplexity divided by its size, and PSNR in dB of 512 validation images are: fsq
1.00, 0.73, 24.9; lfq 1.00, 0.94, 23.1; vq 1.00, 0.69, 25.2; vq_gradient 1.00, 0.95, 23.6; gumbel 1.00, 0.90, 23.7.

`gumbel` computes logits as cosines with the codebook (quantizer.sharpness; 60 instead of 30 gives the same PSNR). With
a separate linear layer, the official form (quantizer.sharpness=0, with quantizer.cooling=300), the result is 0.73,
0.13, 18.3: the initial logits are a third of the noise's size, so codes are assigned at random. Initial logits 16 times
as large do not help, 0.42, 0.24, 19.4; cosines with separate rows use all codes, 1.00, 0.73, 19.9; with the rows of the
codebook, the logit of a code depends on its position. The temperature affects the gradient, not the sampled codes:
cooling gave no gain, 23.6. Without the entropy term few codes dominate: 0.81, 0.06, 24.0.
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
