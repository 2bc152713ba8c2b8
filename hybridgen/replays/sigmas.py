"""Replays of the official schedulers that step in sigma: multistep DPM-Solver and Euler.

Letters: n steps, T training timesteps, B pictures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case
from hybridgen.replays.trajectories import (
    Run,
    bar_of,
    bounding,
    compare,
    kind_of,
    noise_of,
    predictor,
    regrid,
    runs,
    stand_in,
    trajectory,
)
from hybridgen.sampling import official, schedules, solvers
from hybridgen.sampling.schedules import Level
from hybridgen.weights.options import Options


def _ends_of(options: Options, sigmas: np.ndarray) -> tuple[float, float]:
    """The largest and the smallest sigma of a grid that is drawn anew."""
    most, least = options.take("sigma_max", None), options.take("sigma_min", None)
    most = float(sigmas[0]) if most is None else options.number("sigma_max")
    return most, float(sigmas[-1]) if least is None else options.number("sigma_min")


def _last(options: Options, bar: np.ndarray) -> np.floating:
    """The sigma that the last step ends at."""
    final = options.only("final_sigmas_type", "zero", "sigma_min")
    return official.sigmas_of(bar)[0] if final == "sigma_min" else np.float32(0)


def sched_dpmsolver(case: Case) -> None:
    """DPMSolverMultistepScheduler."""

    def each(case: Case, run: Run) -> None:
        options = run.scheduler
        bar = bar_of(options, floor=True)
        flow = options.flag("use_flow_sigmas", False)
        steps, ratios = _solver_grid(run, bar, flow)
        ratios = np.append(ratios, _last(options, bar)).astype(np.float32)
        wide = ratios.astype(np.float64)
        levels = schedules.flow(wide) if flow else official.from_ratio(np.append(steps, -1), wide)
        algorithm = options.only("algorithm_type", "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        options.only("variance_type", None, "learned", "learned_range")  # cuts off channels that the stand-in has not
        noisy, of = algorithm.startswith("sde"), "x" if algorithm.endswith("++") else "eps"
        walk = {"of": of, "noisy": noisy, "official": True, "order": _orders(options, len(steps))}
        walk |= {"heun": options.only("solver_type", "midpoint", "heun") == "heun", "keys": noise_of(case, run, noisy)}
        bound, dynamic = bounding(options, clips=False), options.flag("thresholding", False)
        predict = predictor(kind_of(options), bound, rederive=dynamic)
        x = jnp.asarray(case.takes("in_x_T"))
        compare(case, run, steps, ratios, lambda: trajectory(solvers.dpm, predict, x, levels, steps, **walk))

    runs(case, "DPMSolverMultistepScheduler", each)


def _orders(options: Options, n: int) -> np.ndarray:
    """The order of each step: lower at the end of few steps."""
    order, few = options.count("solver_order", 2), options.flag("lower_order_final", True) and n < 15
    if order > 3:
        raise UserError(f"{options.where}: solver_order {order} is not built, only 1, 2, 3")
    orders = np.full(n, order)
    if few:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-n:])
    if options.flag("euler_at_final", False):
        orders[-1] = 1
    return orders


def _solver_grid(run: Run, bar: np.ndarray, flow: bool) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, sigma / alpha) of the n steps; timesteps that are no whole numbers are cut off, as there."""
    options, count = run.scheduler, len(bar)
    all_ratios = official.sigmas_of(bar)
    logs = np.log(all_ratios)
    last = official.clipped(bar, options.take("lambda_min_clipped", -np.inf))
    spacing, offset = options.take("timestep_spacing", "linspace"), options.count("steps_offset", 0, 0)
    shift, mu = options.number("flow_shift", 1.0), run.grid.take("mu", None)
    options.flag("use_dynamic_shifting", False)
    options.only("time_shift_type", "exponential")
    anew, lu, given = regrid(options), options.flag("use_lu_lambdas", False), run.grid.take("timesteps", None)
    if anew or lu:
        ends = float(all_ratios[-1]), float(all_ratios[0])
        even = np.exp(np.linspace(float(logs[-1]), float(logs[0]), run.n))  # exponential, but for logarithms in float32
        ratios = even if lu and anew != "karras" else official.REGRIDDED[anew](*ends, run.n)
        steps = official.timestep_of(ratios, logs)
        rounds = (lu or anew == "karras") and options.take("beta_schedule", "linear") != "squaredcos_cap_v2"
        return np.trunc(steps.round() if rounds else steps), ratios
    if flow:
        ratios = 1 - np.linspace(1, 1 / count, run.n + 1)
        ratios = official.shifted(ratios, np.exp(run.grid.number("mu")) if mu is not None else shift)[::-1][:-1]
        return np.trunc(ratios * count), ratios
    if given is not None:
        steps = np.asarray(given, np.float64)
    else:
        steps = official.spaced_by_solver(spacing, run.n, count, last, offset)
    return steps, np.interp(steps, np.arange(count), all_ratios)


