"""What a command is doing, on stderr: bars on a terminal, otherwise a line after a second and then every few seconds.

    with doing("reading runs/prior"):
        ...
    for image in progress(images, "caching train"):
        ...

What takes less than a second prints nothing. `--quiet` (see `show`) prints nothing at all, and no lines of training.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

T = TypeVar("T")

FIRST, EVERY = 1.0, 10.0  # seconds before the first line and between two lines
_shown = True


def show(enabled: bool) -> None:
    """Whether this process prints its progress from now on."""
    global _shown
    _shown = enabled


def shown() -> bool:
    """Whether this process prints its progress: not with `--quiet`, and only process 0 of several."""
    import jax  # slow to import: the parser of every command imports this file

    return _shown and jax.process_index() == 0


class Bar:
    """A line of a terminal that is overwritten in place."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def draw(self, text: str) -> None:
        """Shows `text`, cut to the width of the terminal."""
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r{text[:width]}\x1b[K")
        self.stream.flush()

    def clear(self) -> None:
        """Removes the text."""
        self.stream.write("\r\x1b[K")
        self.stream.flush()


@contextlib.contextmanager
def ticking(action: Callable[[], None], first: float, every: float) -> Iterator[None]:
    """Calls `action` in a thread after `first` seconds and then every `every` seconds, while the body runs."""
    ended = threading.Event()

    def work() -> None:
        pause = first
        while not ended.wait(pause):
            action()
            pause = every

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def doing(what: str, first: float = FIRST, every: float = EVERY) -> Iterator[None]:
    """Says on stderr that `what` is being done, after `first` seconds, and for how long, every `every` seconds."""
    if not shown():
        yield
        return
    start, stream = time.perf_counter(), sys.stderr
    bar = Bar(stream) if stream.isatty() else None

    def say() -> None:
        seconds = time.perf_counter() - start
        if bar:
            bar.draw(f"{what}: {seconds:.0f} s")
        else:
            print(f"{what}: {seconds:.0f} s", file=stream, flush=True)

    with ticking(say, first, 1.0 if bar else every):
        yield
    if bar:
        bar.clear()


def progress(items: Iterable[T] | int, label: str, total: int | None = None, seconds: float = EVERY) -> Iterator[T]:
    """Iterates over `items` (or range(items)) and shows on stderr how many are done, with the time remaining.

    On a terminal it is a bar; otherwise a line is printed after a second and every `seconds`, also within an item.
    """
    from tqdm import tqdm

    given: Any = range(items) if isinstance(items, int) else items
    if total is None and hasattr(given, "__len__"):
        total = len(given)
    if not shown():
        yield from given
        return
    start, stream, done = time.perf_counter(), sys.stderr, 0
    if stream.isatty():
        yield from tqdm(given, desc=label, total=total, leave=False)
        return

    def say() -> None:
        text = tqdm.format_meter(done, total, time.perf_counter() - start, prefix=label, ncols=100)
        print(text, file=stream, flush=True)

    with ticking(say, min(FIRST, seconds), seconds):
        for item in given:
            yield item
            done += 1
