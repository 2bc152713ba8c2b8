"""The diffusion process of a denoiser, independent of its network: its training loss and its integration.

A `Process` has continuous times, as in this file (flow matching and related processes), or discrete timesteps (DDPM,
variance.py). Both files define `errors` and `render` for a network with its conditions. The predicted quantity and the
one whose error is the loss may differ: JiT (Li & He 2025) predicts "x" and measures "velocity". Training times are
logit-normal (SD3, Esser et al. 2024).

Letters: b batch, H W picture or latent, c channels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.losses import per_sample
from hybridgen.sampling import schedules
from hybridgen.sampling.solvers import SOLVERS

Network = Callable[[jax.Array, jax.Array, dict], jax.Array]  # (x_t b H W c, t b, cond) -> prediction b H W c or 2c


@dataclasses.dataclass(frozen=True)
class Process:
    """Schedule, prediction and loss, training times, and the default solver."""

    schedule: str = "flow"  # a name of sampling.schedules
    prediction_type: str = "x"  # "x", "eps", "v" or "velocity"
    loss_type: str = "velocity"  # the quantity of the squared error, one of the same four
    relative: bool = False  # divides each error by the draft's, so that bad drafts do not dominate the loss
    time_mean: float = 0.0  # mean and standard deviation of a training time's logit
    time_std: float = 1.0
    time_min: float = 0.05  # smaller training times are set to this
    timesteps: int = 0  # T of a discrete process; 0: times are continuous
    learned_variance: bool = False  # the network has twice the outputs: the prediction, then variances
    variance: str = "large"  # of ancestral steps, if not learned: "large" (beta) or "small" (the posterior's)
    solver: str = "euler"
    steps: int = 8

    def __post_init__(self) -> None:
        for name in ("prediction_type", "loss_type"):
            if (value := getattr(self, name)) not in schedules.KINDS:
                raise UserError(f"process.{name} {value!r} is not one of {', '.join(schedules.KINDS)}")
        if self.learned_variance and not self.timesteps:
            raise UserError("process.learned_variance needs discrete timesteps, but process.timesteps is 0")
        if self.timesteps and self.loss_type != self.prediction_type:
            types = f"process.loss_type is {self.loss_type!r} and process.prediction_type {self.prediction_type!r}"
            raise UserError(f"{types}: with discrete timesteps they must be equal")


def errors(process: Process, network: Network, x: jax.Array, keys: jax.Array, cond: dict) -> tuple[jax.Array, dict]:
    """Squared error of the prediction `[b]` at random times, and metrics `[b]`; `x [b, H, W, c]` is clean."""
    t = schedules.logit_normal(rng.normal(rng.named(keys, "time")), process.time_mean, process.time_std)  # b
    t = jnp.maximum(t, process.time_min)
    level = schedules.schedule(process.schedule)(t)
    eps = rng.normal(rng.named(keys, "noise"), x.shape[1:], x.dtype)
    x_t = schedules.noised(level, x, eps)
    predicted, measured = process.prediction_type, process.loss_type
    x_eps = schedules.to_x_eps(level, predicted, x_t, network(x_t, t, cond))
    if measured == predicted:
        wrong = schedules.target(level, predicted, *x_eps) - schedules.target(level, predicted, x, eps)
    else:
        wrong = schedules.target(level, measured, x_eps[0] - x, x_eps[1] - eps)
    return per_sample(jnp.square(wrong)), {"x_mse": per_sample(jnp.square(x_eps[0] - x))}


def render(
    process: Process, call: Callable, noise: jax.Array, keys: jax.Array, options: Mapping[str, Any]
) -> jax.Array:
    """A sample `[b, H, W, c]` from `noise [b, H, W, c]`; `call(x, t)` is the network with its conditions.

    options: "solver", "steps", "shift" and "spacing" (see schedules.times).
    """
    grid = schedules.times(
        options.get("steps", process.steps), shift=options.get("shift", 1.0), spacing=options.get("spacing", "uniform")
    )
    levels = schedules.schedule(process.schedule)(grid)
    predict = schedules.predictor(call, process.prediction_type)
    return SOLVERS[options.get("solver", process.solver)](predict, noise, levels, keys)
