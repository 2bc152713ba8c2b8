"""Optimizers: groups of parameters by path, each with its own optimizer, schedule, gradient clipping and weight decay.

    config.optim = {kind, lr, schedule, warmup, final, clip, decay, decay_on, b1, b2, eps, groups: {name: {match, ...}}}

A group's `match` is a path pattern; entries that it does not set are those of `config.optim`. A parameter may match one
group only; parameters without a group form the group "rest". Weight decay applies to the paths that match `decay_on`
(not by rank: layers are stacked). It is decoupled, p * (1 - lr * decay), for every kind. The state is packed into
nested dicts of arrays, so that checkpoints contain no Python classes.

`kind: "muon"` (Jordan 2024) uses Muon for the hidden matrices (`MATRICES`, also by path), and AdamW with the group's
b1, b2 and eps for the rest. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so
both use one `lr` and one `decay`, and those of an AdamW run can be used unchanged.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from hybridgen.core import trees
from hybridgen.core.errors import UserError

KINDS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear")

MOMENTUM = 0.95  # Nesterov momentum of Muon
RMS = 0.2  # of Muon's updates: about that of AdamW's

# path pattern -> (input axes, output axes) of Muon's matrices, counted from the end; other axes stack matrices (layers;
# queries, keys and values; gate and value). Queries, keys and values are orthogonalized separately: as one matrix, the
# largest of the three would set the scale of all. Parameters without an entry use AdamW: embedding tables, heads, and
# the first and last layer of a network, which are no maps between hidden states; and modulations, whose input is one
# vector of time and class: a batch has few directions of it, and Muon would scale up the noise in the others.
MATRICES: tuple[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    (r"attention/(qkv|kv|q)/kernel$", ((-4,), (-3, -1))),  # d h g+2 k
    (r"attention/out/kernel$", ((-4, -3, -2), (-1,))),  # h g k d
    (r"mlp/up/kernel$", ((-3,), (-1,))),  # d 1|2 f
    (r"mlp/down/kernel$", ((-2,), (-1,))),  # f d
    (r"conv_(\d+|up_\d+|down_\d+)/kernel$", ((-4, -3, -2), (-1,))),  # rows columns c c
    (r"(text_project|plan_pool|skip|(up|down)_\d+)/kernel$", ((-2,), (-1,))),
)


def build(config: Mapping, steps: int, params: Mapping) -> optax.GradientTransformation:
    """Optimizer for `params` (a nested dict, of which only the paths are used) over `steps` updates.

    Raises UserError for a pattern that matches nothing, and for a parameter in two groups.
    """
    rest = {name: config[name] for name in config if name != "groups"}
    own = dict(config.get("groups", {}))
    if "rest" in own:
        raise UserError("optim.groups.rest: 'rest' names the parameters without a group; set their options in optim")
    match = {name: _pattern(f"groups.{name}.match", group) for name, group in own.items()}
    groups = {"rest": rest} | {name: rest | dict(group) for name, group in own.items()}
    decay_on = {
        name: _pattern("decay_on" if name == "rest" else f"groups.{name}.decay_on", group)
        for name, group in groups.items()
    }
    labels = {path: _label(path, match) for path in trees.flatten(params)}
    if labels:  # an assembled model has no trained parameters
        _check_use(groups, labels, decay_on)
    chains = {name: _chain(group, steps, decay_on[name]) for name, group in groups.items()}
    return optax.multi_transform(chains, trees.unflatten(labels))


def _pattern(key: str, group: Mapping) -> re.Pattern:
    """The compiled pattern of a group's entry; `key`: its path in `optim`. Raises UserError if it is invalid."""
    text = group.get(key.rpartition(".")[2])
    if not isinstance(text, str):
        raise UserError(f"optim.{key} is {text!r}, but must be a pattern of parameter paths")
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"optim.{key} {text!r} is not a regular expression: {error}") from None


def _label(path: str, match: Mapping[str, re.Pattern]) -> str:
    found = [name for name, pattern in match.items() if pattern.search(path)]
    if len(found) > 1:
        raise UserError(f"optim.groups: parameter {path!r} matches two groups, {' and '.join(found)}")
    return found[0] if found else "rest"


