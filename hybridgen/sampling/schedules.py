"""Noise schedules, parameterisations and time grids of diffusion and flow matching.

Time t is in [0, 1] and t = 1 is noise: `x_t = alpha(t) * x + sigma(t) * eps`. A **schedule** is a function
t -> `Level`, of any shape of t: in jax for training (t: B), in numpy float64 on the host for sampling grids (t: n+1).
A `Level` has all that conversions and solvers need, so a grid need not come from a schedule: official samplers whose
model time differs from the noise level (rounded or Karras grids) build their Level directly.

Parameterisations ("kind"): "x" clean, "eps" noise, "v" alpha*eps - sigma*x (Salimans & Ho 2022, arXiv 2202.00512),
"velocity" dx_t/dt = alpha'*x + sigma'*eps (flow matching, Lipman et al. 2023, arXiv 2210.02747; eps - x for `flow`).

Discrete-beta schedules (DDPM, Ho et al. 2020, arXiv 2006.11239) place timestep k of T at t = (k + 1) / T and clean data
at t = 0; between these, alpha and sigma are interpolated.

Shape letters: B pictures, n steps (intervals) of a grid, T timesteps of a discrete schedule.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError

KINDS = ("x", "eps", "v", "velocity")
TINY = 1e-5  # alpha or sigma below this is not divided by (the smallest alpha of an official schedule is 5e-5)


class Level(NamedTuple):
    """A noise level, or an array of them: leaves of one shape, () or B or n+1."""

    t: Any  # time, the network's input
    alpha: Any
    sigma: Any
    dalpha: Any  # d alpha / dt
    dsigma: Any


Array = jax.Array | np.ndarray
Schedule = Callable[[Array | float], Level]
Network = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t B ..., t B) -> out B ...
Predict = Callable[[jax.Array, Level], tuple[jax.Array, ...]]  # (x_t B ..., level) -> (x, eps), each B ...


def _numpy_of(t):
    return jnp if isinstance(t, jax.Array) else np


# ---------------------------------------------------------------- schedules


def flow(t: Array | float) -> Level:
    """Straight path (rectified flow): alpha = 1 - t, sigma = t. t: any shape -> Level of that shape."""
    xp = _numpy_of(t)
    t = xp.asarray(t)
    return Level(t, 1 - t, t, -xp.ones_like(t), xp.ones_like(t))


def cosine(t: Array | float) -> Level:
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2), exact at both ends."""
    xp = _numpy_of(t)
    t, a = xp.asarray(t), np.pi / 2
    alpha, sigma = xp.sin(a * (1 - t)), xp.sin(a * t)  # sin, because cos(pi / 2) is not 0 in float32
    return Level(t, alpha, sigma, -a * sigma, a * alpha)


