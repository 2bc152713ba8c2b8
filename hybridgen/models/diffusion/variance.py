"""The discrete process of DDPM and DiT: T timesteps, learned variances, respaced ancestral sampling.

A step k -> k - 1 has a variance between that of q(x_{k-1} | x_k, x) and beta (Ho et al. 2020). A network with twice the
channels also predicts it, as an interpolation weight between the logarithms of both, which only the variational bound
trains: the bound's gradient stops at the mean (iDDPM, Nichol & Dhariwal 2021, section 3.1, arXiv 2102.09672). The error
and the bound are means over values; the bound is in bits and, as in DiT, not scaled by T.

The process is a `Process` with `timesteps` T. Outside this file times are in [0, 1], timestep k at t = (k + 1) / T.

Letters: b batch, H W picture or latent, c channels, T timesteps, n steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.diffusion.process import Process
from hybridgen.models.losses import per_sample
from hybridgen.sampling import official, schedules, solvers


def timestep(process: Process, t: jax.Array) -> jax.Array:
    """Time in [0, 1] -> the integer timestep that the network takes, as a float."""
    return jnp.round(schedules.to_timestep(t, process.timesteps))


def betas_of(process: Process) -> np.ndarray:
    """T betas, float64; those of "linear" are scaled by 1000 / T. UserError for so few that one would exceed 1."""
    more = 1000 / process.timesteps
    ends = {"start": more * 1e-4, "end": more * 0.02} if process.schedule == "linear" else {}
    found = schedules.betas(process.schedule, process.timesteps, **ends)
    if found.max() > 1:
        raise UserError(f"process.timesteps {process.timesteps} are too few for the schedule 'linear': at least 20")
    return found


def split_output(process: Process, out: jax.Array, c: int) -> tuple[jax.Array, jax.Array | None]:
    """Output `[b, H, W, c or 2c]` -> the prediction and the share of variance (0: that of q, 1: beta) or None.

    Raises UserError for another number of outputs.
    """
    expected = c * (1 + process.learned_variance)
    if out.shape[-1] != expected:
        learned = f"process.learned_variance {process.learned_variance}"
        raise UserError(f"the network has {out.shape[-1]} outputs, but {c} channels with {learned} need {expected}")
    if not process.learned_variance:
        return out, None
    prediction, share = jnp.split(out, 2, -1)
    return prediction, (share + 1) / 2


# ---------------------------------------------------------------- training


class Steps(NamedTuple):
    """x_k = alpha x + sigma eps; q(x_{k-1} | x_k, x) = N(of_x x + of_x_t x_k, exp(low)); high = log beta; T each."""

    alpha: Any
    sigma: Any
    of_x: Any
    of_x_t: Any
    low: Any
    high: Any


def steps_of(betas: np.ndarray) -> Steps:
    """The steps of a process, float64. The first step has no variance; that of the second one is used."""
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    of_x, of_x_t = betas * np.sqrt(before) / (1 - bar), (1 - before) * np.sqrt(1 - betas) / (1 - bar)
    low = betas * (1 - before) / (1 - bar)
    low[0] = low[min(1, len(low) - 1)]
    return Steps(np.sqrt(bar), np.sqrt(1 - bar), of_x, of_x_t, np.log(low), np.log(betas))


def at(process: Process, k: jax.Array, dtype: Any) -> Steps:
    """The steps `k [b]`, shaped to multiply pictures: b 1 1 1."""
    return Steps(*(jnp.asarray(table, dtype)[k].reshape(-1, 1, 1, 1) for table in steps_of(betas_of(process))))


def terms(
    process: Process, network: Callable, x: jax.Array, k: jax.Array, eps: jax.Array, cond: dict
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """(squared error, bits of the bound or None, error of x), `[b]` each, of clean `x [b, H, W, c]` at `k [b] int`."""
    t = schedules.from_timestep(k.astype(x.dtype), process.timesteps)
    here = at(process, k, x.dtype)  # exact values: the schedule would interpolate at a rounded t
    level = schedules.discrete(betas_of(process))(t)._replace(
        alpha=here.alpha[:, 0, 0, 0], sigma=here.sigma[:, 0, 0, 0]
    )
    x_t = schedules.noised(level, x, eps)
    out, share = split_output(process, network(x_t, t, cond), x.shape[-1])
    clean, _ = schedules.to_x_eps(level, process.prediction_type, x_t, out)
    wrong = out - schedules.target(level, process.prediction_type, x, eps)
    bits = None if share is None else bound(process, x, x_t, k, jax.lax.stop_gradient(clean), share)
    return per_sample(jnp.square(wrong)), bits, per_sample(jnp.square(clean - x))


def bound(
    process: Process, x: jax.Array, x_t: jax.Array, k: jax.Array, clean: jax.Array, share: jax.Array
) -> jax.Array:
    """The variational bound's term of timesteps `k [b]`, in bits per value: `[b]`. clean: the predicted x."""
    _, _, of_x, of_x_t, low, high = at(process, k, x.dtype)
    true, mean = of_x * x + of_x_t * x_t, of_x * clean + of_x_t * x_t
    log_var = share * high + (1 - share) * low
    nats = 0.5 * (log_var - low - 1 + jnp.exp(low - log_var) + jnp.square(true - mean) * jnp.exp(-log_var))
    first = -log_likelihood(x, mean, log_var / 2)  # the last sampling step predicts a picture with 256 levels
    return per_sample(jnp.where((k == 0).reshape(-1, 1, 1, 1), first, nats)) / np.log(2.0)


