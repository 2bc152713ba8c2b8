"""Writes the metrics and images of a run for viewers: TensorBoard always, Weights & Biases with `config.log.wandb`.

A board has `scalars(step, {name: number})`, `image(step, name, picture)` and `close()`, and raises OSError if it cannot
write: the run then continues without.
"""

import contextlib
import importlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.core.errors import UserError


class TensorBoard:
    """An event file, written in the caller's thread. Entries of earlier files from step `purge` on are ignored.

    tensorboardX's writer uses a thread, which ends on a full disk, and the run would then wait for it forever.
    """

    def __init__(self, folder: Path, purge: int):
        from tensorboardX import event_file_writer, proto, summary  # slow to import

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = proto.event_pb2.Event, summary
        name = f".{os.getpid()}.{time.monotonic_ns()}"  # unique also within a second
        self._file = event_file_writer.EventsWriter(str(folder / "events"), name)
        self._flushed = time.monotonic()
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


def wandb_module() -> Any:
    """The package wandb. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"config.log.wandb needs wandb ({error}): install the extra hybridgen[wandb], or omit the entry"
        ) from None


class Wandb:
    """A run of Weights & Biases in `project`, which a resumed training continues: its id is kept in `wandb.json`.

    Metrics are plotted over "step": after a rollback it decreases, which W&B's own counter of steps cannot.
    The environment decides the rest, such as WANDB_MODE=offline. Raises UserError if it cannot start.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]):
        self._wandb = wandb_module()
        about = folder / "wandb.json"
        options = {"project": project, "name": name, "config": dict(config), "dir": str(folder)}
        options |= {"id": run_id(about, project), "resume": "allow", "settings": {"console": "off"}}
        try:
            self._run = self._wandb.init(**options)
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of any class of that package, and of what it uses
            raise UserError(
                f"config.log.wandb={project}: W&B does not start: {error}; log in with `wandb login`, set "
                f"WANDB_MODE=offline, or omit the entry"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with _written():
            self._run.log({"step": step} | dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        with _written():
            self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        with _written():
            self._run.finish()


def checked(config: Mapping[str, Any]) -> str:
    """The project of W&B that a stage's config names; "" for none. Raises UserError if wandb is not installed."""
    project = config["log"].get("wandb", "")
    if project:
        wandb_module()
    return project


def chosen(config: Mapping[str, Any], folder: Path, name: str, resolved: Mapping[str, Any]) -> list[Any]:
    """The boards that a config names, besides TensorBoard; none in processes other than the first."""
    project = checked(config)
    return [Wandb(folder, project, name, resolved)] if project and jax.process_index() == 0 else []


def run_id(path: Path, project: str) -> str:
    """The id of W&B's run for a run folder: that in `path`, or a new one if there is none for this project."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.get("project") == project and isinstance(known.get("id"), str):
            return known["id"]
    made = secrets.token_hex(4)
    path.write_text(json.dumps({"project": project, "id": made}) + "\n", encoding="utf-8")
    return made


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Makes every error of W&B an OSError: a service that fails does not end a run."""
    try:
        yield
    except Exception as error:
        raise OSError(0, f"W&B: {error}") from error
