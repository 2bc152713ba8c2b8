"""The raster prior: cached equals uncached, attention is causal, an image depends on its own key only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.core import rng
from hybridgen.models.ar import raster
from hybridgen.nn import cache as kv
from hybridgen.sampling import decode

B, N = 4, 16


@functools.cache
def tokenizer():
    return tiny.tokenizer()


@functools.cache
def prior(**changes):
    return tiny.part("ar.raster", tiny.prior_options(tokenizer(), **changes))


def cond_of(b=B, start=0, drop=None):
    batch = tiny.batch(b, start)
    cond = {name: jnp.asarray(batch[name]) for name in ("text", "text_mask")}
    return cond if drop is None else cond | {"drop": jnp.asarray(drop)}


def tokens_of(b=B, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, tokenizer().model.vocab, (b, N)), jnp.int32)


def forward(part):
    return jax.jit(lambda tokens, cond: part.call("score", tokens, cond))


def cached(part, cond, tokens, chunks):
    """Logits `[b, n, v]` by prefill and then chunks of these lengths."""
    prefill = jax.jit(lambda cond: part.call("prefill", cond))
    step = jax.jit(lambda cache, chunk: part.call("step", cache, chunk))
    logits, cache = prefill(cond)
    out, at = [logits[:, None]], 0
    for length in chunks:
        logits, cache = step(cache, tokens[:, at : at + length])
        out.append(logits)
        at += length
    return jnp.concatenate(out, 1)[:, :N]


VARIANTS = {
    "text": {},
    "grouped, both conditions": {"heads": 4, "kv_heads": 2, "classes": tiny.CLASSES, "qk_norm": False},
    "causal text": {"prefix_mask": False, "text_width": 64, "text_depth": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_is_the_full_forward_for_any_chunks(name):
    part = prior(**VARIANTS[name])
    drop = np.array([False, True, False, True])
    cond, tokens = cond_of(drop=drop), tokens_of()
    if part.model.classes:
        cond["label"] = jnp.arange(B) % tiny.CLASSES
    assert len(set(np.asarray(cond["text_mask"]).sum(1))) > 1  # prompts of several lengths
    full = forward(part)(tokens, cond)
    assert full.shape == (B, N, tokenizer().model.vocab)
    cases = [[1] * N, [N - 1], [3, 1, 5, 2, 4]] if name == "text" else [[1, 1, 2, 7, 4]]
    for chunks in cases:
        assert tiny.gap(full, cached(part, cond, tokens, chunks)) < 1e-5


def test_a_token_changes_no_logits_up_to_its_own():
    part, cond, tokens = prior(), cond_of(), tokens_of()
    run = forward(part)
    before = run(tokens, cond)
    for i in (0, 5, N - 2, N - 1):
        other = tokens.at[:, i].set((tokens[:, i] + 1) % 12)
        after = run(other, cond)
        assert tiny.same(before[:, : i + 1], after[:, : i + 1])
        if i < N - 1:
            moved = np.abs(before - after).max((0, 2))[i + 1 :]
            assert moved.min() > 1e-6  # and all that follow


def test_padding_and_dropped_text_say_nothing():
    part, tokens = prior(), tokens_of()
    run = forward(part)
    cond, other = cond_of(), cond_of(start=100)
    padded = cond | {"text": jnp.where(cond["text_mask"], cond["text"], 7)}
    assert tiny.same(run(tokens, cond), run(tokens, padded))
    dropped = [c | {"drop": jnp.ones((B,), bool)} for c in (cond, other)]
    assert tiny.same(*(run(tokens, c) for c in dropped))
    assert tiny.gap(run(tokens, cond), run(tokens, other)) > 1e-3
    assert tiny.gap(run(tokens, cond), run(tokens, dropped[0])) > 1e-3


def draw(part, **options):
    return jax.jit(lambda cond, keys: part.call("generate", cond, keys, options))


def keys_of(b=B, start=0, seed=0):
    return rng.sample_keys(jax.random.key(seed), jnp.arange(start, start + b))


def test_sampled_tokens_have_the_probability_that_the_forward_gives_them():
    part, cond = prior(), cond_of()
    tokens, logprob = draw(part)(cond, keys_of())
    logits = jax.nn.log_softmax(forward(part)(tokens, cond), -1)
    picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    assert tiny.gap(picked, logprob) < 1e-5
    assert len({tuple(row) for row in np.asarray(tokens)}) == B  # a key each
    greedy, _ = draw(part, temperature=0.0)(cond, keys_of(seed=3))
    assert tiny.same(greedy, forward(part)(greedy, cond).argmax(-1).astype(jnp.int32))


@pytest.mark.parametrize(("unroll", "platform"), [(1, "cpu"), (-1, "cpu"), (-1, "gpu")])
def test_a_cache_that_grows_in_parts_draws_the_same(monkeypatch, unroll, platform):
    monkeypatch.setattr(kv, "platform", lambda: platform)
    part = prior(unroll=unroll)
    whole = draw(part, guidance=2.0)(cond_of(), keys_of())
    monkeypatch.setattr(decode, "PART", 5)  # in three parts of 16 tokens
    assert decode.parts(N) == (5, 10, 16)
    tokens, logprob = draw(part, guidance=2.0)(cond_of(), keys_of())
    assert tiny.same(tokens, whole[0]) and tiny.gap(logprob, whole[1]) < 1e-5


def test_parts_end_where_the_tokens_do():
    for length in (1, 16, 255, 256, 300, 1024, 5000):
        ends = decode.parts(length)
        assert ends[-1] == length and len(ends) <= decode.PARTS
        assert np.diff((0, *ends)).min() >= min(length, decode.PART)


@functools.cache
def traced_guidance():
    """(cond, keys, scale) -> tokens and their log-probabilities, both branches computed whatever the scale."""
    return jax.jit(lambda cond, keys, scale: prior().call("generate", cond, keys, {"guidance": scale}))


def test_guidance_of_one_is_the_conditional_model_bit_for_bit():
    part, cond, traced = prior(), cond_of(), traced_guidance()
    plain = draw(part)(cond, keys_of())
    assert tiny.same(plain, draw(part, guidance=1.0)(cond, keys_of()))
    # also where both branches are computed: a scale that is only known when the program runs
    assert tiny.same(plain[0], traced(cond, keys_of(), jnp.float32(1.0))[0])
    strong = traced(cond, keys_of(), jnp.float32(30.0))[0]
    assert not tiny.same(plain[0], strong)
    unconditional = draw(part)(cond | {"drop": jnp.ones((B,), bool)}, keys_of())
    assert tiny.same(unconditional[0], traced(cond, keys_of(), jnp.float32(0.0))[0])  # u = c + (0 - 1)(c - u)


def test_each_picture_is_guided_against_its_own_dropped_condition():
    part, cond = prior(), cond_of()
    tokens, logprob = traced_guidance()(cond, keys_of(), jnp.float32(3.0))
    run = forward(part)
    reported, dropped = (run(tokens, cond | {"drop": jnp.full(B, gone)}) for gone in (False, True))
    logits = jax.nn.log_softmax(dropped + 3.0 * (reported - dropped), -1)
    picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    assert tiny.gap(picked, logprob) < 1e-5


def test_a_picture_is_the_same_whatever_the_batch():
    """Position, neighbours, batch size and padding: tokens bit for bit."""
    part = prior()
    run = draw(part, guidance=2.0, top_p=0.9)
    cond, keys = cond_of(), keys_of()
    tokens, _ = run(cond, keys)
    turned, _ = run(jax.tree.map(lambda x: x[::-1], cond), keys[::-1])
    assert tiny.same(tokens, turned[::-1])
    other, other_keys = cond_of(start=50), keys_of(start=50)
    mixed = jax.tree.map(lambda x, y: jnp.concatenate([y[:3], x[:1]]), cond, other)
    assert tiny.same(tokens[0], run(mixed, jnp.concatenate([other_keys[:3], keys[:1]]))[0][3])
    for b in (1, 7):  # alone, and in a padded batch of another shape
        rows = jnp.minimum(jnp.arange(b), B - 1)
        some, _ = run(jax.tree.map(lambda x, rows=rows: x[rows], cond), keys[rows])
        assert tiny.same(tokens[: min(b, B)], some[: min(b, B)])


@pytest.mark.slow
def test_class_conditions():
    part = prior(text_vocab=0, classes=tiny.CLASSES)
    run, tokens = forward(part), tokens_of()
    logits = run(tokens, {"label": jnp.zeros((B,), jnp.int32)})
    assert tiny.gap(logits, run(tokens, {"label": jnp.ones((B,), jnp.int32)})) > 1e-3
    dropped = [{"label": jnp.full((B,), label), "drop": jnp.ones((B,), bool)} for label in range(2)]
    assert tiny.same(*(run(tokens, cond) for cond in dropped))
    cond = {"label": jnp.arange(B) % tiny.CLASSES}
    drawn = raster.sample(
        part.model,
        part.params,
        cond,
        keys_of(),
        parts={"tokenizer": tokenizer()},
        extra={},
        options={"prior": {"guidance": 2.0}},
    )
    assert drawn["tokens"].shape == (B, N) and drawn["image"].shape == (B, tiny.SIDE, tiny.SIDE, 3)
    codes = tokenizer().call("embed", drawn["tokens"])
    assert tiny.same(drawn["image"], jnp.clip(tokenizer().call("decode", codes), -1, 1))


def test_conditions_are_dropped_in_training_only_and_by_sample():
    part = prior(cond_drop_prob=0.5)
    batch = tiny.batch(8) | {"tokens": np.asarray(tokens_of(8))}

    @functools.partial(jax.jit, static_argnames="train")
    def loss(batch, key, train):
        return raster.loss(part.model, part.params, batch, key, parts={}, extra={}, step=0, train=train)[0]

    keys = [jax.random.key(seed) for seed in range(4)]
    assert len({float(loss(batch, key, train=False)) for key in keys}) == 1
    assert len({float(loss(batch, key, train=True)) for key in keys}) > 1
    turned = jax.tree.map(lambda x: x[::-1], batch)
    assert float(loss(turned, keys[0], train=True)) == pytest.approx(float(loss(batch, keys[0], train=True)), rel=1e-6)
