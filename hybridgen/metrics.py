"""Metrics of a run for a person (stdout, with ETA), for programs (`metrics.jsonl`), for TensorBoard; where time went.

    with Writer(folder, start_step=0, total_steps=1000, every=50, batch=64) as writer:
        with writer.time("step"):
            state, report = step(...)
        writer.step(i, report)         # report: {name: scalar jax array}, read only when a line is due

A line of `metrics.jsonl` is {"step": N, name: number, ...}: what was measured at, or consumed by, step N. A writer that
starts at step N drops what is beyond N, so that a resumed run logs nothing twice. Only process 0 writes.
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from hybridgen.errors import UserError

T = TypeVar("T")


class Timer:
    """Wall time by bucket. Buckets may nest: the inner time is the inner bucket's, so that all sum to the whole."""

    def __init__(self) -> None:
        self._started = self._since = time.perf_counter()
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._marks: dict[tuple[str, int], float] = {}

    @contextlib.contextmanager
    def time(self, bucket: str) -> Iterator[None]:
        self._charge()
        self._open.append(bucket)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        bucket = self._open[-1] if self._open else "other"
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) + now - self._since
        self._since = now

    def mark(self, bucket: str, step: int) -> None:
        """Remembers what `bucket` holds at `step`: what comes after may be lost."""
        self._charge()
        self._marks[bucket, step] = self._seconds.get(bucket, 0.0)

    def lose(self, bucket: str, step: int) -> None:
        """What `bucket` took since it was marked at `step` (or since the start) becomes "lost"."""
        self._charge()
        lost = self._seconds.get(bucket, 0.0) - self._marks.get((bucket, step), 0.0)
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) - lost
        self._seconds["lost"] = self._seconds.get("lost", 0.0) + lost

    def report(self) -> dict[str, float]:
        """Seconds by bucket, "other" being what was in none, and "total", their sum."""
        self._charge()
        return dict(self._seconds) | {"total": self._since - self._started}


