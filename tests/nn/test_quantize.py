"""Lookup-free quantization, codes sampled by cosine, and entropies that keep codebooks in use, compared with their
definitions.

Letters: n tokens, d bits, v = 2^d codes.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import ive

from hybridgen.core.errors import UserError
from hybridgen.models.tokenizers import vq
from hybridgen.nn import codebook, quantizers
from hybridgen.nn.quantizers import gumbel, lfq

GUMBEL = {"kind": "gumbel", "codebook_size": 16, "width": 4, "divergence": 0.0}
DRAW = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)


def test_every_code_of_signs_is_its_number():
    quantizer = lfq.Quantizer(5)
    codes = quantizer.codes({}, {}, jnp.arange(32))
    np.testing.assert_array_equal(codes, list(itertools.product((-1, 1), repeat=5)))  # most significant bit first
    back, ids = quantizer.encode({}, {}, 0.3 * codes)
    np.testing.assert_array_equal(ids, np.arange(32))
    np.testing.assert_allclose(back, codes, atol=1e-6)
    assert ids.dtype == jnp.int32 and lfq.Quantizer(24).encode({}, {}, jnp.zeros(24))[1] == 0
    assert lfq.Quantizer(24).encode({}, {}, jnp.ones(24))[1] == 2**24 - 1
    # and is the nearest of all codes
    np.testing.assert_array_equal(quantizer.encode({}, {}, DRAW)[1], codebook.nearest(jnp.asarray(DRAW), codes))


def test_signs_let_the_gradient_through():
    weights = jnp.asarray(DRAW[::-1])
    slope = jax.grad(lambda z: (lfq.Quantizer(5).encode({}, {}, z)[0] * weights).sum())(jnp.asarray(DRAW))
    np.testing.assert_array_equal(slope, weights)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_the_entropies_are_those_of_all_codes(temperature):
    """Of softmax over the negative squared distances to every code; the batch's, in groups, from above."""
    codes = np.asarray(list(itertools.product((-1, 1), repeat=5)))
    logits = -np.square(DRAW[:, None].astype(np.float64) - codes).sum(-1) / temperature  # n v
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    quantizer = lfq.Quantizer(5, softness=temperature, joint=5)
    doubt, use = quantizer.entropies(jnp.asarray(DRAW))
    assert float(doubt) == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-5)
    mean = p.mean(0)
    assert float(use) == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-5)
    # in groups of 2, 2 and 1 bits: the sum of the entropies of the margins
    margins = mean.reshape(2, 2, 2, 2, 2)
    want = 0.0
    for axes in ((2, 3, 4), (0, 1, 4), (0, 1, 2, 3)):
        part = margins.sum(axes).ravel()
        want -= (part * np.log(part)).sum()
    grouped = lfq.Quantizer(5, softness=temperature, joint=2).entropies(jnp.asarray(DRAW))[1]
    assert float(grouped) == pytest.approx(want, rel=1e-5) and grouped > use
    # both are numbers, and so are their gradients, however far a token is from its codes
    far = jnp.asarray(1e3 * DRAW)
    slopes = jax.grad(lambda z: sum(quantizer.entropies(z)))(far)
    assert np.isfinite(slopes).all() and float(quantizer.entropies(far)[0]) < 1e-3


def test_soft_codes_by_distance_have_the_entropies_of_their_softmax():
    """The entropy terms of gradient codebooks and sampled codes: low per token, high over the batch."""
    sure, even = -1e3 * jnp.eye(8), jnp.zeros((8, 8))  # of logits' negatives: each token its own code; all alike
    assert float(codebook.distance_entropy(sure, 1.0)) == pytest.approx(-np.log(8), abs=1e-3)
    assert float(codebook.distance_entropy(even, 1.0)) == pytest.approx(0, abs=1e-3)
    assert float(codebook.distance_entropy(-1e3 * jnp.eye(8)[jnp.zeros(8, int)], 1.0)) == pytest.approx(0, abs=1e-3)


OPTIONS = {
    "lfq": {"kind": "lfq", "bits": 4, "entropy": 0.5, "diversity": 2.0, "softness": 0.7},
    "vq": {"kind": "vq_gradient", "codebook_size": 16, "width": 4, "entropy": 0.5, "softness": 0.1},
    "gumbel": GUMBEL | {"entropy": 0.5, "softness": 1.0},
}


