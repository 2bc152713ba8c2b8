"""Profiler traces of a few steps: open the folder with TensorBoard or xprof."""

from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """Traces `steps` steps from step `first` on into `folder`; call `at` before each step. Exit ends the trace."""

    def __init__(self, folder: Path, first: int, steps: int):
        self.folder, self.first, self.last = folder, first, first + steps
        self._open = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, before: Any) -> None:
        """Starts or ends the trace, if due; `before`: arrays of the previous step, which belongs into the trace."""
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
