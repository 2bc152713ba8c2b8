"""The cascade: which modes carry a gradient, whose tokens the decoder sees, and one program from text to image.

The role test at the end runs over PRIORS x DECODERS: add new families there.

Letters: b pictures, n tokens, v codes, l text positions.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.core import rng, trees
from hybridgen.core.errors import UserError
from hybridgen.models.ar import raster
from hybridgen.models.contract import Part, find
from hybridgen.models.hybrid import cascade
from hybridgen.runs import drawing

B, N = 8, 16
MEMBERS = ("prior", "decoder")
SMALL = {"depth": 1, "text_depth": 0}  # as quick to compile as it gets


@functools.cache
def parts():
    return {"tokenizer": tiny.tokenizer()}


def joint(**changes):
    """A cascade that trains both members, with random arrays."""
    changes = {"prior": SMALL, "decoder": {"depth": 1}} | changes
    return tiny.part("hybrid.cascade", tiny.cascade_options(parts()["tokenizer"], **changes), parts=parts())


def batch_of(b=B, start=0):
    return jax.tree.map(jnp.asarray, tiny.batch(b, start))


def requested(b=B, start=0):
    batch = batch_of(b, start)
    return {name: batch[name] for name in ("text", "text_mask")}


def keys_of(b=B, start=0):
    return drawing.keys_for(0, np.arange(start, start + b))


def loss_of(part, given=None, train=True):
    """(params, batch, key, step) -> (scalar, metrics)."""

    def run(params, batch, key, step):
        options = {"parts": given or parts(), "extra": {}, "step": step, "train": train}
        scalar, aux = cascade.loss(part.model, params, batch, key, **options)
        return scalar, aux["metrics"]

    return run


def largest(tree) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------- what flows between the members


@functools.cache
def graded(mode):
    """(cascade without its prior's own loss, params -> ((scalar, metrics), gradients)) on one batch."""
    part = joint(mode=mode, prior_weight=0.0, prior=SMALL | {"cond_drop_prob": 0.0})
    batch, key = batch_of(), jax.random.key(0)
    return part, jax.jit(jax.value_and_grad(lambda params: loss_of(part)(params, batch, key, 1), has_aux=True))


@pytest.mark.parametrize("mode", cascade.COUPLINGS)
def test_which_modes_carry_a_gradient_to_the_prior(mode):
    """Without the prior's own loss, its gradient comes from the decoder's loss only."""
    part, run = graded(mode)
    (scalar, metrics), grads = run(part.params)
    assert float(scalar) == float(metrics["render"]) and largest(grads["decoder"]) > 1e-4
    if mode == "tokens":
        assert largest(grads["prior"]) == 0
        moved = jax.tree.map(lambda x: x + 0.1, part.params["prior"])
        assert float(run(part.params | {"prior": moved})[0][0]) == float(scalar)
        return
    # through every layer and the text; hidden states are read before the head
    flat = trees.flatten(grads["prior"])
    silent = {path for path, leaf in flat.items() if largest(leaf) == 0}
    assert silent == ({"head/kernel"} if mode == "features" else set())
    # and it is the slope of the decoder's error
    norm = sum(float(jnp.square(leaf).sum()) for leaf in flat.values()) ** 0.5
    by = 0.003
    up, down = (
        jax.tree.map(lambda p, g, side=side: p + side * by * g / norm, part.params["prior"], grads["prior"])
        for side in (1, -1)
    )
    high, low = (float(run(part.params | {"prior": moved})[0][0]) for moved in (up, down))
    assert (high - low) / (2 * by) == pytest.approx(norm, rel=0.05)


def test_one_step_trains_both_and_both_losses_fall():
    tokenizer = parts()["tokenizer"]
    model = tiny.cascade_options(tokenizer, SMALL, {"depth": 1}, own=0.25, rollout_every=8)
    batch = tiny.batch(16)
    run = tiny.Run(tiny.experiment("hybrid.cascade", model, parts(), optim__lr=3e-3), batch)
    before = jax.device_get(run.state["params"])
    reports = [run.step(batch)]
    for name in MEMBERS:
        still = [path for path, leaf in trees.flatten(before[name]).items() if tiny.same(leaf, at(run, name, path))]
        assert still == [], name
    reports += [run.step(batch) for _ in range(39)]
    for metric in ("nll", "render"):
        values = [report[metric] for report in reports]
        assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5]), metric
    assert all(report["loss"] == pytest.approx(report["nll"] + report["render"], rel=1e-5) for report in reports)


