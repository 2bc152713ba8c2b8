"""The interface of a data source. The docstring of the package lists its optional methods."""

from collections.abc import Mapping
from typing import Any, Protocol


class Source(Protocol):
    """Records of one split: dicts with `image` H W 3 uint8, `text`, and others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def name(self, index: int) -> str:
        """The name of a record in messages."""
