"""The interface of a data source, and its errors. The docstring of the package lists its optional methods."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from hybridgen.core.errors import UserError


class Source(Protocol):
    """Records of one split: dicts with `image` H W 3 uint8, `text`, and others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def name(self, index: int) -> str:
        """The name of a record in messages."""


class BrokenRecord(Exception):
    """A record cannot be read; the message names it and the reason."""


def known(what: str, given: Iterable[str], names: Collection[str]) -> None:
    """Raises UserError for the first of `given` that is not in `names`, with the nearest known name."""
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0)[0]
            raise UserError(f"unknown {what} {name!r}; the nearest known one is {near!r} (known: {', '.join(names)})")
