"""Guidance: scale 1 is the conditional branch bit for bit, terms act as documented, unused branches are not run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preflight import PRIOR, needs_libtpu, run

from hybridgen.core.errors import UserError
from hybridgen.sampling import guidance


def arrays(count, shape=(6, 5), seed=0):
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), count)]


def test_combine_is_the_usual_form_and_exact_at_one():
    cond, uncond = arrays(2)
    assert np.array_equal(jax.jit(guidance.combine)(cond, uncond * 1e6, 1.0), cond)
    usual = uncond + 4.0 * (cond - uncond)
    np.testing.assert_allclose(guidance.combine(cond, uncond, 4.0), usual, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(guidance.combine(cond, uncond, 0.0), uncond, atol=1e-6)
    assert guidance.combine(cond.astype(jnp.bfloat16), uncond.astype(jnp.bfloat16), 2.0).dtype == jnp.float32


def test_is_on():
    assert not guidance.is_on(None) and not guidance.is_on(1) and not guidance.is_on(1.0)
    assert not guidance.is_on(guidance.schedule("cosine", 1.0))
    assert guidance.is_on(2) and guidance.is_on(0) and guidance.is_on(jnp.float32(1))
    assert guidance.is_on(guidance.schedule("linear", 3.0))


def test_schedules():
    progress = jnp.linspace(0, 1, 5)
    assert guidance.schedule("constant", 3.0) == 3.0
    np.testing.assert_allclose(guidance.schedule("linear", 3.0)(progress), [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(guidance.schedule("cosine", 3.0)(progress)[jnp.array([0, 2, 4])], [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(guidance.schedule("constant", 3.0, (0.25, 0.8))(progress), [1, 3, 3, 3, 1])
    traced = jax.jit(lambda s: guidance.schedule("linear", s)(progress))(jnp.float32(3))
    np.testing.assert_allclose(traced, [1, 1.5, 2, 2.5, 3])
    with pytest.raises(UserError, match="sawtooth"):
        guidance.schedule("sawtooth", 3.0)
    with pytest.raises(UserError, match="interval"):
        guidance.schedule("linear", 3.0, (0.5, 0.2))


def test_branches_are_computed_once_and_only_if_needed():
    assert guidance.branches(guidance.parse(None)) == guidance.branches(guidance.parse(1.0)) == ((),)
    assert guidance.branches(guidance.parse(3.0)) == ((), ("c",))
    terms = guidance.parse({"c": 3.0, "z+c|c": 2.0, "z": 1.0, "c+z": 1.5})
    assert guidance.branches(terms) == ((), ("c",), ("c", "z"))
    for wrong in ("c|z", "c|c", "a|b|c"):
        with pytest.raises(UserError, match="guidance term"):
            guidance.parse({wrong: 2.0})


def test_levels():
    full, no_c, no_cz = outputs = arrays(3)
    nested = guidance.parse({"c": 3.0, "c+z|c": jnp.float32(2.0)})
    # telescoped: s1 (full - no c) + s2 (no c - nothing) + nothing
    expected = 3.0 * (full - no_c) + 2.0 * (no_c - no_cz) + no_cz
    np.testing.assert_allclose(guidance.combine_levels(outputs, nested), expected, rtol=1e-5, atol=1e-5)
    one = guidance.parse({"c": jnp.float32(1.0), "c+z|c": jnp.float32(1.0)})
    assert np.array_equal(guidance.combine_levels(outputs, one), full)
    ramp = guidance.parse({"c": guidance.schedule("linear", 3.0)})
    assert np.array_equal(guidance.combine_levels(outputs[:2], ramp, 0.0), full)
    np.testing.assert_allclose(
        guidance.combine_levels(outputs[:2], ramp, 0.5), guidance.combine(full, no_c, 2.0), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ValueError):
        guidance.combine_levels(outputs[:2], nested)


def test_the_branches_of_a_picture_are_side_by_side():
    branches = arrays(3, (2, 4))
    rows = guidance.join(branches)
    for row, (picture, branch) in enumerate((b, k) for b in range(2) for k in range(3)):
        assert np.array_equal(rows[row], branches[branch][picture])
    assert all(map(np.array_equal, guidance.split(rows, 3), branches))
    assert np.array_equal(guidance.repeat({"x": branches[0]}, 3)["x"], guidance.join(branches[:1] * 3))
    assert guidance.repeat(rows, 1) is rows


def test_guided_calls_the_network_on_rows_in_branch_order():
    x, t = arrays(1, (2, 3))[0], jnp.array([0.5, 0.5])
    shift = jnp.array([5.0, 1.0, 5.0, 1.0])[:, None]  # conditional rows +5, unconditional rows +1
    network = lambda x, t: x * t[:, None] + shift  # noqa: E731
    np.testing.assert_allclose(guidance.guided(network, 3.0)(x, t), x * 0.5 + 1 + 3 * 4, rtol=1e-6)
    half = guidance.schedule("linear", 3.0)  # progress 1 - t = 0.5: scale 2
    np.testing.assert_allclose(guidance.guided(network, half)(x, t), x * 0.5 + 1 + 2 * 4, rtol=1e-6)
    assert guidance.guided(network, 1.0) is network


DECODER = ["--config", "configs/diffusion/dit.py:tiny", "--config.parts.tokenizer=configs/tokenizers/vq.py:tiny"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [*PRIOR, "--config.sample.options.prior.guidance=2.0"],
        [*DECODER, "--config.sample.options.decoder.guidance=2.0"],
    ],
    ids=["prior", "decoder"],
)
def test_nothing_is_sent_to_combine_branches(arguments, tmp_path):
    """Four devices sample sixteen images: each has both branches of its own four, without communication."""
    code, report, _ = run(tmp_path, *arguments, "--topology", "v5e:2x2", "--what", "sample")
    assert code == 0, report
    assert report["mesh"] == {"data": 4} and report["sample"]["collectives"] == []
