"""Replay of the official EulerDiscreteScheduler.

Letters: n steps, T training timesteps, B pictures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.replays import Case
from hybridgen.replays._schedulers import (
    Run,
    bar_of,
    compare,
    kind_of,
    last_sigma,
    noise_of,
    regrid,
    runs,
    stand_in,
    trajectory,
)
from hybridgen.sampling import official, schedules, solvers
from hybridgen.sampling.schedules import Level
from hybridgen.weights.options import Options


def _ends_of(options: Options, sigmas: np.ndarray) -> tuple[float, float]:
    """The largest and the smallest sigma of a grid that replaces the timesteps' one."""
    most, least = options.take("sigma_max", None), options.take("sigma_min", None)
    most = float(sigmas[0]) if most is None else options.number("sigma_max")
    return most, float(sigmas[-1]) if least is None else options.number("sigma_min")


def replay(case: Case) -> None:
    """Compares EulerDiscreteScheduler: Euler in sigma for variance-exploding noise; the network's input is scaled."""

    def each(case: Case, run: Run) -> None:
        options = run.scheduler
        bar = bar_of(options, floor=True)
        steps, sigmas = _euler_grid(run, bar)
        final = last_sigma(options, bar)
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
    """The factor by which sigma is increased before each step, n+1 (Karras et al. 2022, gamma of algorithm 2)."""
    share = min(options.number("s_churn", 0.0) / (len(sigmas) - 1), 2**0.5 - 1)
    least, most = options.number("s_tmin", 0.0), options.take("s_tmax", np.inf)
    return np.where((sigmas >= least) & (sigmas <= most), share, 0.0)


def _euler_step(kind: str, x: jax.Array, t: Any, sigmas: np.ndarray, noise: jax.Array | None) -> jax.Array:
    """One step: noise raises sigmas[0] to sigmas[1], Euler leads to sigmas[2]; the network sees `x` before that."""
    sigma, raised, _ = sigmas
    shrink = np.float32(1 / np.sqrt(sigma**2 + 1))
    out = stand_in(x * shrink, t)  # the input of a variance-preserving network at this noise level
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
    """(timesteps n, sigmas n; sigmas n+1 if the run gives them)."""
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
