"""Reads an official config key by key: unknown keys and unsupported values raise UserError with the key's name.

with Options(config, "config.json") as options:
    width = options.count("n_embed")
    options.only("double_z", False)              # any other value: UserError
    options.skip("dropout")                      # has no effect on inference
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.tensors import shown

MOST = 2**24  # the largest integer option: no layer has more channels or codes
REQUIRED = object()


class Options:
    """The keys of a config; leaving the `with` block raises UserError for a key that was not read or skipped."""

    def __init__(self, config: Any, where: str = "config"):
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise UserError(f"{where} is not a mapping from option names to values")
        self.config, self.where, self.taken = config, where, set()

    def __enter__(self) -> "Options":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        unknown = sorted(set(self.config) - self.taken)
        if kind is None and unknown:
            raise UserError(f"{self.where} has the key {shown(unknown[0])}, which is not supported")

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key, unchecked; `default` if it is missing, or UserError without one."""
        self.taken.add(name)
        if name in self.config:
            return self.config[name]
        if default is REQUIRED:
            raise UserError(f"{self.where} lacks the key {name!r}")
        return default

    def count(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        """An integer of at least `least`."""
        return self._count(name, self.take(name, default), least)

    def counts(self, name: str, default: Any = REQUIRED, least: int = 1, some: bool = True) -> tuple[int, ...]:
        """A list of integers of at least `least`; with `some` it must not be empty."""
        values = self.take(name, default)
        if not isinstance(values, list | tuple) or len(values) > 64 or (some and not values):
            raise UserError(f"{self.where}: {name} {shown(values)} is not a list of integers")
        return tuple(self._count(name, value, least) for value in values)

    def _count(self, name: str, value: Any, least: int) -> int:
        if type(value) is not int or not least <= value <= MOST:
            raise UserError(f"{self.where}: {name} {shown(value)} is not an integer within {least} and {MOST}")
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
        """One of the supported values `allowed`; the first one is the default."""
        value = self.take(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            known = ", ".join(map(repr, allowed))
            raise UserError(f"{self.where}: {name} {shown(value)} is not supported, only {known}")
        return value

    def skip(self, *names: str) -> None:
        """Ignores keys that do not change what the model computes."""
        self.taken.update(names)
