"""Reading from storage that fails for a while: a network file system, too many open files, too little memory.

An error of one file is permanent: it does not exist, may not be read, or is no file of the expected kind. Any other
error of the operating system is retried, because a record that counts as broken is replaced by another one: the data
would change without a word, and on one host only.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from hybridgen.core.errors import StorageError

T = TypeVar("T")
PATIENCE = 300.0  # seconds for which a read is retried
PAUSES = (0.05, 10.0)  # seconds between two tries: the first, and the longest after doubling
OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
OF_THE_FILE |= {errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.ENODEV, errno.EOVERFLOW}
# what C++ readers say, whose exceptions have no number
TEXTS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN)
TEXTS = tuple(map(os.strerror, TEXTS))


def passes(error: Exception, root: str) -> bool:
    """Whether an error while reading a file in the folder `root` may pass, so that reading again can succeed."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:  # decoders raise OSError without a number
        return error.errno not in OF_THE_FILE or not os.path.isdir(root)  # the whole folder is gone: not mounted
    return any(text in str(error) for text in TEXTS)


def steadily(read: Callable[[], T], root: str, patience: float = PATIENCE) -> T:
    """`read()`, retried with growing pauses for `patience` seconds while its errors may pass.

    Raises the error of `read` if it does not pass by itself, and StorageError if it has not passed in time.
    """
    pause, started, noted = PAUSES[0], time.monotonic(), False
    while True:
        try:
            return read()
        except Exception as error:
            if not passes(error, root):
                raise
            text, spent = f"{type(error).__name__}: {error}", time.monotonic() - started
        if spent + pause > patience:
            raise StorageError(f"{root} cannot be read for {spent:.0f} s: {' '.join(text.split())[:200]}")
        if not noted and spent > 1:
            noted = True
            print(f"warning: {root} cannot be read ({text}); trying for {patience:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, PAUSES[1])