def at(run, name, path):
    return trees.flatten(run.state["params"][name])[path]


# ---------------------------------------------------------------- whose plan


def test_own_plans_are_drawn_in_parallel_and_every_k_steps_rolled_out():
    part = joint(own=1.0, rollout_every=3)
    prior = cascade.part(part.model, "prior", part.params, parts())
    cond, keys = requested(), keys_of()
    logits = 3 * jax.random.normal(jax.random.key(5), (B, N, prior.model.vocab))  # not what this prior says
    run = jax.jit(lambda logits, keys, step: cascade.own_tokens(part.model, prior, cond, logits, keys, step))
    rolled, _ = jax.jit(lambda keys: prior.call("generate", cond, keys, {}))(keys)
    parallel = rng.categorical(keys, logits)
    assert not tiny.same(rolled, parallel)
    for step in range(7):
        assert tiny.same(run(logits, keys, jnp.int32(step)), rolled if step % 3 == 0 else parallel), step
    sure = jax.nn.one_hot(jnp.arange(N) % 12, 12) * 100 + jnp.zeros((B, 1, 1))
    assert tiny.same(run(sure, keys, jnp.int32(1)), jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32) % 12, (B, N)))
    assert tiny.same(parallel[::-1], run(logits[::-1], keys[::-1], jnp.int32(1)))  # a picture's draw is its own
    never = joint(own=1.0)
    assert tiny.same(cascade.own_tokens(never.model, prior, cond, logits, keys, jnp.int32(0)), parallel)


def test_the_decoder_is_trained_on_its_share_of_own_plans():
    """Rows that the share picks see the prior's tokens, the others the true ones; none of it outside training."""
    part = joint(own=0.5, rollout_every=2)
    batch, key = batch_of(), jax.random.key(0)
    prior, decoder = (cascade.part(part.model, name, part.params, parts()) for name in MEMBERS)
    keys = rng.sample_keys(key, batch["id"])
    picked = rng.bernoulli(rng.named(keys, "own"), 0.5)
    assert 0 < picked.sum() < B

    @jax.jit
    def reported(step, flip):
        tokenizer = parts()["tokenizer"]
        tokens = tokenizer.call("encode", batch["image"])
        dropped = {"drop": rng.bernoulli(rng.named(keys, "drop"), prior.model.cond_drop_prob)}
        logits = prior.call("score", tokens, requested() | dropped)
        own = cascade.own_tokens(part.model, prior, requested(), logits, rng.named(keys, "own plan"), step)
        plan = jnp.where((picked ^ flip)[:, None], own, tokens)
        flow = find(decoder.family).plan_conditioning(decoder.model, tokenizer.call("embed", plan), parts())
        render = find(decoder.family).decoder_loss
        alone = raster.loss(prior.model, prior.params, batch, key, parts=parts(), extra={}, step=step, train=True)
        verdict = render(decoder.model, decoder.params, batch, flow, rng.named(keys, "decoder"), parts(), True)
        return alone[0], verdict[0]

    run = jax.jit(loss_of(part))
    seen = [run(part.params, batch, key, jnp.int32(step))[1] for step in range(2)]
    for step in range(2):
        nll, render = reported(jnp.int32(step), False)
        assert float(seen[step]["render"]) == pytest.approx(float(render), rel=1e-5)
        assert float(seen[step]["nll"]) == pytest.approx(float(nll), rel=1e-5)  # the prior learns from true tokens
        assert abs(seen[step]["render"] / reported(jnp.int32(step), True)[1] - 1) > 1e-3
    assert abs(seen[0]["render"] / seen[1]["render"] - 1) > 1e-3  # a rollout, and none
    with pytest.raises(TypeError):
        jax.eval_shape(lambda params: loss_of(part)(params, batch, key, None), part.params)
    jax.eval_shape(lambda params: loss_of(part, train=False)(params, batch, key, None), part.params)  # asks no step


