"""Data sources outside of this package: how they are built, and what is wrong with one in a line."""

import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.data import storage

METHODS = {"__len__": "", "__getitem__": "index", "name": "index"}


class Own:
    """A source outside of this package, with its name in a config and the side of its images; all else is its own."""

    def __init__(self, source: Any, kind: str, resolution: int):
        self.source, self.kind, self.resolution = source, kind, resolution

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy look for these before `source` is set
            raise AttributeError(name)
        return getattr(self.source, name)


def make(made: Callable, kind: str, split: str, resolution: int, options: Mapping, where: str) -> Own:
    """The source that `made`, the class named `kind`, makes for a split. Raises UserError if it cannot be used."""
    try:
        source = made(split=split, resolution=resolution, **options)
        missing = [name for name in METHODS if not callable(getattr(source, name, None))]
        length = 0 if missing else len(source)
    except UserError:
        raise
    except Exception as error:
        if storage.passing(error):
            raise
        raise UserError(f"{where} {kind!r} fails for the split {split!r}: {described(error)}") from error
    if missing:
        raise UserError(f"{where} {kind!r} has no method {missing[0]}({METHODS[missing[0]]})")
    if not length:
        raise UserError(f"{where} {kind!r} has no records in the split {split!r}")
    names = getattr(source, "class_names", ())
    if isinstance(names, str) or not all(hasattr(names, method) for method in ("__len__", "__iter__")):
        raise UserError(f"{where} {kind!r}: class_names is {names!r}, but must be a list of names")
    return Own(source, kind, resolution)


def described(error: Exception) -> str:
    """An exception in one line, with the line of code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({os.path.basename(frame.filename)} line {frame.lineno})" for frame in last)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
