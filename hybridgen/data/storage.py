"""Failures of storage that pass (an I/O error, too many open files, a lost mount): which they are, and trying again.

A file that is missing or damaged is a broken record, which another one replaces. A file that cannot be read just now is
not: it is read again until the storage answers, so that an outage changes no sample.
"""

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from hybridgen.core.errors import StorageError

T = TypeVar("T")

RETRY = 120.0  # seconds for which a read is tried again; `data.retry` in a config
FIRST, LONGEST = 0.05, 5.0  # seconds between two tries: doubled from the first to the longest
# what trying again does not change; all other errors of the operating system pass
FINAL = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
}


def passing(error: BaseException) -> bool:
    """Whether the same read may succeed later. Errors of decoders have no error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in FINAL
    if isinstance(error, OSError) and str(error).startswith("out of memory"):  # of a decoder of PIL
        return True
    return isinstance(error, MemoryError | ConnectionError | TimeoutError)


def gone(path: str) -> OSError:
    """The error for a folder, or a file in a listed folder, that has disappeared since it was listed."""
    return OSError(errno.ESTALE, "it has disappeared since the data were listed", path)


def patiently(work: Callable[[], T], seconds: float = RETRY) -> T:
    """The result of `work()`, which is called again while it fails with an error that passes.

    After `seconds` raises StorageError, which ends a command with an exit code that launchers restart.
    """
    began, pause, warned = time.monotonic(), FIRST, False
    while True:
        try:
            return work()
        except (OSError, MemoryError) as error:
            if not passing(error):
                raise
            text = f"{type(error).__name__}: {error}"  # not the exception, which would make a reference cycle
        left = began + seconds - time.monotonic()
        if left <= 0:
            raise StorageError(
                f"the data cannot be read: {text}; tried again for {seconds:g} s (data.retry): run the command again "
                f"when the storage answers"
            )
        if pause >= 1 and not warned:
            warned = True
            print(f"warning: the data cannot be read: {text}; trying again for {left:.0f} s", file=sys.stderr)
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST)
