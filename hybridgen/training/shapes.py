"""Training on images of several shapes (data/sources/buckets.py).

XLA compiles one executable per shape. All are compiled before the first step, so that no later step waits for a
compilation, on every host.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from hybridgen.data import sources
from hybridgen.models.contract import Shape


class Shaped:
    """The training step and evaluation, jitted programs of (state, batch, parts), compiled for all shapes.

    trained, seen: the shapes of training and of evaluation. beat: called before each compilation; say: prints a line.
    """

    def __init__(self, programs: tuple, trained: list[Shape], seen: list[Shape], beat: Callable, say: Callable):
        self._programs, self._shapes, self._beat, self._say = programs, (trained, seen), beat, say
        self._compiled: dict[tuple[int, Shape], Any] = {}

    def step(self, state: dict, batch: dict, parts: Any) -> tuple[dict, dict]:
        """One training step; call `compile` before."""
        return self._compiled[0, batch["image"].shape[1:3]](state, batch, parts)

    def evaluate(self, state: dict, batch: dict, parts: Any) -> dict:
        """Metrics of an evaluation batch; call `compile` before."""
        return self._compiled[1, batch["image"].shape[1:3]](state, batch, parts)

    def compile(self, state: dict, batch: dict, parts: Any) -> None:
        """Compiles all programs, for arguments like those of a step."""
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
        self._say(f"compiled the training step for {len(trained)} shapes ({sizes}){also} in {seconds:.0f} s")


def shaped(
    config: Any, source: Any, programs: tuple[Any, Any], beat: Callable, say: Callable
) -> tuple[Callable, Callable, Callable]:
    """(training step, evaluation, function that compiles the step before the first one) for all shapes of the data.

    programs: the first two, jitted; they are unchanged if the images have one shape.
    """
    if not hasattr(source, "occurring"):
        step, evaluate = programs
        return step, evaluate, lambda *arguments: step.lower(*arguments).compile()  # a call then finds this program
    seen = sources.build(config.data, "validation").occurring(config.batch, False) if config.eval.every else []
    both = Shaped(programs, source.occurring(config.batch, True), seen, beat, say)
    return both.step, both.evaluate, both.compile