# ---------------------------------------------------------------- from text to picture


@functools.cache
def drawn_by(prior=(), decoder=(), mode="tokens"):
    """(cascade, its program) with these sampling options, as pairs."""
    part = joint(mode=mode)
    options = {"prior": dict(prior), "decoder": {"steps": 2} | dict(decoder)}
    return part, drawing.sampler(cascade, part.model, options, parts())


def draw(cond, keys, **options):
    part, program = drawn_by(**options)
    return program(part.params, {}, parts(), cond, keys)


@pytest.mark.parametrize("mode", ["tokens", "features"])
def test_one_program_from_text_to_tokens_draft_and_picture(mode):
    part, program = drawn_by(mode=mode)
    args = jax.device_put((part.params, {}, parts(), requested(), keys_of()))
    one = program.lower(*args).compile()  # a single executable
    with jax.transfer_guard("disallow"):  # that never comes back to the host
        out = jax.block_until_ready(one(*args))
    assert {name: value.shape for name, value in out.items()} == {
        "image": (B, tiny.SIDE, tiny.SIDE, 3),
        "draft": (B, tiny.SIDE, tiny.SIDE, 3),
        "tokens": (B, N),
        "logprob": (B, N),
    }
    tokenizer = parts()["tokenizer"]
    decode = jax.jit(lambda tokens: jnp.clip(tokenizer.call("decode", tokenizer.call("embed", tokens)), -1, 1))
    assert tiny.gap(out["draft"], decode(out["tokens"])) < 1e-6
    assert tiny.gap(out["draft"], decode(out["tokens"][::-1])) > 1e-2
    assert tiny.gap(out["draft"], out["image"]) > 1e-2 and np.abs(out["image"]).max() <= 1
    assert len({row.tobytes() for row in np.asarray(out["tokens"])}) == B
    # arrays are arguments: other parameters, texts and keys run in the same executable and say something else
    params, _, _, cond, keys = args
    other = [
        (params | {"prior": jax.tree.map(lambda x: x + 0.1, params["prior"])}, *args[1:]),
        (params, {}, parts(), requested(start=50), keys),
        (params, {}, parts(), cond, keys_of(start=50)),
    ]
    for changed in other:
        assert not tiny.same(one(*changed)["tokens"], out["tokens"])
    text = [names for names in ("text", "text_mask") if names in cond]
    assert text == list(cond)  # nothing but text went in


def test_given_tokens_are_rendered_and_the_text_is_not_asked():
    cond = requested() | {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 12, (B, N)), jnp.int32)}
    out, other = draw(cond, keys_of()), draw(cond | requested(start=50), keys_of())
    assert tiny.same(out, other) and tiny.same(out["tokens"], cond["tokens"])
    own = draw(requested(), keys_of())
    again = draw(requested() | {"tokens": own["tokens"]}, keys_of())  # the same noise for the picture either way
    assert tiny.gap(own["image"], again["image"]) < 1e-5


