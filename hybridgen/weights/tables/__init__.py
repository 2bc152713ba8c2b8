"""One file a source of weights: what its config means, and the rules that name its tensors.

A table is a module with `ABOUT` (an `About`) and `plan(config, shapes) -> Plan`; it is found by its file's name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybridgen.core.errors import UserError
from hybridgen.weights.rules import Rule


class About(NamedTuple):
    """What `--list` shows. presets: configs of published checkpoints that come without one, by name."""

    what: str
    licence: str
    sizes: str
    presets: Mapping[str, Mapping[str, Any]] = {}
    roots: tuple[str, ...] = ()  # the first of these that names begin with is cut off, all beside it left


class Plan(NamedTuple):
    """What a config means here.

    inputs: shape of one row of what the family takes, `{"image": (H, W, 3)}`. dropped: patterns of tensors that the
    model has no use for. sample: options of drawing, as the official script has them.
    """

    family: str
    model: dict[str, Any]
    rules: tuple[Rule, ...]
    inputs: dict[str, tuple[int, ...]]
    dropped: tuple[str, ...] = ()
    sample: Mapping[str, Any] = {}


class Source(NamedTuple):
    """A table by its name. `plan(config, shapes)`: shapes of the official tensors by name."""

    name: str
    about: About
    plan: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Plan]


def names() -> list[str]:
    """The sources there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Source:
    """The source `name`, or of a variant of it ("sd_kl_vae_flux"): the longest known beginning. Raises UserError."""
    known = longest(name, names())
    if known is None:
        raise UserError(f"unknown source {name!r}; known are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{known}")
    return Source(known, module.ABOUT, module.plan)


def longest(name: str, known: list[str]) -> str | None:
    """The longest of `known` that `name` begins with."""
    return max((one for one in known if name.startswith(one)), key=len, default=None)


def rooted(tensors: Mapping[str, Any], roots: tuple[str, ...]) -> Mapping[str, Any]:
    """The tensors below the first of `roots` that there is, without it; all of them if there is none."""
    for root in roots:
        begin = f"{root}."
        found = {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}
        if found:
            return found
    return tensors
