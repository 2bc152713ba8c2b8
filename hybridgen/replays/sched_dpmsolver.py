"""Replay of the official DPMSolverMultistepScheduler.

Letters: n steps, T training timesteps, B pictures.
"""

import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case
from hybridgen.replays._schedulers import (
    Run,
    bar_of,
    bounding,
    compare,
    kind_of,
    last_sigma,
    noise_of,
    predictor,
    regrid,
    runs,
    trajectory,
)
from hybridgen.sampling import official, schedules, solvers
from hybridgen.weights.options import Options


def replay(case: Case) -> None:
    """Compares DPMSolverMultistepScheduler."""

    def each(case: Case, run: Run) -> None:
        options = run.scheduler
        bar = bar_of(options, floor=True)
        flow = options.flag("use_flow_sigmas", False)
        steps, ratios = _solver_grid(run, bar, flow)
        ratios = np.append(ratios, last_sigma(options, bar)).astype(np.float32)
        wide = ratios.astype(np.float64)
        levels = schedules.flow(wide) if flow else official.from_ratio(np.append(steps, -1), wide)
        algorithm = options.only("algorithm_type", "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        options.only("variance_type", None, "learned", "learned_range")  # drops channels that `stand_in` does not have
        noisy, of = algorithm.startswith("sde"), "x" if algorithm.endswith("++") else "eps"
        walk = {"of": of, "noisy": noisy, "official": True, "order": _orders(options, len(steps))}
        walk |= {"heun": options.only("solver_type", "midpoint", "heun") == "heun", "keys": noise_of(case, run, noisy)}
        bound, dynamic = bounding(options, clips=False), options.flag("thresholding", False)
        predict = predictor(kind_of(options), bound, rederive=dynamic)
        x = jnp.asarray(case.takes("in_x_T"))
        compare(case, run, steps, ratios, lambda: trajectory(solvers.dpm, predict, x, levels, steps, **walk))

    runs(case, "DPMSolverMultistepScheduler", each)


def _orders(options: Options, n: int) -> np.ndarray:
    """The order of each step; with fewer than 15 steps it is lower at the end."""
    order, few = options.count("solver_order", 2), options.flag("lower_order_final", True) and n < 15
    if order > 3:
        raise UserError(f"{options.where}: solver_order {order} is not supported, only 1, 2, 3")
    orders = np.full(n, order)
    if few:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-n:])
    if options.flag("euler_at_final", False):
        orders[-1] = 1
    return orders


def _solver_grid(run: Run, bar: np.ndarray, flow: bool) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, sigma / alpha) of the n steps; fractional timesteps are truncated, as in official code."""
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
        even = np.exp(np.linspace(float(logs[-1]), float(logs[0]), run.n))  # `exponential`, with logarithms in float32
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