def test_guidance_of_one_is_no_guidance_and_each_member_has_its_own():
    cond, keys, part = requested(), keys_of(), joint()

    def program(**options):
        steps = {"decoder": {"steps": 2} | options.pop("decoder", {})}
        return lambda cond, keys: cascade.sample(
            part.model, part.params, cond, keys, parts=parts(), extra={}, options=options | steps
        )

    ones = {name: {"guidance": 1.0} for name in MEMBERS}
    assert str(jax.make_jaxpr(program())(cond, keys)) == str(jax.make_jaxpr(program(**ones))(cond, keys))

    @jax.jit
    def guided(cond, keys, prior, decoder):
        return program(prior={"guidance": prior}, decoder={"guidance": decoder})(cond, keys)

    def at_scales(prior, decoder):
        return guided(cond, keys, jnp.float32(prior), jnp.float32(decoder))

    unguided, none = draw(cond, keys), at_scales(1, 1)
    assert tiny.same(unguided["tokens"], none["tokens"]) and tiny.gap(unguided["image"], none["image"]) < 1e-5
    render, plan = at_scales(1, 4), at_scales(20, 1)
    assert tiny.same(render["tokens"], none["tokens"]) and tiny.same(render["draft"], none["draft"])
    assert tiny.gap(render["image"], none["image"]) > 1e-3
    assert not tiny.same(plan["tokens"], none["tokens"])
    both = at_scales(20, 4)
    assert tiny.same(both["tokens"], plan["tokens"]) and tiny.gap(both["image"], plan["image"]) > 1e-3


GUIDED = {"prior": (("guidance", 2.0), ("top_p", 0.9)), "decoder": (("guidance", 2.0), ("solver", "ddpm"))}


def test_a_picture_is_the_same_whatever_the_batch():
    """Row, neighbours, batch size and padding: tokens bit for bit, pictures too in one shape, else to rounding."""
    cond, keys = requested(), keys_of()
    out = draw(cond, keys, **GUIDED)
    turned = draw(jax.tree.map(lambda x: x[::-1], cond), keys[::-1], **GUIDED)
    assert tiny.same(out, jax.tree.map(lambda x: x[::-1], turned))
    mixed = jax.tree.map(lambda x, y: jnp.concatenate([y[:5], x[:3]]), cond, requested(start=50))
    other = draw(mixed, jnp.concatenate([keys_of(start=50)[:5], keys[:3]]), **GUIDED)
    for name in out:
        assert tiny.same(out[name][:3], other[name][5:]), name
    # five at a time, the second batch padded
    rows = {name: np.asarray(value) for name, value in cond.items()}
    pieces = list(drawing.draw_all(lambda cond, keys: draw(cond, keys, **GUIDED), rows, 0, 5, jax.device_put))
    assert [len(piece["image"]) for piece in pieces] == [5, 3]
    gap = {name: np.concatenate([piece[name] for piece in pieces]) for name in out}
    assert tiny.same(out["tokens"], gap["tokens"])
    assert tiny.gap(out["image"], gap["image"]) < 1e-5 and tiny.gap(out["draft"], gap["draft"]) < 1e-5


# ---------------------------------------------------------------- members: given, or trained here


def given_parts(part, *names):
    """The tokenizer, and these members of a joint cascade as parts."""
    return parts() | {name: cascade.part(part.model, name, part.params, {}) for name in names}


def test_given_members_draw_what_members_trained_here_draw():
    cond, keys = requested(), keys_of()
    part, program = drawn_by()
    out = program(part.params, {}, parts(), cond, keys)
    gap = cascade.build({})
    given = given_parts(part, *MEMBERS)
    alone = drawing.sampler(cascade, gap, {"prior": {}, "decoder": {"steps": 2}}, given)
    assert tiny.same(out, alone({}, {}, given, cond, keys))
    assert cascade.init(gap, jax.random.key(0), {}, given) == {"params": {}, "extra": {}}
    # what a config says of a member, and its way through JSON, is the model that is trained alone
    model = raster.build(tiny.prior_options(parts()["tokenizer"], **SMALL))
    assert given["prior"].model == model and given["prior"].family == "ar.raster"
    other = Part(jax.tree.map(lambda x: x + 0.1, given["prior"].params), {}, "ar.raster", model)
    assert not tiny.same(out["tokens"], alone({}, {}, given | {"prior": other}, cond, keys)["tokens"])


