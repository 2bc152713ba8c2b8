"""Traces of a few steps, for a profiler: open the folder with TensorBoard or xprof."""

from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """A trace of `steps` steps from step `first` on, in `folder`; `at` goes before each step. Leaving it ends it."""

    def __init__(self, folder: Path, first: int, steps: int):
        self.folder, self.first, self.last = folder, first, first + steps
        self._open = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, before: Any) -> None:
        """Starts or ends the trace, if it is time; `before`: arrays of the step before, which belongs into it."""
        if self.first <= step < self.last and not self._open:
            jax.profiler.start_trace(str(self.folder))
            self._open = True
        elif step >= self.last and self._open:
            jax.block_until_ready(before)
            self._stop()

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
