"""Shared by the replays of text models: recorded ids and masks, and methods of the model, compiled once.

Letters: b texts, l positions.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case

FAINT = np.float32(0.01)  # factor of the embeddings in the outputs named "faint"


class Texts:
    """The model with compiled methods, and the recorded ids."""

    def __init__(self, case: Case):
        self.case, (_, part) = case, case.imported
        self.model, self.params = part.model, part.params
        self.compiled: dict[Any, Any] = {}

    def apply(self, method: str, *args: Any, params: Any = None, **options: Any) -> jax.Array:
        """A method of the model, compiled once; `params` replaces the imported parameters."""
        run = jax.jit(lambda params, *args: self.model.apply({"params": params}, *args, method=method, **options))
        run = self.compiled.setdefault((method, *options.items()), run)
        return run(self.params if params is None else params, *args)

    def ids(self, vocab: int, name: str = "in_ids") -> np.ndarray:
        """Recorded ids `[b, l]`. Raises UserError for one outside the vocabulary."""
        ids = self.case.takes(name)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab:
            raise UserError(f"{self.case.folder / 'io.npz'}: {name} must be b l integers within 0 and {vocab - 1}")
        return ids.astype(np.int32)

    def mask(self, name: str) -> np.ndarray:
        """A recorded mask `[b, l]`."""
        return self.case.takes(name).astype(bool)

    def layers(self, states: Callable[[], jax.Array]) -> None:
        """Compares the outputs of single layers; "out_hidden1" is that of the first."""
        for i in range(1, self.model.depth + 1):
            self.case.gives(f"out_hidden{i}", lambda i=i: states()[i - 1])
