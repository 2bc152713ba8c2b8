"""Batches that a run skips for good: where it went bad, it goes back to a checkpoint and on behind them.

`skipped.json` of the run folder lists the intervals [first, end); `config.health.skip` may name some beforehand. With
the same intervals from the start, a run ends in the same bits as one that found them by itself.
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
    """The state at a later step, whose batches it has not seen: they count as skipped."""
    health = state["health"]
    health = health | {"skipped": health["skipped"] + step - state["step"], "streak": jnp.zeros_like(health["streak"])}
    return state | {"step": step, "health": health}


def end_of_skip(skipped: list, step: int, steps: int) -> int | None:
    """The end, at most `steps`, of the skipped intervals [first, end) that `step` lies in; None if in none."""
    here = step
    while ends := [min(end, steps) for first, end in skipped if first <= here < min(end, steps)]:
        here = max(ends)
    return here if here > step else None


def roll_back(job: Any, end: int) -> tuple[dict, int]:
    """From bad steps up to `end` to the newest checkpoint before them; the batches from there to `end` are skipped.

    Raises UserError where this happens too often: then what is wrong is not in a few batches.
    """
    health, writer = job.experiment.config.health, job.writer
    if len(job.skipped) - len(health.skip) >= health.rollbacks:
        raise UserError(
            f"{health.streak} bad steps in a row up to step {end}, and {health.rollbacks} intervals were skipped "
            "before: see config.health, the learning rate and the data"
        )
    with job.doing(end, "restore"):
        with contextlib.suppress(checkpoint.SaveError):  # older steps are there
            job.saved.wait_until_saved()
        start = job.saved.drop_after(end - health.streak)  # before the list says so: cut short, it happens again
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


def intervals(config: Any, folder: Path) -> list[tuple[int, int]]:
    """What config and run folder say is skipped, config first. Raises UserError for what is no list of intervals."""
    file = folder / "skipped.json"
    found = run_folder.read_json(file) if file.is_file() else []
    named = [("health.skip", pair) for pair in config.health.skip]
    named += [(file, pair) for pair in (found if isinstance(found, list) else [found])]
    for where, pair in named:
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, int) for x in pair)
        if not numbers or not 0 <= pair[0] < pair[1]:
            raise UserError(f"{where}: {pair!r} is no interval (first, end) of steps")
    return [(first, end) for _, (first, end) in named]