def part_of(options, **changes):
    return tiny.part("tokenizers.vq", tiny.VQ | {"quantizer": options | changes})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_adds_its_entropies_by_weight(name):
    weighed, without = (part_of(OPTIONS[name] | more) for more in ({}, {"entropy": 0.0}))
    batch = jax.tree.map(jnp.asarray, tiny.batch(3))

    @jax.jit
    def both(params, extra):
        options = {"parts": {}, "extra": extra, "step": 0, "train": False}
        z = weighed.model.apply({"params": params}, batch["image"], method="features")
        scores = weighed.model.quantizer.logits(params, extra, z) if name == "gumbel" else None
        models, key = (weighed.model, without.model), jax.random.key(0)
        return z, scores, *(vq.loss(model, params, batch, key, **options)[0] for model in models)

    z, scores, total, base = both(weighed.params, weighed.extra)
    if name == "lfq":
        doubt, use = weighed.model.quantizer.entropies(z.reshape(-1, 4))
        want = doubt - 2 * use
    elif name == "vq":
        table = codebook.normalise(weighed.params["codebook"])
        want = codebook.distance_entropy(codebook.distances(z, table), 0.1)
    else:
        want = codebook.distance_entropy(-scores, 1.0)
    assert float(total - base) == pytest.approx(0.5 * float(want), rel=1e-4, abs=1e-6) and abs(float(want)) > 1e-3


def test_a_tokenizer_of_signs_encodes_embeds_and_decodes():
    part = part_of(OPTIONS["lfq"])
    image = jnp.asarray(tiny.batch(4)["image"])
    assert part.model.vocab == 16 and part.model.code_width == 4

    @jax.jit
    def ways(part, image):
        z = part.model.apply({"params": part.params}, image, method="features")
        tokens = part.call("encode", image)
        codes = part.call("embed", tokens)
        quantised = part.model.quantizer.encode(part.params, part.extra, z)[0]
        return z, tokens, codes, part.call("decode", codes), quantised

    z, tokens, codes, picture, quantised = ways(part, image)
    assert tokens.shape == (4, 16) and len(np.unique(tokens)) > 1 and picture.shape == image.shape
    np.testing.assert_array_equal(codes, np.where(np.asarray(z) > 0, 1, -1))
    np.testing.assert_allclose(quantised, codes, atol=1e-6)  # training decodes what sampling will decode


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_expected_code_by_cosines_moves_as_the_output_does(temperature):
    """With many codes on a circle, by Bessel functions of the sharpness: nearly straight-through for any sharpness."""
    turn = 2 * jnp.pi * jnp.arange(256) / 256
    codes, z = jnp.stack([jnp.cos(turn), jnp.sin(turn)], -1), jnp.asarray([0.6, 0.8])

    def expected(z):
        scores = gumbel.cosine_logits(z, codes, 20.0)
        return gumbel.draw(scores, jnp.zeros(256), temperature)[0] @ codes

    along = jnp.asarray([0.8, -0.6])  # the sphere
    want = ive(1, 20.0 / temperature) / ive(0, 20.0 / temperature)
    np.testing.assert_allclose(jax.jit(lambda z: jax.jvp(expected, (z,), (along,))[1])(z), want * along, atol=1e-4)
    assert 0.97 < want < 1


def test_the_temperature_falls_from_its_first_step_to_its_last():
    steps = jnp.asarray([0, 100, 150, 300, 400])
    want = [1, 0.765625, 0.53125, 0.0625, 0.0625]
    np.testing.assert_allclose(gumbel.cooled(steps, 1.0, 0.0625, 300), want, rtol=1e-6)
    assert gumbel.cooled(steps, 1.0, 0.0625, 0) == 1  # no steps: it stays


def test_codes_drawn_by_cosine_are_distinct_from_the_first_step():
    """Initial logits of a linear map are small beside the noise; cosines select the nearest codes, and all learn."""
    image, doubt = jnp.asarray(tiny.batch(16)["image"]), {}

    def loss(params, part):
        batch, options = {"id": jnp.arange(16), "image": image}, {"parts": {}, "extra": part.extra, "step": 0}
        return vq.loss(part.model, params, batch, jax.random.key(0), **options, train=True)[0]

    @jax.jit
    def look(part):
        z = part.model.apply({"params": part.params}, image, method="features")
        scores = part.model.quantizer.logits(part.params, part.extra, z)
        tokens = part.call("encode", image)
        slope = jax.grad(loss)(part.params, part) if part.model.quantizer.sharpness else None
        return np.log(64) - gumbel.prior_divergence(scores, 64).mean(), z, tokens, part.call("embed", tokens), slope

    for sharpness in (0.0, 30.0):
        part = part_of(GUMBEL, codebook_size=64, sharpness=sharpness)
        assert ("score" in part.params) == (not sharpness)
        doubt[sharpness], z, tokens, embedded, slope = look(part)
    assert doubt[30.0] < 0.4 * np.log(64) < 0.9 * np.log(64) < doubt[0.0], doubt
    codes = np.asarray(part.params["codebook"])
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(tokens.ravel(), (np.asarray(z).reshape(-1, 4) @ codes.T).argmax(-1))
    np.testing.assert_allclose(embedded.reshape(-1, 4), codes[tokens.ravel()], atol=1e-6)
    assert np.abs(slope["codebook"]).max(-1).min() > 0 and np.abs(slope["encoder"]["project"]["kernel"]).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfq", "vq"])