def _check_use(groups: Mapping, labels: Mapping[str, str], decay_on: Mapping[str, re.Pattern]) -> None:
    """Raises UserError for a group without parameters, and for a `decay_on` that matches no parameter of its groups."""
    some = f"an example of a path is {next(iter(labels))!r}"
    for name, group in groups.items():
        if name not in ("rest", *labels.values()):
            raise UserError(f"optim.groups.{name}.match {group['match']!r} matches no trained parameter; {some}")
    users: dict[re.Pattern, list[str]] = {}  # by pattern: a group of norms may inherit it and decay nothing
    for name, pattern in decay_on.items():
        if groups[name]["decay"] and name in labels.values():
            users.setdefault(pattern, []).append(name)
    for pattern, names in users.items():
        if not any(pattern.search(path) for path, name in labels.items() if name in names):
            where = "decay_on" if "rest" in names else f"groups.{names[0]}.decay_on"
            raise UserError(f"optim.{where} {pattern.pattern!r} matches no trained parameter to decay; {some}")


def schedule(group: Mapping, steps: int) -> optax.Schedule:
    """Linear warmup to `lr` over `warmup` updates, then constant, or cosine or linear decay to `final` * lr."""
    lr, warmup, final = group["lr"], min(group["warmup"], steps), group["final"]
    rest = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(lr, lr * final, rest),
    }
    if group["schedule"] not in after:
        raise UserError(f"optim.schedule {group['schedule']!r} is not one of {', '.join(SCHEDULES)}")
    # the first update has count 0: warmup starts at lr / warmup, not at zero
    rise = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after[group["schedule"]]()], [warmup])


def _chain(group: Mapping, steps: int, decay_on: re.Pattern) -> optax.GradientTransformation:
    rate = schedule(group, steps)

    def decays(params: Mapping) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(decay_on.search(_name(path))), params)

    if group["kind"] == "adamw":
        rule = _adamw(group, rate, decays)
    elif group["kind"] == "adafactor":
        rule = optax.adafactor(rate)
        if group["decay"]:  # optax's own decay is not multiplied by the rate: 0.1 would be a tenth per step
            rule = optax.chain(rule, optax.add_decayed_weights(lambda count: -group["decay"] * rate(count), decays))
    elif group["kind"] == "muon":
        rule = _muon(group, rate, decays)
    else:
        raise UserError(f"optim.kind {group['kind']!r} is not one of {', '.join(KINDS)}")
    clip = [optax.clip_by_global_norm(group["clip"])] if group["clip"] else []
    return optax.chain(*clip, rule)


def _adamw(group: Mapping, rate: optax.Schedule, decays: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, group["b1"], group["b2"], group["eps"], weight_decay=group["decay"], mask=decays)


def _muon(group: Mapping, rate: optax.Schedule, decays: Any) -> optax.GradientTransformation:
    """The Muon part of `optax.contrib.muon` with our AdamW: the other part there is NAdam, without decay by path."""

    def axes(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(_name(path)), tree)

    def shaped(updates: Any) -> Any:
        def one(path: tuple, update: jax.Array) -> jax.Array:
            sides = (math.prod(update.shape[axis] for axis in side) for side in _matrix(_name(path)))
            return RMS * max(sides) ** 0.5 * update  # an orthogonal matrix m x n has the RMS max(m, n)^-0.5

        return jax.tree_util.tree_map_with_path(one, updates)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _matrix(_name(path)) else "adamw", params)

    matrices = optax.chain(
        scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: shaped(updates)),
        optax.add_decayed_weights(group["decay"], decays),
        optax.scale_by_learning_rate(rate),
    )
    return optax.multi_transform({"muon": matrices, "adamw": _adamw(group, rate, decays)}, labels)


def _matrix(path: str) -> MuonDimensionNumbers | None:
    """The axes of a parameter that form Muon's matrix; None if it uses AdamW."""
    return next((MuonDimensionNumbers(*axes) for pattern, axes in MATRICES if re.search(pattern, path)), None)


def _name(path: tuple) -> str:
    parts = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return "/".join(parts)


def pack(state: Any) -> dict:
    """Optimizer state -> nested dict of its arrays, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return trees.unflatten({_name(path): leaf for path, leaf in leaves})


def unpack(rule: optax.GradientTransformation, params: Mapping, packed: Mapping) -> Any:
    """Inverse of `pack`, for the same optimizer and parameters."""
    shape = jax.eval_shape(rule.init, params)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shape)
    flat = trees.flatten(packed)
    return jax.tree_util.tree_unflatten(structure, [flat[_name(path)] for path, _ in leaves])


def ema(average: Mapping, params: Mapping, decay: float, count: jax.Array) -> Any:
    """EMA of parameters after `count` = n good steps. The decay is at most (1 + n) / (10 + n), for a short start."""
    n = count.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda a, p: a + (1 - rate).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)
