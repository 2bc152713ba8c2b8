"""Replay of the official DDIMScheduler.

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
    kind_of,
    noise_of,
    predictor,
    runs,
    trajectory,
    whole_timesteps,
)
from hybridgen.sampling import official, solvers


def replay(case: Case) -> None:
    """Compares DDIMScheduler: each step goes back by T // n, which may differ from the next timestep."""

    def each(case: Case, run: Run) -> None:
        bar, options = bar_of(run.scheduler), run.scheduler
        steps = whole_timesteps(run, len(bar))
        last = 1.0 if options.flag("set_alpha_to_one", True) else bar[0]
        back = (steps - len(bar) // run.n).astype(int)
        after = np.where(back >= 0, bar[back], last)
        eta, rederive = run.step.number("eta", 0.0), run.step.flag("use_clipped_model_output", False)
        predict = predictor(kind_of(options), bounding(options, clips=True), rederive)
        noise = noise_of(case, run, eta > 0)

        def walk() -> np.ndarray:
            trail = [jnp.asarray(case.takes("in_x_T"))]
            for i, step in enumerate(steps):
                ends = official.variance_preserving([step, back[i]], [bar[int(step)], after[i]])
                keys = None if noise is None else lambda _, x, i=i: noise(i, x)
                options = {"keys": keys, "eta": eta}
                trail.append(trajectory(solvers.ddim, predict, trail[-1], ends, [step], **options)[-1])
            return np.stack(trail)

        compare(case, run, steps, (), walk)

    runs(case, "DDIMScheduler", each)
