"""Logs the metrics of a run to stdout (with ETA), `metrics.jsonl` and boards, and the run's time to `time.json`.

    with Writer(folder, start_step=0, total_steps=1000, every=50) as writer:
        with writer.time("step"):
            state, report = step(...)
        writer.count(i, Work(images=64))
        writer.step(i, report)         # report: {name: scalar JAX array}, read only when a line is due
        writer.ended(j, earlier)       # the report of a step for which the caller has waited

A line of `metrics.jsonl` is {"step": N, name: number, ...}, measured at step N or on its batch. A writer that starts at
step N deletes later lines, so that a resumed run logs nothing twice. Only process 0 writes. On stdout there is a line
after the first step, for each line of `metrics.jsonl`, and every five seconds; on a terminal a bar instead.

`time.json` lists where the time went, per start of the run: [{"from": step, "to": step, "seconds": {bucket: s}}, ...].
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.training import boards as board_lib
from hybridgen.training import rates
from hybridgen.training.console import Console, duration, short, train_line


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
    """Logs to `folder`. `every`: steps between lines of metrics.jsonl; `label`: first word of the lines on stdout.

    `timer` may have been started earlier, to include building and restoring. `optim`: the config of the optimizer, for
    the learning rate; `peak`: FLOP/s of all devices, if known; `boards`: further boards (training/boards.py).
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        total_steps: int,
        every: int = 1,
        label: str = "train",
        timer: Timer | None = None,
        tensorboard: bool = True,
        optim: Mapping[str, Any] | None = None,
        peak: float = 0.0,
        boards: Sequence[Any] = (),
    ):
        self.folder = Path(folder)
        self.total, self.every, self.label = total_steps, max(1, every), label
        self.timer = timer or Timer()
        self._lock = threading.Lock()  # notes may come from any thread
        self._active = jax.process_index() == 0
        self._console = Console()
        self._tensorboard, self._optim, self._peak = tensorboard, optim, peak
        self._file, self._board, self._others = None, None, list(boards)
        self._troubled = False
        self._from = self._to = start_step
        self._accounts, self._accounted = accounts(self.folder / "time.json", start_step), 0.0
        self._open(start_step)

    def _open(self, step: int) -> None:
        """Opens the logs after `step` and deletes the entries of later steps."""
        self._rates = rates.Rates(self.timer, self.total, self._peak)
        self._logged: rates.Point | None = None  # where the previous line of metrics.jsonl was measured
        self._shown: int | None = None  # step of the previous line on stdout
        self._read = step  # the last step for which `step` has waited
        self._ended: rates.Point | None = None  # the first point since then that `ended` measured
        if self._active:
            path = self.folder / "metrics.jsonl"
            cut_back(path, step)
            # a line is on its way to disk before the step is saved
            self._file = path.open("a", buffering=1, encoding="utf-8")
            if self._tensorboard:
                self._board = board_lib.TensorBoard(self.folder / "tensorboard", step + 1)

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
        """Counts the time inside for `bucket`."""
        if bucket == "step":
            self._rates.begin()
        with self.timer.time(bucket):
            yield

    def count(self, step: int, work: rates.Work) -> None:
        """Counts what a step does, before `step` is called with its report."""
        self._rates.add(step, work)

    def step(self, step: int, report: Mapping[str, Any]) -> None:
        """Logs a training step if a line is due. Reading the scalars of `report` waits for the step to finish."""
        self._to = step
        due, first = step % self.every == 0 or step == self.total, self._shown is None
        if not due and not (first and self._active):
            return
        with self.timer.time("step"):
            values = _numbers(report)
        now = self._rates.point(step)
        values |= self._measured(step, values) | self._rates.between(self._logged or self._rates.start, now)
        self._logged, self._read, self._ended = now, step, None
        if due:
            self._log(step, values)
        self._show(step, values, now)

    def ended(self, step: int, report: Mapping[str, Any]) -> None:
        """Prints a line for a step that has ended, if the last line was some seconds ago and before this step."""
        if not self._active or self._shown is None or step < self._read:
            return
        # like is compared with like: the caller is as many steps ahead at both points
        self._ended = self._ended or self._rates.point(step)
        if step <= self._shown or not self._console.due():
            return
        values, now = _numbers(report), self._rates.point(step)
        values |= self._measured(step, values) | self._rates.between(self._ended, now)
        self._show(step, values, now)

    def _measured(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The learning rate of a step with this report, and the memory in use, in GiB."""
        out = {}
        if self._optim is not None:
            applied = step - int(values.get("skipped", 0)) - (not values.get("streak", 0))
            out |= rates.learning_rates(self._optim, self.total, applied)
        used = rates.memory_in_use()
        return out | ({"memory_gib": used / 2**30} if used else {})

    def _show(self, step: int, values: dict[str, float], now: rates.Point) -> None:
        """Prints the state of the training at a step that ended now."""
        self._shown = step
        left = self._rates.remaining(step, now, values["step_seconds"]) if "step_seconds" in values else None
        if self._active:
            self._console.step(train_line(self.label, step, self.total, values), step / max(self.total, 1), left)
        if time.perf_counter() - self._accounted >= 10:
            self._account()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers measured at `step`, such as an evaluation's, and prints them as a line."""
        numbers = _numbers(values)
        self._log(step, numbers)
        self.line(f"{self.label} {step}/{self.total}  " + "  ".join(f"{k} {short(v)}" for k, v in numbers.items()))

    def note(self, step: int, name: str, text: str) -> None:
        """Logs an event of `step`, with a `name` and a `text`, and prints it. Any thread may call this."""
        self._write({"step": step, "note": name, "text": text})
        line = f"{self.label} {step}/{self.total}  {name}: {text}"
        self._console.note(line if self._active else f"process {jax.process_index()}: {line}", here=self._active)

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
            for board in self._boards():
                board.image(step, name, picture)
        return path

    def line(self, text: str) -> None:
        """Prints a line, in process 0 only, and not with --quiet."""
        if self._active:
            self._console.line(text)

    @contextlib.contextmanager
    def waiting(self, step: int, what: str, first: float = 5.0) -> Iterator[None]:
        """Says `what` is being done at `step` if it takes longer than `first` seconds, and then for how long."""
        if not self._active:
            yield
            return
        with self._console.waiting(f"{self.label}: at step {step}/{self.total}, {what}", first):
            yield

    def close(self) -> None:
        """Closes the files and prints where the time went."""
        if self._file is None:
            return
        with self._lock:
            self._close()
        for board in self._others:
            with self._trouble():
                board.close()
        self._console.finish()
        self._account()
        times = self.timer.report()
        total = times.pop("total")
        parts = sorted(times.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {duration(s)} ({s / max(total, 1e-9):.0%})" for name, s in parts)
        self.line(f"{self.label}: {duration(total)} in total: {shares}")

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
        named = {n if "/" in n else f"{self.label}/{n}": x for n, x in numbers.items()}
        for board in self._boards():
            with self._trouble():
                board.scalars(step, named)

    def _boards(self) -> list[Any]:
        return [board for board in (self._board, *self._others) if board and self._active]

    def _write(self, entry: dict) -> None:
        if self._active:
            with self._lock, self._trouble():
                if self._file:  # a reader thread may log after close
                    self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def opened(
    experiment: Any, folder: Path, start: int, label: str, timer: Timer, resolved: Mapping[str, Any], peak: float
) -> Writer:
    """The logs of a run in `folder`, from step `start` on. resolved: its config as plain data, which boards show."""
    config = experiment.config
    options = {"start_step": start, "total_steps": config.steps, "every": config.log.every, "optim": config.optim}
    more = board_lib.chosen(config, folder, label, resolved)
    return Writer(folder, label=label, timer=timer, peak=peak, boards=more, **options)


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
