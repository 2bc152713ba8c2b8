"""Batches of a config's data on the mesh: each process reads only the rows that its own devices hold."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hybridgen.core import placement
from hybridgen.data import pipeline, sources, storage
from hybridgen.data.sources.reading import why_broken
from hybridgen.runs.experiment import Experiment, classes_of
from hybridgen.training.logging import Writer


def specs_of(batch: dict, rows: int) -> dict:
    """ShapeDtypeStructs of the global batch, from one host's rows of it."""
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items() if name != "broken"}


def reader(experiment: Experiment) -> tuple[Callable, Callable]:
    """(`stream(source, start)`: iterator over this process's rows of each batch, `put`: rows -> arrays on the mesh)."""
    config, mesh = experiment.config, experiment.mesh
    rows = placement.local_rows(mesh, config.batch)
    taken = classes_of(experiment.family, experiment.model, experiment.parts).values()
    classes = min(filter(None, taken), default=0)

    def stream(source: Any, start: int, shuffle: bool = True) -> Any:
        options = {"batch": config.batch, "seed": config.seed, "rows": rows, "shuffle": shuffle}
        options |= {"flip": config.data.get("flip", False) and shuffle, "threads": config.data.get("threads", 1)}
        options |= {"classes": classes, "retry": config.data.get("retry", storage.RETRY)}
        return pipeline.batches(
            source, experiment.text, start=start, workers=config.data.workers if shuffle else 0, **options
        )

    return stream, functools.partial(placement.to_global, mesh=mesh)


def training(stream: Callable, put: Callable, source: Any, writer: Writer) -> Callable:
    """`batches(start)`: a context manager of an iterator over the training batches on the mesh, from `start` on.

    Batches are prefetched. Each broken record is logged once, when the first batch in which it was replaced is used.
    """

    def ready(pair: tuple[dict, list[int]]) -> tuple[dict, list[int]]:
        return put(pair[0]), pair[1]

    def taken(pairs: Iterator, start: int) -> Iterator[dict]:
        # records that are already in the log, also of an earlier start of the run
        known, seen = {text.rpartition(" (")[0] for text in writer.notes("broken_record")}, set()
        for step, (batch, broken) in enumerate(pairs, start + 1):
            for index in broken:
                text = why_broken(source, index) if index not in seen else ""
                seen.add(index)
                if text and text not in known:
                    known.add(text)
                    writer.note(step, "broken_record", f"{text} ({len(known)} so far)")
            yield batch

    @contextlib.contextmanager
    def batches(start: int) -> Iterator[Iterator[dict]]:
        host = ((batch, pipeline.take_broken(batch)) for batch in stream(source, start))
        with pipeline.prefetch(host, ready, depth=2) as pairs:
            yield taken(pairs, start)

    return batches


class Feed:
    """The training batches by number: prefetched in order, and opened again when the run jumps to another step."""

    def __init__(self, batches: Callable):
        self._batches, self._next = batches, None
        self._open = contextlib.ExitStack()
        self._iterator: Iterator[dict] = iter(())

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def at(self, step: int) -> dict:
        """Batch number `step`, on the mesh."""
        if step != self._next:
            self._open.close()
            self._iterator = self._open.enter_context(self._batches(step))
        self._next = step + 1
        return next(self._iterator)


def evaluation(compiled: Callable, experiment: Experiment, stream: Callable, put: Callable) -> Callable:
    """A function: state -> weighted means of the metrics over `config.eval.batches` validation batches."""

    def evaluate(state: dict) -> dict[str, float]:
        source = sources.build(experiment.config.data, "validation")
        totals: dict[str, float] = {}
        for batch in itertools.islice(stream(source, 0, shuffle=False), experiment.config.eval.batches):
            pipeline.take_broken(batch)
            for name, value in compiled(state, put(batch), experiment.parts).items():
                totals[name] = totals.get(name, 0.0) + float(np.asarray(value))
        weight = max(totals.pop("weight", 0.0), 1e-9)
        return {name: value / weight for name, value in totals.items()}

    return evaluate
