"""Replay of the official DDPMScheduler.

Letters: n steps, T training timesteps, B pictures.
"""

import jax.numpy as jnp
import numpy as np

from hybridgen.replays import Case
from hybridgen.replays._schedulers import (
    Run,
    bar_of,
    bounding,
    compare,
    forward_run,
    kind_of,
    noise_of,
    predictor,
    runs,
    trajectory,
    whole_timesteps,
)
from hybridgen.sampling import official, schedules, solvers


def replay(case: Case) -> None:
    """Compares DDPMScheduler: ancestral steps along the list of timesteps."""
    bars: dict[str, np.ndarray] = {}

    def each(case: Case, run: Run) -> None:
        bar, options = bar_of(run.scheduler), run.scheduler
        bars[run.name] = bar
        steps = whole_timesteps(run, len(bar))
        at = np.append(bar[steps.astype(int)], 1.0)
        levels = official.variance_preserving(np.append(steps, -1), at)
        predict = predictor(kind_of(options), bounding(options, clips=True))
        large = options.only("variance_type", "fixed_small", "fixed_small_log", "fixed_large") == "fixed_large"
        ratio = at[:-1].astype(np.float64) / at[1:]
        deviation = np.sqrt(1 - ratio) * (steps > 0) if large else None
        noise = noise_of(case, run, bool((steps > 0).any()))
        walk = {"keys": noise, "deviation": deviation}
        x = jnp.asarray(case.takes("in_x_T"))
        compare(case, run, steps, (), lambda: trajectory(solvers.ddpm, predict, x, levels, steps, **walk))
        case.gives(f"out_{run.name}_alphas_cumprod", lambda: bar)

    runs(case, "DDPMScheduler", each)
    if case.has("in_q_x0"):
        _forward(case, forward_run(case, bars))


def _forward(case: Case, bar: np.ndarray) -> None:
    clean, noise, steps = (jnp.asarray(case.takes(f"in_q_{name}")) for name in ("x0", "noise", "t"))
    level = official.variance_preserving(steps, bar[np.asarray(steps)])
    case.gives("out_q_noisy", lambda: schedules.noised(level, clean, noise))
    case.gives("out_q_velocity", lambda: schedules.target(level, "v", clean, noise))
