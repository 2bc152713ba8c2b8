"""Progress of long work with the time that is left: a bar on a terminal, otherwise a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def progress(items: Iterable[T] | int, label: str, total: int | None = None, seconds: float = 15) -> Iterator[T]:
    """Goes through `items` (or range(items)), showing progress with ETA: a bar on a terminal, else a line now and then.

    On a plain log there is a line every `seconds`, so that short work prints nothing.
    """
    from tqdm import tqdm

    if isinstance(items, int):
        items = range(items)  # type: ignore[assignment]
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, leave=False)
        return
    start = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown >= seconds and jax.process_index() == 0:
            shown = now
            print(tqdm.format_meter(done, total, now - start, prefix=label, ncols=100), file=sys.stderr, flush=True)
