"""The causal language model: cached equals uncached for any chunks and padding; it learns the captions' grammar."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs.text.lm import MARGIN
from hybridgen.core import config as config_lib
from hybridgen.core import rng
from hybridgen.data import pipeline, sources
from hybridgen.data import text as text_lib
from hybridgen.models.text import lm

B, L, N = 3, 5, 9
SMALL = {"text_vocab": 23, "text_length": 16, "width": 32, "depth": 2, "heads": 4, "hidden": 48}
VARIANTS = {
    "plain": {},
    "grouped, tied, biases, wide heads": {"kv_heads": 2, "tied": True, "bias": True, "mlp_bias": True, "head_width": 6},
    "stretched": {"scaling": {"kind": "llama3", "factor": 4.0, "trained": 8}, "kv_heads": 1, "mlp": "geglu"},
}


@functools.cache
def part(name="plain", **changes):
    return tiny.part("text.lm", SMALL | VARIANTS[name] | changes)


@functools.cache
def role(name):
    """A role function of a part, compiled once for all tests of the same shapes."""
    return jax.jit(lambda part, *args: part.call(name, *args))


def prompts(side="left"):
    """The same prompts, of 2, 4 and L tokens, padded on a side or in the middle."""
    draw = np.random.default_rng(0)
    real, noise = draw.integers(1, 23, (2, B, L)).astype(np.int32)
    count = np.array([[2], [4], [L]])
    mask = np.arange(L) >= L - count
    mask = {"left": mask, "right": mask[:, ::-1], "gap": (np.arange(L) == 0) | (np.arange(L) > L - count)}[side]
    text = np.where(mask, np.take_along_axis(real, np.cumsum(mask, 1) - mask, 1), noise)
    return {"text": jnp.asarray(text), "text_mask": jnp.asarray(mask)}


def tokens_of(seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 23, (B, N)), jnp.int32)


def by_chunks(part, cond, tokens, chunks):
    """Logits `[b, n, v]` of the tokens by prefill and then chunks of these lengths."""
    logits, cache = role("prefill")(part, cond)
    out, at = [logits[:, None]], 0
    for length in chunks:
        logits, cache = role("step")(part, cache, tokens[:, at : at + length])
        out.append(logits)
        at += length
    return jnp.concatenate(out, 1)[:, :N]


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_is_the_full_forward_for_any_chunks(name):
    cond, tokens, it = prompts(), tokens_of(), part(name)
    full = role("score")(it, tokens, cond)
    assert full.shape == (B, N, 23)
    for chunks in [[1] * N, [N - 1], [3, 1, 4, 1]] if name == "plain" else [[2, 1, 2, 4]]:
        assert tiny.gap(full, by_chunks(it, cond, tokens, chunks)) < 1e-5


def test_padding_anywhere_is_no_text():
    """A row gives what it gives alone, without padding; what stands at the padding does not matter."""
    it, tokens = part(), tokens_of()
    left, right, gap = (role("score")(it, tokens, prompts(side)) for side in ("left", "right", "gap"))
    assert tiny.gap(left, right) < 1e-5 and tiny.gap(left, gap) < 1e-5
    real = prompts("right")["text"][:1, :2]
    alone = role("score")(it, tokens[:1], {"text": real, "text_mask": real > 0})
    assert tiny.gap(left[:1], alone) < 1e-5
    cond = prompts("gap")
    noise = jnp.where(cond["text_mask"], cond["text"], 7)
    assert (noise != cond["text"]).any()
    np.testing.assert_array_equal(gap, role("score")(it, tokens, cond | {"text": noise}))
    assert tiny.gap(gap, by_chunks(it, cond, tokens, [1, 3, 1, 4])) < 1e-5


def test_a_chunk_may_hold_padding():
    """Prompts that arrive in pieces, padded within each, end as in one piece."""
    it, cond = part(), prompts("gap")
    text, mask = cond["text"], cond["text_mask"]
    logits, _ = role("prefill")(it, cond)
    _, cache = role("prefill")(it, {"text": text[:, :1], "text_mask": mask[:, :1]})
    pieces, _ = role("step")(it, cache, text[:, 1:], mask[:, 1:])
    assert tiny.gap(logits, pieces[:, -1]) < 1e-5


def test_embeddings_enter_as_ids_do():
    it, cond, tokens = part(), prompts(), tokens_of()
    table = it.params["tokens"]["table"]
    inside = cond | {"text": table[cond["text"]]}
    (a, cache), (b, other) = (role("prefill")(it, given) for given in (cond, inside))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    a, b = role("step")(it, cache, tokens[:, :4])[0], role("step")(it, other, table[tokens[:, :4]])[0]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_real_tokens_behind_real_ones():
    it, cond = part(), prompts()
    options = {"parts": {}, "extra": {}, "step": 0, "train": True}

    @jax.jit
    def loss(batch):
        scalar, aux = lm.loss(it.model, it.params, batch, jax.random.key(0), **options)
        return scalar, aux["weight"]

    @jax.jit
    def probabilities(text, mask):
        return jax.nn.log_softmax(it.model.apply({"params": it.params}, text, mask, method="forward"))

    log, counts = probabilities(cond["text"], cond["text_mask"]), (2, 4, L)
    each = [-log[row, i, cond["text"][row, i + 1]] for row, n in enumerate(counts) for i in range(L - n, L - 1)]
    every = jnp.ones((B,), bool)
    scalar, weight = loss(cond | {"valid": every})
    np.testing.assert_allclose(scalar, np.mean(each), rtol=1e-5)
    assert weight == len(each) == 1 + 3 + 4
    assert loss(cond | {"valid": every.at[1].set(False)})[1] == 1 + 4


def test_a_continuation_depends_on_its_own_prompt_and_key():
    it, cond = part(), prompts()
    keys = rng.sample_keys(jax.random.key(3), np.arange(B))
    options = {"prior": {"temperature": 1.0, "steps": 6}}

    @jax.jit
    def draw(cond, keys):
        return lm.sample(it.model, it.params, cond, keys, parts={}, extra={}, options=options)

    whole = draw(cond, keys)
    assert whole["text"].shape == whole["logprob"].shape == (B, 6)
    one = draw(jax.tree.map(lambda x: x[1:2], cond), keys[1:2])
    np.testing.assert_array_equal(whole["text"][1:2], one["text"])
    logits = role("score")(it, jnp.pad(whole["text"], ((0, 0), (0, N - 6))), cond)[:, :6]
    log = jnp.take_along_axis(jax.nn.log_softmax(logits), whole["text"][..., None], -1)[..., 0]
    np.testing.assert_allclose(whole["logprob"], log, rtol=1e-4)


def test_it_learns_more_than_how_often_words_are(tiny_run):
    """By the margin that its config states, against the entropy of the words that it is to predict."""
    _, losses = tiny_run("configs/text/lm.py")
    data = config_lib.load(f"{tiny.ROOT}/configs/text/lm.py:tiny").data
    source = sources.build(data, "train")
    batch = next(pipeline.batches(source, text_lib.build(data, source), batch=512, seed=0))
    words = batch["text"][:, 1:][batch["text_mask"][:, 1:]]
    share = np.bincount(words) / words.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert np.mean(losses[-8:]) < entropy - MARGIN, (losses[-8:], entropy)
