"""The DiT decoder: dropped conditions are ignored, the draft is the starting point, any token grid works.

Letters: b pictures, H W picture, n tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.diffusion import dit
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.sampling.solvers import SOLVERS

B = 4


@functools.cache
def tokenizer(**changes):
    return tiny.tokenizer({**tiny.FSQ, **changes})


def parts_of(**changes):
    return {"tokenizer": tokenizer(**changes)}


def decoder(parts=None, **changes):
    parts = parts or parts_of()
    return tiny.part("diffusion.dit", tiny.decoder_options(parts["tokenizer"], depth=1, **changes), parts=parts)


def batch_of(b=B, start=0):
    tokens = np.random.default_rng(start).integers(0, 12, (b, 16)).astype(np.int32)
    return jax.tree.map(jnp.asarray, tiny.batch(b, start) | {"tokens": tokens})


def keys_of(b=B):
    return rng.sample_keys(jax.random.key(0), jnp.arange(b))


@functools.partial(jax.jit, static_argnums=0)
def reported(model, batch):
    """cond of a batch with tokens."""
    return dit.conditioning(model, batch, parts_of())


def predict(part):
    return jax.jit(lambda x, t, cond: part.call("predict", x, t, cond))


def training(part, parts, train=True):
    def run(params, batch, key):
        return dit.loss(part.model, params, batch, key, parts=parts, extra={}, step=0, train=train)[0]

    return run


# ---------------------------------------------------------------- the network


def test_at_initialisation_the_prediction_is_the_draft():
    parts = parts_of()
    options = tiny.decoder_options(parts["tokenizer"], depth=1, process={"prediction_type": "x"})
    model = dit.build(options)
    # another generator than everywhere else: this one compiles in no time
    params = jax.jit(lambda key: dit.init(model, key, {}, parts)["params"])(jax.random.key(0, impl="rbg"))
    cond = reported(model, batch_of())
    x, t = jax.random.normal(jax.random.key(1), (B, 16, 16, 3)), jnp.linspace(0.1, 1, B)
    run = jax.jit(lambda x, t, cond: dit.predict(model, params, {}, x, t, cond))
    assert tiny.same(run(x, t, cond), cond["draft"])
    decode = jax.jit(lambda codes: parts["tokenizer"].call("decode", codes))
    assert tiny.gap(cond["draft"], decode(parts["tokenizer"].call("embed", batch_of()["tokens"]))) < 1e-6
    assert tiny.same(run(x, t, cond | {"drop_plan": jnp.ones(B, bool)}), jnp.zeros_like(x))
    velocity = dit.build(options | {"process": {"prediction_type": "velocity"}})
    message = jax.jit(lambda x, t, cond: dit.predict(velocity, params, {}, x, t, cond))(x, t, cond)
    assert tiny.same(message, jnp.zeros_like(x))


def test_a_dropped_plan_tells_nothing_and_a_kept_one_does():
    part = decoder(cross=True)
    run = predict(part)
    x, t = jax.random.normal(jax.random.key(1), (B, 16, 16, 3)), jnp.linspace(0.1, 1, B)
    conds = [reported(part.model, batch_of(start=start)) for start in (0, 50)]
    drop = jnp.array([True, True, False, False])
    one, other = (run(x, t, cond | {"drop_plan": drop}) for cond in conds)
    same_rows = [tiny.same(one[i], other[i]) for i in range(B)]
    assert same_rows == [True, True, False, False], "plan and draft must both go, and their rows only"
    plan_only, draft_only = (conds[0] | {name: conds[1][name]} for name in ("plan", "draft"))
    for cond in (plan_only, draft_only):
        assert tiny.gap(run(x, t, conds[0]), run(x, t, cond)) > 1e-4


def test_each_way_of_the_plan_carries_it():
    """Grid, adaLN and cross-attention: cutting any one of them changes the prediction."""
    part = decoder(cross=True, draft=False)
    cond = dit.conditioning(part.model, batch_of(), parts_of())
    assert "draft" not in cond
    x, t = jax.random.normal(jax.random.key(1), (B, 16, 16, 3)), jnp.linspace(0.1, 1, B)
    run = jax.jit(lambda params: dit.predict(part.model, params, {}, x, t, cond))
    before = run(part.params)
    for path in ("plan_pool/kernel", "blocks/layers/cross_attention/out/kernel", "plan/kernel"):
        names = path.split("/")
        params = jax.tree_util.tree_map_with_path(
            lambda p, leaf, names=names: jnp.zeros_like(leaf) if [k.key for k in p] == names else leaf, part.params
        )
        assert not tiny.same(params, part.params)
        assert tiny.gap(before, run(params)) > 1e-5, path


@pytest.mark.parametrize("patch", [2, 8], ids=["finer patches", "coarser patches"])
def test_plan_and_patches_of_other_ratios(patch):
    """A change of one code moves its place in the picture, and that place alone or most."""
    part = decoder(patch=patch, draft=False)
    x, t = jax.random.normal(jax.random.key(1), (1, 16, 16, 3)), jnp.full((1,), 0.5)
    # without attention and adaLN of the plan, what remains is its place on the patch grid
    params = part.params | {"plan_pool": jax.tree.map(jnp.zeros_like, part.params["plan_pool"])}
    out = params["blocks"]["layers"]["attention"]["out"]
    params["blocks"]["layers"]["attention"]["out"] = jax.tree.map(jnp.zeros_like, out)
    run = jax.jit(lambda cond: dit.predict(part.model, params, {}, x, t, cond))
    plan = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    moved = np.abs(np.asarray(run({"plan": plan}) - run({"plan": plan.at[0, 1, 2].add(1.0)}))).max((0, 3))  # H W
    assert moved[4:8, 8:12].min() > 0  # its own 4 x 4 pixels
    if patch == 2:
        moved[4:8, 8:12] = 0
        assert moved.max() == 0
    else:
        patches = moved.reshape(2, 8, 2, 8).mean((1, 3))  # the resize is smooth: neighbours see some of it
        assert patches.max() == patches[0, 1] > 1.5 * patches[1, 0]


def test_text_and_labels_by_name():
    """Each condition has its own way in, and is dropped in one with the other in training."""
    part = decoder(plan_width=0, draft=False, text_vocab=tiny.WORDS, text_length=tiny.LENGTH, classes=tiny.CLASSES)
    run, batch = predict(part), batch_of()
    x, t = jax.random.normal(jax.random.key(1), (B, 16, 16, 3)), jnp.linspace(0.1, 1, B)
    cond = dit.conditioning(part.model, batch, {})
    assert set(cond) == {"text", "text_mask", "label"}
    before = run(x, t, cond)
    assert tiny.gap(before, run(x, t, cond | {"text": (cond["text"] % 11) + 1})) > 1e-4
    assert tiny.gap(before, run(x, t, cond | {"label": (cond["label"] + 1) % tiny.CLASSES})) > 1e-4
    padding = jnp.where(cond["text_mask"], cond["text"], 5)
    assert tiny.same(before, run(x, t, cond | {"text": padding}))
    gone = cond | {"drop_text": jnp.ones(B, bool), "drop_label": jnp.ones(B, bool)}
    other = gone | {"text": (cond["text"] % 11) + 1, "label": (cond["label"] + 1) % tiny.CLASSES}
    assert tiny.same(run(x, t, gone), run(x, t, other))
    assert np.isfinite(run(x, t, gone)).all()


def test_trains_without_captions():
    parts = parts_of()
    batch = {name: batch_of()[name] for name in ("id", "image")}
    model = tiny.decoder_options(parts["tokenizer"], depth=1)
    run = tiny.Run(tiny.experiment("diffusion.dit", model, parts, optim__lr=3e-3), batch)
    losses = [run.step(batch)["x_mse"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_latents_cached_or_from_an_autoencoder():
    auto = tiny.part("tokenizers.vq", tiny.quantised(tiny.CONTINUOUS, width=5))
    parts = parts_of() | {"autoencoder": auto}
    part = decoder(parts, resolution=4, patch=1, channels=5)
    batch = batch_of()
    latent, cond = jax.jit(lambda b: (denoiser.clean(part.model, b, parts), dit.conditioning(part.model, b, parts)))(
        batch
    )
    assert latent.shape == (B, 4, 4, 5)
    assert tiny.gap(latent, jax.jit(lambda image: auto.call("encode", image))(batch["image"])) < 1e-6
    given = batch | {"latent": latent + 1}
    assert tiny.same(denoiser.clean(part.model, given, parts), latent + 1)
    assert cond["draft"].shape == (B, 4, 4, 5)  # the draft is seen as a latent too
    loss = jax.jit(training(part, parts, train=False))
    cached = {name: batch[name] for name in ("id", "tokens")} | {"latent": latent}
    key = jax.random.key(0)
    assert float(loss(part.params, cached, key)) == pytest.approx(float(loss(part.params, batch, key)), rel=1e-6)

    @jax.jit
    def sample(tokens):
        options = {"steps": 2}
        given = {"parts": parts, "extra": {}, "options": {"decoder": options}}
        drawn = dit.sample(part.model, part.params, {"tokens": tokens}, keys_of(), **given)
        network = functools.partial(part.call, "predict")
        return drawn["image"], denoiser.integrate(part.model.process, network, cond, keys_of(), (4, 4, 5), options)

    image, latents = sample(batch["tokens"])
    assert image.shape == (B, 16, 16, 3) and np.abs(image).max() <= 1
    assert tiny.gap(image, jnp.clip(jax.jit(lambda z: auto.call("decode", z))(latents), -1, 1)) < 1e-5


def test_corruption_is_for_training_and_by_picture():
    keys, tokens = keys_of(512), jnp.zeros((512, 16), jnp.int32)
    corrupted = jax.jit(lambda keys: dit.corrupt_tokens(tokens, keys, 12, 0.5))
    out = np.asarray(corrupted(keys))
    assert out.min() >= 0 and set(out.reshape(-1)) == set(range(12))
    rate = (out > 0).mean(1) * 12 / 11
    assert 0.2 < rate.mean() < 0.3  # uniform in [0, 1/2]
    assert rate.std() > 0.15  # a rate for each picture: with one for all, 0.11 of chance alone
    assert tiny.same(out, np.asarray(corrupted(keys[::-1]))[::-1])

    parts, batch, key = parts_of(), batch_of(), jax.random.key(0)
    clean, dirty = decoder(plan_drop_prob=0.0), decoder(plan_drop_prob=0.0, token_corruption=0.9)
    losses = [
        float(jax.jit(training(part, parts, train=train))(part.params, batch, key))
        for part, train in ((clean, True), (dirty, True), (dirty, False))
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert abs(losses[1] / losses[0] - 1) > 1e-4


# ---------------------------------------------------------------- renders


def drawer(part):
    """(cond, keys, **options) -> pictures, three steps."""
    return lambda cond, keys, **options: part.call("render", cond, keys, parts_of(), {"steps": 3} | options)


def test_guidance_of_one_is_no_guidance():
    part = decoder(draft=False)
    cond, keys, draw = dit.conditioning(part.model, batch_of(8), parts_of()), keys_of(8), drawer(part)
    given = [str(jax.make_jaxpr(functools.partial(draw, **options))(cond, keys)) for options in ({}, {"guidance": 1.0})]
    assert given[0] == given[1]  # the same program: bit for bit
    # a scale that is only known when the program runs: as many rows, half of them without the plan
    guided = jax.jit(lambda cond, keys, scale: draw(cond, keys, guidance=scale))
    first, strong, none = (guided(cond, keys, jnp.float32(scale)) for scale in (1.0, 3.0, 0.0))
    plain = jax.jit(draw)
    twice = {"plan": jnp.repeat(cond["plan"], 2, 0), "drop_plan": jnp.arange(16) % 2 == 1}
    kept, dropped = plain(twice, jnp.repeat(keys, 2)).reshape(8, 2, 16, 16, 3).swapaxes(0, 1)
    assert tiny.same(first, kept)
    assert tiny.gap(first, plain(cond, keys)) < 1e-5
    assert tiny.gap(dropped, none) < 1e-5  # c - (c - u)
    for other in (strong, dropped):
        assert tiny.gap(first, other) > 1e-3


def test_text_and_plan_are_guided_apart():
    """Each term drops what it names: its scale does nothing where that condition says nothing."""
    part = decoder(text_vocab=tiny.WORDS, text_length=tiny.LENGTH, draft=False)
    cond, keys, draw = dit.conditioning(part.model, batch_of(), parts_of()), keys_of(), drawer(part)
    guided = jax.jit(lambda cond, plan, text: draw(cond, keys, guidance={"plan": plan, "text": text}))
    silent = cond | {"text_mask": jnp.zeros_like(cond["text_mask"])}
    scale = jnp.float32
    assert tiny.same(guided(silent, scale(1), scale(1)), guided(silent, scale(1), scale(5)))
    before = guided(cond, scale(1), scale(1))
    for plan, text in ((1, 5), (5, 1)):
        assert tiny.gap(before, guided(cond, scale(plan), scale(text))) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_renders(solver):
    """Alone or combined; with one step the result is the prediction from pure noise."""
    part = decoder(draft=False)
    cond, keys, draw = dit.conditioning(part.model, batch_of(), parts_of()), keys_of(), drawer(part)
    run = jax.jit(lambda cond, keys: draw(cond, keys, solver=solver))
    image = run(cond, keys)
    assert image.shape == (B, 16, 16, 3) and np.isfinite(image).all() and np.abs(image).max() <= 1
    assert tiny.same(image, run(cond, keys)) and len({np.asarray(row).tobytes() for row in image}) == B
    assert tiny.gap(image, run(cond, keys[::-1])) > 1e-3

    @jax.jit
    def one_step(cond, keys):
        noise = rng.normal(rng.named(keys, "noise"), (16, 16, 3))
        message = part.call("predict", noise, jnp.ones(B), cond)
        return draw(cond, keys, solver=solver, steps=1), jnp.clip(message, -1, 1)

    once, message = one_step(cond, keys)
    assert tiny.gap(message, once) < 1e-5
    assert tiny.gap(image, once) > 1e-3


def test_a_render_is_the_same_whatever_the_batch():
    """Bit for bit in a batch of one shape, whatever the row and the neighbours; to rounding in another shape."""
    part = decoder(draft=False)
    cond, keys, draw = dit.conditioning(part.model, batch_of(8), parts_of()), keys_of(8), drawer(part)
    run = jax.jit(lambda cond, keys: draw(cond, keys, guidance=2.0, solver="ddpm"))
    all_of = run(cond, keys)
    order = jnp.array([5, 2, 7, 0, 1, 6, 3, 4])
    assert tiny.same(all_of[order], run(jax.tree.map(lambda x: x[order], cond), keys[order]))
    other = jax.tree.map(lambda x: x.at[1:].set(x[:1]), cond)
    assert tiny.same(all_of[0], run(other, jnp.repeat(keys[:1], 8))[0])
    for b in (1, 3):
        some = run(jax.tree.map(lambda x, b=b: x[:b], cond), keys[:b])
        assert tiny.gap(all_of[:b], some) < 1e-5


def test_relative_errors_count_in_units_of_the_drafts():
    part, batch, key = decoder(), batch_of(), jax.random.key(0)
    keys, clean = rng.sample_keys(key, batch["id"]), np.asarray(batch["image"])
    cond = reported(part.model, batch)
    gone = np.asarray(rng.bernoulli(rng.named(keys, "drop plan"), part.model.plan_drop_prob))
    start = np.where(gone[:, None, None, None], 0, cond["draft"])
    model = dataclasses.replace(part.model, process=Process(relative=True))

    @jax.jit
    def losses(params, batch):
        rows = {name: x[:, None] for name, x in batch.items()}  # a picture at a time
        one = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(B)]
        options = {"parts": parts_of(), "extra": {}, "step": 0, "train": True}
        return jnp.stack(
            [jnp.stack([dit.loss(m, params, row, key, **options)[0] for row in one]) for m in (part.model, model)]
        )

    plain, relative = np.asarray(losses(part.params, batch))
    np.testing.assert_allclose(plain / relative, np.square(start - clean).mean((1, 2, 3)) + 1e-4, rtol=1e-4)


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="process.relative needs model.draft"):
        decoder(draft=False, process={"relative": True})
    alone = decoder(draft=False)
    cond = dit.conditioning(alone.model, batch_of(), parts_of())
    with pytest.raises(UserError, match="guidance for 'text': the decoder is conditioned on plan"):
        jax.eval_shape(lambda: drawer(alone)(cond, keys_of(), guidance={"text": 2.0}))
    model = dit.build(tiny.decoder_options(tokenizer()))
    with pytest.raises(UserError, match="a decoder with a plan needs the part 'tokenizer'; this config has none"):
        dit.init(model, jax.random.key(0), {}, {})


def test_a_decoder_of_discrete_timesteps():
    """The same network: it trains and renders along timesteps, which it takes whole, and predicts no variance."""
    way = {"timesteps": 20, "schedule": "squaredcos", "prediction_type": "v", "loss_type": "v"}
    part = decoder(process=way, draft=False)
    assert part.model.network.time_scale == 1 and decoder().model.network.time_scale == 1000
    loss = jax.jit(training(part, parts_of()))(part.params, batch_of(), jax.random.key(0))
    cond = dit.conditioning(part.model, batch_of(), parts_of())
    image = jax.jit(lambda cond, keys: drawer(part)(cond, keys, solver="ddpm"))(cond, keys_of())
    assert np.isfinite(loss) and image.shape == (B, 16, 16, 3) and np.isfinite(image).all()
    with pytest.raises(UserError, match="process.learned_variance is not supported by this network"):
        decoder(process=way | {"learned_variance": True})
