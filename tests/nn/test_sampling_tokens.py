"""Tokens from logits against slow numpy, and decoding against a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.sampling import decode, guidance, tokens


def keys_of(ids):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.asarray(ids, jnp.uint32))


def kept_by_numpy(row, temperature, top_k, top_p):
    """The set of tokens that are kept, by definition, for one row in float64."""
    row = np.float64(np.float32(row) / np.float32(temperature))
    keep = np.ones(len(row), bool)
    if top_k:
        keep &= row >= np.sort(row)[-min(top_k, len(row))]
    if top_p < 1:
        p = np.where(keep, np.exp(row - row.max()), 0)
        p /= p.sum()
        above = np.array([p[row > value].sum() for value in row])
        keep &= (above < top_p) | (row == row.max())
    return keep


def tied(b, v, seed=0):
    """Logits with many ties, zeros of both signs, large and tiny values."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(b, v)) * 3) / 2
    logits[0] = 0.0
    logits[1, ::2] *= -1.0
    logits[2] = rng.normal(size=v) * 1e-3
    logits[3] = rng.normal(size=v) * 40
    return jnp.asarray(logits, jnp.float32)


OPTIONS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 1, 1.0), (1.3, 0, 0.9), (1.0, 0, 1e-6), (0.9, 7, 0.6), (1.0, 99, 0.99)]


def filtered(logits, temperature, top_k, top_p):
    return tokens.filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)


STATIC = jax.jit(filtered, static_argnums=(1, 2, 3))
TRACED = jax.jit(filtered)


@pytest.mark.parametrize("run, options", [(TRACED, o) for o in OPTIONS] + [(STATIC, o) for o in OPTIONS[-2:]])
def test_filters_keep_what_the_definition_keeps(run, options):
    logits = tied(8, 37)
    out = run(logits, *options)
    expected = np.stack([kept_by_numpy(row, *options) for row in np.asarray(logits)])
    assert np.array_equal(np.isfinite(out), expected)
    scaled = np.asarray(logits) / np.float32(options[0])
    np.testing.assert_allclose(np.asarray(out)[expected], scaled[expected], rtol=1e-6)


def test_filters_at_the_sizes_of_codebooks():
    logits = jax.random.normal(jax.random.key(0), (4, 5000)) * 4
    out = TRACED(logits, 1.0, 900, 0.95)
    assert np.array_equal(np.isfinite(out), [kept_by_numpy(row, 1.0, 900, 0.95) for row in np.asarray(logits)])
    assert (np.isfinite(TRACED(logits, 1.0, 900, 1.0)).sum(-1) == 900).all()


def test_no_sort_and_no_loop_where_nothing_is_asked_for():
    logits = jnp.zeros((4, 64))
    plain = str(jax.make_jaxpr(lambda a: tokens.filter_logits(a))(logits))
    assert "sort" not in plain and "while" not in plain and "scan" not in plain


@pytest.mark.parametrize("traced", [False, True])
def test_temperature_zero_is_argmax(traced):
    logits = tied(8, 37)
    draw = lambda t: tokens.draw(keys_of(range(8)), logits, temperature=t, top_k=5, top_p=0.9)  # noqa: E731
    drawn, logp = jax.jit(draw)(jnp.float32(0)) if traced else jax.jit(lambda: draw(0))()
    assert np.array_equal(drawn, jnp.argmax(logits, -1))
    np.testing.assert_allclose(logp, jnp.max(jax.nn.log_softmax(logits), -1), rtol=1e-5, atol=1e-6)


def test_frequencies_match_the_softmax():
    count, row = 20_000, jnp.array([1.0, 0.0, -1.0, 2.0, 0.5, -3.0])
    logits = jnp.broadcast_to(row, (count, 6))
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.97}
    drawn, _ = jax.jit(lambda k: tokens.draw(k, logits, **options))(keys_of(range(count)))
    p = np.asarray(jax.nn.softmax(tokens.filter_logits(row[None], **options)[0]), np.float64)
    seen = np.bincount(drawn, minlength=6)
    assert (seen[p == 0] == 0).all() and (p == 0).any()
    live = p > 0
    chi2 = ((seen - count * p)[live] ** 2 / (count * p[live])).sum()
    assert chi2 < 25  # 4 degrees of freedom or fewer: 5e-5 of being exceeded


