"""One file per source of weights: how its config is read, and the rules that map its tensors.

A table is a module with `ABOUT` (an `About`) and `plan(config, shapes) -> Plan`; its file's name is the source's name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybridgen.core.errors import UserError
from hybridgen.weights.rules import Rule


class About(NamedTuple):
    """The row that `--list` shows. presets: configs of published checkpoints that have no config file, by name."""

    what: str
    licence: str
    sizes: str
    presets: Mapping[str, Mapping[str, Any]] = {}
    roots: tuple[str, ...] = ()  # the first of these prefixes that occurs selects its tensors and is removed


class Plan(NamedTuple):
    """How to build and fill a model from an official config.

    inputs: shapes of one row of the family's inputs, `{"image": (H, W, 3)}`. dropped: patterns of tensors that the
    model does not use; kept: of those that an export has nevertheless, since official code loads them. sample: sampling
    options, with the values of the official script.
    """

    family: str
    model: dict[str, Any]
    rules: tuple[Rule, ...]
    inputs: dict[str, tuple[int, ...]]
    dropped: tuple[str, ...] = ()
    sample: Mapping[str, Any] = {}
    kept: tuple[str, ...] = ()


class Source(NamedTuple):
    """A table and its name. `plan(config, shapes)` takes the shapes of the official tensors by name."""

    name: str
    about: About
    plan: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Plan]


def names() -> list[str]:
    """The names of all sources."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Source:
    """The source `name`, also of a variant ("sd_kl_vae_flux"): the longest known prefix. UserError if there is none."""
    known = longest(name, names())
    if known is None:
        raise UserError(f"unknown source {name!r}; it must be one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{known}")
    return Source(known, module.ABOUT, module.plan)


def longest(name: str, known: list[str]) -> str | None:
    """The longest prefix of `name` in `known`, or None."""
    return max((one for one in known if name.startswith(one)), key=len, default=None)
