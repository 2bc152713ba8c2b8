"""Diffusion and flow solvers: from x at the first level to x at the last one, each as one `lax.scan` over the grid.

    levels = schedules.flow(schedules.times(steps, shift=3.0))              # or any Level of n+1, on the host
    predict = schedules.predictor(guidance.guided(network, scale), "velocity")
    x = SOLVERS["dpmpp_2m"](predict, noise, levels, keys)

One signature: `solve(predict, x, levels, keys=None, *, previews=False, **options)`.
- `predict(x_t B ..., level) -> (x, eps)`, both B ...: clean picture and noise at this level (a Level of scalars). It
  returns both because some solvers use x and others eps, and official samplers that clip x may keep eps unchanged.
- `levels`: schedules.Level of n+1 numpy values, noisiest first; they are constants of the traced program. Euler and
  Heun need dalpha and dsigma to be derivatives with respect to t; the others only pass t to `predict`.
- `keys`: B typed keys, for stochastic solvers: step i draws picture b's noise from `fold_in(keys[b], i)`. Or a
  function (i, x) -> standard normal noise like x.
- `ddpm` with a learned variance needs a third result of `predict`: shares B ..., see there.
- if sigma ends at 0, the result is exactly the last prediction of x.
- `previews=True` also returns the n predictions of x: n B ...

All solvers but Heun take linear steps `x' = a x_t + b x + c eps + d before + e earlier + f noise`, where before and
earlier are the predictions of one and two steps ago. Such a solver is a table of n rows of coefficients, computed in
float64 on the host. Euler and Heun step in t; DDIM is Euler in sigma / alpha.

Shape letters: B pictures, n steps (intervals).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.sampling.schedules import Level, Predict

Keys = jax.Array | Callable[[jax.Array, jax.Array], jax.Array]  # B, or (i, x) -> noise like x
Solved = jax.Array | tuple[jax.Array, jax.Array]  # x B ..., with `previews` also n B ...


class Rows(NamedTuple):
    """Coefficients of a linear multistep solver, n each (a scalar means n equal ones)."""

    x_t: Any = 0.0
    x: Any = 0.0  # predicted clean
    eps: Any = 0.0  # predicted noise
    before: Any = 0.0  # the previous step's x, or eps
    earlier: Any = 0.0  # the one before it
    noise: Any = 0.0
    reach: Any = 0.0  # the noise is multiplied by exp(reach * share), where share is the third result of `predict`


def _ends(levels):
    """Level n+1 -> (levels before each step, levels after it), n each, float64."""
    levels = Level(*(np.asarray(a, np.float64) for a in levels))
    return Level(*(a[:-1] for a in levels)), Level(*(a[1:] for a in levels))


def _cast(rows, count, dtype):
    return type(rows)(*(jnp.asarray(np.broadcast_to(a, (count,)), dtype) for a in rows))


def _run(rows, predict, x, levels, keys, previews, keep_eps=False):
    """The scan of all linear solvers. rows: Rows; keep_eps: previous predictions are eps; the rest as in the head."""
    now, _ = _ends(levels)
    count = len(now.t)
    # static: unused terms are not computed
    past, noisy = 2 if np.any(rows.earlier) else int(np.any(rows.before)), np.any(rows.noise)
    learned = np.any(rows.reach)
    if noisy and keys is None:
        raise UserError("keys is None: a stochastic solver needs one key per picture")
    draw = keys if callable(keys) else functools.partial(_noise, keys)

    def body(carry, inputs):
        x_t, before = carry
        i, level, row = inputs
        clean, eps, *share = predict(x_t, level)
        x_next = row.x_t * x_t + row.x * clean + row.eps * eps
        for weight, one in zip((row.before, row.earlier), before, strict=False):
            x_next += weight * one
        if noisy:
            noise = row.noise * draw(i, x_t)
            x_next += noise * jnp.exp(row.reach * share[0]) if learned else noise
        before = ((eps if keep_eps else clean).astype(x_t.dtype), *before)[:past]
        return (x_next.astype(x_t.dtype), before), clean if previews else None

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start = (x, (jnp.zeros_like(x),) * past)
    inputs = (jnp.arange(count), _cast(now, count, x.dtype), _cast(rows, count, x.dtype))
    (x, _), trail = jax.lax.scan(body, start, inputs)
    return (x, trail) if previews else x


def _noise(keys, i, x):
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(here)


def _landing(rows, after):
    """The rows, where those that end at sigma 0 are replaced by x' = alpha * predicted x."""
    lands = after.sigma == 0
    plain = Rows(x=after.alpha)
    return Rows(*(np.where(lands, to, a) for a, to in zip(rows, plain, strict=True)))


