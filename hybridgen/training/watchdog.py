"""Detects that a process hangs: prints its stacks and the stragglers, and exits with code 42 for a restart."""

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
START = 600.0  # seconds that tracing and compiling may take, even if the timeout is shorter
COMPILING = tuple(f"/jax/_src/{file}.py" for file in ("compiler", "interpreters/mlir", "interpreters/partial_eval"))
WARM, SLOWER = 3, 3.0  # first steps, during which other processes may compile this many times longer than this one


class Watchdog:
    """Prints all stacks and exits with code 42 if `beat` was not called for `timeout` seconds (0: never).

    Compiling counts as progress for at most ten minutes. In the first steps the timeout is extended, since other
    processes may compile longer. With several processes it reports the stragglers: each process shares its position.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._where = 0, "start"
        self._first_step, self._starting, self._compiled = None, True, 0.0
        self._first: list | None = None  # the status of process 0
        self._ended = threading.Event()
        # statuses are shared in a thread of their own, which blocks if process 0 has stopped
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
        """Reports progress: `doing` begins, at `step`."""
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
        """Whether the training thread is tracing or compiling."""
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
            time.sleep(2.0)  # the first exit ends the other processes too: let them print their stacks
        os._exit(HUNG)

    def _stragglers(self) -> list[str]:
        """Lines that name the stragglers; the statuses are stored in process 0, which may have stopped itself."""
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
        return [f"straggler: process 0 on host {host} (pid {pid}), the coordinator, does not answer"]


def behind(where: dict[int, list], lately: float) -> list[str]:
    """The stragglers, one line each, from {process: [step, doing, seconds, host, pid, time of this status]}.

    These are the processes without a status since `lately`; or else those at the lowest step and, among them, those
    outside a "step", in which processes wait for each other.
    """
    silent = {i: status for i, status in where.items() if status[5] < lately}
    least = min((step for step, *_ in where.values()), default=0)
    late = {i: status for i, status in where.items() if status[0] == least}
    late = silent or {i: status for i, status in late.items() if status[1] != "step"} or late
    if len(late) == len(where):
        return [f"all {len(where)} processes are at step {least}: there is no straggler"]
    return [
        f"straggler: process {i} on host {host} (pid {pid}), "
        + ("silent since " if i in silent else "")
        + f"step {step}, {doing}, for {seconds:.0f} s"
        for i, (step, doing, seconds, host, pid, _) in sorted(late.items())
    ]
