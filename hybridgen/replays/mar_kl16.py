"""Replay of KL-16, the autoencoder of MAR."""

import jax
import numpy as np

from hybridgen.models.tokenizers import kl
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.replays._latents import Latents


def replay(case: Case) -> None:
    """Compares the outputs of KL-16; `latent` is scaled as in MAR's trainer, and `recon` is that latent decoded."""
    it = Latents(case)

    def image() -> np.ndarray:
        return case.takes("image")

    def latent() -> jax.Array:
        return kl.scaled(it.model, kl.draw_latent(*it.moments(image()), rows_last(case.takes("noise"))))

    def recon() -> np.ndarray:
        return rows_first(jax.jit(lambda z: kl.decode(it.model, it.params, {}, z))(latent()))

    case.gives("enc_prenorm", lambda: rows_first(it.apply("encoded", image(), hidden=True)))
    case.gives("enc", lambda: rows_first(it.apply("encoded", image())))
    # without variances the official map returns means only, and official code appends ones to them
    given = case.arrays["moments"].shape[1:2] if case.has("moments") else (None,)
    case.gives("moments", lambda: rows_first(it.apply("raw", image()))[:, slice(*given)])
    case.gives("mean", lambda: rows_first(it.moments(image())[0]))
    case.gives("logvar", lambda: rows_first(it.moments(image())[1]))
    case.gives("kl", lambda: kl.divergence(*it.moments(image())))
    case.gives("latent", lambda: rows_first(latent()))
    case.gives("recon", recon)
    case.gives("decoded", lambda: it.decoded(case.takes("z")))
