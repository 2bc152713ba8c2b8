"""Rollback: after several bad steps in a row, a run restores an earlier checkpoint and skips the bad batches for good.

`skipped.json` in the run folder lists the skipped intervals [first, end); `config.health.skip` may list more. A run
that is given these intervals from the start gets the same state, bit for bit, as the run that detected them.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import distributed
from hybridgen.core.errors import UserError
from hybridgen.runs import checkpoint
from hybridgen.runs import folder as run_folder


def jump(state: dict, step: jax.Array) -> dict:
    """The state at a later `step`; the batches in between count as skipped."""
    health = state["health"]
    health = health | {"skipped": health["skipped"] + step - state["step"], "streak": jnp.zeros_like(health["streak"])}
    return state | {"step": step, "health": health}


def end_of_skip(skipped: list, step: int, steps: int) -> int | None:
    """The end, at most `steps`, of the skipped intervals [first, end) that contain `step`; None if none does."""
    here = step
    while ends := [min(end, steps) for first, end in skipped if first <= here < min(end, steps)]:
        here = max(ends)
    return here if here > step else None


def roll_back(job: Any, end: int) -> tuple[dict, int]:
    """Restores the newest checkpoint before the bad steps up to `end`; skips the batches from there to `end`.

    Returns (state, step). Raises UserError after `health.rollbacks` rollbacks: then the cause is not a few batches.
    """
    health, writer = job.experiment.config.health, job.writer
    if len(job.skipped) - len(health.skip) >= health.rollbacks:
        raise UserError(
            f"{health.streak} bad steps in a row up to step {end}, and {health.rollbacks} intervals were skipped "
            "before (config.health.rollbacks): lower the learning rate or check the data"
        )
    with job.doing(end, "restore"):
        with contextlib.suppress(checkpoint.SaveError):  # an older step is restored anyway
            job.saved.wait_until_saved()
        start = job.saved.drop_after(end - health.streak)  # before the list is written: if interrupted, it runs again
        first = start or 0
        job.skipped.append((first, end))
        if jax.process_index() == 0:
            run_folder.write_json(
                writer.folder / "skipped.json", [list(pair) for pair in job.skipped[len(health.skip) :]]
            )
        distributed.exchange(f"skipped/{len(job.skipped)}", "written")
        state = job.state_at(start)
    writer.rewind(first)
    writer.note(end, "rolled back", f"{health.streak} bad steps in a row: batches {first} to {end - 1} are skipped")
    return state, first


def require_good(state: dict, step: int) -> None:
    """Raises UserError at the end of a run in which no step was good: its parameters are still the first ones."""
    if step and not int(state["health"]["count"]):
        raise UserError(
            f"none of {step} steps was good, so the parameters are still those of step 0: the loss or its gradient was "
            "never finite, or health.skip leaves no batch; lower optim.lr or check the data, and train in a new folder"
        )


def intervals(config: Any, folder: Path) -> list[tuple[int, int]]:
    """The skipped intervals of the config, then of the run folder. Raises UserError for an invalid interval."""
    file = folder / "skipped.json"
    found = run_folder.read_json(file) if file.is_file() else []
    named = [("health.skip", pair) for pair in config.health.skip]
    named += [(file, pair) for pair in (found if isinstance(found, list) else [found])]
    for where, pair in named:
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, int) for x in pair)
        if not numbers or not 0 <= pair[0] < pair[1]:
            raise UserError(f"{where}: {pair!r} is not an interval (first, end) of steps, with 0 <= first < end")
    return [(first, end) for _, (first, end) in named]
