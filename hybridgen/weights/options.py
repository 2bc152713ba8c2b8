"""An official config, read key by key: what is not understood is refused by name, and so is what is not built.

with Options(config, "config.json") as options:
    width = options.count("n_embed")
    options.only("double_z", False)              # any other value: UserError
    options.skip("dropout")                      # says nothing about inference
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.tensors import shown

MOST = 2**24  # of a count: no layer has more channels or codes
REQUIRED = object()


class Options:
    """The keys of a config; leaving the `with` block refuses those that nobody asked for."""

    def __init__(self, config: Any, where: str = "config"):
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise UserError(f"{where} is not a mapping of options by name")
        self.config, self.where, self.taken = config, where, set()

    def __enter__(self) -> "Options":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        unknown = sorted(set(self.config) - self.taken)
        if kind is None and unknown:
            raise UserError(f"{self.where} has the key {shown(unknown[0])}, which is not understood")

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value as it is."""
        self.taken.add(name)
        if name in self.config:
            return self.config[name]
        if default is REQUIRED:
            raise UserError(f"{self.where} has no {name!r}")
        return default

    def count(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        """A whole number of at least `least`."""
        return self._count(name, self.take(name, default), least)

    def counts(self, name: str, default: Any = REQUIRED, least: int = 1, some: bool = True) -> tuple[int, ...]:
        """A list of whole numbers; `some`: not an empty one."""
        values = self.take(name, default)
        if not isinstance(values, list | tuple) or len(values) > 64 or (some and not values):
            raise UserError(f"{self.where}: {name} {shown(values)} is not a list of whole numbers")
        return tuple(self._count(name, value, least) for value in values)

    def _count(self, name: str, value: Any, least: int) -> int:
        if type(value) is not int or not least <= value <= MOST:
            raise UserError(f"{self.where}: {name} {shown(value)} is not a whole number of {least} to {MOST}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise UserError(f"{self.where}: {name} {shown(value)} is not a number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} {shown(value)} is neither true nor false")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """A value of those that are built; the first one stands where the key is missing."""
        value = self.take(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            known = ", ".join(map(repr, allowed))
            raise UserError(f"{self.where}: {name} {shown(value)} is not built, only {known}")
        return value

    def skip(self, *names: str) -> None:
        """Keys that say nothing about what the model computes."""
        self.taken.update(names)
