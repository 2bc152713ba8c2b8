"""The model of an official config, and what official weights look like that do not fit it."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.models.contract import find
from hybridgen.weights import nesting, rules, tables

SHOWN = 4  # presets in a message
STRANGE = 0.2  # largest share of names that a source may not know: its configs differ in the tensors that they have


class Target(NamedTuple):
    """A plan with its model; `shapes`: {path: ShapeDtypeStruct} of all arrays, params and extra."""

    plan: tables.Plan
    family: ModuleType
    model: Any
    shapes: dict[str, Any]

    @property
    def official(self) -> dict[str, Any]:
        """The shapes of the arrays that official tensors provide; others, such as usage counts, start at zero."""
        made = [path for path in self.shapes if any(rule.fields(path) is not None for rule in self.plan.rules)]
        return {path: spec for path, spec in self.shapes.items() if path in made or path.startswith("params/")}


def target(plan: tables.Plan) -> Target:
    """The model of a plan, without arrays. Raises UserError for an invalid config."""
    family = find(plan.family)
    specs = {name: jax.ShapeDtypeStruct((1, *shape), np.float32) for name, shape in plan.inputs.items()}
    model = contract.model_of(family, plan.model)
    try:
        shapes = jax.eval_shape(lambda key: family.init(model, key, specs, {}), jax.random.key(0))
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the config does not describe a model: {type(error).__name__}: {str(error)[:200]}") from None
    return Target(plan, family, model, trees.flatten(shapes))


def fitted(source: tables.Source, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Target:
    """The model of a config that fits official tensors, of which nothing is read. Raises UserError for what differs."""
    goal = target(source.plan(config, shapes_of(tensors)))
    rules.check(tensors, goal.plan.rules, goal.official, goal.plan.dropped)
    return goal


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def advice(source: tables.Source, weights: Mapping[str, Any]) -> str:
    """What weights look like that do not fit a config of `source`: "; they look like ...", or "" if like nothing known.

    That is another preset of the source if names and shapes fit it; otherwise the source that has most of the names.
    """
    presets = [name for name, config in source.about.presets.items() if _fits(source, config, weights)]
    if presets:
        listed = " or ".join(presets[:SHOWN])
        return f"; the weights look like the preset {listed}: give --config {presets[0]}"
    strange = {name: _strange(tables.find(name), weights) for name in tables.names()}  # shares
    least = min(strange.values())
    if least > STRANGE or strange[source.name] == least:
        return ""
    return f"; the weights look like those of the source {' or '.join(x for x in strange if strange[x] == least)}"


def _fits(source: tables.Source, config: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    try:
        fitted(source, config, nesting.model_tensors(weights, source.about.roots))
    except UserError:
        return False
    return True


def _strange(source: tables.Source, weights: Mapping[str, Any]) -> float:
    """The share of names that no rule of the source matches, whatever the preset."""
    tensors = nesting.model_tensors(weights, source.about.roots)
    names, shapes = set(tensors), shapes_of(tensors)
    for config in source.about.presets.values():
        try:
            plan = source.plan(config, shapes)
        except UserError:
            continue
        names -= {name for name in names if any(rule.read(name) for rule in plan.rules)}
        names -= rules.dropped_names(names, plan.dropped)
    return len(names) / max(len(tensors), 1)
