"""Schedules, parameterisations and solvers against closed forms.

For data N(MU, S^2) the posterior mean of x given x_t is known, and so is where the probability flow takes a point from
one level to another: the same number of standard deviations from the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.sampling import schedules, solvers

MU, S = 0.7, 0.3
SCHEDULES = {
    "flow": schedules.flow,
    "cosine": schedules.cosine,
    "linear": schedules.schedule("linear"),
    "scaled_linear": schedules.schedule("scaled_linear", start=0.00085, end=0.012),
    "squaredcos": schedules.schedule("squaredcos"),
}
DETERMINISTIC = ("euler", "heun", "ddim", "dpmpp_2m")


def gaussian(x_t, level):
    """The exact (x, eps) of N(MU, S^2) data."""
    away = (x_t - level.alpha * MU) / (level.alpha**2 * S**2 + level.sigma**2)
    return MU + level.alpha * S**2 * away, level.sigma * away


def flow_map(x, levels):
    """Where the probability flow takes x from the first level to the last."""
    spread_of = np.sqrt((levels.alpha * S) ** 2 + levels.sigma**2)
    return levels.alpha[-1] * MU + spread_of[-1] / spread_of[0] * (x - levels.alpha[0] * MU)


def keys_of(ids):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.asarray(ids, jnp.uint32))


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels(name):
    schedule, t = SCHEDULES[name], np.linspace(0, 1, 23)
    level = schedule(t)
    assert level.alpha[0] == 1 and level.sigma[0] == 0
    assert (np.diff(level.alpha) < 0).all() and (np.diff(level.sigma) > 0).all()
    if name != "flow":
        np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, atol=5e-6)
    if name in ("flow", "cosine"):
        assert level.alpha[-1] == 0 and level.sigma[-1] == 1
    inner, step = t[3:-3], 1e-3  # a timestep of the discrete ones
    ahead, behind, here = schedule(inner + step), schedule(inner - step), schedule(inner)
    for slope, leaf in ((here.dalpha, "alpha"), (here.dsigma, "sigma")):
        np.testing.assert_allclose(slope, (getattr(ahead, leaf) - getattr(behind, leaf)) / (2 * step), rtol=1e-2)
    traced = jax.jit(schedule)(jnp.float32(t))
    for ours, host in zip(traced, level, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, host, rtol=1e-4, atol=1e-6)


def test_discrete_schedules_are_the_published_ones():
    # the last alpha-bar of DDPM and of improved DDPM, and the largest sigma of Stable Diffusion
    ends = {name: SCHEDULES[name](np.array([0.001, 1.0])) for name in SCHEDULES}
    np.testing.assert_allclose(ends["linear"].alpha[1] ** 2, 4.0358e-5, rtol=1e-4)
    np.testing.assert_allclose(ends["linear"].sigma[0] ** 2, 1e-4, rtol=1e-6)
    np.testing.assert_allclose(ends["squaredcos"].alpha[1] ** 2, 2.4288e-9, rtol=1e-3)
    np.testing.assert_allclose(ends["scaled_linear"].sigma[1] / ends["scaled_linear"].alpha[1], 14.6146, rtol=1e-5)
    beta = schedules.betas("linear")
    bar = np.cumprod(1 - beta)
    at = schedules.discrete(beta)(schedules.from_timestep(np.arange(1000)))
    np.testing.assert_allclose(at.alpha**2, bar, rtol=1e-12)
    np.testing.assert_allclose(schedules.to_timestep(at.t), np.arange(1000), atol=1e-9)
    with pytest.raises(UserError, match="'sigmoid' is not one of flow, cosine"):
        schedules.schedule("sigmoid")
    with pytest.raises(UserError, match="'flow' takes no options, but is given start"):
        schedules.schedule("flow", start=1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_parameterisations_round_trip(name):
    with jax.enable_x64(True):
        level = SCHEDULES[name](jnp.linspace(0.002, 0.98, 9))  # B
        x, eps = (jax.random.normal(key, (9, 4, 4, 3)) for key in jax.random.split(jax.random.key(0)))
        x_t = schedules.noised(level, x, eps)
        assert x_t.dtype == jnp.float64
        for kind in schedules.KINDS:
            back = schedules.to_x_eps(level, kind, x_t, schedules.target(level, kind, x, eps))
            for ours, true in zip(back, (x, eps), strict=True):
                np.testing.assert_allclose(ours, true, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_parameterisations_at_the_ends(name):
    """Where x or eps is undetermined the other is still correct, and results stay finite for wrong predictions too."""
    level = SCHEDULES[name](jnp.array([0.0, 1.0]))
    x, eps, wrong = (jax.random.normal(key, (2, 50)) for key in jax.random.split(jax.random.key(0), 3))
    x_t = schedules.noised(level, x, eps)
    for kind in schedules.KINDS:
        out = schedules.target(level, kind, x, eps)
        clean, noise = schedules.to_x_eps(level, kind, x_t, out)
        np.testing.assert_allclose(clean[0], x[0], atol=1e-5)
        np.testing.assert_allclose(noise[1], eps[1], atol=2e-3 if name == "linear" else 1e-4)
        assert all(jnp.isfinite(a).all() for a in schedules.to_x_eps(level, kind, x_t, out + wrong))
    assert schedules.to_x_eps(level, "x", x_t, x.astype(jnp.bfloat16))[0].dtype == jnp.float32
    for call in (schedules.target, schedules.to_x_eps):
        with pytest.raises(UserError, match="'score' is not one of"):
            call(level, "score", x, eps)


def test_velocity_is_the_derivative_of_the_path():
    x, eps = jnp.float32([0.3, -1.0]), jnp.float32([1.1, 0.4])
    for schedule in (schedules.flow, schedules.cosine):
        path = lambda t, schedule=schedule: schedules.noised(schedule(t), x, eps)  # noqa: E731
        slope = jax.jvp(path, (jnp.float32(0.3),), (jnp.float32(1.0),))[1]
        np.testing.assert_allclose(schedules.target(schedule(jnp.float32(0.3)), "velocity", x, eps), slope, rtol=1e-5)


def test_times():
    for spacing in schedules.SPACINGS:
        grid = schedules.times(7, spacing=spacing, shift=3.0)
        assert len(grid) == 8 and grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    np.testing.assert_allclose(schedules.times(4, shift=3.0), [1, 0.9, 0.75, 0.5, 0])
    for wrong, message in (({"steps": 0}, "steps 0"), ({"steps": 3, "spacing": "odd"}, "'odd' is not one of")):
        with pytest.raises(UserError, match=message):
            schedules.times(**wrong)


def test_training_times():
    t = schedules.logit_normal(jax.random.normal(jax.random.key(0), (100_000,)))
    assert abs(t.mean() - 0.5) < 3e-3 and abs(t.std() - 0.2085) < 3e-3 and (t > 0).all() and (t < 1).all()
    assert schedules.logit_normal(jnp.float32(0), mean=-0.8) < 0.5
    np.testing.assert_allclose(schedules.uniform(jnp.float32([0, 1]), 0.1, 0.8), [0.1, 0.8])


# ---------------------------------------------------------------- deterministic solvers


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order, schedule):
    def error(steps):
        levels = SCHEDULES[schedule](0.1 + 0.8 * schedules.times(steps))
        with jax.enable_x64(True):
            x = jnp.linspace(-2.0, 2.0, 9)[:, None]
            return np.abs(solvers.SOLVERS[solver](gaussian, x, levels) - flow_map(x, levels)).max()

    coarse, fine = error(128), error(256)
    assert abs(np.log2(coarse / fine) - order) < 0.12, (coarse, fine)
    assert fine < {1: 5e-3, 2: 6e-5}[order]


@pytest.mark.parametrize("schedule", ["flow", "squaredcos"])
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_from_noise_to_clean(solver, schedule):
    """Over the whole of [0, 1], both ends singular, in float32: the map's answer, and the last prediction of x."""
    levels = SCHEDULES[schedule](schedules.times(200))
    x = jnp.linspace(-2.0, 2.0, 9)[:, None]
    y, trail = solvers.SOLVERS[solver](gaussian, x, levels, previews=True)
    assert trail.shape == (200, 9, 1) and np.array_equal(y, trail[-1])
    np.testing.assert_allclose(y, flow_map(x, levels), atol={"euler": 8e-3, "ddim": 8e-3}.get(solver, 3e-3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_exact_on_one_picture(solver, schedule):
    """With the true x and eps, any grid ends exactly at alpha x + sigma eps."""
    x, eps = (jax.random.normal(key, (2, 5)) for key in jax.random.split(jax.random.key(3)))
    levels = SCHEDULES[schedule](np.array([1.0, 0.8, 0.35, 0.3]))
    start = schedules.noised(schedules.Level(*(a[0] for a in levels)), x, eps)
    y = solvers.SOLVERS[solver](lambda x_t, level: (x, eps), start, levels)
    np.testing.assert_allclose(y, levels.alpha[-1] * x + levels.sigma[-1] * eps, atol=2e-6)


def test_ddim_is_euler_on_the_flow_path():
    levels = schedules.flow(schedules.times(13, shift=2.0))
    network = lambda x, t: jnp.tanh(x) * (1 + t[:, None]) - 0.3  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (4, 6))
    predict = schedules.predictor(network, "velocity")
    ddim, euler = (solvers.SOLVERS[name](predict, x, levels) for name in ("ddim", "euler"))
    np.testing.assert_allclose(ddim, euler, atol=2e-6)
    by_hand = x
    for t, s in zip(levels.t[:-1], levels.t[1:], strict=True):
        by_hand = by_hand + (s - t) * network(by_hand, jnp.full(4, t, jnp.float32))
    np.testing.assert_allclose(euler, by_hand, atol=2e-6)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_one_scan_and_one_copy_of_the_model(solver):
    traced, called = [], []

    def predict(x_t, level):
        traced.append(1)
        jax.debug.callback(lambda: called.append(1))
        return gaussian(x_t, level)

    levels = schedules.flow(schedules.times(6))
    solvers.SOLVERS[solver](predict, jnp.ones((2, 3)), levels, keys_of(range(2)))
    jax.effects_barrier()
    assert len(traced) == 1 and len(called) == (11 if solver == "heun" else 6)


# ---------------------------------------------------------------- stochastic solvers

STOCHASTIC = {
    "ddpm": solvers.ddpm,
    "ddim_eta1": lambda *args, **kw: solvers.ddim(*args, eta=1.0, **kw),
    "ddim_eta0.5": lambda *args, **kw: solvers.ddim(*args, eta=0.5, **kw),
}


@pytest.mark.parametrize("name, schedule", [*((name, "flow") for name in STOCHASTIC), ("ddpm", "scaled_linear")])
def test_ancestral_marginals(name, schedule):
    """With the true x, x_s is N(alpha x, sigma^2) after any number of steps, which defines these samplers."""
    levels = SCHEDULES[schedule](np.array([1.0, 0.7, 0.65, 0.4]))
    start = jax.random.normal(jax.random.key(1), (400, 100)) * levels.sigma[0] + levels.alpha[0] * MU

    def predict(x_t, level):
        return jnp.full_like(x_t, MU), (x_t - level.alpha * MU) / level.sigma

    y = np.asarray(STOCHASTIC[name](predict, start, levels, keys_of(range(400))))
    error = levels.sigma[-1] / 200  # standard error of 40,000 draws
    assert abs(y.mean() - levels.alpha[-1] * MU) < 4 * error
    assert abs(y.std() - levels.sigma[-1]) < 4 * error / np.sqrt(2)


@pytest.mark.parametrize("schedule, steps", [("cosine", 200), ("linear", 1000)])
def test_ddpm_draws_the_data(schedule, steps):
    levels = SCHEDULES[schedule](schedules.times(steps))
    x = jax.random.normal(jax.random.key(1), (100, 60))
    y = np.asarray(solvers.ddpm(gaussian, x, levels, keys_of(range(100))))
    assert abs(y.mean() - MU) < 4 * S / 77  # 4 standard errors of 6,000 draws; of the spread, and 1 % of discretisation
    assert abs(y.std() / S - 1) < 4 / 109 + 0.01


def test_ddim_of_eta_one_is_ddpm():
    levels = schedules.cosine(schedules.times(9))
    x, keys = jax.random.normal(jax.random.key(1), (3, 8)), keys_of(range(3))
    np.testing.assert_allclose(
        solvers.ddpm(gaussian, x, levels, keys), solvers.ddim(gaussian, x, levels, keys, eta=1.0), atol=2e-6
    )


def test_a_picture_is_solved_alike_in_any_batch():
    levels = schedules.cosine(schedules.times(5))
    x = jax.random.normal(jax.random.key(1), (9, 7, 3))
    run = jax.jit(lambda x, keys: solvers.ddpm(gaussian, x, levels, keys))
    whole = run(x, keys_of(range(9)))
    assert np.array_equal(run(x[3:4], keys_of([3])), whole[3:4])
    assert not np.array_equal(run(x[3:4], keys_of([4])), whole[3:4])


def test_noise_needs_keys():
    with pytest.raises(UserError, match="keys is None: a stochastic solver needs one key per picture"):
        solvers.ddpm(gaussian, jnp.ones((2, 3)), schedules.flow(schedules.times(3)))


# ---------------------------------------------------------------- the multistep family


@pytest.mark.parametrize("of", ["x", "eps"])
@pytest.mark.parametrize(("order", "heun"), [(1, False), (2, False), (2, True)])
def test_dpm_converges_at_its_order(order, heun, of):
    def error(steps):
        levels = SCHEDULES["cosine"](0.1 + 0.8 * schedules.times(steps))
        with jax.enable_x64(True):
            x = jnp.linspace(-2.0, 2.0, 9)[:, None]
            return np.abs(solvers.dpm(gaussian, x, levels, order=order, heun=heun, of=of) - flow_map(x, levels)).max()

    coarse, fine = error(128), error(256)
    assert abs(np.log2(coarse / fine) - order) < 0.25, (coarse, fine)
    assert fine < {1: 5e-3, 2: 6e-5}[order]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("of", ["x", "eps"])
@pytest.mark.parametrize(("order", "heun"), [(1, False), (2, False), (2, True), (3, False)])
def test_dpm_is_the_published_update(order, heun, of, noisy):
    """Step by step as the papers and diffusers write it, difference by difference."""
    if noisy and of == "eps" and order == 3:
        return  # nobody has a formula
    levels = SCHEDULES["cosine"](np.array([0.95, 0.8, 0.7, 0.45, 0.3, 0.1]))
    draws = np.random.RandomState(0).randn(6, 4)
    with jax.enable_x64(True):
        options = {"order": order, "heun": heun, "of": of, "noisy": noisy, "official": True}
        ours = solvers.dpm(gaussian, jnp.asarray(draws[5]), levels, lambda i, x: jnp.asarray(draws)[i], **options)
    x, past, half = draws[5], [], np.log(levels.alpha / levels.sigma)
    for i in range(5):
        past.insert(0, gaussian(x, schedules.Level(*(leaf[i] for leaf in levels)))[of == "eps"])
        h = half[i + 1] - half[i]
        d = [past[0], 0.0, 0.0]
        now = min(order, i + 1)
        if now > 1:
            near = (past[0] - past[1]) / (r0 := (half[i] - half[i - 1]) / h)
            d[1] = near
        if now > 2:
            far = (past[1] - past[2]) / (r1 := (half[i - 1] - half[i - 2]) / h)
            d[1:] = near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)
        alpha, sigma = levels.alpha[i + 1], levels.sigma[i + 1]
        e = np.exp
        if of == "x" and noisy:
            x = sigma / levels.sigma[i] * e(-h) * x + sigma * np.sqrt(1 - e(-2 * h)) * draws[i]
            weights = [1 - e(-2 * h), (1 - e(-2 * h)) / (-2 * h) + 1, (1 - e(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5]
        elif of == "x":
            x = sigma / levels.sigma[i] * x
            weights = [1 - e(-h), (e(-h) - 1) / h + 1, -((e(-h) - 1 + h) / h**2 - 0.5)]
        else:
            x = alpha / levels.alpha[i] * x + noisy * sigma * np.sqrt(e(2 * h) - 1) * draws[i]
            weights = [1 - e(h), 1 - (e(h) - 1) / h, 0.5 - (e(h) - 1 - h) / h**2]
            weights = [(1 + noisy) * weight for weight in weights]
        if now == 2 and not heun:
            weights[1] = weights[0] / 2
        x = x + (alpha if of == "x" else sigma) * sum(w * one for w, one in zip(weights, d, strict=True))
    np.testing.assert_allclose(ours, x, atol=1e-12)


def test_dpm_of_second_order_on_x_is_dpmpp_2m():
    levels = schedules.cosine(schedules.times(9)[1:])  # from a level where the log-SNR is finite
    x = jax.random.normal(jax.random.key(0), (3, 5))
    ours, same = (solve(gaussian, x, levels) for solve in (solvers.dpm, solvers.dpmpp_2m))
    np.testing.assert_allclose(ours, same, atol=2e-6)
    first = solvers.dpm(gaussian, x, levels, order=1)
    np.testing.assert_allclose(first, solvers.ddim(gaussian, x, levels), atol=2e-6)  # on x or eps, it is DDIM
    mixed = solvers.dpm(gaussian, x, levels, order=np.asarray([2] * 4 + [1] * 4))
    assert np.abs(mixed - first).max() > 1e-4 and np.abs(mixed - same).max() > 1e-4


@pytest.mark.parametrize(("of", "order"), [("x", 1), ("x", 2), ("x", 3), ("eps", 1), ("eps", 2)])
def test_noisy_dpm_draws_the_data(of, order):
    levels = schedules.cosine(1e-3 + 0.989 * schedules.times(300))
    x = jax.random.normal(jax.random.key(1), (100, 40))
    y = np.asarray(solvers.dpm(gaussian, x, levels, keys_of(range(100)), of=of, order=order, noisy=True))
    assert abs(y.mean() - MU) < 4 * S / 63 + 0.01
    assert abs(y.std() / S - 1) < 4 / 89 + 0.02


def test_dpm_refuses_what_has_no_formula():
    levels, x = schedules.cosine(schedules.times(4)), jnp.ones((1, 1))
    with pytest.raises(UserError, match="cannot end at sigma 0"):
        solvers.dpm(gaussian, x, levels, of="eps")
    with pytest.raises(UserError, match="'v' is not one of 'x', 'eps'"):
        solvers.dpm(gaussian, x, levels, of="v")


def test_noise_may_be_given():
    """Recorded noise in place of keys, and other deviations than those of the posterior."""
    levels = schedules.cosine(np.array([0.9, 0.5, 0.2]))
    x, noise = jnp.ones((2, 3)), np.random.RandomState(0).randn(2, 2, 3).astype(np.float32)
    drawn = solvers.ddpm(gaussian, x, levels, lambda i, like: jnp.asarray(noise)[i])
    still = solvers.ddpm(gaussian, x, levels, lambda i, like: jnp.zeros_like(like))
    none = solvers.ddpm(gaussian, x, levels, deviation=np.zeros(2))
    np.testing.assert_allclose(still, none, atol=1e-6)
    assert np.abs(drawn - still).max() > 0.1
    again = solvers.ddim(
        lambda x_t, level: (MU + 0 * x_t, x_t),
        x,
        levels,
        lambda i, like: jnp.asarray(noise)[i],
        deviation=levels.sigma[1:],
    )
    np.testing.assert_allclose(again, levels.alpha[2] * MU + levels.sigma[2] * noise[1], atol=1e-6)  # all noise is new


def test_densities_of_training_times():
    u = (np.arange(10_000) + 0.5) / 10_000
    t = schedules.mode(u, 1.29)
    assert (t > 0).all() and (t < 1).all() and abs(t.mean() - 0.5) < 1e-6
    assert (np.abs(t - 0.5) < 0.25).mean() > 0.5 + 0.05  # more in the middle than even
    np.testing.assert_allclose(schedules.mode(jnp.asarray(u[:5])), t[:5], rtol=1e-5)
    np.testing.assert_allclose(schedules.mode(u, 0.0), 1 - u)
    weight = schedules.loss_weight("cosmap", u)
    assert abs(weight.mean() - 1) < 1e-3 and weight.argmax() in (4999, 5000)  # it is a density
    np.testing.assert_allclose(schedules.loss_weight("sigma_sqrt", u), 1 / u**2)
    with pytest.raises(UserError, match="'even' is not one of cosmap"):
        schedules.loss_weight("even", u)
