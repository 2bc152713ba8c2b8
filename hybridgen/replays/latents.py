"""Replays of autoencoders with continuous latents: Stable Diffusion's family, and KL-16 of MAR.

Recorded pictures are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, h w grid, d channels of a latent.
"""

from typing import Any

import jax
import numpy as np

from hybridgen.models.tokenizers import kl
from hybridgen.replays import Case, rows_first, rows_last


class Latents:
    """The model with its methods compiled; pictures in and out as they were recorded."""

    def __init__(self, case: Case):
        _, part = case.imported
        self.model, self.params = part.model, part.params
        self.known: dict[Any, Any] = {}

    def apply(self, method: str, x: np.ndarray, **options: Any) -> Any:
        """A method on `x [b, c, H, W]`; results channels last."""
        key = (method, x.tobytes(), tuple(options))
        if key not in self.known:
            run = jax.jit(lambda params, x: self.model.apply({"params": params}, x, method=method, **options))
            self.known[key] = run(self.params, rows_last(x))
        return self.known[key]

    def moments(self, image: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self.apply("moments", image)

    def decoded(self, latent: Any) -> np.ndarray:
        """Pictures of latents that are not scaled, `[b, d, h, w]`."""
        return rows_first(self.apply("picture", np.asarray(latent)))


def sd_kl_vae(case: Case) -> None:
    """AutoencoderKL of diffusers; "faint" is a hundredth of the input."""
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


def mar_kl16(case: Case) -> None:
    """KL-16 of MAR; `latent` is scaled as its trainer does, `recon` is that latent decoded."""
    it = Latents(case)

    def image() -> np.ndarray:
        return case.takes("image")

    def latent() -> jax.Array:
        return kl.scaled(it.model, kl.draw_latent(*it.moments(image()), rows_last(case.takes("noise"))))

    def recon() -> np.ndarray:
        return rows_first(jax.jit(lambda z: kl.decode(it.model, it.params, {}, z))(latent()))

    case.gives("enc_prenorm", lambda: rows_first(it.apply("encoded", image(), hidden=True)))
    case.gives("enc", lambda: rows_first(it.apply("encoded", image())))
    # without variances the official map gives means alone, and its posterior is handed ones behind them
    given = case.arrays["moments"].shape[1:2] if case.has("moments") else (None,)
    case.gives("moments", lambda: rows_first(it.apply("raw", image()))[:, slice(*given)])
    case.gives("mean", lambda: rows_first(it.moments(image())[0]))
    case.gives("logvar", lambda: rows_first(it.moments(image())[1]))
    case.gives("kl", lambda: kl.divergence(*it.moments(image())))
    case.gives("latent", lambda: rows_first(latent()))
    case.gives("recon", recon)
    case.gives("decoded", lambda: it.decoded(case.takes("z")))
