"""Shared by the replays of official schedulers: runs, the model, and the trajectory of a solver.

A fixture has several runs, each with its scheduler's options, and no network: the model is `0.3 x + sin(t)`, where t is
the timestep that a network would receive. Letters: n steps, T training timesteps, B pictures.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case
from hybridgen.sampling import official, schedules
from hybridgen.sampling.schedules import Level
from hybridgen.weights.options import Options

KINDS = {"epsilon": "eps", "sample": "x", "original_sample": "x", "v_prediction": "v", "flow_prediction": "velocity"}


class Run(NamedTuple):
    """One run: its name, options of the scheduler, of its grid and of its steps, and the number of steps."""

    name: str
    scheduler: Options
    grid: Options
    step: Options
    n: int


def runs(case: Case, kind: str, each: Callable[[Case, Run], None], *more: str) -> None:
    """Replays every run of a fixture of the scheduler `kind`. more: further allowed keys of the config."""
    with Options(case.config) as options:
        options.only("class_name", kind)
        options.skip("package", *more)
        table = options.take("runs")
    for name, entry in Options(table, "runs").config.items():
        with Options(entry, name) as parts, Options(parts.take("scheduler"), f"{name}.scheduler") as scheduler:
            with Options(parts.take("set_timesteps", {}), f"{name}.set_timesteps") as grid:
                with Options(parts.take("step", {}), f"{name}.step") as step:
                    given = grid.take("timesteps", None) or grid.take("sigmas", None) or ()
                    counted = parts.take("num_inference_steps", None) is not None
                    n = parts.count("num_inference_steps") if counted else len(given)
                    each(case, Run(name, scheduler, grid, step, n))


def bar_of(options: Options, floor: bool = False) -> np.ndarray:
    """alpha-bar of the T training timesteps."""
    steps, given = options.count("num_train_timesteps", 1000), options.take("trained_betas", None)
    start, end = options.number("beta_start", 1e-4), options.number("beta_end", 0.02)
    name = options.take("beta_schedule", "linear")
    betas = official.betas(name, steps, start, end) if given is None else np.asarray(given, np.float32)
    return official.alphas_bar(betas, options.flag("rescale_betas_zero_snr", False), floor)


def kind_of(options: Options) -> str:
    """The parameterisation, by our name (schedules.KINDS)."""
    return KINDS[options.only("prediction_type", *KINDS)]


def bounding(options: Options, clips: bool) -> Callable[[jax.Array], jax.Array]:
    """The clipping or dynamic thresholding of a predicted clean picture."""
    ratio, most = options.number("dynamic_thresholding_ratio", 0.995), options.number("sample_max_value", 1.0)
    clip = options.flag("clip_sample", True) if clips else False
    far = options.number("clip_sample_range", 1.0) if clips else 1.0

    def threshold(x: jax.Array) -> jax.Array:
        size = jnp.quantile(jnp.abs(x).reshape(x.shape[0], -1), ratio, 1)
        size = jnp.clip(size, 1, most).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.clip(x, -size, size) / size

    if options.flag("thresholding", False):
        return threshold
    return (lambda x: jnp.clip(x, -far, far)) if clip else (lambda x: x)


def stand_in(x: jax.Array, t: Any) -> jax.Array:
    """The model of every recorded run."""
    return np.float32(0.3) * x + np.sin(np.float32(t))


def trajectory(solver: Callable, predict: Callable, x: jax.Array, levels: Level, timesteps: Any, **options: Any) -> Any:
    """The start and the result of every step, n+1 B ...: the inputs of `predict(x, t, level)`, and the end."""
    trail: list[Any] = []

    def recorded(x_t: jax.Array, level: Level) -> tuple[jax.Array, jax.Array]:
        trail.append(x_t)
        i = len(trail) - 1
        return predict(x_t, timesteps[i], level)

    with jax.disable_jit():  # step by step, so that the trajectory can be recorded
        end = solver(recorded, x, levels, **options)
    return np.stack([*trail, end])


def predictor(kind: str, bound: Callable, rederive: bool = False) -> Callable:
    """predict(x, t, level) of the model `stand_in`. rederive: computes eps from the x that `bound` returned."""

    def predict(x_t: jax.Array, t: Any, level: Level) -> tuple[jax.Array, jax.Array]:
        clean, eps = schedules.to_x_eps(level, kind, x_t, stand_in(x_t, t))
        clean = bound(clean)
        return clean, (x_t - level.alpha * clean) / level.sigma if rederive else eps

    return predict


def noise_of(case: Case, run: Run, noisy: bool) -> Callable | None:
    """The recorded noise of each step, if the run draws any or has recorded some; otherwise None."""
    name = f"in_{run.name}_noise"
    if not noisy and (not case.has(name) or case.arrays[name].shape[1:] != case.takes("in_x_T").shape):
        return None
    noise = case.takes(name)
    return lambda i, x: jnp.asarray(noise[int(i)])


def compare(case: Case, run: Run, timesteps: Any, sigmas: Any, trail: Callable[[], Any]) -> None:
    """Compares the recorded arrays of a run that all schedulers may have."""
    case.gives(f"out_{run.name}_timesteps", lambda: np.asarray(timesteps))
    case.gives(f"out_{run.name}_sigmas", lambda: np.asarray(sigmas))
    case.gives(f"out_{run.name}_traj", trail)


def forward_run(case: Case, known: Mapping[str, Any]) -> Any:
    """The entry in `known` of the run whose forward process was recorded: the README names it if there are several."""
    readme = case.folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    named = [name for name in re.findall(r"run '(\w+)'", text) if name in known]
    if not named and len(known) != 1:
        raise UserError(f"{readme} must name the run of {', '.join(known)} that added the noise, as \"run 'NAME'\"")
    return known[named[0] if named else next(iter(known))]


def regrid(options: Options) -> str:
    """The name of the sigma grid that replaces the timesteps' one, or ""."""
    regridded = [name for name in official.REGRIDDED if options.flag(f"use_{name}_sigmas", False)]
    if len(regridded) > 1:
        raise UserError(f"{options.where}: only one of {' and '.join(regridded)} sigmas may be used")
    return regridded[0] if regridded else ""


def whole_timesteps(run: Run, count: int) -> np.ndarray:
    """The integer timesteps of a run: given ones, or n spaced ones."""
    spacing, offset = run.scheduler.take("timestep_spacing", "leading"), run.scheduler.count("steps_offset", 0, 0)
    given = run.grid.take("timesteps", None)
    steps = official.spaced(spacing, run.n, count, offset).round() if given is None else np.asarray(given, np.float64)
    if not ((steps >= 0) & (steps < count)).all():
        raise UserError(f"{run.name}: timesteps {steps.min():g} to {steps.max():g} are not within 0 and {count - 1}")
    return steps


def last_sigma(options: Options, bar: np.ndarray) -> np.floating:
    """The sigma at the end of the last step."""
    final = options.only("final_sigmas_type", "zero", "sigma_min")
    return official.sigmas_of(bar)[0] if final == "sigma_min" else np.float32(0)
