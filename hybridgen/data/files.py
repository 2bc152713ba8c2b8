"""Files that are read with a limit, and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridgen.core.errors import UserError

MAX_FILE = 2**26  # bytes


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it is missing, damaged or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE} bytes")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:100]}") from None


@contextlib.contextmanager
def whole_folder(goal: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `goal` at the end. Nothing stays of work that fails; an end without a
    chance to clean up leaves the temporary folder, never `goal`. UserError where there is a `goal` already.
    """
    temporary = goal.with_name(f".{goal.name}.{os.getpid()}.tmp")
    if os.path.lexists(goal):
        raise UserError(f"{goal} is there already: give a new folder")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process of that number
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"cannot write in {goal.parent}: {error.strerror}") from None
    try:
        yield temporary
        temporary.rename(goal)
        handle = os.open(goal.parent, os.O_RDONLY)  # the rename itself is on disk only when the folder is
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
