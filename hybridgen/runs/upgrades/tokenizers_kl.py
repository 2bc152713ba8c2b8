"""Old options of `tokenizers.kl`, where the weight of the squared error was called `l2`."""

from collections.abc import Mapping
from typing import Any


def upgrade(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Old options -> (family, its options); None if they are current."""
    if "l2" not in model:
        return None
    rest = {name: value for name, value in model.items() if name != "l2"}
    return "tokenizers.kl", rest | {"mse": model["l2"]}
