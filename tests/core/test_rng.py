"""Keys come from names and ids alone, and a sample's noise from its own key alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core import rng


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_step_key_is_a_pure_function_of_seed_step_name():
    seed = jax.random.key(0)
    key = rng.step_key(seed, 3, "noise")
    traced = jax.jit(lambda step: jax.random.key_data(rng.step_key(seed, step, "noise")))(jnp.int32(3))
    assert same(jax.random.key_data(key), traced)
    for other in ((seed, 3, "drop"), (seed, 4, "noise"), (jax.random.key(1), 3, "noise")):
        assert not same(jax.random.key_data(key), jax.random.key_data(rng.step_key(*other)))


def test_name_hash_is_the_same_in_another_process():
    code = "from hybridgen.core.rng import name_hash; print(name_hash('noise'))"
    env = {"PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout
    assert int(out) == int(rng.name_hash("noise"))


@jax.jit
def draws(ids):
    keys = rng.sample_keys(jax.random.key(0), ids)
    return {
        "normal": rng.normal(keys, (5, 3)),
        "categorical": rng.categorical(keys, jnp.zeros((keys.shape[0], 4, 6))),
    }


def test_a_row_depends_on_its_own_id_only():
    ids = np.array([5, 2**32 - 1, 17, 0, 9, 8, 1, 2, 3], np.uint32)
    whole, rows = draws(ids), [8, 2, 1, 5, 7]
    for name, part in draws(ids[rows]).items():
        assert same(np.asarray(whole[name])[rows], part), name
        assert len({row.tobytes() for row in np.asarray(whole[name])}) == len(ids), name


def test_fold_in_and_names_give_new_keys():
    keys = rng.sample_keys(jax.random.key(0), np.arange(4))
    children = [keys, rng.named(keys, "prior"), rng.named(keys, "decoder"), rng.fold_in(keys, 0), rng.fold_in(keys, 1)]
    assert all(child.shape == keys.shape for child in children)
    data = [np.asarray(jax.random.key_data(child)) for child in children]
    assert len({row.tobytes() for d in data for row in d}) == 20


def test_moments():
    keys = rng.sample_keys(jax.random.key(1), np.arange(64))
    x = np.asarray(rng.normal(keys, (1000,)))
    assert abs(x.mean()) < 4 / 253 and abs(x.std() - 1) < 4 / 357  # 4 standard errors of 64,000 draws
    assert abs(np.asarray(rng.bernoulli(keys, 0.3, (1000,))).mean() - 0.3) < 4 * 0.458 / 253
    u = np.asarray(rng.uniform(keys, (1000,), minval=-1.0, maxval=2.0))
    assert u.min() >= -1 and u.max() < 2 and abs(u.mean() - 0.5) < 4 * 0.87 / 253
    n = np.asarray(rng.randint(keys, (1000,), 2, 5))
    assert set(np.unique(n)) == {2, 3, 4} and abs(n.mean() - 3) < 4 * 0.82 / 253
    assert rng.normal(keys, (), jnp.bfloat16).dtype == jnp.bfloat16