@pytest.mark.parametrize("trained", MEMBERS)
def test_a_member_can_be_trained_on_top_of_the_other(trained):
    """The other one is a part: no parameters here, and no gradient."""
    both, run = graded("soft")
    (given,) = set(MEMBERS) - {trained}
    model, ready = dataclasses.replace(both.model, **{given: None}), given_parts(both, given)
    shapes = jax.eval_shape(lambda key: cascade.init(model, key, {}, ready), jax.random.key(0))
    assert list(shapes["params"]) == [trained]
    one = Part({trained: both.params[trained]}, {}, "hybrid.cascade", model)
    batch, key = batch_of(), jax.random.key(0)
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss_of(one, ready)(p, batch, key, 1)[0]))(one.params)
    (whole, _), all_grads = run(both.params)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    assert list(grads) == [trained] and tiny.gap(grads[trained], all_grads[trained]) < 1e-3


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(UserError, match="cascade mode 'hints' is not one of tokens, soft, features"):
        cascade.build({"mode": "hints"})
    part = joint()
    both = given_parts(part, *MEMBERS)
    with pytest.raises(UserError, match="this cascade has nothing to train"):
        loss_of(Part({}, {}, "hybrid.cascade", cascade.build({})), both)({}, batch_of(), jax.random.key(0), 0)
    for name in (*MEMBERS, "tokenizer"):
        short = {other: value for other, value in both.items() if other != name}
        with pytest.raises(UserError, match=f"a cascade needs the part '{name}'"):
            cascade.sample(cascade.build({}), {}, requested(), keys_of(), parts=short, extra={}, options={})


# ---------------------------------------------------------------- roles


# each with what the tests above leave out
PRIORS = [("ar.raster", tiny.PRIOR | {"depth": 1, "heads": 4, "kv_heads": 2, "classes": tiny.CLASSES})]
DECODERS = [
    (
        "diffusion.dit",
        tiny.DECODER
        | {"depth": 1, "draft": False, "cross": True, "patch": 2, "process": {"prediction_type": "velocity"}},
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("prior", PRIORS, ids=lambda pair: pair[0])
def test_any_prior_with_any_decoder(prior, decoder):
    """They train together on a gradient each, and what is drawn follows caption, plan and key."""
    tokenizer = parts()["tokenizer"]
    known = {"vocab": tokenizer.model.vocab, "grid": tokenizer.model.grid}
    members = {
        "prior": {"family": prior[0], "model": prior[1] | known},
        "decoder": {"family": decoder[0], "model": decoder[1] | {"plan_width": tokenizer.model.code_width}},
    }
    part = tiny.part("hybrid.cascade", json.loads(json.dumps(members)) | {"mode": "soft"}, parts=parts())
    batch = batch_of(4)
    grads, metrics = jax.jit(jax.grad(loss_of(part), has_aux=True))(part.params, batch, jax.random.key(0), 0)
    assert {"nll", "render"} <= set(metrics) and np.isfinite(jax.tree.leaves(metrics)).all()
    for name in MEMBERS:
        assert np.isfinite(largest(grads[name])) and largest(grads[name]) > 1e-6

    program = drawing.sampler(cascade, part.model, {"prior": {"guidance": 2.0}, "decoder": {"steps": 2}}, parts())
    cond, keys = {name: batch[name] for name in ("text", "text_mask", "label")}, keys_of(4)
    out = program(part.params, {}, parts(), cond, keys)
    assert out["tokens"].shape == (4, N) and 0 <= out["tokens"].min() and out["tokens"].max() < tokenizer.model.vocab
    assert out["image"].shape == out["draft"].shape == (4, tiny.SIDE, tiny.SIDE, 3)
    assert np.isfinite(out["image"]).all() and np.isfinite(out["logprob"]).all()
    assert not tiny.same(out["tokens"], program(part.params, {}, parts(), cond | requested(4, 50), keys)["tokens"])
    others = program(part.params, {}, parts(), cond, keys_of(4, 50))
    assert not tiny.same(out["tokens"], others["tokens"])
    own, foreign = (
        program(part.params, {}, parts(), cond | {"tokens": tokens}, keys)["image"]
        for tokens in (out["tokens"], others["tokens"])
    )
    assert tiny.gap(out["image"], own) < 1e-5 and tiny.gap(out["image"], foreign) > 1e-3