def test_entropies_keep_the_codes_in_use(name):
    """After some steps on a few images, more codes are in use with the terms than without, and most of them."""
    used, image = {}, jnp.asarray(tiny.batch(64)["image"])
    for entropy in (0.0, 0.2):
        changes = {"entropy": entropy} | ({"revive_below": 0.0} if name == "vq" else {})
        options = tiny.VQ | {"quantizer": OPTIONS[name] | changes}
        run = tiny.Run(tiny.experiment("tokenizers.vq", options, optim__lr=1e-2), tiny.batch(16))
        for step in range(40):
            run.step(tiny.batch(16, 16 * (step % 4)))
        tokens = vq.encode(run.experiment.model, run.state["params"], run.state["extra"], image)
        used[entropy] = float(codebook.perplexity(jnp.bincount(tokens.ravel(), length=16)))
    assert used[0.2] > used[0.0] and used[0.2] > 8, used


# ---------------------------------------------------------------- options

REFUSED = {
    "kind": ({"kind": "pq"}, "quantizer.kind 'pq' is not one of fsq, gumbel, lfq, none, vq_ema, vq_gradient"),
    "no kind": ({"levels": (4, 4)}, "quantizer.kind None is not one of"),
    "no group": ("fsq", "quantizer 'fsq' is not a group of options"),
    "option": ({"kind": "lfq", "levels": (4, 4)}, "quantizer 'lfq' has no option 'levels', only bits, commitment"),
    "bits": ({"kind": "lfq", "bits": 25}, "quantizer.bits 25 is not within 1 and 24"),
    "levels": ({"kind": "fsq", "levels": (4, 1)}, r"quantizer.levels \(4, 1\) is not within 2 and"),
    "no levels": ({"kind": "fsq", "levels": ()}, r"quantizer.levels \(\) is not within 2"),
    "too many": ({"kind": "fsq", "levels": (4096,) * 3}, "give more than 16777216 codes"),
    "far too many": ({"kind": "fsq", "levels": (4096,) * 9999}, r"4096, \S+ give more than 16777216 codes"),
    "whole": ({"kind": "vq_ema", "codebook_size": 16.0}, "quantizer.codebook_size 16.0 is not within"),
    "flag": ({"kind": "vq_ema", "l2": 1}, "quantizer.l2 1 is not true or false"),
    "number": ({"kind": "vq_gradient", "commitment": True}, "quantizer.commitment True is not a number"),
    "nan": ({"kind": "none", "decay": float("nan")}, "quantizer.decay nan is not within 0.0 and 1.0"),
    "pair": ({"kind": "gumbel", "temperature": (1.0,)}, r"quantizer.temperature \(1.0,\) is not a pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_make_no_quantiser_are_refused_in_a_line(case):
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        quantizers.build(options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", quantizers.kinds())
def test_every_kind_keeps_the_interface(kind):
    """With default options it is hashable, and `encode`, `codes`, `loss` and `merge` are consistent."""
    quantizer = quantizers.build({"kind": kind})
    assert quantizer == quantizers.build({"kind": kind}) and hash(quantizer) == hash(quantizers.build({"kind": kind}))
    params, extra = quantizer.init(jax.random.key(0))
    z = quantizer.project(jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, quantizer.width)), jnp.float32))
    training = quantizers.Training(jax.random.key(1), jnp.arange(2, dtype=jnp.uint32), jnp.asarray(5))

    @jax.jit
    def ways(params, extra, z):
        codes, ids = quantizer.encode(params, extra, z)
        drawn, drawn_ids = quantizer.encode(params, extra, z, training)
        terms, sums, _ = quantizer.loss(params, extra, z, drawn_ids, training)
        again = quantizer.codes(params, extra, ids) if quantizer.size else codes
        return codes, again, drawn, terms, quantizer.merge(extra, sums, jax.random.key(2), 5), ids

    codes, again, drawn, terms, merged, ids = ways(params, extra, z)
    assert codes.shape == drawn.shape == z.shape and terms.shape == (2,)
    np.testing.assert_allclose(again, codes, atol=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(extra) and not tiny.same(merged, extra)
    if quantizer.size:
        assert ids.shape == z.shape[:-1] and 0 <= ids.min() and ids.max() < quantizer.size
        assert float(merged["use"].sum()) == pytest.approx((1 - quantizer.decay) * 24, rel=1e-4)
    else:
        latent = quantizer.standardise(merged, z)
        np.testing.assert_allclose(quantizer.restore(merged, latent), z, atol=1e-5)