def sched_euler(case: Case) -> None:
    """EulerDiscreteScheduler: Euler in sigma on pictures that noise was added to; the network sees them shrunk."""

    def each(case: Case, run: Run) -> None:
        options = run.scheduler
        bar = bar_of(options, floor=True)
        steps, sigmas = _euler_grid(run, bar)
        final = _last(options, bar)
        if run.grid.take("sigmas", None) is None:
            sigmas = np.append(sigmas, final).astype(np.float32)
        kind, continuous = kind_of(options), options.only("timestep_type", "discrete", "continuous") == "continuous"
        if continuous and kind == "v":
            steps = np.float32(0.25) * np.log(sigmas[:-1])
        raised = sigmas * (1 + _churn(run.step, sigmas))
        noise, scale = noise_of(case, run, bool((raised > sigmas).any())), run.step.number("s_noise", 1.0)
        most = float(sigmas.max())
        start = most if options.take("timestep_spacing", "linspace") != "leading" else (most**2 + 1) ** 0.5

        def walk() -> np.ndarray:
            trail = [jnp.asarray(case.takes("in_x_T")) * np.float32(start)]
            for i, t in enumerate(steps):
                ends = np.asarray([sigmas[i], raised[i], sigmas[i + 1]], np.float64)
                trail.append(_euler_step(kind, trail[-1], t, ends, noise and scale * noise(i, None)))
            return np.stack(trail)

        compare(case, run, steps, sigmas, walk)

    runs(case, "EulerDiscreteScheduler", each)


def _churn(options: Options, sigmas: np.ndarray) -> np.ndarray:
    """By which share noise is raised before each step, n+1 (Karras et al. 2022, algorithm 2)."""
    share = min(options.number("s_churn", 0.0) / (len(sigmas) - 1), 2**0.5 - 1)
    least, most = options.number("s_tmin", 0.0), options.take("s_tmax", np.inf)
    return np.where((sigmas >= least) & (sigmas <= most), share, 0.0)


def _euler_step(kind: str, x: jax.Array, t: Any, sigmas: np.ndarray, noise: jax.Array | None) -> jax.Array:
    """From the first of three sigmas, which noise raises to the second, to the third; the network sees `x` before."""
    sigma, raised, _ = sigmas
    shrink = np.float32(1 / np.sqrt(sigma**2 + 1))
    out = stand_in(x * shrink, t)  # what a variance-preserving network would see at this noise
    if raised > sigma:
        x = x + noise * np.float32(np.sqrt(raised**2 - sigma**2))

    def predict(x_t: jax.Array, t: Any, level: Level) -> tuple[jax.Array, jax.Array]:
        if kind == "v":
            clean = schedules.to_x_eps(official.from_ratio(t, sigma), "v", x_t * shrink, out)[0]
        else:
            clean = out if kind == "x" else x_t - level.sigma * out
        return clean, (x_t - clean) / level.sigma

    return trajectory(solvers.euler, predict, x, official.exploding(sigmas[1:]), [t])[-1]


def _euler_grid(run: Run, bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps n, sigmas n, or n+1 where they were given)."""
    options, all_sigmas = run.scheduler, official.sigmas_of(bar)
    logs, given = np.log(all_sigmas), run.grid.take("sigmas", None)
    spacing, offset = options.take("timestep_spacing", "linspace"), options.count("steps_offset", 0, 0)
    anew, interpolation = regrid(options), options.only("interpolation_type", "linear", "log_linear")
    if given is not None:
        options.skip("sigma_min", "sigma_max")
        sigmas = np.asarray(given, np.float32)
        return official.timestep_of(sigmas[:-1], logs).astype(np.float32), sigmas
    steps = run.grid.take("timesteps", None)
    steps = official.spaced(spacing, run.n, len(bar), offset) if steps is None else np.asarray(steps)
    steps = steps.astype(np.float32)
    sigmas = np.interp(steps, np.arange(len(bar)), all_sigmas)
    if interpolation == "log_linear":
        sigmas = official.exponential(all_sigmas[-1], all_sigmas[0], run.n + 1)
    ends = _ends_of(options, sigmas)
    if not anew:
        return steps, sigmas
    sigmas = official.REGRIDDED[anew](*ends, run.n)
    return official.timestep_of(sigmas, logs).astype(np.float32), sigmas
