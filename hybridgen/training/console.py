"""What a person sees of a training run on stdout: lines, or on a terminal a bar that is drawn in place."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

from hybridgen.core import progress

EVERY, REDRAWN = 5.0, 0.5  # seconds between two lines of a log, and between two states of a bar
WAITING = 15.0  # seconds between two lines about the same work
WIDTH = 20  # of the bar, in characters

# metrics in a line of training: name -> (label, unit, format); other metrics come first
RATES = {
    "learning_rate": ("lr ", "", ".3g"),
    "step_seconds": ("", " s/step", ".3g"),
    "images_per_second": ("", " images/s", ".4g"),
    "tokens_per_second": ("", " tokens/s", ".4g"),
    "mfu": ("MFU ", "", ".1%"),
    "memory_gib": ("memory ", " GiB", ".3g"),
}
ONLY_IF_NOT_ZERO = ("skipped", "streak")


class Console:
    """Prints the lines of a run to stdout; nothing but notes with `--quiet`. Any thread may call it."""

    def __init__(self) -> None:
        self._bar = progress.Bar(sys.stdout) if sys.stdout.isatty() else None
        self._lock, self._drawn, self._last = threading.Lock(), "", -math.inf

    def line(self, text: str) -> None:
        """Prints a line; above the bar, if there is one."""
        if progress.shown():
            self._print(text)

    def note(self, text: str, here: bool = True) -> None:
        """Prints an event such as a broken record, also with `--quiet`: then, or if not `here`, on stderr."""
        if here and progress.shown():
            self._print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def waiting(self, text: str, first: float = EVERY) -> Iterator[None]:
        """Says what is being done if it takes longer than `first` seconds, and then every 15 seconds, for how long."""
        start = time.perf_counter()
        if not first:
            self.line(text)

        def say() -> None:
            self.line(f"{text}: {time.perf_counter() - start:.0f} s")

        with progress.ticking(say, first or WAITING, WAITING):
            yield

    def _print(self, text: str) -> None:
        with self._lock:
            if self._bar and self._drawn:
                self._bar.clear()
            print(text, flush=True)
            if self._bar and self._drawn:
                self._bar.draw(self._drawn)

    def due(self) -> bool:
        """Whether the state of the training was last printed some seconds ago."""
        return progress.shown() and time.perf_counter() - self._last >= (REDRAWN if self._bar else EVERY)

    def step(self, text: str, share: float, left: float | None) -> None:
        """Prints the state of the training, `share` of which is done, and the seconds `left`, if known."""
        drawn = not self._bar or self.due()
        self._last = time.perf_counter() if drawn else self._last
        remaining = "" if left is None else f"ETA {duration(left)}"
        if not self._bar:
            self.line(f"{text}  {remaining}" if remaining else text)
        elif progress.shown():
            done = round(WIDTH * share)
            with self._lock:
                words = f"[{'#' * done}{'.' * (WIDTH - done)}]", remaining, text  # a narrow terminal cuts the end
                self._drawn = " ".join(filter(None, words))
                if drawn:  # a terminal is slow
                    self._bar.draw(self._drawn)

    def finish(self) -> None:
        """Leaves the last state of the bar as a line."""
        with self._lock:
            if self._bar and self._drawn:
                self._bar.clear()
                print(self._drawn, flush=True)
            self._drawn = ""


def train_line(label: str, step: int, total: int, values: dict[str, float]) -> str:
    """A line about a step: its metrics (the loss first) and rates."""
    width = len(str(total))
    words = [f"{label} {step:>{width}}/{total} {step / max(total, 1):4.0%}"]
    hidden = [name for name in ONLY_IF_NOT_ZERO if not values.get(name)]
    hidden += [name for name in values if name.startswith("learning_rate/")]  # of groups
    metrics = [name for name in values if name not in RATES and name not in hidden]
    words += [f"{name} {short(values[name])}" for name in sorted(metrics, key=lambda name: name != "loss")]
    given = [(values[name], *about) for name, about in RATES.items() if name in values]
    words += [f"{name}{value:{form}}{unit}" for value, name, unit, form in given]
    return "  ".join(words)


def short(value: float) -> str:
    """A number with four digits."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as "1.5s", "12s", "3m05s" or "2h10m"."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
