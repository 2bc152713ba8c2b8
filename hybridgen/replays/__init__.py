"""Replays: recompute the recorded outputs of each official system. One file per system, found by its name.

    def replay(case):
        image = case.takes("image")                           # an input
        case.gives("indices", lambda: ...)                    # an output: computed and compared if it was recorded

A function lists all outputs of its system; a recorded array that is neither an input nor an output is an error.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part
from hybridgen.runs import importing
from hybridgen.weights import tables
from hybridgen.weights.files import open_weights

BOUND = 2e-5


def names() -> list[str]:
    """The systems whose recordings can be replayed."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(source: str) -> tuple[str, Callable[["Case"], None]]:
    """(system, its replay) of a name with any suffix. Raises UserError for an unknown one."""
    system = tables.longest(source, names())
    if system is None:
        raise UserError(f"unknown source {source!r}; it must be one of {', '.join(names())}")
    return system, importlib.import_module(f"{__name__}.{system}").replay


class Case:
    """One fixture: its arrays, its model, and the comparisons so far."""

    def __init__(self, system: str, folder: Path, config: dict, arrays: Mapping[str, np.ndarray], report: Any = print):
        self.system, self.folder, self.config, self.arrays, self.report = system, folder, config, arrays, report
        self.taken: set[str] = set()
        self.verdicts: dict[str, bool] = {}

    @cached_property
    def imported(self) -> tuple[importing.Target, Part]:
        """The model with the official weights."""
        source = tables.find(self.system)
        goal, arrays = importing.load(source, self.config, open_weights(self.folder / "weights.safetensors"))
        return goal, jax.tree.map(jax.numpy.asarray, importing.part(goal, arrays))

    def has(self, name: str) -> bool:
        return name in self.arrays

    def takes(self, name: str) -> np.ndarray:
        """An input. Raises UserError if it was not recorded."""
        if name not in self.arrays:
            raise UserError(f"{self.folder / 'io.npz'} lacks the input {name!r}")
        self.taken.add(name)
        return self.arrays[name]

    def gives(self, name: str, compute: Callable[[], Any], within: float | None = None) -> None:
        """An output: computed and compared only if it was recorded. within: an absolute bound, for random samples."""
        if name not in self.arrays:
            return
        recorded, ours = self.arrays[name], np.asarray(compute())
        if recorded.dtype.kind in "iub" and ours.size == recorded.size:
            ours = ours.reshape(recorded.shape)  # indices come flat or as a grid
        scale = float(np.abs(recorded.astype(np.float64)).max(initial=0.0))
        shape = "x".join(map(str, recorded.shape)) or "scalar"
        if ours.shape != recorded.shape:
            self.verdicts[name] = False
            self.report(f"{name:24s} {shape:14s} computed shape is {'x'.join(map(str, ours.shape))}  FAILED")
            return
        exact = recorded.dtype.kind in "iub"
        error = float(np.abs(ours.astype(np.float64) - recorded.astype(np.float64)).max(initial=0.0))
        bound = 0.0 if exact else BOUND * max(1.0, scale) if within is None else within
        self.verdicts[name] = error <= bound  # False if either is NaN
        verdict = "ok" if self.verdicts[name] else f"FAILED: at most {bound:.1e}"
        self.report(f"{name:24s} {shape:14s} {error:.1e}  {scale:.3g}  {verdict}")

    def close(self) -> bool:
        """Whether all outputs agree. Raises UserError for an array that was not used, or if there is no output."""
        for name in self.arrays:
            if name not in self.taken and name not in self.verdicts:
                raise UserError(
                    f"{self.folder / 'io.npz'} has {name!r}, which the replay of {self.system} does not use"
                )
        if not self.verdicts:
            raise UserError(f"{self.folder / 'io.npz'} has no output to compare")
        return all(self.verdicts.values())


def rows_last(x: np.ndarray) -> np.ndarray:
    """Channels last: `[b, c, h, w] -> [b, h, w, c]`."""
    return np.moveaxis(x, 1, -1)


def rows_first(x: Any) -> np.ndarray:
    """Channels first: `[b, h, w, c] -> [b, c, h, w]`."""
    return np.moveaxis(np.asarray(x), -1, 1)
