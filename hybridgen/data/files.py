"""Reading text and JSON files with a size limit, and writing folders atomically."""

import codecs
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.data import storage

MAX_FILE = 2**26  # bytes


def decoded(data: bytes) -> str:
    """Text in UTF-8, with or without a byte-order mark, or in UTF-16 with one, as editors of Windows write it.

    Raises UnicodeDecodeError for other data.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def read_text(path: Path) -> str:
    """A text file that a user gives, with "\\n" between lines. UserError if it is missing, not text or too large."""
    try:
        return decoded(_read(path)).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it is missing, damaged or too large."""
    try:
        return json.loads(decoded(_read(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {str(error)[:100]}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        if storage.passing(error):
            raise
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE} bytes")
    return data


@contextlib.contextmanager
def whole_folder(goal: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `goal` at the end.

    If the work fails, the folder is deleted; if the process is killed, the temporary folder remains, but never `goal`.
    Raises UserError if `goal` exists already or cannot be written.
    """
    temporary = goal.with_name(f".{goal.name}.{os.getpid()}.tmp")
    if os.path.lexists(goal):
        raise UserError(f"{goal} already exists: give a new folder")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process with the same pid
        temporary.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"cannot write to {goal.parent}: {error.strerror}") from None
    try:
        yield temporary
        temporary.rename(goal)
        handle = os.open(goal.parent, os.O_RDONLY)  # the rename is on disk only after fsync of the folder
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
