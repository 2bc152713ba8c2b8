"""Suppresses the log lines of libraries after a failed save: thousands of them, where SaveError needs one.

When a disk is full, Orbax's threads log a traceback for each part of the save, asyncio one for each write that was
never awaited, and tensorstore one for each write that ends after its event loop was closed.
"""

import logging
import sys
from typing import Any


def failed_saves() -> None:
    """Suppresses these lines from now on. For commands, which report a failed save themselves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_needed)
    before = sys.unraisablehook

    def hook(args: Any) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            before(args)

    sys.unraisablehook = hook


def _needed(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "exception was never retrieved" not in record.getMessage()
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
