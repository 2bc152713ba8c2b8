"""Latents for diffusion training: sampled from the autoencoder's Gaussian with the sample's key, or its mean.

Letters: b pictures, h w grid, d channels of the latent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs.diffusion import dit_official
from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.diffusion import dit
from hybridgen.models.roles import denoiser

B = 4
KL = {"resolution": tiny.SIDE, "channels": (8, 8), "blocks": 1, "attention": False, "width": 2, "scale": 0.5}
KL |= {"shift": 0.1, "residual": {"groups": 4}}
DIT = {"resolution": 8, "channels": 2, "patch": 2, "width": 16, "depth": 1, "heads": 1, "classes": tiny.CLASSES}


@functools.cache
def autoencoder():
    return tiny.part("tokenizers.kl", KL)


@functools.cache
def encode():
    return jax.jit(lambda image, keys=None: autoencoder().call("encode", image, keys=keys))


def test_draws_have_the_mean_and_the_variance_of_the_posterior():
    """Within four standard errors over all values; the scale and the shift are those of the mean."""
    part, count = autoencoder(), 2048
    image = tiny.batch(1)["image"]
    mean, spread_of = part.model.apply({"params": part.params}, image, method="moments")  # 1 h w d
    keys = rng.sample_keys(jax.random.key(0), np.arange(count))
    given = jnp.broadcast_to(image, (count, *image.shape[1:]))
    draws = np.asarray(
        jax.lax.map(lambda pair: encode()(*pair), (given.reshape(8, -1, *image.shape[1:]), keys.reshape(8, -1))),
        np.float64,
    )
    draws = draws.reshape(count, *mean.shape[1:])
    want, deviation = (np.asarray(mean)[0] - 0.1) * 0.5, 0.5 * np.exp(0.5 * np.asarray(spread_of)[0])
    np.testing.assert_allclose(encode()(image)[0], want, atol=1e-5)
    off = (draws.mean(0) - want) / deviation * np.sqrt(count)  # standard normal, as many as values
    assert np.abs(off).max() < 4.5 and abs(np.square(off).mean() - 1) < 4 * np.sqrt(2 / off.size)
    ratio = (draws.var(0) / deviation**2 - 1) * np.sqrt(count / 2)
    assert np.abs(ratio).max() < 4.5 and abs(np.square(ratio).mean() - 1) < 0.5
    assert deviation.std() / deviation.mean() > 0.05  # each value its own


@functools.cache
def losses(posterior):
    """(batch, key, train) -> the loss of a model of latents."""
    part = tiny.part("diffusion.dit", DIT | {"posterior": posterior})

    @functools.partial(jax.jit, static_argnames="train")
    def run(batch, key, train):
        given = {"parts": {"autoencoder": autoencoder()}, "extra": {}, "step": 0, "train": train}
        return dit.loss(part.model, part.params, batch, key, **given)[0]

    return run


@pytest.mark.slow
def test_training_draws_by_the_samples_key_and_evaluation_takes_the_mean():
    batch, key = tiny.batch(B), jax.random.key(1)
    noise = rng.named(rng.sample_keys(key, batch["id"]), "posterior")
    mean, drawn = encode()(batch["image"]), encode()(batch["image"], noise)
    assert tiny.gap(mean, drawn) > 0.1
    turned = encode()(batch["image"][::-1], noise[::-1])
    assert tiny.same(drawn, turned[::-1])
    seen = {}
    for posterior, train, latent in (("sample", True, drawn), ("sample", False, mean), ("mean", True, mean)):
        seen[posterior, train] = float(losses(posterior)(batch, key, train=train))
        cached = {name: batch[name] for name in ("id", "label")} | {"latent": latent}
        assert seen[posterior, train] == pytest.approx(float(losses("sample")(cached, key, train=train)), rel=1e-5)
    assert abs(seen["sample", True] / seen["mean", True] - 1) > 1e-3


def test_the_published_recipe_draws():
    assert dit_official.get_config("xl").model.posterior == dit_official.get_config("tiny").model.posterior == "sample"
    part = tiny.part("diffusion.dit", DIT | {"posterior": "sample"})
    plain = tiny.part("tokenizers.vq", tiny.quantised(tiny.CONTINUOUS | {"patch": 2}, width=2))
    with pytest.raises(UserError, match="model.posterior is 'sample', but tokenizers.vq predicts no Gaussian"):
        denoiser.clean(
            part.model, tiny.batch(B), {"autoencoder": plain}, rng.sample_keys(jax.random.key(0), np.arange(B))
        )
    with pytest.raises(UserError, match="model.posterior 'mode' is not one of 'mean', 'sample'"):
        dit.build(DIT | {"posterior": "mode"})