def euler(predict: Predict, x: jax.Array, levels: Level, keys: Keys | None = None, *, previews: bool = False) -> Solved:
    """Euler in t: x_t + dt * (alpha' x + sigma' eps). First order, deterministic."""
    now, after = _ends(levels)
    dt = after.t - now.t
    rows = Rows(x_t=np.ones_like(dt), x=dt * now.dalpha, eps=dt * now.dsigma)
    return _run(_landing(rows, after), predict, x, levels, keys, previews)


def ddim(
    predict: Predict,
    x: jax.Array,
    levels: Level,
    keys: Keys | None = None,
    *,
    eta: float = 0.0,
    deviation: np.ndarray | None = None,
    previews: bool = False,
) -> Solved:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12, 16). eta 0: deterministic, first order; 1: as noisy as DDPM.

    deviation: n, standard deviations of each step's noise, in place of eta.
    """
    now, after = _ends(levels)
    noise = eta * np.sqrt(_posterior(now, after)[2]) if deviation is None else np.asarray(deviation)
    rows = Rows(x=after.alpha, eps=np.sqrt(np.maximum(after.sigma**2 - noise**2, 0)), noise=noise)
    return _run(rows, predict, x, levels, keys, previews)


def ddpm(
    predict: Predict,
    x: jax.Array,
    levels: Level,
    keys: Keys | None = None,
    *,
    deviation: np.ndarray | None = None,
    variance: str = "small",
    previews: bool = False,
) -> Solved:
    """Ancestral sampling from q(x_s | x_t, x) (Ho et al. 2020, arXiv 2006.11239, eq. 6, 7), for any schedule and grid.

    variance: of each step's noise: "small" (that of q), "large" (beta), or "learned": between both, interpolated in the
    logarithm by the share that `predict` returns (1: "large"; arXiv 2102.09672, eq. 15). deviation: n, replaces it.
    """
    now, after = _ends(levels)
    of_x_t, of_x, small = _posterior(now, after)
    large = np.where(after.sigma > 0, 1 - (now.alpha / after.alpha) ** 2, 0)  # beta; no noise in a step to sigma 0
    if variance not in ("small", "large", "learned"):
        raise UserError(f"variance {variance!r} is not one of small, large, learned")
    noise = np.sqrt(large if variance == "large" else small) if deviation is None else np.asarray(deviation)
    reach = np.log(np.where(small > 0, large / np.where(small > 0, small, 1), 1)) / 2 if variance == "learned" else 0.0
    return _run(Rows(x_t=of_x_t, x=of_x, noise=noise, reach=reach), predict, x, levels, keys, previews)


def _posterior(now, after):
    """q(x_s | x_t, x) = N(a x_t + b x, variance) -> (a, b, variance), n each, s < t."""
    ratio = now.alpha / after.alpha
    fresh = np.maximum(now.sigma**2 - (ratio * after.sigma) ** 2, 0)  # variance of x_t given x_s
    shrink = (after.sigma / now.sigma) ** 2
    return ratio * shrink, after.alpha * fresh / now.sigma**2, fresh * shrink


def dpmpp_2m(
    predict: Predict, x: jax.Array, levels: Level, keys: Keys | None = None, *, previews: bool = False
) -> Solved:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one call a step, deterministic.

    First order in the first step, where the log-SNR is infinite (flow at t = 1), and in the last step to sigma 0.
    """
    now, after = _ends(levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(after.alpha / after.sigma) - np.log(now.alpha / now.sigma)  # n: steps in half the log-SNR
        over = np.concatenate([[0.0], h[1:] / h[:-1] / 2])  # n: 1 / (2 r)
    over = np.where(np.isfinite(over), over, 0.0)
    weight = after.alpha - after.sigma * now.alpha / now.sigma  # = -alpha' expm1(-h), also where h is infinite
    rows = Rows(x_t=after.sigma / now.sigma, x=weight * (1 + over), before=-weight * over)
    return _run(rows, predict, x, levels, keys, previews)


def dpm(
    predict: Predict,
    x: jax.Array,
    levels: Level,
    keys: Keys | None = None,
    *,
    order: int | Sequence[int] | np.ndarray = 2,
    of: str = "x",
    heun: bool = False,
    noisy: bool = False,
    official: bool = False,
    previews: bool = False,
) -> Solved:
    """Multistep DPM-Solver of first to third order on x ("++", arXiv 2211.01095) or on eps (arXiv 2206.00927).

    order: one, or one per step (n); it is lower in the first steps, and 1 in a step to sigma 0. Third order is as
    published, although it halves the second derivative and so is not of higher order. of: the prediction that is
    extrapolated. heun: the second of the papers' two forms of second order. noisy: their SDE. official: the SDE's third
    order on x with diffusers' sign of 1/2, which is the opposite of the expansion's.
    """
    if of not in ("x", "eps"):
        raise UserError(f"dpm of {of!r} is not one of 'x', 'eps'")
    now, after = _ends(levels)
    if (of == "eps" and not after.sigma.all()) or (of == "eps" and noisy and np.max(order) > 2):
        raise UserError("dpm of 'eps' cannot end at sigma 0, and with noise its order must be at most 2")
    count, data = len(now.t), of == "x"
    with np.errstate(all="ignore"):
        h = np.log(after.alpha / after.sigma) - np.log(now.alpha / now.sigma)  # n: steps in half the log-SNR
        # the exponential integrator's weights of a prediction and of its first and second difference
        reach, u = (-after.alpha, -h * (1 + noisy)) if data else (-after.sigma * (1 + noisy), h)
        first, slope = reach * np.expm1(u), reach * (np.expm1(u) / u - 1)
        bend = reach * ((np.expm1(u) - u) / u**2 + (0.5 if official and noisy else -0.5))
        r0, r1 = (np.concatenate([np.full(min(k, count), np.nan), h[: max(count - k, 0)]]) / h for k in (1, 2))
        both = (slope * r0 + bend) / (r0 + r1)
        none = np.zeros(count)
        table = np.stack(  # order, weights of the last three predictions, n
            [
                [first, none, none],
                _differences(first, slope if heun else first / 2, none, r0, none + 1),
                _differences(first, slope + both, both, r0, r1),
            ]
        )
        shrink = after.sigma / now.sigma * (np.exp(-h) if noisy else 1) if data else after.alpha / now.alpha
        noise = after.sigma * np.sqrt(-np.expm1(-2 * h) if data else np.expm1(2 * h))
    orders = np.minimum(np.broadcast_to(order, count), np.arange(count) + 1)
    orders = np.where(after.sigma == 0, 1, orders)
    weights = table[orders - 1, :, np.arange(count)].T  # 3 n
    rows = Rows(x_t=shrink, before=weights[1], earlier=weights[2], noise=noise if noisy else 0.0)
    rows = rows._replace(**{of: weights[0]})
    return _run(rows, predict, x, levels, keys, previews, keep_eps=not data)


def _differences(first, near, far, r0, r1):
    """`first m0 + near (m0 - m1) / r0 - far (m1 - m2) / r1` as weights of m0, m1, m2."""
    return [first + near / r0, -near / r0 - far / r1, far / r1]


class Stage(NamedTuple):
    """One call of Heun's method, 2n - 1 each."""

    dt: Any
    correct: Any  # 0 predictor, 1 corrector
    land: Any  # 1 where the step ends at sigma 0: then x' = alpha * predicted x
    alpha: Any


def heun(predict: Predict, x: jax.Array, levels: Level, keys: Keys | None = None, *, previews: bool = False) -> Solved:
    """Heun in t (Karras et al. 2022, arXiv 2206.00364, algorithm 1): second order, 2n - 1 calls, deterministic.

    The scan runs over calls, predictor and corrector in turn, so that the model is compiled once. The last step is
    Euler's: a corrector there would call the model at sigma 0.
    """
    now, after = _ends(levels)
    steps = len(now.t)
    calls = np.arange(2 * steps - 1)
    step = calls // 2  # index of the step of each call; a corrector is called at the step's end level
    stage = Stage((after.t - now.t)[step], calls % 2, (after.sigma == 0)[step] & (calls % 2 == 0), after.alpha[step])
    inputs = Level(*(np.where(calls % 2, b[step], a[step]) for a, b in zip(now, after, strict=True)))

    def body(carry, inputs):
        x_t, base, slope = carry  # for a corrector: the predicted point, the start of the step, the slope at the start
        level, at = inputs
        clean, eps = predict(x_t, level)
        here = level.dalpha * clean + level.dsigma * eps  # dx_t / dt
        begun = jnp.where(at.correct > 0, base, x_t)
        x_next = begun + at.dt * jnp.where(at.correct > 0, (slope + here) / 2, here)
        x_next = jnp.where(at.land > 0, at.alpha * clean, x_next)
        return (x_next.astype(x_t.dtype), begun, here.astype(x_t.dtype)), clean if previews else None

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inputs = (_cast(inputs, len(calls), x.dtype), _cast(stage, len(calls), x.dtype))
    (x, _, _), trail = jax.lax.scan(body, (x, x, jnp.zeros_like(x)), inputs)
    return (x, trail[::2]) if previews else x


SOLVERS = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m}
