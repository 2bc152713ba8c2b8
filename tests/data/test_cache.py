"""Cached entries equal the frozen model's outputs bit for bit, in every view; a cache of another model is refused."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from hybridgen import cache, recipe
from hybridgen.core.config import load as load_config
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text, transforms
from hybridgen.models.contract import find

DATA = {
    "source": "shapes",
    "options": {"size": 20},
    "resolution": tiny.SIDE,
    "text": {"kind": "words", "length": tiny.LENGTH},
}
KL = {
    "resolution": tiny.SIDE,
    "channels": (32, 32),
    "blocks": 1,
    "attention": False,
    "width": 2,
    "scale": 0.5,
    "shift": 0.1,
}


def run_of(part, digest="d", text=None):
    return SimpleNamespace(config=None, part=part, text=text, digest=digest, check_finite=lambda: None)


def cached(out, part, digest="d", data=DATA, text=None, **options):
    cache.cache([run_of(part, digest, text)], data, out, {"splits": ("train",), "batch": 8, **options}, threads=2)
    return {**data, "source": "records", "options": {"path": str(out)}}


def batches(data, count=3, flip=False, **options):
    source = sources.build(data, "train")
    loader = pipeline.batches(source, text.build(data, source), batch=8, seed=1, flip=flip, **options)
    out = [next(loader) for _ in range(count)]
    loader.close()
    for batch in out:
        pipeline.take_broken(batch)
    return out


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def encode(tokenizer):
    return jax.jit(lambda image: tokenizer.call("encode", image))


@pytest.fixture(scope="module")
def flipped(tokenizer, tmp_path_factory):
    """A cache of both flips, with the pictures."""
    return cached(tmp_path_factory.mktemp("flipped"), tokenizer, views="flip", pictures=True)


def test_tokens_are_the_tokenizers(flipped, encode):
    """An online run with flips has the same images, captions and tokens in the same order."""
    for one, two in zip(batches(DATA, flip=True), batches(flipped), strict=True):
        assert two["tokens"].dtype == np.int32 and len(np.unique(two["tokens"])) > 4
        np.testing.assert_array_equal(two["tokens"], encode(one["image"]))
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    first = batches(flipped, shuffle=False)[0]  # an evaluation sees the pictures as they are
    np.testing.assert_array_equal(first["tokens"], encode(batches(DATA, shuffle=False)[0]["image"]))


def test_the_priors_loss_is_the_same_bit_for_bit(flipped, tokenizer):
    prior = tiny.part("ar.raster", tiny.prior_options(tokenizer, text_vocab=64, depth=1) | {"text_length": tiny.LENGTH})
    family = find("ar.raster")

    @jax.jit
    def loss(batch, parts):
        return family.loss(
            prior.model, prior.params, batch, jax.random.key(0), parts=parts, extra={}, step=0, train=True
        )[0]

    for online, offline in zip(batches(DATA, 2, flip=True), batches(flipped, 2), strict=True):
        del offline["image"]  # the prior needs no picture, and no tokenizer
        assert tiny.same(loss(online, {"tokenizer": tokenizer}), loss(offline, {}))


def test_ten_crops(tmp_path, encode, tokenizer):
    data = cached(tmp_path, tokenizer, views="ten", crop=(1.25, 1.5), shards=2)
    assert json.loads((tmp_path / "train" / "index.json").read_text())["fields"]["tokens"]["shape"] == [20, 16]
    source = sources.build(data, "train")
    plain = sources.build({**DATA, "resolution": 24}, "train")
    crops = transforms.crops(plain[3]["image"], 16)
    seen = {source.view(3, own).pop("tokens").tobytes() for own in pipeline.draw(0, 1, np.arange(400)).tolist()}
    views = np.concatenate([crops, crops[:, :, ::-1]])  # those of crop 1.5
    true = np.asarray(encode(transforms.to_float(np.concatenate([views, views[:6]]))[:8]))
    assert len(seen) > 5 and {tokens.tobytes() for tokens in true} <= seen
    corners = np.stack([plain[3]["image"][:16, :16], plain[3]["image"][8:, 8:], plain[3]["image"][4:20, 4:20]])
    np.testing.assert_array_equal(crops[[0, 3, 4]], corners)


def test_latents_are_drawn_by_the_samples_number(tmp_path):
    part = tiny.part("tokenizers.kl", KL)
    data = cached(tmp_path, part)
    mean, spread_of = jax.jit(lambda image: part.model.apply({"params": part.params}, image, method="moments"))(
        batches(DATA, 1)[0]["image"]
    )
    mean, deviation = (mean - 0.1) * 0.5, np.exp(0.5 * spread_of) * 0.5
    again = [batches(data, 1)[0]["latent"] for _ in range(2)]
    np.testing.assert_array_equal(*again)
    noise = (again[0] - mean) / deviation
    assert again[0].shape == mean.shape and abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    own = int(pipeline.draw(1, 1, np.arange(1))[0])
    true = np.random.Generator(np.random.Philox(key=own)).standard_normal(mean.shape[1:], np.float32)
    np.testing.assert_allclose(noise[0], true, atol=1e-4)
    still = batches(data, 1, shuffle=False)[0]
    np.testing.assert_allclose(
        still["latent"], part.call("encode", batches(DATA, 1, shuffle=False)[0]["image"]), rtol=1e-5, atol=1e-5
    )
    assert "latent_std" not in still


def test_text_features(tmp_path):
    """Of the requested number of captions; a batch has the features of its caption."""
    tower = tiny.part("text.transformer", {"vocab": 80, "length": 5, "width": 8, "depth": 1, "heads": 2})
    reader = text.Words(text.words_of(sources.build(DATA, "train")), 5)
    with pytest.raises(UserError, match="no text tokenizer"):
        cached(tmp_path, tower)
    data = cached(tmp_path, tower, text=reader, captions=2)
    batch = batches(data, 1)[0]
    features, mask = jax.jit(lambda ids, mask: tower.call("encode", ids, mask))(batch["text"], batch["text_mask"])
    np.testing.assert_array_equal(batch["text_features"], features)
    np.testing.assert_array_equal(batch["text_features_mask"], mask)


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    data = cached(tmp_path, tokenizer, "of the first")
    source = sources.build(data, "train")
    sources.fits(source, {"tokenizer": "of the first", "text": "any"})
    with pytest.raises(UserError, match="has the digest another, .*made with of the first"):
        sources.fits(source, {"tokenizer": "another"})
    message = pipeline.fingerprint(data, source, None, batch=8, seed=0)["source"]
    assert message["encoders"] == {"tokens": "of the first"}
    cached(tmp_path, tokenizer, "of the first")  # is there already
    with pytest.raises(UserError, match="encoders.*of the first.*another"):
        cached(tmp_path, tokenizer, "another")
    with pytest.raises(UserError, match="cache is .*views.*one.*flip"):
        cached(tmp_path, tokenizer, "of the first", views="flip")
    with pytest.raises(UserError, match="already hold cached entries"):
        cached(tmp_path / "again", tokenizer, data=data)
    with pytest.raises(UserError, match="--views flip"):
        sources.build({**data, "flip": True}, "train")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"views": "five"}, "five"),
        ({"crop": (0.5,)}, "crop"),
        ({"captions": 0}, "captions 0"),
        ({"shards": True}, "shards"),
    ],
)
def test_options_out_of_range(options, says, tokenizer, tmp_path):
    with pytest.raises(UserError, match=says):
        cached(tmp_path, tokenizer, **options)


@pytest.mark.slow
def test_a_recipe_caches_and_trains_from_it(tmp_path):
    config = load_config("configs/recipes/shapes.py:tiny")
    with config.unlocked():
        config.order = ("tokenizer", "cached", "prior")
        config.stages.cached = {"cache": "../tokenizer", "splits": ("train", "validation"), "views": "flip"}
        for name in ("tokenizer", "prior"):
            config.stages[name].data.options.size = 64
        config.stages.prior.data.source = "records"
        config.stages.prior.data.options = {"path": "../cached"}
    assert recipe.run(config, tmp_path)
    stamp = (tmp_path / "cached" / "train" / "index.json").stat().st_mtime_ns
    assert recipe.run(config, tmp_path)
    assert (tmp_path / "cached" / "train" / "index.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "prior" / "config.json").read_text())["steps"] == 20
