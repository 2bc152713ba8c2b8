"""DiT of diffusers: class-conditional, on latents of a KL autoencoder, with the training recipe of the paper.

    python -m hybridgen.train --config configs/diffusion/dit_diffusers.py --workdir runs/dit \
        --config.parts.autoencoder=runs/vae

The default is DiT-XL-2-256 of the library: XL/2 on latents of 32 x 32 x 4 of images at 256, 750 M parameters, 75 M of
them copies of the embedders in every block. Training and expected results are those of dit_official.py, which is the
smaller network and preferable for training from scratch. This config is for weights of the library (`convert dit`,
`init_from`); `convert dit --export` writes a run as such weights.

`tiny`: images of shapes at 16 px in place of latents, 300 steps, a minute on one core.
"""

from configs import common
from configs.diffusion import dit_official


def get_config(variant: str = ""):
    if variant not in ("", "tiny"):
        raise common.unknown(variant, "tiny")
    config = dit_official.get_config(variant)
    config.family = "diffusion.dit_diffusers"
    config.model.update(mlp="gelu", qkv_bias=True, mlp_norm_eps=1e-5, mlp_norm_affine=False)
    config.model.process.variance = "small"
    return config
