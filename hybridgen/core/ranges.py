"""Ranges of options: which values an option may have, declared as data and checked before anything is built.

    RANGES = {"width": count(1, 2**20), "dropout": share(), "remat": one_of("none", "full"), "process.steps": count(1)}
    check("model.", RANGES, {"process": {"steps": 0}})    # UserError: model.process.steps 0 is not within 1 and ...

A name with dots is an option of a group. Options without a range are not checked here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridgen.core import numbers
from hybridgen.core.errors import UserError

MOST = 2**32 - 1  # the largest count, as that of a seed
LARGE = 1e12  # the largest number that is meant as "no limit"


class Range(NamedTuple):
    """The values of an option: numbers within `low` and `high`, one of `words`, or, without either, true or false.

    whole: integers only. none: it may be None. least, most: it is a tuple of so many such values; alone: it may be a
    single value too.
    """

    low: float = 0
    high: float = 0
    whole: bool = False
    words: tuple[str, ...] = ()
    none: bool = False
    least: int = 0
    most: int = 0
    alone: bool = True

    def wrong(self, value: Any) -> str:
        """What is wrong with a value, such as "-1 is not within 0 and 9"; "" if it is allowed."""
        if value is None and self.none:
            return ""
        several = isinstance(value, tuple | list)
        if several != bool(self.most) and (several or not self.alone):
            return f"{_short(value)} is not a tuple of {self._count}" if self.most else f"{_short(value)} is not {self}"
        if several and not self.least <= len(value) <= self.most:
            return f"{_short(value)} is not a tuple of {self._count}"
        for one in value if several else (value,):
            if not self._allows(one):
                fraction = self.whole and numbers.is_number(one) and not numbers.is_number(one, whole=True)
                return f"{_short(one)} is not {'a whole number ' * fraction}{self}"
        return ""

    def _allows(self, value: Any) -> bool:
        if self.words:
            return isinstance(value, str) and value in self.words
        if self.low == self.high:
            return isinstance(value, bool)
        return numbers.is_number(value, self.whole) and self.low <= value <= self.high

    @property
    def _count(self) -> str:
        ends = f"{self.least} to {self.most}" if self.least < self.most else str(self.most)
        return f"{ends} numbers"

    def __str__(self) -> str:
        """The allowed values in words."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        if self.low == self.high:
            return "true or false"
        return f"within {self.low} and {self.high}"


def count(low: int = 0, high: int = MOST, **more: Any) -> Range:
    """A whole number."""
    return Range(low, high, whole=True, **more)


def number(low: float = 0.0, high: float = LARGE, **more: Any) -> Range:
    """A number that may be a fraction."""
    return Range(low, high, **more)


def share(**more: Any) -> Range:
    """A number from 0 to 1: a share, a rate or a probability."""
    return Range(0.0, 1.0, **more)


def one_of(*words: str) -> Range:
    """One of some words."""
    return Range(words=words)


FLAG = Range()  # true or false


def check(where: str, ranges: Mapping[str, Range], options: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError, which begins with `where` and the option's name, for an option that is out of its range."""
    groups = {name.rpartition(".")[0] for name in ranges if "." in name}
    for name, value in options.items():
        path = f"{prefix}{name}"
        if path in ranges:
            if fault := ranges[path].wrong(value):
                raise UserError(f"{where}{path} {fault}")
        elif path in groups:
            if not isinstance(value, Mapping) and not hasattr(value, "items"):
                raise UserError(f"{where}{path} {_short(value)} is not a group of options")
            check(where, ranges, value, f"{path}.")


def _short(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else ascii(text)