def betas(name: str, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """T betas, float64: linear, scaled_linear (a line squared; CompVis calls it linear), squaredcos (cap 0.999)."""
    if name == "linear":
        return np.linspace(start, end, steps)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if name == "squaredcos":
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    raise UserError(f"beta schedule {name!r} is not one of linear, scaled_linear, squaredcos")


def discrete(betas: np.ndarray) -> Schedule:
    """T betas -> a schedule with the level of timestep k at t = (k + 1) / T, and clean data at t = 0."""
    bar = np.concatenate([[1.0], np.cumprod(1 - np.asarray(betas, np.float64))])  # T+1
    table = np.stack([np.sqrt(bar), np.sqrt(1 - bar)])  # 2 T+1: alpha, sigma
    table = np.concatenate([table, np.gradient(table, 1 / len(betas), axis=1)])  # 4 T+1: and their derivatives
    return functools.partial(_interpolate, table)


def _interpolate(table, t):
    xp, steps = _numpy_of(t), table.shape[1] - 1
    t = xp.asarray(t)
    table = xp.asarray(table, dtype=t.dtype if xp.issubdtype(t.dtype, xp.floating) else None)
    place = t * steps
    left = xp.clip(xp.floor(place), 0, steps - 1).astype(np.int32)
    weight = place - left
    return Level(t, *(table[:, left] * (1 - weight) + table[:, left + 1] * weight))


def to_timestep(t: Array | float, steps: int = 1000) -> Array | float:
    """Time in [0, 1] -> the (fractional) timestep 0 .. T-1, the input of a DDPM network."""
    return t * steps - 1


def from_timestep(timestep: Array | float, steps: int = 1000) -> Array | float:
    """Timestep 0 .. T-1 -> time in (0, 1]; -1 is clean data."""
    return (timestep + 1) / steps


def schedule(name: str, **options: float) -> Schedule:
    """A schedule by name: flow, cosine, or linear / scaled_linear / squaredcos with the options of `betas`."""
    if name in ("flow", "cosine"):
        if options:
            raise UserError(f"schedule {name!r} takes no options, but is given {', '.join(options)}")
        return {"flow": flow, "cosine": cosine}[name]
    if name not in ("linear", "scaled_linear", "squaredcos"):
        raise UserError(f"schedule {name!r} is not one of flow, cosine, linear, scaled_linear, squaredcos")
    return discrete(betas(name, **options))


# ---------------------------------------------------------------- parameterisations


def _over(level, x):
    """Level leaves, () or B, reshaped to multiply x: B ...; in the precision of x, at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    leaves = (jnp.asarray(a, dtype) for a in level)
    return Level(*(a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) for a in leaves))


def noised(level: Level, x: Array, eps: Array) -> jax.Array:
    """x_t = alpha x + sigma eps. level: () or B; x, eps: B ... -> B ..."""
    at = _over(level, x)
    return at.alpha * x + at.sigma * eps


def target(level: Level, kind: str, x: Array, eps: Array) -> Array:
    """The training target of a network of this kind. level: () or B; x, eps: B ... -> B ..."""
    at = _over(level, x)
    if kind == "x":
        return x
    if kind == "eps":
        return eps
    if kind == "v":
        return at.alpha * eps - at.sigma * x
    if kind == "velocity":
        return at.dalpha * x + at.dsigma * eps
    raise UserError(f"parameterisation {kind!r} is not one of {', '.join(KINDS)}")


def to_x_eps(level: Level, kind: str, x_t: Array, out: Array) -> tuple[Array, Array]:
    """A prediction of any kind -> (x, eps), both B ..., in at least float32.

    It is finite at both ends: "v" and "velocity" never divide by less than 1/2 on the schedules here. An "x" prediction
    does not determine eps where sigma < TINY, nor an "eps" prediction x where alpha < TINY: there the result goes to 0.
    """
    at = _over(level, x_t)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    if kind == "x":
        return out, (x_t - at.alpha * out) * _inverse(at.sigma)
    if kind == "eps":
        return (x_t - at.sigma * out) * _inverse(at.alpha), out
    if kind == "v":
        norm = at.alpha**2 + at.sigma**2  # 1 if the schedule is variance preserving
        return (at.alpha * x_t - at.sigma * out) / norm, (at.sigma * x_t + at.alpha * out) / norm
    if kind == "velocity":
        det = at.alpha * at.dsigma - at.dalpha * at.sigma  # 1 on the flow path, pi / 2 on the cosine one
        return (at.dsigma * x_t - at.sigma * out) / det, (at.alpha * out - at.dalpha * x_t) / det
    raise UserError(f"parameterisation {kind!r} is not one of {', '.join(KINDS)}")


def _inverse(a):
    return a / jnp.maximum(a**2, TINY**2)


def predictor(network: Network, kind: str) -> Predict:
    """A network (x_t B ..., t B float32) -> out B ..., of this kind -> predict(x_t, level) -> (x, eps) for solvers."""

    def predict(x_t, level):
        t = jnp.full(x_t.shape[:1], level.t, jnp.float32)  # B
        return to_x_eps(level, kind, x_t, network(x_t, t))

    return predict


# ---------------------------------------------------------------- times

SPACINGS = {"uniform": lambda s: s, "cosine": lambda s: (1 - np.cos(np.pi * s)) / 2}


def times(steps: int, *, spacing: str = "uniform", shift: float = 1.0) -> np.ndarray:
    """A sampling grid from exactly 1 to exactly 0 with `steps` intervals -> steps+1 float64.

    spacing: uniform, or cosine (denser at both ends). shift: see `shifted`.
    """
    if steps < 1:
        raise UserError(f"steps {steps} is below 1")
    if spacing not in SPACINGS:
        raise UserError(f"time spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    grid = SPACINGS[spacing](np.linspace(1.0, 0.0, steps + 1))
    return shifted(grid, shift)


def shifted(t: Array | float, shift: float) -> Array | float:
    """t -> s t / (1 + (s - 1) t): more steps at high noise if s > 1 (SD3, arXiv 2403.03206, eq. 23). Keeps 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def uniform(u: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """Training times from uniform u in [0, 1): u B -> t B."""
    return low + (high - low) * u


def logit_normal(normal: Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Training times sigmoid(mean + std * normal) (SD3, section 3.1). normal: B standard normal -> t B in (0, 1)."""
    return jax.nn.sigmoid(mean + std * normal)


def mode(u: Array, scale: float = 1.29) -> Array:
    """Training times that are dense in the middle (SD3, eq. 20), from uniform u in [0, 1): u B -> t B."""
    return 1 - u - scale * (_numpy_of(u).cos(np.pi * u / 2) ** 2 - 1 + u)


def loss_weight(name: str, sigma: Array) -> Array:
    """Loss weight of a flow at noise level sigma, B -> B, as compared by SD3: "cosmap", "sigma_sqrt" (1 / sigma^2)."""
    if name == "cosmap":
        return 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    if name == "sigma_sqrt":
        return sigma**-2.0
    raise UserError(f"loss weight {name!r} is not one of cosmap, sigma_sqrt")
