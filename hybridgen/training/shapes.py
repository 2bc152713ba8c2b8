"""Training on pictures of several shapes (data/sources/buckets.py).

There is one executable a shape, and all are compiled before the first step.

XLA compiles for shapes: a step that meets a new one would wait for a compilation, amid the run and on every host.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from hybridgen.data import sources
from hybridgen.models.contract import Shape


class Shaped:
    """Train step and evaluation, jitted programs of (state, batch, parts); the first step compiles both for all shapes.

    trained, seen: the shapes that they meet. beat: called before each compilation; say: told what was compiled.
    """

    def __init__(self, programs: tuple, trained: list[Shape], seen: list[Shape], beat: Callable, say: Callable):
        self._programs, self._shapes, self._beat, self._say = programs, (trained, seen), beat, say
        self._compiled: dict[tuple[int, Shape], Any] = {}

    def step(self, state: dict, batch: dict, parts: Any) -> tuple[dict, dict]:
        """A train step."""
        if not self._compiled:
            self._compile(state, batch, parts)
        return self._compiled[0, batch["image"].shape[1:3]](state, batch, parts)

    def evaluate(self, state: dict, batch: dict, parts: Any) -> dict:
        """Metrics of a batch of an evaluation, which is after a step."""
        return self._compiled[1, batch["image"].shape[1:3]](state, batch, parts)

    def _compile(self, state: dict, batch: dict, parts: Any) -> None:
        started, image = time.monotonic(), batch["image"]
        valid = jax.ShapeDtypeStruct(batch["id"].shape, bool, sharding=batch["id"].sharding)
        for number, given in enumerate((batch, batch | {"valid": valid})):
            for shape in self._shapes[number]:
                self._beat()
                spec = jax.ShapeDtypeStruct((len(image), *shape, 3), image.dtype, sharding=image.sharding)
                lowered = self._programs[number].lower(state, given | {"image": spec}, parts)
                self._compiled[number, shape] = lowered.compile()
        trained, seen = self._shapes
        sizes = ", ".join("{} x {}".format(*shape) for shape in trained)
        also = f" and the evaluation for {len(seen)}" * bool(seen)
        seconds = time.monotonic() - started
        self._say(f"compiled the step for {len(trained)} shapes ({sizes}){also} in {seconds:.0f} s")


def shaped(config: Any, source: Any, programs: tuple[Any, Any], beat: Callable, say: Callable) -> tuple[Any, Any]:
    """`programs` (train step, evaluation) for all shapes of the data; as they are where there is only one."""
    if not hasattr(source, "occurring"):
        return programs
    seen = sources.build(config.data, "validation").occurring(config.batch, False) if config.eval.every else []
    both = Shaped(programs, source.occurring(config.batch, True), seen, beat, say)
    return both.step, both.evaluate
