"""Replay of the official FlowMatchEulerDiscreteScheduler, and of SD3's densities of training times.

Letters: n steps, T training timesteps, B pictures.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from hybridgen.core.errors import UserError
from hybridgen.replays import Case
from hybridgen.replays._schedulers import (
    Run,
    compare,
    forward_run,
    noise_of,
    predictor,
    regrid,
    runs,
    trajectory,
)
from hybridgen.sampling import official, schedules, solvers


def replay(case: Case) -> None:
    """Compares FlowMatchEulerDiscreteScheduler, the forward process, and SD3's densities of training times."""
    trained: dict[str, tuple[np.ndarray, int]] = {}

    def each(case: Case, run: Run) -> None:
        options, count = run.scheduler, run.scheduler.count("num_train_timesteps", 1000)
        dynamic, shift = options.flag("use_dynamic_shifting", False), options.number("shift", 1.0)
        train = official.flow_sigmas(count, 1.0 if dynamic else shift)
        trained[run.name] = train, count
        sigmas = _flow_grid(run, train, count)
        inverted, explicit = options.flag("invert_sigmas", False), run.grid.take("timesteps", None)
        sigmas = np.append(1 - sigmas if inverted else sigmas, np.float32(inverted))
        # the network receives given timesteps unchanged, even if the sigmas were shifted
        steps = sigmas[:-1] * np.float32(count) if explicit is None or inverted else np.asarray(explicit, np.float32)
        if len(steps) != len(sigmas) - 1:
            raise UserError(f"{run.name}: there are {len(steps)} timesteps, but {len(sigmas) - 1} sigmas")
        noisy = options.flag("stochastic_sampling", False)
        options.skip("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")  # mu is computed from these
        levels = schedules.flow(sigmas.astype(np.float64))
        predict = predictor("velocity", lambda x: x)
        noise, x = noise_of(case, run, noisy), jnp.asarray(case.takes("in_x_T"))
        walk = {"keys": noise, "deviation": levels.sigma[1:]} if noisy else {}
        solver = solvers.ddim if noisy else solvers.euler
        compare(case, run, steps, sigmas, lambda: trajectory(solver, predict, x, levels, steps, **walk))

    runs(case, "FlowMatchEulerDiscreteScheduler", each, "density")
    if case.has("in_q_x0"):
        sigmas, count = forward_run(case, trained)
        clean, noise, index = (case.takes(f"in_q_{name}") for name in ("x0", "noise", "index"))
        level = schedules.flow(sigmas[index])
        case.gives("out_train_sigmas", lambda: sigmas)
        case.gives("out_q_timestep", lambda: sigmas[index] * np.float32(count))
        case.gives("out_q_noisy", lambda: schedules.noised(level, jnp.asarray(clean), jnp.asarray(noise)))
    _densities(case)


def _flow_grid(run: Run, train: np.ndarray, count: int) -> np.ndarray:
    """Sigmas of the n steps, float32. A static shift is applied twice: to the ends of the range and to the sigmas."""
    options, given, steps = run.scheduler, run.grid.take("sigmas", None), run.grid.take("timesteps", None)
    mu, kind = run.grid.take("mu", None), options.only("time_shift_type", "exponential", "linear")
    if given is not None:
        sigmas = np.asarray(given, np.float32)
    elif steps is not None:
        sigmas = np.asarray(steps, np.float32) / count
    else:
        sigmas = np.linspace(float(train[0]) * count, float(train[-1]) * count, run.n) / count
    if options.flag("use_dynamic_shifting", False):
        if mu is None:
            raise UserError(f"{run.name}: use_dynamic_shifting needs mu in set_timesteps")
        sigmas = official.shifted_by(sigmas, run.grid.number("mu"), kind)
    else:
        sigmas = official.shifted(sigmas, options.number("shift", 1.0))
    if options.take("shift_terminal", None):
        sigmas = official.stretched(sigmas, options.number("shift_terminal"))
    if anew := regrid(options):
        sigmas = official.REGRIDDED[anew](float(sigmas[0]), float(sigmas[-1]), run.n)
    return sigmas.astype(np.float32)


def _densities(case: Case) -> None:
    """Compares maps and weights at given numbers, and moments of the densities that the config lists, one per row."""
    listed = case.config.get("density", DENSITIES)
    rows = [_density(row) for row in (listed if isinstance(listed, list | tuple) else [listed])]

    def moments() -> np.ndarray:
        u = (np.arange(400_000) + 0.5) / 400_000  # even quantiles instead of random samples
        drawn = np.stack([DRAWS[name](u, *parameters) for name, parameters in rows])
        return np.stack([drawn.mean(1), drawn.std(1), *((drawn < at).mean(1) for at in (0.25, 0.5, 0.75))], 1)

    scales = [parameters for name, parameters in rows if name == "mode"] or [()]
    case.gives("out_mode_map", lambda: schedules.mode(case.takes("in_density_u"), *scales[0]))
    case.gives("out_weight_cosmap", lambda: schedules.loss_weight("cosmap", case.takes("in_density_u")))
    case.gives("out_weight_sigma_sqrt", lambda: schedules.loss_weight("sigma_sqrt", case.takes("in_density_u")))
    case.gives("out_density_moments", moments, within=0.004)  # the recorded ones are of 400,000 random samples


def _density(row: Any) -> tuple[str, tuple[float, ...]]:
    """(name, parameters) of a density in the config, such as ["logit_normal", mean, std]. Raises UserError."""
    name, *parameters = row if isinstance(row, list | tuple) and row else ("",)
    known = isinstance(name, str) and name in DRAWS
    if not known or len(parameters) > MOST[name] or not all(type(number) in (int, float) for number in parameters):
        raise UserError(f"config: density {str(row)[:80]!a} is not supported, only {', '.join(DRAWS)} with numbers")
    return name, tuple(parameters)


# training times from uniform u in (0, 1); MOST is the largest number of parameters
DRAWS = {
    "logit_normal": lambda u, *parameters: schedules.logit_normal(ndtri(u), *parameters),
    "mode": schedules.mode,
    "uniform": schedules.uniform,
}
MOST = {"logit_normal": 2, "mode": 1, "uniform": 0}
DENSITIES = (
    ("logit_normal", 0.0, 1.0),
    ("logit_normal", 0.5, 0.6),
    ("mode", 1.29),
    ("uniform",),
)  # the default if the config lists none