def test_options_out_of_range():
    for wrong in ({"temperature": -0.1}, {"top_k": -1}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            tokens.filter_logits(jnp.zeros((1, 3)), **wrong)


# ---------------------------------------------------------------- decoding

V, B, N = 37, 5, 7
TABLE = jax.random.normal(jax.random.key(11), (V, V)) * 2


def chain(cache, token):
    """A Markov chain with memory: the logits depend on the number of calls and the sum of tokens in the cache."""
    calls, total = cache
    calls, total = calls + 1, total + token
    return TABLE[token] + jnp.sin(total + calls)[:, None] * TABLE[0], (calls, total)


def begin(branches=1):
    """Cache and logits of the first position, those of the second branch turned round."""
    first = jax.random.normal(jax.random.key(12), (B, V))
    rows = guidance.join([first, jnp.flip(first, -1)][:branches])
    return (jnp.int32(0), jnp.zeros(len(rows), jnp.int32)), rows


def by_hand(rows, options, scale=None):
    """The same for some images, by a Python loop over positions, with separate branches."""
    pick = jnp.array(rows)
    cache, logits = begin()
    cache, logits = (cache[0], cache[1][pick]), logits[pick]
    dropped = cache, jnp.flip(logits, -1)  # the second branch, if there is one

    @jax.jit
    def draw(i, logits):
        here = jax.vmap(jax.random.fold_in, (0, None))(keys_of(rows), i)
        return tokens.draw(here, logits, **options)

    out = []
    for i in range(N):
        if scale is not None:
            at = scale(i / (N - 1)) if callable(scale) else scale
            logits = logits + (at - 1) * (logits - dropped[1])
        token, logp = draw(i, logits)
        out.append((token, logp))
        logits, cache = chain(cache, token)
        other, dropped_cache = chain(dropped[0], token)
        dropped = dropped_cache, jnp.flip(other, -1)
    return [jnp.stack(a, 1) for a in zip(*out, strict=True)]


def two_chains(cache, token):
    """The second branch sees other logits, turned round."""
    logits, cache = chain(cache, token)
    reported, dropped = guidance.split(logits, 2)
    return guidance.join([reported, jnp.flip(dropped, -1)]), cache


def test_generate_is_the_loop_in_any_batch():
    """Five pictures in one program are two of them in a Python loop, tokens bit for bit."""
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    run = jax.jit(lambda k: decode.generate(chain, *begin(), k, length=N, **options))
    drawn, logp = run(keys_of(range(B)))
    rows = [4, 1]
    expected, expected_logp = by_hand(rows, options)
    assert drawn.shape == (B, N) and np.array_equal(drawn[jnp.array(rows)], expected)
    np.testing.assert_allclose(logp[jnp.array(rows)], expected_logp, rtol=1e-5, atol=1e-5)
    assert len({row.tobytes() for row in np.asarray(drawn)}) == B


GREEDY = {"temperature": 0}  # where chance is beside the point: it compiles in a third of the time


@pytest.mark.parametrize("scale", [3.0, guidance.schedule("cosine", 5.0, (0.3, 0.9))])
def test_guided_generate_is_the_loop(scale):
    def run(model, branches, guidance):
        cache, logits = begin(branches)
        return decode.generate(model, cache, logits, keys_of(range(B)), length=N, guidance=guidance, **GREEDY)[0]

    drawn = run(two_chains, 2, scale)
    assert np.array_equal(drawn, by_hand(range(B), GREEDY, scale)[0])
    plain = run(chain, 1, 1.0)
    assert not np.array_equal(drawn, plain)
    assert np.array_equal(run(two_chains, 2, jnp.float32(1)), plain)


def test_the_model_runs_once_less_than_the_length():
    calls = []

    def counted(cache, token):
        jax.debug.callback(lambda: calls.append(1))
        return chain(cache, token)

    for length in (1, 4):
        calls.clear()
        drawn, _ = decode.generate(counted, *begin(), keys_of(range(B)), length=length, **GREEDY)
        jax.effects_barrier()
        assert drawn.shape == (B, length) and len(calls) == length - 1


def test_forced_tokens_are_kept_and_heard():
    keys = keys_of(range(B))
    run = jax.jit(lambda k, f, m: decode.generate(chain, *begin(), k, length=N, forced=(f, m), **GREEDY))
    unmasked = jnp.zeros((B, N), bool)
    free, free_logp = run(keys, jnp.zeros((B, N), jnp.int32), unmasked)
    given = (free + 1) % V
    mask = jnp.zeros((B, N), bool).at[:, 2].set(True).at[0].set(True)
    drawn, logp = run(keys, given, mask)
    assert np.array_equal(jnp.where(mask, given, drawn), drawn)
    assert np.array_equal(drawn[1:, :2], free[1:, :2])  # before the forced position nothing changes
    assert not np.array_equal(drawn[1:, 3:], free[1:, 3:])  # after it, what was forced is what was fed
    cache, logits = begin()  # teacher forcing: the log-probability of the row that was wholly forced
    for i in range(N):
        np.testing.assert_allclose(logp[0, i], jax.nn.log_softmax(logits[0])[given[0, i]], rtol=1e-4, atol=1e-5)
        logits, cache = chain(cache, drawn[:, i])
    plain, plain_logp = decode.generate(chain, *begin(), keys, length=N, **GREEDY)
    assert np.array_equal(free, plain)
    np.testing.assert_allclose(free_logp, plain_logp, rtol=1e-5, atol=1e-5)


def test_rows_must_fit():
    with pytest.raises(UserError, match="logits have 5 rows, but 5 keys with guidance 3.0 need 10"):
        decode.generate(chain, *begin(), keys_of(range(B)), length=N, guidance=3.0)
    with pytest.raises(UserError, match="length 0"):
        decode.generate(chain, *begin(), keys_of(range(B)), length=0)