class Writer:
    """Logs to `folder`. `every`: steps between lines; `batch`: samples a step, for their rate; `label`: what runs.

    `timer` may be one that was started earlier, so that building and restoring are in the account too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        total_steps: int,
        every: int = 1,
        batch: int = 0,
        label: str = "train",
        timer: Timer | None = None,
        tensorboard: bool = True,
    ):
        self.folder = Path(folder)
        self.total, self.every, self.batch, self.label = total_steps, max(1, every), batch, label
        self.timer = timer or Timer()
        self._lock = threading.Lock()  # notes come from the thread that reads the data
        self._active = jax.process_index() == 0
        self._stepped, self._tensorboard = False, tensorboard
        self._file, self._board = None, None
        self._open(start_step)

    def _open(self, step: int) -> None:
        """Starts behind `step`: what the logs say of later steps is not so any more."""
        self._last: tuple[int, float] | None = None  # step and time of the line before
        if self._active:
            path = self.folder / "metrics.jsonl"
            cut_back(path, step)
            self._file = path.open("a", buffering=1)  # a line is on its way to disk before the step is saved
            if self._tensorboard:
                from tensorboardX import SummaryWriter  # slow to import

                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Goes back to `step`: drops what was logged beyond it, and counts the time of those steps as lost."""
        self.timer.lose("step", step)
        with self._lock:
            for opened in (self._file, self._board):
                if opened:
                    opened.close()
            self._open(step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def time(self, bucket: str) -> Iterator[None]:
        """Charges the time within to `bucket`; the first "step" goes to "compile", which takes most of it."""
        if bucket == "step" and not self._stepped:
            self._stepped, bucket = True, "compile"
        with self.timer.time(bucket):
            yield

    def step(self, step: int, report: Mapping[str, Any]) -> None:
        """Logs a training step if one is due. `report` holds scalars; reading them waits for that step to finish."""
        if step % self.every and step != self.total:
            if self._last is None:
                self._last = (step, time.perf_counter())  # after the first step: compilation is no step time
            return
        with self.timer.time("step"):
            values = _numbers(report)
        now, before = time.perf_counter(), self._last
        self._last = (step, now)
        speed = {}
        if before and step > before[0]:
            speed["step_seconds"] = (now - before[1]) / (step - before[0])
            if self.batch:
                speed["samples_per_second"] = self.batch / speed["step_seconds"]
        self._log(step, values | speed)
        self.line(_train_line(self.label, step, self.total, values, speed))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers measured at `step`, such as an evaluation's, with a line of their own."""
        numbers = _numbers(values)
        self._log(step, numbers)
        self.line(f"{self.label} {step}/{self.total}  " + "  ".join(f"{k} {_short(v)}" for k, v in numbers.items()))

    def note(self, step: int, name: str, text: str) -> None:
        """Logs something that happened to the batch that `step` consumed. Any thread may call this."""
        self._write({"step": step, "note": name, "text": text})
        line = f"{self.label} {step}/{self.total}  {name}: {text}"
        self.line(line) if self._active else print(f"process {jax.process_index()}: {line}", file=sys.stderr)

    def image(self, step: int, name: str, picture: np.ndarray) -> Path | None:
        """Writes a picture (H W 3 uint8) as `images/<name>-<step>.png` and to TensorBoard; its path."""
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise ValueError(f"picture {name!r} is {picture.dtype}{list(picture.shape)}, not uint8[H, W, 3]")
        if not self._active:
            return None
        from PIL import Image

        path = self.folder / "images" / f"{name}-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        if self._board:
            self._board.add_image(name, picture, step, dataformats="HWC")
        return path

    def line(self, text: str) -> None:
        """Prints a line for a person, on process 0."""
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Reports where the time went, and ends the files."""
        if self._file is None:
            return
        times = self.timer.report()
        total = times.pop("total")
        parts = sorted(times.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {_duration(s)} ({s / max(total, 1e-9):.0%})" for name, s in parts)
        self.line(f"{self.label}: {_duration(total)} in all: {shares}")
        self._file.close()
        if self._board:
            self._board.close()
        self._file, self._board = None, None

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        # JSON knows no nan and no inf: they are written as strings, which float() reads
        plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        self._write({"step": step} | plain)
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name if "/" in name else f"{self.label}/{name}", value, step)

    def _write(self, entry: dict) -> None:
        if self._active:
            with self._lock:
                if self._file:  # a reader thread may be late
                    self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")


class ProfileWindow:
    """A trace of `steps` steps from step `first` on, in `folder`; `at` goes before each step. Leaving it ends it."""

    def __init__(self, folder: Path, first: int, steps: int):
        self.folder, self.first, self.last = folder, first, first + steps
        self._open = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def at(self, step: int, before: Any) -> None:
        """Starts or ends the trace, if it is time; `before`: arrays of the step before, which belongs into it."""
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


def cut_back(path: Path, step: int) -> None:
    """Drops the entries of a JSONL log that are beyond `step`, or half written. Keeps the order of the rest."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


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


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Waits for all the scalars in one transfer."""
    values = jax.device_get(dict(report))
    for name, value in values.items():
        if np.size(value) != 1:
            raise UserError(f"metric {name!r} has shape {np.shape(value)}; a metric is one number")
    return {name: float(np.asarray(value).reshape(())) for name, value in values.items()}


def _train_line(label: str, step: int, total: int, values: dict[str, float], speed: dict[str, float]) -> str:
    width = len(str(total))
    words = [f"{label} {step:>{width}}/{total} {step / max(total, 1):4.0%}"]
    loss_first = sorted(values, key=lambda name: name != "loss")
    words += [f"{name} {_short(values[name])}" for name in loss_first]
    if "step_seconds" in speed:
        words.append(f"{speed['step_seconds']:.3g} s/step")
        if "samples_per_second" in speed:
            words.append(f"{speed['samples_per_second']:.4g} samples/s")
        words.append(f"ETA {_duration(speed['step_seconds'] * (total - step))}")
    return "  ".join(words)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
