"""The process around any network: parameterisations agree, times and noise belong to the sample, options are checked.

Letters: b pictures, H W picture.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.diffusion import dit, process, variance
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.sampling import schedules
from hybridgen.sampling.solvers import SOLVERS

B = 4


def keys_of(b=B):
    return rng.sample_keys(jax.random.key(0), jnp.arange(b))


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
def test_every_parameterisation_says_the_same_x_and_has_the_same_loss(schedule):
    """A network that knows x up to a fixed error, in each of the four types: one x, one loss, one render."""
    level_of = schedules.schedule(schedule)
    settings = {"schedule": schedule, "time_mean": 0.0, "time_std": 1.0, "time_min": 0.05}

    def message(kind, wrong, x_t, t, cond):
        at = level_of(t.astype(x_t.dtype))
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (at.alpha, at.sigma))
        return schedules.target(at, kind, wrong, (x_t - alpha * wrong) / jnp.maximum(sigma, 1e-9))

    @jax.jit
    def run(x, wrong, keys):
        out = {}
        for kind in schedules.KINDS:
            network = functools.partial(message, kind, wrong)
            ways = [Process(**settings, prediction_type=kind, loss_type=measured) for measured in ("x", "velocity")]
            losses = [process.errors(way, network, x, keys, {}) for way in ways]
            out[kind] = losses, denoiser.integrate(ways[0], network, {}, keys, x.shape[1:], {"steps": 3})
        return out

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 4, 4, 3)))
        wrong = x + 0.1 * jnp.sin(7 * x)
        out = run(x, wrong, keys_of())
        for losses, render in out.values():
            for (each, metrics), (usual, _) in zip(losses, out["x"][0], strict=True):
                assert each.shape == (B,) and each.min() > 0
                # the error of x is what it was made to be, whatever the network says
                np.testing.assert_allclose(metrics["x_mse"], jnp.square(wrong - x).mean((1, 2, 3)), rtol=1e-6)
                np.testing.assert_allclose(each, usual, rtol=2e-6)
            np.testing.assert_allclose(render, wrong, atol=2e-6)
        assert tiny.gap(out["x"][0][0][0], out["x"][0][1][0]) > 0.1  # judged in x, and in velocity


def test_times_and_noise_belong_to_the_sample():
    way = Process(
        prediction_type="x", loss_type="velocity", schedule="flow", time_mean=-1.0, time_std=0.5, time_min=0.3
    )

    @jax.jit
    def requested(keys):
        seen = []

        def network(x_t, t, cond):
            seen.append((x_t, t))
            return x_t

        process.errors(way, network, jnp.zeros((64, 2, 2, 3)), keys, {})
        return seen[0]

    x_t, t = requested(keys_of(64))
    assert tiny.same((x_t, t), jax.tree.map(lambda x: x[::-1], requested(keys_of(64)[::-1])))
    assert len({row.tobytes() for row in np.asarray(x_t)}) == 64
    assert t.min() == np.float32(0.3) and 0.35 < (t == t.min()).mean() < 0.75  # P(sigmoid(N(-1, 1/2)) < 0.3) = 0.62
    assert len(set(np.asarray(t[t > t.min()]))) == (t > t.min()).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "score"}, "process.prediction_type 'score' is not one of x, eps, v, velocity"),
        ({"loss_type": "huber"}, "process.loss_type 'huber' is not one of x, eps, v, velocity"),
        ({"learned_variance": True}, "process.learned_variance needs discrete timesteps, but process.timesteps is 0"),
        (
            {"timesteps": 9},
            "loss_type is 'velocity' and process.prediction_type 'x': with discrete timesteps they must be equal",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_process_that_is_none_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Process(**options)


def test_options_of_sampling():
    """A decoder lists its options; those of a grid of continuous times are not of discrete timesteps."""
    known = dit.OPTIONS["decoder"]
    assert known["steps"].default == Process().steps and set(SOLVERS) == set(known["solver"].choices)
    fewer = denoiser.options_of(Process(timesteps=9, loss_type="x", solver="ddim"))
    assert set(known) - set(fewer) == {"shift", "spacing"} and fewer["solver"].default == "ddim"


@pytest.mark.parametrize("schedule", ["linear", "squaredcos"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_number_of_steps_starts_at_the_last_timestep_and_ends_at_the_picture(solver, schedule):
    """A network that knows the picture gives it, whatever the solver and however few the steps: no noise is left."""
    kind = {"prediction_type": "eps", "loss_type": "eps"}
    way = Process(schedule=schedule, timesteps=1000, solver=solver, variance="small", **kind)
    picture = np.random.default_rng(0).uniform(-1, 1, (4, 4, 3)).astype(np.float32)
    table = variance.steps_of(variance.betas_of(way))

    def network(x, t, cond):
        at = variance.timestep(way, t).astype(int)
        alpha, sigma = (jnp.asarray(each, x.dtype)[at].reshape(-1, 1, 1, 1) for each in (table.alpha, table.sigma))
        return (x - alpha * picture) / sigma

    noise = rng.normal(rng.named(keys_of(), "noise"), picture.shape)
    for options in ({"steps": 1}, {"steps": 2}, {"steps": 3}, {"respacing": "3,1"}):
        out = np.asarray(
            jax.jit(lambda keys, o=options: denoiser.integrate(way, network, {}, keys, picture.shape, o))(keys_of())
        )
        for row, start in zip(out, noise, strict=True):
            assert np.corrcoef(row.ravel(), picture.ravel())[0, 1] > 0.99, options
            assert abs(np.corrcoef(row.ravel(), np.asarray(start).ravel())[0, 1]) < 0.5


def test_too_few_timesteps_for_a_schedule_are_refused():
    few = Process(schedule="linear", timesteps=19, prediction_type="eps", loss_type="eps")
    with pytest.raises(UserError, match="process.timesteps 19 are too few for the schedule 'linear': at least 20"):
        variance.betas_of(few)


def test_a_start_that_is_no_noise_is_refused():
    way = Process(schedule="linear", timesteps=1000, prediction_type="eps", loss_type="eps")
    for text, last in (("ddim2", 500), ("ddim1", None), ("5,0", 499)):
        says = f"respacing '{text}' starts at timestep {last} of 1000" if last else "no integer stride"
        with pytest.raises(UserError, match=says):
            denoiser.integrate(way, lambda x, t, cond: x, {}, keys_of(), (2, 2, 3), {"respacing": text})
