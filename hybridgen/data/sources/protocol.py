"""The type of a source of pictures: what each of them has. The head of the package lists what else one may have."""

from collections.abc import Mapping
from typing import Any, Protocol


class Source(Protocol):
    """Records of one split, in any order: `image` H W 3 uint8, `text` and others by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def name(self, index: int) -> str:
        """What to call a record in a message."""
