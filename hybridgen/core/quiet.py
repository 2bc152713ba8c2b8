"""What a failed save sets off in the libraries that write: thousands of lines, where SaveError says it in one.

For each part of a save to a full disk Orbax's threads log a traceback, asyncio another for each write that nobody
awaited, and tensorstore one for each write that ends after the event loop it reports to.
"""

import logging
import sys
from typing import Any


def failed_saves() -> None:
    """From here on none of that is printed; for programs, which tell of a failed save themselves."""
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