def log_likelihood(x: jax.Array, mean: jax.Array, log_deviation: jax.Array) -> jax.Array:
    """log of a Gaussian's mass within half a level (of 256) around x in [-1, 1], in nats; the end levels are open."""

    def below(z: jax.Array) -> jax.Array:  # the tanh approximation of the normal CDF, as in official code
        u = np.sqrt(2 / np.pi).astype(np.float32) * (z + 0.044715 * z**3)
        # 1 - tanh directly: XLA's tanh has errors in the last digits near 1, which the logarithm amplifies
        size = jnp.minimum(jnp.where(u < 0, -u, u), 20.0)  # bounded, so that gradients are finite
        missing = 2 / (jnp.exp(2 * size) + 1)
        return 0.5 * (1 + jnp.where(u < 0, missing - 1, 1 - missing))

    def log(p: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(p, 1e-12))

    scale = jnp.exp(-log_deviation)
    upper, lower = (below(scale * (x - mean + side / 255)) for side in (1, -1))
    return jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1 - lower), log(upper - lower)))


def errors(process: Process, network: Callable, x: jax.Array, keys: jax.Array, cond: dict) -> tuple[jax.Array, dict]:
    """The loss `[b]` at random timesteps, and metrics `[b]`; `x [b, H, W, c]` is clean."""
    k = rng.randint(rng.named(keys, "time"), (), 0, process.timesteps)
    eps = rng.normal(rng.named(keys, "noise"), x.shape[1:], x.dtype)
    squared, bits, x_mse = terms(process, network, x, k, eps, cond)
    if bits is None:
        return squared, {"x_mse": x_mse}
    return squared + bits, {"x_mse": x_mse, "mse": squared, "vb": bits}


# ---------------------------------------------------------------- sampling


def levels_of(process: Process, kept: np.ndarray) -> schedules.Level:
    """The grid of `kept` timesteps (n, ascending), noisiest first, with clean data at the end: n+1."""
    times = schedules.from_timestep(np.append(kept[::-1], -1).astype(np.float64), process.timesteps)
    return schedules.discrete(betas_of(process))(times)


def solve(
    process: Process, call: Callable, noise: jax.Array, levels: schedules.Level, keys: Any, solver: str = "ddpm"
) -> jax.Array:
    """A sample `[b, H, W, c]` from noise along `levels`; `call(x, t)` is the network with its conditions."""
    ancestral = solver == "ddpm"

    def predict(x_t: jax.Array, level: schedules.Level) -> tuple[jax.Array, ...]:
        t = jnp.full(x_t.shape[:1], level.t, jnp.float32)
        out, share = split_output(process, call(x_t, t), x_t.shape[-1])
        both = schedules.to_x_eps(level, process.prediction_type, x_t, out)
        return (*both, share) if ancestral and share is not None else both

    options = {"variance": "learned" if process.learned_variance else process.variance} if ancestral else {}
    return solvers.SOLVERS[solver](predict, noise, levels, keys, **options)


STARTS = 0.1  # sampling starts from noise, so a picture has to be this invisible (alpha) at the first timestep


def render(
    process: Process, call: Callable, noise: jax.Array, keys: jax.Array, options: Mapping[str, Any]
) -> jax.Array:
    """A sample `[b, H, W, c]` from `noise [b, H, W, c]`; `call(x, t)` is the network with its conditions.

    options: "solver", "steps" or "respacing" (see official.respaced). Raises UserError for "shift" and "spacing".
    """
    if options.get("shift", 1.0) != 1 or options.get("spacing", "uniform") != "uniform":
        raise UserError("shift and spacing need continuous times; with discrete timesteps use steps or respacing")
    kept = official.respaced(options.get("respacing") or str(options.get("steps", process.steps)), process.timesteps)
    levels, every = levels_of(process, kept), schedules.discrete(betas_of(process))(1.0)
    if levels.alpha[0] > max(STARTS, every.alpha):
        raise UserError(
            f"respacing {options['respacing']!r} starts at timestep {kept[-1]} of {process.timesteps}, where a picture "
            f"is still visible (alpha {levels.alpha[0]:.2f}): sampling from noise needs a timestep near the last one"
        )
    return solve(process, call, noise, levels, keys, options.get("solver", process.solver))
