"""The diffusion process around any decoder network: its training loss and its sampling, over the role `predict`.

A decoder's module carries the options `schedule`, `kind` (what the network says), `loss_kind` (what it is judged in:
"x" predicted and "velocity" judged is JiT, Li & He 2025), `time_mean, time_std, time_min` (logit-normal times, SD3).
One with `timesteps` has the discrete process of variance.py.

Letters: b batch, H W picture or latent, c channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.diffusion import variance
from hybridgen.models.losses import per_sample
from hybridgen.sampling import guidance, schedules
from hybridgen.sampling.solvers import SOLVERS

Network = Callable[[jax.Array, jax.Array, dict], jax.Array]  # (x_t b H W c, t b, cond) -> prediction b H W c


def errors(model: Any, network: Network, x: jax.Array, keys: jax.Array, cond: dict) -> tuple[jax.Array, dict]:
    """Squared error of the prediction `[b]` at random times, and metrics `[b]`; `x [b, H, W, c]` is clean."""
    if getattr(model, "timesteps", 0):
        return variance.errors(model, network, x, keys, cond)
    t = schedules.logit_normal(rng.normal(rng.named(keys, "time")), model.time_mean, model.time_std)  # b
    t = jnp.maximum(t, model.time_min)
    level = schedules.schedule(model.schedule)(t)
    eps = rng.normal(rng.named(keys, "noise"), x.shape[1:], x.dtype)
    x_t = schedules.noised(level, x, eps)
    x_eps = schedules.to_x_eps(level, model.kind, x_t, network(x_t, t, cond))
    if model.loss_kind == model.kind:
        wrong = schedules.target(level, model.kind, *x_eps) - schedules.target(level, model.kind, x, eps)
    else:
        wrong = schedules.target(level, model.loss_kind, x_eps[0] - x, x_eps[1] - eps)
    return per_sample(jnp.square(wrong)), {"x_mse": per_sample(jnp.square(x_eps[0] - x))}


def render(
    model: Any, network: Network, cond: dict, keys: jax.Array, shape: tuple[int, ...], options: dict
) -> jax.Array:
    """Draws `[b, *shape]` by a solver. `cond` holds b rows; guided branches repeat them with conditions dropped.

    options: "solver", "steps", "shift", "spacing" (of discrete timesteps: see variance.render), "guidance" (a scale by
    condition, {"plan": s, "text": s}, see sampling.guidance; a bare scale is that of the first of plan, text and label
    that there is), "guidance_channels" (how many of the channels are guided; 0: all). A condition "x" is dropped
    through the entry `drop_x [b] bool` of `cond`.
    """
    known = [name for name in ("plan", "text", "label") if name in cond]
    spec = options.get("guidance", 1.0)
    spec = spec if hasattr(spec, "items") or not guidance.is_on(spec) else {(known or ["plan"])[0]: spec}
    for name in {name for branch in guidance.branches(guidance.parse(spec)) for name in branch}:
        if name not in known:
            raise UserError(f"guidance against {name!r}: the decoder is conditioned on {', '.join(known) or 'nothing'}")
    branches = guidance.branches(guidance.parse(spec))
    b = keys.shape[0]
    full = guidance.repeat(cond, len(branches))
    for name in {name for branch in branches for name in branch}:
        full[f"drop_{name}"] = guidance.join([jnp.full(b, name in branch) for branch in branches])

    channels = options.get("guidance_channels", 0) or shape[-1]  # never what a network says about its variance
    call = guidance.guided(lambda x, t: network(x, t, full), spec, channels)
    noise = rng.normal(rng.named(keys, "noise"), shape)  # b H W c: at t = 1 sigma is 1
    with jax.named_scope("render"):
        if getattr(model, "timesteps", 0):
            return variance.render(model, call, noise, rng.named(keys, "solver"), options)
        grid = schedules.times(
            options.get("steps", 8), shift=options.get("shift", 1.0), spacing=options.get("spacing", "uniform")
        )
        levels = schedules.schedule(model.schedule)(grid)
        predict = schedules.predictor(call, model.kind)
        return SOLVERS[options.get("solver", "euler")](predict, noise, levels, rng.named(keys, "solver"))
