"""Rates of a run for its log: seconds per step, images/s, tokens/s, share of the devices' peak, time remaining, memory.

The time of evaluations, samples, saves, compilation and restoring is not part of a step's.
"""

import collections
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

TRAINING = ("step", "data", "other")  # buckets of time that are a step's; the others interrupt the training


class Work(NamedTuple):
    """What steps have done, in all: a step's number, how many were made, images, tokens, and FLOPs (0: unknown)."""

    steps: int = 1
    images: int = 0
    tokens: int = 0
    flops: float = 0.0

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Point(NamedTuple):
    """A point of a run at which all steps counted in `work` have ended."""

    seconds: float  # of training, so far
    paused: float  # of evaluation, samples and saves, so far
    work: Work


class Rates:
    """Counts the steps of a run. `timer`: its training.logging.Timer; `peak`: FLOP/s of all devices; 0: unknown."""

    def __init__(self, timer: Any, total: int, peak: float = 0.0):
        self._timer, self._total, self._peak = timer, total, peak
        self._recent: collections.deque[tuple[int, Work]] = collections.deque(maxlen=8)
        self._work, self._began = Work(0), None

    def begin(self) -> None:
        """Starts the measurement, at the first step of a start of the run."""
        if self._began is None:
            self._began = self.point(0)

    def add(self, step: int, work: Work) -> None:
        """Counts a step that was begun; it need not have ended."""
        self._work = self._work.plus(work)
        self._recent.append((step, self._work))

    def point(self, step: int) -> Point:
        """Now, at the end of `step`, one of the last eight that were begun."""
        work = next((work for number, work in self._recent if number == step), self._work)
        seconds = self._timer.report()
        inside = sum(seconds.get(bucket, 0.0) for bucket in TRAINING)
        paused = sum(seconds.get(bucket, 0.0) for bucket in ("eval", "sample", "save"))
        return Point(inside, paused, work)

    @property
    def start(self) -> Point | None:
        """The point of the first step; None before it."""
        return self._began

    def between(self, before: Point | None, now: Point) -> dict[str, float]:
        """The rates between two points; empty if no step or time lies between them."""
        if before is None or now.work.steps <= before.work.steps or now.seconds <= before.seconds:
            return {}
        seconds = now.seconds - before.seconds
        _, images, tokens, flops = (a - b for a, b in zip(now.work, before.work, strict=True))
        out = {"step_seconds": seconds / (now.work.steps - before.work.steps)}
        out |= {"images_per_second": images / seconds} if images else {}
        out |= {"tokens_per_second": tokens / seconds} if tokens else {}
        return out | ({"mfu": flops / seconds / self._peak} if flops and self._peak else {})

    def remaining(self, step: int, now: Point, step_seconds: float) -> float:
        """Estimated seconds from `step` to the end, with as much evaluating and saving for each step as so far."""
        paused = now.paused - self._began.paused if self._began else 0.0
        return (self._total - step) * (step_seconds + paused / max(now.work.steps, 1))


def memory_in_use() -> int:
    """The most bytes that a device of this process has used; on a CPU those that the process has now; 0: unknown."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    statm = Path("/proc/self/statm")
    if any(used) or sys.platform != "linux" or not statm.exists():
        return max(used)
    return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def learning_rates(optim: Mapping[str, Any], steps: int, count: int) -> dict[str, float]:
    """{"learning_rate", "learning_rate/GROUP"} of the update after `count` updates, by the schedules of training.optim.

    Computed here on the host: the device is busy with the next steps.
    """
    groups = {"": optim} | {f"/{name}": {**optim, **group} for name, group in optim.get("groups", {}).items()}
    return {f"learning_rate{name}": learning_rate(group, max(steps, 1), count) for name, group in groups.items()}


def learning_rate(group: Mapping[str, Any], steps: int, count: int) -> float:
    """The value of `optim.schedule(group, steps)` at `count`."""
    lr, warmup, final = group["lr"], min(group["warmup"], steps), group["final"]
    if count < warmup:
        start = lr / warmup
        return start + (lr - start) * min(count / max(warmup - 1, 1), 1.0)
    share = min((count - warmup) / max(steps - warmup, 1), 1.0)
    if group["schedule"] == "cosine":
        return lr * ((1 - final) * (1 + math.cos(math.pi * share)) / 2 + final)
    return lr + (lr * final - lr) * share if group["schedule"] == "linear" else lr
