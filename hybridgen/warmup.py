"""Programs over pictures of several shapes (data/buckets.py): one executable a shape, all compiled before one is called.

XLA compiles for shapes: a step that meets a new one would wait for a compilation, amid the run and on every host.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from hybridgen.data import sources
from hybridgen.models.parts import Shape


class Shaped:
    """`program(state, batch, parts)`, jitted, for batches of `shapes()`; the first call compiles it for all of them.

    beat: is told before each, that the run lives; say: is told which there are and how long it took.
    """

    def __init__(self, program: Any, shapes: Callable[[], list[Shape]], what: str, beat: Callable, say: Callable):
        self._program, self._shapes, self._what, self._beat, self._say = program, shapes, what, beat, say
        self._compiled: dict[Shape, Any] = {}

    def __call__(self, state: dict, batch: dict, parts: Any) -> Any:
        if not self._compiled:
            self._compile(state, batch, parts)
        return self._compiled[batch["image"].shape[1:3]](state, batch, parts)

    def _compile(self, state: dict, batch: dict, parts: Any) -> None:
        started, image = time.monotonic(), batch["image"]
        for shape in self._shapes():
            self._beat()
            spec = jax.ShapeDtypeStruct((image.shape[0], *shape, 3), image.dtype, sharding=image.sharding)
            self._compiled[shape] = self._program.lower(state, batch | {"image": spec}, parts).compile()
        sizes = ", ".join("{} x {}".format(*shape) for shape in self._compiled)
        seconds = time.monotonic() - started
        self._say(f"compiled {self._what} for each of {len(self._compiled)} shapes in {seconds:.0f} s: {sizes}")


def shaped(config: Any, source: Any, step: Any, evaluate: Any, beat: Callable, say: Callable) -> tuple[Any, Any]:
    """(train step, evaluation) for the shapes of their batches; as they are where a source has one shape only."""
    if not hasattr(source, "occurring"):
        return step, evaluate

    def seen() -> list[Shape]:
        return sources.build(config.data, "validation").occurring(config.batch, False)

    return (
        Shaped(step, lambda: source.occurring(config.batch, True), "the step", beat, say),
        Shaped(evaluate, seen, "the evaluation", beat, say),
    )
