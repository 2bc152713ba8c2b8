"""Replay of the autoencoders of Stable Diffusion, SD3 and Flux (diffusers)."""

import jax
import numpy as np

from hybridgen.models.tokenizers import kl
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.replays._latents import Latents


def replay(case: Case) -> None:
    """Compares AutoencoderKL of diffusers; "faint" outputs are for the input times 0.01."""
    it = Latents(case)

    def image() -> np.ndarray:
        return case.takes("in_image")

    def sample() -> jax.Array:
        return kl.draw_latent(*it.moments(image()), rows_last(case.takes("in_noise")))

    faint = np.float32(0.01)
    case.gives("out_enc_prenorm", lambda: rows_first(it.apply("encoded", image(), hidden=True)))
    case.gives("out_enc", lambda: rows_first(it.apply("encoded", image())))
    case.gives("out_moments", lambda: rows_first(it.apply("raw", image())))
    case.gives("out_mean", lambda: rows_first(it.moments(image())[0]))
    case.gives("out_logvar", lambda: rows_first(it.moments(image())[1]))
    case.gives("out_kl", lambda: kl.divergence(*it.moments(image())))
    case.gives("out_sample", lambda: rows_first(sample()))
    case.gives("out_model_latent", lambda: rows_first(kl.scaled(it.model, sample())))
    case.gives("out_decoded", lambda: it.decoded(case.takes("in_latent")))
    case.gives("out_recon", lambda: it.decoded(rows_first(it.moments(image())[0])))
    case.gives("out_moments_faint", lambda: rows_first(it.apply("raw", faint * image())))
    case.gives("out_decoded_faint", lambda: it.decoded(faint * case.takes("in_latent")))
