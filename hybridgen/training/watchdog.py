"""Notices that a process hangs: its stacks, who is behind, and exit code 42, so that a supervisor starts all again."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time

import jax

from hybridgen.core import distributed

HUNG = 42  # exit code of a process that made no progress
START = 600.0  # seconds that tracing and compiling may take, however short the time-out
COMPILING = tuple(f"/jax/_src/{file}.py" for file in ("compiler", "interpreters/mlir", "interpreters/partial_eval"))
WARM, SLOWER = 3, 3.0  # steps that may be in flight while the others compile, and how much slower than here they may


class Watchdog:
    """Ends the process with code 42 and all its stacks when nothing was `beat` for `timeout` seconds (0: never).

    Compiling is progress, for ten minutes at most; before the first steps are done, others are waited for a few times
    as long as it took here.
    With several processes it says who is behind: each tells the others where it is.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._where = 0, "start"
        self._first_step, self._starting, self._compiled = None, True, 0.0
        self._first: list | None = None  # what process 0 has said of itself
        self._ended = threading.Event()
        # telling is a thread of its own: where process 0 has stopped, it waits
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._tell)]

    def __enter__(self) -> "Watchdog":
        self._since = self._began = time.monotonic()
        self._thread = threading.get_ident()
        if self.timeout:
            for thread in self._threads[: min(2, jax.process_count())]:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.ident:
                thread.join(timeout=5)

    def beat(self, step: int, doing: str) -> None:
        """Says that work goes on: `doing` begins, at `step`."""
        self._first_step = step if self._first_step is None else self._first_step
        self._starting = self._starting and step < self._first_step + WARM
        self._where, self._since = (step, doing), time.monotonic()
        self._began = self._since

    def _watch(self) -> None:
        tick = min(1.0, self.timeout / 4)
        while not self._ended.wait(tick):
            now = time.monotonic()
            others = SLOWER * self._compiled if self._starting and jax.process_count() > 1 else 0.0
            if now - self._began < START and self._compiles():
                self._since, self._compiled = now, self._compiled + tick
            elif now - self._since > self.timeout + others:
                self._end(now - self._since)

    def _compiles(self) -> bool:
        """Whether the thread that works traces or compiles."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None and not frame.f_code.co_filename.endswith(COMPILING):
            frame = frame.f_back
        return frame is not None

    def _tell(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            step, doing = self._where
            still = round(time.monotonic() - self._since, 1)
            status = json.dumps([step, doing, still, socket.gethostname(), os.getpid(), time.time()])
            client = distributed.client()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"hybridgen/where/{jax.process_index()}", status, allow_overwrite=True)
                self._first = self._first or json.loads(client.blocking_key_value_get("hybridgen/where/0", 5000))

    def _end(self, still: float) -> None:
        step, doing = self._where
        print(f"no progress for {still:.0f} s: step {step}, {doing}; the stacks follow", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if jax.process_count() > 1:
            for line in self._stragglers():
                print(line, file=sys.stderr, flush=True)
            time.sleep(2.0)  # the first to go takes the others along: let them print theirs
        os._exit(HUNG)

    def _stragglers(self) -> list[str]:
        """Lines that say who is behind; the others' words lie with process 0, which may be the one that has stopped."""
        where: dict[int, list] = {}

        def ask() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                for key, status in distributed.client().key_value_dir_get("hybridgen/where/"):
                    where[int(key.rsplit("/", 1)[1])] = json.loads(status)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(timeout=1.5)
        if where:
            return behind(where, time.time() - max(self.timeout / 2, 2.0))
        host, pid = self._first[3:5] if self._first else ("unknown", "unknown")
        return [f"straggler: process 0 on host {host} (pid {pid}), where the others meet, does not answer"]


def behind(where: dict[int, list], lately: float) -> list[str]:
    """Who holds the others up, a line each, from {process: [step, doing, seconds, host, pid, when it said so]}.

    Those that have said nothing since `lately`; or else those of the lowest step and, among them, those that wait for
    nobody (a "step" is where processes wait for each other).
    """
    silent = {i: status for i, status in where.items() if status[5] < lately}
    least = min((step for step, *_ in where.values()), default=0)
    late = {i: status for i, status in where.items() if status[0] == least}
    late = silent or {i: status for i, status in late.items() if status[1] != "step"} or late
    if len(late) == len(where):
        return [f"all {len(where)} processes are at step {least}: none is behind the others"]
    return [
        f"straggler: process {i} on host {host} (pid {pid}), "
        + ("silent since " if i in silent else "")
        + f"step {step}, {doing}, for {seconds:.0f} s"
        for i, (step, doing, seconds, host, pid, _) in sorted(late.items())
    ]
