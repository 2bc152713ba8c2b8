"""Options of `tokenizers.kl` while the weight of the squared error was `l2`."""

from collections.abc import Mapping
from typing import Any


def upgrade(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(family, its options) that old ones mean, or None if they are new ones."""
    if "l2" not in model:
        return None
    rest = {name: value for name, value in model.items() if name != "l2"}
    return "tokenizers.kl", rest | {"mse": model["l2"]}
