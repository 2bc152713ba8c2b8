"""Optimisers: groups of parameters by path, each with its own optimiser, schedule, clip and decay.

    config.optim = {kind, lr, schedule, warmup, final, clip, decay, decay_on, b1, b2, eps, groups: {name: {match, ...}}}

A group's `match` is a path pattern; what it does not set is as in `config.optim`. A parameter may match one group only;
those that match none form the group "rest". Decay follows `decay_on`, a path pattern: layers are stacked, so rank says
nothing. The state is packed into nested dicts of arrays, so that checkpoints hold no Python classes.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridgen import trees
from hybridgen.errors import UserError

KINDS = ("adamw", "adafactor")
SCHEDULES = ("constant", "cosine", "linear")


def build(config: Mapping, steps: int, params: Mapping) -> optax.GradientTransformation:
    """Optimiser for `params` (a nested dict, only its paths count) over `steps` updates."""
    rest = {name: config[name] for name in config if name != "groups"}
    groups = {"rest": rest} | {name: rest | dict(group) for name, group in config.get("groups", {}).items()}
    labels = trees.unflatten({path: _label(path, groups) for path in trees.flatten(params)})
    chains = {name: _chain(group, steps) for name, group in groups.items()}
    return optax.multi_transform(chains, labels)


def _label(path: str, groups: Mapping) -> str:
    found = [name for name, group in groups.items() if name != "rest" and re.search(group["match"], path)]
    if len(found) > 1:
        raise UserError(f"parameter {path!r} matches the optimiser groups {' and '.join(found)}")
    return found[0] if found else "rest"


def schedule(group: Mapping, steps: int) -> optax.Schedule:
    """Linear warm-up to `lr` over `warmup` updates, then constant, or cosine / linear down to `final` * lr."""
    lr, warmup, final = group["lr"], min(group["warmup"], steps), group["final"]
    rest = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(lr, lr * final, rest),
    }
    if group["schedule"] not in after:
        raise UserError(f"optim.schedule {group['schedule']!r} is not one of {', '.join(SCHEDULES)}")
    # the first update has count 0: start at lr / warmup, not at zero
    rise = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after[group["schedule"]]()], [warmup])


def _chain(group: Mapping, steps: int) -> optax.GradientTransformation:
    rate = schedule(group, steps)

    def decays(params: Mapping) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(group["decay_on"], _name(path))), params)

    if group["kind"] == "adamw":
        rule = optax.adamw(rate, group["b1"], group["b2"], group["eps"], weight_decay=group["decay"], mask=decays)
    elif group["kind"] == "adafactor":
        rule = optax.adafactor(rate, weight_decay_rate=group["decay"] or None, weight_decay_mask=decays)
    else:
        raise UserError(f"optim.kind {group['kind']!r} is not one of {', '.join(KINDS)}")
    clip = [optax.clip_by_global_norm(group["clip"])] if group["clip"] else []
    return optax.chain(*clip, rule)


def _name(path: tuple) -> str:
    parts = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return "/".join(parts)


def pack(state: Any) -> dict:
    """Optimiser state -> nested dict of its arrays, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return trees.unflatten({_name(path): leaf for path, leaf in leaves})


def unpack(rule: optax.GradientTransformation, params: Mapping, packed: Mapping) -> Any:
    """Inverse of `pack`, for the optimiser and parameters that it came from."""
    shape = jax.eval_shape(rule.init, params)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shape)
    flat = trees.flatten(packed)
    return jax.tree_util.tree_unflatten(structure, [flat[_name(path)] for path, _ in leaves])


def ema(average: Mapping, params: Mapping, decay: float, count: jax.Array) -> Any:
    """Moving average of parameters; early on it averages over fewer steps: decay is at most (1 + n) / (10 + n)."""
    n = count.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda a, p: a + (1 - rate).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)
