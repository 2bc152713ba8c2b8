"""The tokenizer: the decoder sees the codes, straight-through gradients, codebooks learn and stay in use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.models.tokenizers import vq
from hybridgen.nn import codebook
from hybridgen.nn.linear import lookup
from hybridgen.nn.quantizers import fsq, vq_ema

LEVELS = (5, 4, 3, 2, 8)  # odd, even, and the smallest
FSQ = fsq.Quantizer(LEVELS)


@functools.cache
def part(name):
    options = {
        "fsq": tiny.quantised(tiny.FSQ, levels=LEVELS),
        "moving": tiny.MOVING,
        "plain": tiny.quantised(tiny.MOVING, l2=False),
        "gradient": tiny.GRADIENT,
        "none": tiny.CONTINUOUS,
    }[name]
    return tiny.part("tokenizers.vq", options)


def images(b=4, start=0):
    return jnp.asarray(tiny.batch(b, start)["image"])


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("name", ["fsq", "moving", "plain", "gradient"])
def test_what_is_encoded_is_embedded_and_decoded(name):
    tokenizer = part(name)
    tokens = tokenizer.call("encode", images())
    assert tokens.shape == (4, 16) and tokens.dtype == jnp.int32
    assert 0 <= tokens.min() and tokens.max() < tokenizer.model.vocab and len(np.unique(tokens)) > 1
    codes = tokenizer.call("embed", tokens)
    assert codes.shape == (4, 4, 4, tokenizer.model.code_width)
    z = tokenizer.model.apply({"params": tokenizer.params}, images(), method="features")
    quantised, ids = tokenizer.model.quantizer.encode(tokenizer.params, tokenizer.extra, z)
    assert tiny.same(ids.reshape(4, 16), tokens)
    assert tiny.gap(quantised, codes) < 1e-6  # the loss decodes what sampling will decode
    options = {"parts": {}, "extra": tokenizer.extra, "options": {}}
    drawn = vq.sample(tokenizer.model, tokenizer.params, {"image": images()}, None, **options)
    assert tiny.same(drawn["tokens"], tokens) and drawn["image"].shape == (4, 16, 16, 3)
    assert tiny.gap(drawn["image"], jnp.clip(tokenizer.call("decode", codes), -1, 1)) < 1e-6
    assert tiny.gap(drawn["image"], jnp.clip(tokenizer.call("decode", codes[::-1]), -1, 1)) > 1e-3


def test_every_fsq_code_can_be_reached_and_reaches_itself():
    size = FSQ.size
    assert size == 960 and part("fsq").model.vocab == size
    codes = FSQ.codes({}, {}, jnp.arange(size))
    assert len(np.unique(np.asarray(codes), axis=0)) == size and np.abs(codes).max() <= 1
    half = np.asarray([n // 2 for n in LEVELS])
    bounds = np.asarray(codes) * half  # what the bounded value must round to
    odd, two = np.asarray(LEVELS) % 2, np.asarray(LEVELS) == 2
    span = (np.asarray(LEVELS) - 1) * np.where(two, 1 + 1e-3, 1 - 1e-3) / 2
    shift = np.where(two, 0.0, np.arctanh(np.where(odd, 0.0, 0.5) / span))
    z = np.arctanh((bounds + np.where(odd, 0.0, 0.5)) / (span * (1 + 2e-3))) - shift  # inverse of the bound
    back, ids = FSQ.encode({}, {}, jnp.asarray(z))
    np.testing.assert_array_equal(ids, np.arange(size))
    np.testing.assert_allclose(back, codes, atol=1e-6)
    far, ids = FSQ.encode({}, {}, jnp.asarray([[50.0] * 5, [-50.0] * 5]))  # however far, no code outside
    assert ids.tolist() == [size - 1, 0]
    assert np.abs(far).max() <= 1


def test_two_levels_go_by_the_sign_and_more_are_as_they_were():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(200, 4)) * 2, jnp.float32)
    two = fsq.Quantizer((2, 2, 2, 2))
    codes, ids = two.encode({}, {}, z)
    np.testing.assert_array_equal(codes, np.where(z > 0, 0.0, -1.0))
    np.testing.assert_array_equal(two.codes({}, {}, ids), codes)
    slope = jax.grad(lambda z: fsq.Quantizer((2, 3, 2, 4)).bound(z).sum())(jnp.zeros(4))
    assert slope.min() > 0.4  # a channel that starts at zero learns
    # trained tokenizers, bit for bit
    levels = (8, 5, 7, 4)
    half = (jnp.asarray(levels, z.dtype) - 1) * (1 - 1e-3) / 2
    offset = jnp.asarray([0.5, 0.0, 0.0, 0.5])
    assert tiny.same(fsq.Quantizer(levels).bound(z), jnp.tanh(z + jnp.arctanh(offset / half)) * half - offset)


def test_nearest_code_is_the_nearest():
    draw = np.random.default_rng(0)
    z, table = draw.normal(size=(50, 3)), draw.normal(size=(20, 3))
    want = np.square(z[:, None] - table[None]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(codebook.nearest(jnp.asarray(z), jnp.asarray(table)), want)


def test_a_continuous_latent():
    tokenizer = part("none")
    latent = tokenizer.call("encode", images())
    assert latent.shape == (4, 4, 4, 4) and latent.dtype == jnp.float32
    assert tokenizer.model.vocab == 0
    out = tokenizer.call("decode", latent)
    assert not tiny.same(tokenizer.call("decode", latent + 1e-3), out)  # nothing rounds it


def test_a_continuous_latent_has_the_scale_that_noise_schedules_expect():
    tokenizer = part("none")
    batch, extra = {"id": jnp.arange(16), "image": images(16)}, tokenizer.extra
    options = {"parts": {}, "step": 0, "train": True}
    for _ in range(20):
        aux = vq.loss(tokenizer.model, tokenizer.params, batch, jax.random.key(0), extra=extra, **options)[1]
        double = jax.tree.map(lambda x: 2 * x, aux["extra"])  # as of two microbatches
        quick = dataclasses.replace(tokenizer.model.quantizer, decay=0.5)
        extra = quick.merge(extra, double, None, 0)
    latent = vq.encode(tokenizer.model, tokenizer.params, extra, batch["image"])
    np.testing.assert_allclose(latent.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(latent.std((0, 1, 2)), 1, rtol=1e-3)
    assert np.abs(tokenizer.call("encode", batch["image"]).std((0, 1, 2)) - 1).max() > 0.05  # it was not so before
    # what was trained is what is drawn: the picture of the raw latent
    out = vq.decode(tokenizer.model, tokenizer.params, extra, latent)
    raw = tokenizer.model.apply({"params": tokenizer.params}, batch["image"])
    assert tiny.gap(out, raw) < 1e-5


# ---------------------------------------------------------------- gradients


def test_gradients_go_straight_through():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(7, 5)))
    got = jax.grad(lambda z: (FSQ.encode({}, {}, z)[0] * weights).sum())(z)
    half = jnp.asarray([n // 2 for n in LEVELS])
    want = jax.grad(lambda z: (FSQ.bound(z) / half * weights).sum())(z)  # as if nothing were rounded
    np.testing.assert_allclose(got, want, rtol=1e-6)
    table = jnp.asarray(np.random.default_rng(2).normal(size=(9, 5)))
    codes = lookup(table, codebook.nearest(z, table))
    got = jax.grad(lambda z: (codebook.straight_through(z, codes) * weights).sum())(z)
    np.testing.assert_allclose(got, weights, rtol=1e-6)


@pytest.mark.parametrize("name", ["moving", "gradient"])
def test_who_learns_from_what(name):
    """The encoder learns from the reconstruction; a gradient codebook from its pull, a moving one not at all."""
    tokenizer = part(name)
    batch = {"id": jnp.arange(4), "image": images()}

    def loss(params, extra):
        return vq.loss(tokenizer.model, params, batch, jax.random.key(0), parts={}, extra=extra, step=0, train=True)[0]

    by_params, by_extra = jax.jit(jax.grad(loss, (0, 1)))(tokenizer.params, tokenizer.extra)
    assert np.abs(by_params["encoder"]["stem"]["kernel"]).max() > 0
    assert np.abs(by_params["decoder"]["project"]["kernel"]).max() > 0
    assert ("codebook" in by_params) == (name == "gradient")
    if name == "gradient":
        used = np.unique(tokenizer.call("encode", images()))
        rows = np.abs(by_params["codebook"]).max(1) > 0
        assert rows[used].all() and not rows.all()
        # the pull: a used code goes to the mean of its tokens, so it is at rest there
    else:
        assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(by_extra))


# ---------------------------------------------------------------- codebooks that learn


def mixture(step, n=256):
    """n points around eight corners."""
    draw = np.random.default_rng([4, step])
    corners = np.stack(np.meshgrid([-2, 2], [-2, 2], [-2, 2]), -1).reshape(8, 3)
    which = draw.choice(8, n, p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    return jnp.asarray(corners[which] + 0.1 * draw.normal(size=(n, 3)), jnp.float32), corners


def sums_of(z, table, u):
    ids = codebook.nearest(z, table)
    size = max(len(table), vq_ema.POOL)
    return vq_ema.token_sums(z, ids, len(table)) | vq_ema.candidates(z, u, size)


@functools.cache
def moving_step(quantizer):
    @jax.jit
    def step(extra, z, key):
        sums = sums_of(z, extra["codebook"], jax.random.uniform(jax.random.fold_in(key, 1), z.shape[:1]))
        return quantizer.merge(extra, sums, key, 0)

    return step


def fresh(table):
    nothing = jnp.zeros(len(table))
    return {"use": nothing, "count": nothing, "codebook": table, "total": jnp.zeros_like(table)}


def learn(quantizer, table, steps=150):
    extra = fresh(table)
    for i in range(steps):
        extra = moving_step(quantizer)(extra, mixture(i)[0], jax.random.key(i))
    return extra


def test_a_moving_codebook_finds_the_clusters():
    """Started near the corners it is online k-means; started far away, revival must bring every code home."""
    eight = vq_ema.Quantizer(8, 3, l2=False, decay=0.9)
    _, corners = mixture(0)
    near = learn(eight, jnp.asarray(corners + 0.5, jnp.float32), 60)
    np.testing.assert_allclose(near["codebook"], corners, atol=0.05)
    share = near["count"] / near["count"].sum()
    np.testing.assert_allclose(share, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], atol=0.03)

    far = jnp.asarray(50 + np.arange(24).reshape(8, 3), jnp.float32)  # one code takes all, seven are dead
    many = vq_ema.Quantizer(32, 3, l2=False, decay=0.9)
    start = jnp.concatenate([far] * 4) + jnp.arange(32.0)[:, None]
    alive = learn(many, start)
    distance = np.square(np.asarray(alive["codebook"])[None] - corners[:, None]).sum(-1)  # corner, code
    assert distance.min(1).max() < 0.05  # a code at every corner
    ids = np.asarray(codebook.nearest(mixture(999)[0], alive["codebook"]))
    assert len(np.unique(ids)) > 28
    dead = learn(dataclasses.replace(many, revive_below=0.0), start)
    ids = np.asarray(codebook.nearest(mixture(999)[0], dead["codebook"]))
    assert len(np.unique(ids)) <= 2  # what happens without


def test_sums_are_those_of_each_code_without_a_matrix_of_tokens_by_codes():
    draw = np.random.default_rng(0)
    z, ids = draw.normal(size=(50, 3)), draw.integers(0, 7, 50)
    sums = vq_ema.token_sums(jnp.asarray(z, jnp.float32), jnp.asarray(ids), 9)
    np.testing.assert_array_equal(sums["count"], np.bincount(ids, minlength=9))
    np.testing.assert_allclose(sums["total"], np.eye(9)[ids].T @ z, atol=1e-5)
    specs = jax.ShapeDtypeStruct((65_536, 8), jnp.float32), jax.ShapeDtypeStruct((65_536,), jnp.int32)
    program = jax.make_jaxpr(lambda z, ids: vq_ema.token_sums(z, ids, 16_384))(*specs)
    assert max(out.aval.size for line in program.eqns for out in line.outvars) <= 65_536 * 8


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("n", [64, 4096, 400_000])
def test_candidates_are_outputs_and_not_means(n, parts):
    """For any number of tokens and microbatches."""
    draw = np.random.default_rng(n)
    z, u = draw.normal(size=(n, 3)).astype(np.float32), draw.uniform(size=n).astype(np.float32)
    each = [vq_ema.candidates(jnp.asarray(z[i::parts]), jnp.asarray(u[i::parts]), 1024) for i in range(parts)]
    sums = jax.tree.map(lambda *leaves: sum(leaves), *each)
    assert sums["hits"].sum() == n
    found = np.asarray(sums["pool"])[np.asarray(sums["hits"]) == 1]
    assert {row.tobytes() for row in found} <= {row.tobytes() for row in z}
    assert len(found) > 32
    if n == 4096:  # one of each slot, from all over the batch
        dead = jnp.asarray(draw.uniform(size=300) < 0.9)
        reborn, places = vq_ema.revived(dead, sums, jax.random.key(0))
        assert reborn.sum() == len(found) < dead.sum() and not (reborn & ~dead).any()
        used = {row.tobytes() for row in np.asarray(places)[np.asarray(reborn)]}
        assert used == {row.tobytes() for row in found}  # each once
        few = dead & (jnp.arange(300) < 40)
        reborn, places = vq_ema.revived(few, sums, jax.random.key(0))
        assert (reborn == few).all() and len(np.unique(np.asarray(places)[np.asarray(few)], axis=0)) == few.sum()
        other = vq_ema.revived(few, sums, jax.random.key(1))[1]
        assert not tiny.same(other, places)


@pytest.mark.slow
def test_accumulated_is_a_large_batch_for_a_moving_codebook():
    """Also for the codes that are reborn: at encoder outputs of the batch, in microbatches as in one piece."""
    options = tiny.quantised(tiny.MOVING, revive_below=0.5, decay=0.5)
    batch, states = tiny.batch(8), []
    with jax.enable_x64(True):
        for parts in (1, 4):
            run = tiny.Run(tiny.experiment("tokenizers.vq", options, accumulate=parts), batch, "float64")
            before = jax.device_get(run.state)
            run.step(batch)
            states.append(jax.device_get(run.state["extra"]))
        model, image = run.experiment.model, jnp.asarray(batch["image"], jnp.float64)
        z = np.asarray(model.apply({"params": before["params"]}, image, method="features")).reshape(-1, 4)
    whole, by_parts = states
    assert tiny.gap(whole, by_parts) < 1e-9
    count = 0.5 * before["extra"]["count"] + by_parts["use"]
    dead = count < 0.5 * count.mean()  # v
    far = np.abs(by_parts["codebook"][:, None] - z[None]).max(-1).min(1)  # v, from the nearest output
    assert dead.sum() >= 4 and far[dead].max() < 1e-9 and far[~dead].min() > 1e-6


def test_a_fresh_codebook_is_at_the_data_after_a_step():
    """Codes with tokens are the mean of these tokens; the others are reset or unchanged."""
    quantizer = vq_ema.Quantizer(64, 3, l2=False)
    extra = quantizer.init(jax.random.key(0))[1]
    assert all(float(jnp.abs(extra[name]).max()) == 0 for name in ("use", "count", "total"))
    z, _ = mixture(0)
    ids = np.asarray(codebook.nearest(z, extra["codebook"]))
    after = moving_step(quantizer)(extra, z, jax.random.key(0))
    used = np.bincount(ids, minlength=64) > 0
    assert 8 <= used.sum() < 40
    for code in np.flatnonzero(used & (np.bincount(ids, minlength=64) > 1)):
        np.testing.assert_allclose(after["codebook"][code], z[ids == code].mean(0), rtol=0.01, atol=0.01)
    rows = {row.tobytes() for row in np.asarray(z)}
    assert all(row.tobytes() in rows for row in np.asarray(after["codebook"])[~used])
    np.testing.assert_allclose(after["use"], 0.01 * np.bincount(ids, minlength=64), rtol=1e-5)


def test_usage_and_perplexity_are_honest_from_the_first_step():
    quantizer = fsq.Quantizer((5, 4), decay=0.75)
    extra = {"use": jnp.zeros(20)}
    assert codebook.in_use(extra["use"], 0.75) == 0 and codebook.perplexity(extra["use"]) == 1
    sums = {"count": jnp.zeros(20).at[:5].set(0.2)}  # of any scale: the mass is below one here
    extra = quantizer.merge(extra, sums, jax.random.key(0), 0)
    np.testing.assert_allclose(extra["use"], 0.25 * sums["count"])
    assert float(codebook.perplexity(extra["use"])) == pytest.approx(5, rel=1e-5)
    assert float(codebook.perplexity(jnp.array([3.0, 3.0, 0.0, 3.0]))) == pytest.approx(3)
    for decay in (0.75, 0.99):
        window, quantizer = round(1 / (1 - decay)), fsq.Quantizer((5, 4), decay=decay)
        extra = {"use": jnp.zeros(20)}
        for step in range(2 * window):  # code 7 takes one token, early; code 2 one a step
            sums = {"count": jnp.zeros(20).at[2].set(1.0).at[7].set(float(step == 3))}
            extra = quantizer.merge(extra, sums, jax.random.key(0), step)
            seen = 1 + (3 <= step < 3 + window)
            assert float(codebook.in_use(extra["use"], decay)) == pytest.approx(seen / 20), step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "moving"])
def test_training_brings_dead_codes_to_life(name):
    """Codes start in one place, and one takes all: after some steps most are in use, and the pictures are better."""
    options = tiny.quantised(tiny.MOVING if name == "moving" else tiny.GRADIENT, decay=0.8, revive_below=0.1)
    run = tiny.Run(tiny.experiment("tokenizers.vq", options, optim__lr=1e-2), tiny.batch(16))
    flat = run.state["extra" if name == "moving" else "params"]
    flat["codebook"] = jnp.zeros((16, 4)).at[:, 0].set(1.0)
    if name == "moving":
        flat["total"] = jnp.copy(flat["codebook"])

    def used():
        state = run.state
        tokens = vq.encode(run.experiment.model, state["params"], state["extra"], images(16))
        return len(np.unique(tokens))

    before, first = used(), run.step(tiny.batch(16))["mse"]
    for step in range(60):
        last = run.step(tiny.batch(16, 16 * (step % 4)))["mse"]
    after = used()
    assert before == 1 and after >= 12, (before, after)
    assert last < 0.5 * first


def test_entropy_spreads_the_codes():
    """Soft rounding: the entropy of an even use is that of the codebook, of one place that of one code."""
    quantizer = fsq.Quantizer((5, 3), softness=1e-2)
    even = np.stack(np.meshgrid([-9, -0.55, 0, 0.55, 9], [-9, 0, 9]), -1).reshape(-1, 2)
    high = quantizer.batch_entropy(jnp.asarray(even, jnp.float32))
    assert float(high) == pytest.approx(np.log(15), abs=1e-3)
    low = quantizer.batch_entropy(jnp.zeros((9, 2)))
    assert float(low) == pytest.approx(0, abs=1e-3)
