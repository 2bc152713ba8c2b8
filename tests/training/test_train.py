"""The training contract: accumulation by weight, noise by sample, freezing, skipped steps.

Most of it is proved on a toy family (tiny.py) whose loss is masked and noisy: what holds for it holds for the
step, which knows nothing of families.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen import train
from hybridgen.core import config, meshes, trees
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, storage
from hybridgen.runs.reading import inference_params
from hybridgen.training import batches as batch_stream
from hybridgen.training import optim, state

ROOT = Path(__file__).parents[2]
ADAM = {"kind": "adamw", "lr": 0.1, "schedule": "constant", "warmup": 0, "final": 0.0, "clip": 0.0, "decay": 0.0}
ADAM |= {"decay_on": "kernel$", "b1": 0.9, "b2": 0.95, "eps": 1e-8}


# ---------------------------------------------------------------- accumulation


def steps(family, model, batches, dtype="float64", parts=None, **changes):
    """State and losses after a step on each batch."""
    run = tiny.Run(tiny.experiment(family, model, parts, **changes), batches[0], dtype)
    losses = [run.step(batch) for batch in batches]
    return run.state, losses


def test_accumulated_is_a_large_batch_for_a_masked_loss():
    batches = [tiny.toy_batch(8, start) for start in (0, 8)]
    weights = [batches[0]["mask"][i::4].sum() for i in range(4)]
    assert max(weights) > 1.5 * min(weights)  # so that a mean over microbatches would be another gradient
    with jax.enable_x64(True):
        options = {"ema__decay": 0.9, "optim__clip": 0.1}
        whole, losses = steps(tiny.toy, {}, batches, **options)
        parts, by_parts = steps(tiny.toy, {}, batches, accumulate=4, **options)
    assert whole["params"]["a"]["kernel"].dtype == jnp.float64
    assert tiny.gap(whole, parts) < 1e-12
    assert tiny.gap(losses, by_parts) < 1e-12


@pytest.mark.slow
def test_accumulated_is_a_large_batch_for_a_prior_with_rows_that_do_not_count():
    tokenizer = tiny.tokenizer()
    model = tiny.prior_options(tokenizer, text_vocab=0, classes=tiny.CLASSES, depth=1, cond_drop_prob=0.5)
    batch = tiny.batch(8) | {"valid": np.arange(8) < 5}  # row 7, 6 and 5 are filling: microbatches weigh 3 and 2
    with jax.enable_x64(True):
        batch["tokens"] = np.random.default_rng(0).integers(0, 12, (8, 16)).astype(np.int32)
        whole, losses = steps("ar.raster", model, [batch] * 2, optim__kind="adamw")
        parts, by_parts = steps("ar.raster", model, [batch] * 2, accumulate=2)
        changed = batch | {"tokens": np.where(batch["valid"][:, None], batch["tokens"], 0)}
        other, _ = steps("ar.raster", model, [changed] * 2, accumulate=2)
    assert tiny.gap(whole["params"], parts["params"]) < 1e-9
    assert tiny.gap(losses, by_parts) < 1e-11
    assert tiny.same(parts, other)  # what is not valid counts for nothing


@pytest.fixture(scope="module")
def toy():
    """One compiled toy, and its first state on the host: `toy()` starts anew."""
    run = tiny.Run(tiny.experiment(tiny.toy, {}, ema__decay=0.9, health__spike=10.0, optim__lr=1e-3), tiny.toy_batch(8))
    first = jax.device_get(run.state)

    def fresh():
        run.state = jax.device_put(first, jax.tree.map(lambda s: s.sharding, run.abstract))
        return run

    return fresh


def test_noise_belongs_to_the_sample_and_the_step(toy):
    batch = tiny.toy_batch(8)
    turned = {name: x[::-1].copy() for name, x in batch.items()}
    loss = toy().step(batch)["loss"]
    assert toy().step(turned)["loss"] == pytest.approx(loss, rel=1e-6)  # whatever the row
    assert abs(toy().step(batch | {"id": batch["id"] + 8})["loss"] / loss - 1) > 1e-3
    assert toy().step(batch)["loss"] == loss
    run = toy()
    run.state = run.state | {"step": run.state["step"] + 1}
    assert abs(run.step(batch)["loss"] / loss - 1) > 1e-3


def test_batches_are_read_as_the_config_says(monkeypatch):
    """Workers, threads and flips are for training; an evaluation is one pass of this process."""
    requested = []
    monkeypatch.setattr(pipeline, "batches", lambda *_, **options: requested.append(options))
    words = ["data.workers=3", "data.threads=5", "data.flip=True", "batch=8", "seed=2"]
    config_of = config.load(f"{ROOT}/configs/tokenizers/vq.py:tiny", words)
    known = {"family": tiny.toy, "model": None, "parts": {}, "text": None}
    read, _ = batch_stream.reader(SimpleNamespace(config=config_of, mesh=meshes.make_mesh({"data": -1}), **known))
    read(None, 7)
    read(None, 0, shuffle=False)
    same = {"batch": 8, "seed": 2, "rows": list(range(8)), "threads": 5, "classes": 0, "retry": storage.RETRY}
    assert requested[0] == same | {"start": 7, "shuffle": True, "flip": True, "workers": 3}
    assert requested[1] == same | {"start": 0, "shuffle": False, "flip": False, "workers": 0}


# ---------------------------------------------------------------- freezing


def test_frozen_parameters_have_no_gradient_no_optimizer_state_and_no_average():
    """Compiled memory: two matrices of d x d, of which one trains or both do."""
    d = 512
    size = d * d * 4
    batch = tiny.toy_batch(2, n=2, d=d)
    options = {"ema__decay": 0.9, "optim__lr": 1e-2}
    full = tiny.Run(tiny.experiment(tiny.toy, {}, **options), batch)
    rules = (("^a/bias", True), ("^a/", False))  # the first match decides
    frozen = tiny.Run(tiny.experiment(tiny.toy, {}, trainable=rules, frozen_dtype="bfloat16", **options), batch)
    with_all, with_one = full.memory(batch), frozen.memory(batch)
    saved = with_all.temp_size_in_bytes - with_one.temp_size_in_bytes
    assert 0.95 * size < saved < 2.5 * size  # the gradient of the other one, or that and its update
    # two moments and an average less, and half of the parameter
    assert with_all.argument_size_in_bytes - with_one.argument_size_in_bytes == pytest.approx(3.5 * size, rel=0.01)

    before = jax.device_get(frozen.state["params"])
    for start in (0, 2, 4):
        report = frozen.step(tiny.toy_batch(2, start, n=2, d=d))
    assert np.isfinite(report["loss"])
    after = frozen.state["params"]
    assert after["a"]["kernel"].dtype == jnp.bfloat16
    assert tiny.same(before["a"]["kernel"], after["a"]["kernel"])
    assert not tiny.same(before["a"]["bias"], after["a"]["bias"])
    assert not tiny.same(before["b"]["kernel"], after["b"]["kernel"])
    paths = [*trees.flatten(frozen.state["opt"]), *trees.flatten(frozen.state["ema"])]
    assert not [path for path in paths if "a/kernel" in path] and [path for path in paths if "a/bias" in path]


def test_average_follows_its_rule_and_leaves_out_what_is_named():
    which = state.Trainable((), "^disc/", 0.9)
    params = {"a": {"kernel": jnp.ones(3)}, "disc": {"kernel": jnp.ones(3)}}
    assert list(which.averaged(params)) == ["a"]
    assert state.Trainable((), "^disc/", 0.0).averaged(params) == {}
    average, value = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    for count, keep in ((0, 0.1), (8, 0.5), (10_000, 0.9)):  # min(decay, (1 + n) / (10 + n))
        got = optim.ema(average, value, 0.9, jnp.int32(count))["a"]
        np.testing.assert_allclose(got, 1 - keep, rtol=1e-6)
    assert tiny.same(inference_params(params, {"a": {"kernel": 2 * jnp.ones(3)}})["a"]["kernel"], 2 * jnp.ones(3))


# ---------------------------------------------------------------- health


def test_a_bad_batch_is_counted_and_changes_nothing_else(toy):
    run = toy()
    good = tiny.toy_batch(8)
    run.step(good)
    before = jax.device_get(run.state)
    reports = []
    for bad in (np.nan, np.inf, 1e38):  # the last one: finite numbers, and the loss overflows
        x = good["x"].copy()
        x[3, 2, 1] = bad
        y = np.where(good["mask"] & (bad == 1e38), bad, good["y"]).astype(np.float32)
        reports.append(run.step(good | {"x": x, "y": y, "mask": np.ones_like(good["mask"])}))
    for name in ("params", "opt", "ema", "extra"):
        assert tiny.same(before[name], run.state[name]), name
    assert [report["skipped"] for report in reports] == [1, 2, 3]
    health = jax.device_get(run.state["health"])
    assert (int(run.state["step"]), health["skipped"], health["streak"], health["count"]) == (4, 3, 3, 1)
    assert health["norm"] == before["health"]["norm"]

    run.step(good)
    assert int(run.state["health"]["streak"]) == 0 and int(run.state["health"]["skipped"]) == 3
    assert not tiny.same(before["params"], run.state["params"])
    counts = {int(leaf) for path, leaf in trees.flatten(run.state["opt"]).items() if path.endswith("count")}
    assert counts == {2} == {int(run.state["step"]) - int(run.state["health"]["skipped"])}
    assert float(run.state["extra"]["seen"]) == pytest.approx(1.5 * good["mask"].sum())  # merged twice, halved once


def test_a_spike_is_skipped_once_the_usual_norm_is_known(toy):
    run = toy()
    wild = tiny.toy_batch(8) | {"y": tiny.toy_batch(8)["y"] * 1e4}
    assert run.step(wild)["skipped"] == 0  # nobody knows yet what is usual
    run = toy()
    for i in range(20):
        run.step(tiny.toy_batch(8, 8 * i))
    before = jax.device_get(run.state)
    report = run.step(wild)
    assert np.isfinite(report["loss"]) and report["skipped"] == 1
    for name in ("params", "opt", "ema", "extra"):
        assert tiny.same(before[name], run.state[name]), name
    mild = tiny.toy_batch(8) | {"y": tiny.toy_batch(8)["y"] * 2}
    assert run.step(mild)["skipped"] == 1  # a larger one than usual is no spike


def test_a_spike_is_ten_times_the_usual_norm():
    """Of the norms of late, however large they are; what is skipped does not count as usual."""
    spike, check = config.load(f"{ROOT}/configs/tokenizers/vq.py").health.spike, jax.jit(train.check, static_argnums=3)
    for usual in (1e-3, 1.0, 2000.0):
        health = {name: jnp.int32(0) for name in ("skipped", "streak", "count")} | {"norm": jnp.float32(0)}
        for _ in range(20):
            good, health = check(jnp.float32(1), jnp.float32(usual), health, spike)
            assert good
        for factor, taken in ((9.9, True), (10.1, False), (0.01, True)):
            good, after = check(jnp.float32(1), jnp.float32(factor * usual), health, spike)
            assert bool(good) == taken and int(after["skipped"]) == int(after["streak"]) == 1 - taken
            assert (after["norm"] == health["norm"]) == (not taken)


# ---------------------------------------------------------------- starting from another run


@pytest.fixture
def made():
    which = state.Trainable((("^b/bias", False),), "", 0.9)
    arrays = tiny.filled(tiny.toy, None, {"x": jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)}, {})
    arrays = jax.tree.map(jnp.asarray, arrays)
    rule = optim.build(ADAM, 10, which.split(arrays["params"])[0])
    return state.initial(arrays, rule, which, "bfloat16"), which


def test_init_from_takes_the_whole_or_a_subtree_and_nothing_of_the_optimizer(made):
    fresh, which = made
    source = jax.tree.map(lambda x: np.asarray(x, np.float32) + 1, fresh["params"])
    whole = state.start_from(fresh, {"": source}, which)
    assert tiny.gap(jax.tree.map(lambda x: x.astype(jnp.float32), whole["params"]), source) < 1e-2  # bfloat16
    assert tiny.same(whole["params"]["a"]["kernel"], source["a"]["kernel"])
    assert whole["params"]["b"]["bias"].dtype == jnp.bfloat16  # as it was to be
    assert tiny.same(whole["ema"]["a"], whole["params"]["a"])
    for name in ("step", "opt", "extra", "health"):
        assert tiny.same(whole[name], fresh[name])
    part = state.start_from(fresh, {"b": source["a"]}, which)  # under another name
    assert tiny.same(part["params"]["b"]["kernel"], source["a"]["kernel"])
    assert tiny.same(part["params"]["a"], fresh["params"]["a"])
    leaf = state.start_from(fresh, {"a": source["a"], "b": source["b"]}, which)
    assert tiny.same(leaf["params"], whole["params"])


def test_init_from_refuses_other_trees_and_shapes(made):
    fresh, which = made
    kernel = fresh["params"]["a"]["kernel"]
    with pytest.raises(UserError, match="'a/bias'"):
        state.start_from(fresh, {"a": {"kernel": kernel}}, which)
    with pytest.raises(UserError, match="'a/odd'"):
        state.start_from(fresh, {"a": fresh["params"]["a"] | {"odd": kernel}}, which)
    with pytest.raises(UserError, match=r"'a/kernel' has shape \(4, 5\), but this model has \(4, 4\)"):
        state.start_from(fresh, {"a": fresh["params"]["a"] | {"kernel": jnp.zeros((4, 5))}}, which)
