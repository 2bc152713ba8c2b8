"""Logs the metrics of a run to stdout (with ETA), `metrics.jsonl` and TensorBoard, and the run's time to `time.json`.

    with Writer(folder, start_step=0, total_steps=1000, every=50, batch=64) as writer:
        with writer.time("step"):
            state, report = step(...)
        writer.step(i, report)         # report: {name: scalar JAX array}, read only when a line is due

A line of `metrics.jsonl` is {"step": N, name: number, ...}, measured at step N or on its batch. A writer that starts at
step N deletes later lines, so that a resumed run logs nothing twice. Only process 0 writes.

`time.json` lists where the time went, per start of the run: [{"from": step, "to": step, "seconds": {bucket: s}}, ...].
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.core.errors import UserError


class Timer:
    """Wall time by bucket. Buckets may nest: inner time counts for the inner bucket only, so they sum to the total."""

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
        """Records the time of `bucket` at `step`, after which it may be lost by a rollback."""
        self._charge()
        self._marks[bucket, step] = self._seconds.get(bucket, 0.0)

    def lose(self, bucket: str, step: int) -> None:
        """Moves the time of `bucket` since its mark at `step` (or since the start) to "lost"."""
        self._charge()
        lost = self._seconds.get(bucket, 0.0) - self._marks.get((bucket, step), 0.0)
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) - lost
        self._seconds["lost"] = self._seconds.get("lost", 0.0) + lost

    def report(self) -> dict[str, float]:
        """Seconds by bucket; "other": outside all buckets; "total": the sum."""
        self._charge()
        return dict(self._seconds) | {"total": self._since - self._started}


class Writer:
    """Logs to `folder`. `every`: steps between lines; `batch`: samples per step, for the rate; `label`: of the lines.

    `timer` may have been started earlier, to include building and restoring.
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
        self._lock = threading.Lock()  # notes may come from any thread
        self._active = jax.process_index() == 0
        self._stepped, self._tensorboard = False, tensorboard
        self._file, self._board = None, None
        self._troubled = False
        self._from = self._to = start_step
        self._accounts, self._accounted = accounts(self.folder / "time.json", start_step), 0.0
        self._open(start_step)

    def _open(self, step: int) -> None:
        """Opens the logs after `step` and deletes the entries of later steps."""
        self._last: tuple[int, float] | None = None  # step and time of the previous line
        if self._active:
            path = self.folder / "metrics.jsonl"
            cut_back(path, step)
            self._file = path.open(
                "a", buffering=1, encoding="utf-8"
            )  # a line is on its way to disk before the step is saved
            if self._tensorboard:
                self._board = Board(self.folder / "tensorboard", step + 1)

    def rewind(self, step: int) -> None:
        """Goes back to `step`: deletes the entries of later steps, and counts their time as lost."""
        self.timer.lose("step", step)
        self._to = step
        with self._lock:
            self._close()
            self._open(step)

    def _close(self) -> None:
        for opened in (self._file, self._board):
            with self._trouble():
                if opened:
                    opened.close()
        self._file, self._board = None, None

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        """Reports once that a log cannot be written (full disk, for instance); the run continues."""
        try:
            yield
        except OSError as error:
            if not self._troubled:
                self._troubled = True
                text = f"warning: cannot write the logs in {self.folder}: {error.strerror}; the run continues"
                print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def time(self, bucket: str) -> Iterator[None]:
        """Counts the time inside for `bucket`; the first "step" counts as "compile", which takes most of it."""
        if bucket == "step" and not self._stepped:
            self._stepped, bucket = True, "compile"
        with self.timer.time(bucket):
            yield

    def step(self, step: int, report: Mapping[str, Any]) -> None:
        """Logs a training step if a line is due. Reading the scalars of `report` waits for the step to finish."""
        self._to = step
        if step % self.every and step != self.total:
            if self._last is None:
                self._last = (step, time.perf_counter())  # after the first step, to exclude compilation
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
        if now - self._accounted >= 10:
            self._account()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers measured at `step`, such as an evaluation's, and prints them as a line."""
        numbers = _numbers(values)
        self._log(step, numbers)
        self.line(f"{self.label} {step}/{self.total}  " + "  ".join(f"{k} {_short(v)}" for k, v in numbers.items()))

    def note(self, step: int, name: str, text: str) -> None:
        """Logs an event of `step`, with a `name` and a `text`, and prints it. Any thread may call this."""
        self._write({"step": step, "note": name, "text": text})
        line = f"{self.label} {step}/{self.total}  {name}: {text}"
        self.line(line) if self._active else print(f"process {jax.process_index()}: {line}", file=sys.stderr)

    def notes(self, name: str) -> list[str]:
        """The texts of all notes with this name in the log, in order."""
        path = self.folder / "metrics.jsonl"
        if not self._active or not path.exists():
            return []
        with path.open(encoding="utf-8", errors="replace") as lines:
            entries = [json.loads(line) for line in lines if '"note"' in line and _step_of(line) < math.inf]
        return [str(entry.get("text")) for entry in entries if entry.get("note") == name]

    def image(self, step: int, name: str, picture: np.ndarray) -> Path | None:
        """Writes an image (H W 3 uint8) as `images/<name>-<step>.png` and to TensorBoard; returns its path."""
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise ValueError(f"image {name!r} is {picture.dtype}{list(picture.shape)}, but must be uint8[H, W, 3]")
        if not self._active:
            return None
        from PIL import Image

        path = self.folder / "images" / f"{name}-{step:08d}.png"
        with self._trouble():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            if self._board:
                self._board.image(step, name, picture)
        return path

    def line(self, text: str) -> None:
        """Prints a line, in process 0 only."""
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the files and prints where the time went."""
        if self._file is None:
            return
        with self._lock:
            self._close()
        self._account()
        times = self.timer.report()
        total = times.pop("total")
        parts = sorted(times.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {_duration(s)} ({s / max(total, 1e-9):.0%})" for name, s in parts)
        self.line(f"{self.label}: {_duration(total)} in total: {shares}")

    def _account(self) -> None:
        """Writes time.json: the entries of earlier starts and that of this one."""
        if not self._active:
            return
        seconds = {name: round(s, 4) for name, s in self.timer.report().items() if name != "total"}
        entry = {"from": min(self._from, self._to), "to": self._to, "seconds": seconds}
        with self._trouble():
            _replace(self.folder / "time.json", json.dumps([*self._accounts, entry], indent=1) + "\n")
        self._accounted = time.perf_counter()

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        # JSON has no nan and inf: they are written as strings, which float() reads
        plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        self._write({"step": step} | plain)
        if self._board:
            with self._trouble():
                self._board.scalars(step, {n if "/" in n else f"{self.label}/{n}": x for n, x in numbers.items()})

    def _write(self, entry: dict) -> None:
        if self._active:
            with self._lock, self._trouble():
                if self._file:  # a reader thread may log after close
                    self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")


class Board:
    """An event file for TensorBoard, written in the caller's thread.

    tensorboardX's writer uses a thread, which ends on a full disk, and the run would then wait for it forever.
    """

    def __init__(self, folder: Path, purge: int):
        from tensorboardX import event_file_writer, proto, summary  # slow to import

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = proto.event_pb2.Event, summary
        name = f".{os.getpid()}.{time.monotonic_ns()}"  # unique also within a second
        self._file = event_file_writer.EventsWriter(str(folder / "events"), name)
        self._flushed = time.monotonic()
        # TensorBoard then ignores entries of earlier files from step `purge` on
        self._add(purge, session_log=proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._add(step, summary=self._summary.image(name, picture, dataformats="HWC"))

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))
        if time.monotonic() - self._flushed > 60:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Deletes the entries of a JSONL log that are after `step` or incomplete; keeps the others in order."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(f"{line}\n" for line in text.split("\n")[:-1] if _step_of(line) <= step)
    if kept != text:
        _replace(path, kept)


def accounts(path: Path, step: int) -> list[dict]:
    """The entries of a `time.json`, for a run that resumes at `step`: the time of later steps counts as lost."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            first, last, seconds = entry["from"], entry["to"], entry["seconds"]
            if last > step:
                entry["to"] = max(first, step)
                lost = seconds.get("step", 0.0) * (last - entry["to"]) / (last - first)
                seconds |= {"step": seconds.get("step", 0.0) - lost, "lost": seconds.get("lost", 0.0) + lost}
        return list(entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return []  # missing or damaged; the file is only informative


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The scalars as floats, read in one transfer. Raises UserError for a metric that is not a scalar."""
    values = jax.device_get(dict(report))
    for name, value in values.items():
        if np.size(value) != 1:
            raise UserError(f"metric {name!r} has shape {np.shape(value)}; a metric must be a scalar")
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
