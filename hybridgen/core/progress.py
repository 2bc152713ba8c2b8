"""Progress of long loops with the time remaining: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def progress(items: Iterable[T] | int, label: str, total: int | None = None, seconds: float = 15) -> Iterator[T]:
    """Iterates over `items` (or range(items)) and shows progress with the time remaining on stderr.

    On a terminal it is a bar; otherwise a line is printed every `seconds`, so short loops print nothing.
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
