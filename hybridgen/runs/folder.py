"""The run folder: creation with access for its owner only, a lock, atomic JSON files, and stopping by signals.

    make(folder)
    with lock(folder), Signals() as signals:
        while not signals.requested: ...

The lock is one of the operating system (`flock` on `lock.json`), which is released when its process ends, however that
happens; the content of the file names the holder, and decides only where the file system has no locks. SIGTERM and the
first Ctrl-C set `signals.requested`; the training loop then saves and returns.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from hybridgen.core.errors import StorageError, UserError
from hybridgen.data import storage

MAX_JSON = 2**26  # bytes of one JSON file of a run
URL = re.compile(r"[a-zA-Z][\w+.-]+:/")  # a Path writes gs://bucket as gs:/bucket


def make(folder: Path) -> Path:
    """Creates `folder` (mode 0700) and its parents. Raises UserError if it cannot be created or written to."""
    if URL.match(str(folder)):
        raise UserError(f"{folder} is not a path on a file system: mount the bucket (gcsfuse) and give that path")
    folder = Path(folder)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {folder}: permission denied")
    return folder


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` atomically: `path` is the old file or the complete new one, also after a power failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(obj, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename is on disk only after fsync of the folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_report(path: Path, report: Any) -> None:
    """Writes a report of measurements as `write_json` does; a number that is not finite is null, since JSON has none.

    Readers other than Python's reject NaN and Infinity.
    """
    write_json(path, _as_json(report))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it is missing, damaged or too large."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON:
                raise UserError(f"{path} has {size} bytes; the limit is {MAX_JSON}")
            return json.loads(file.read(size))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks the run folder for this run (in process 0). Raises UserError with host and pid of another holder."""
    if jax.process_index() != 0:
        yield
        return
    path = Path(folder) / "lock.json"
    handle = _acquire(path)
    _locks.add(handle)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        holder |= _place()
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        if handle in _locks:  # not in a forked child
            path.unlink(missing_ok=True)  # before the lock is released: the next holder creates a new file
            _locks.discard(handle)
            os.close(handle)


_locks: set[int] = set()  # the files of this process's locks


def _release_in_child() -> None:
    """A forked worker has the lock's file open too, and would hold the lock after the trainer has died."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _acquire(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _failed("open", path, error) from None
        try:
            if not _locked(handle, path):
                raise UserError(_in_use(path))
            if _same_file(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _failed(what: str, path: Path, error: OSError) -> Exception:
    return (StorageError if storage.passing(error) else UserError)(f"cannot {what} {path}: {error.strerror}")


def _locked(handle: int, path: Path) -> bool:
    """Locks the file, if no process has locked it. A lock that is held is in use, whatever process its content names.

    Where the file system has no locks, the process that the file names decides, if it can be looked up here.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise _failed("lock", path, error) from None
        return not _lives(_holder(path))


def _same_file(handle: int, path: Path) -> bool:
    """Whether `path` is still the file that was opened; its last holder may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _place() -> dict[str, str]:
    """What a pid is a number in: a start of the machine, and the PID namespace of a container."""
    found = {"boot": "", "namespace": ""}  # without /proc
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
    return found


def _holder(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # another process is writing it


def _near(holder: dict) -> bool:
    """Whether the holder's pid is a number of this boot and of this process's namespace."""
    return all(value and holder.get(name) == value for name, value in _place().items())


def _lives(holder: dict) -> bool:
    pid = holder.get("pid")
    if not _near(holder) or type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _in_use(path: Path) -> str:
    holder = _holder(path)
    who = ", ".join(f"{name} {holder.get(name, 'unknown')}" for name in ("host", "pid"))
    where = "" if not holder or _near(holder) else " (of another machine or container)"
    return f"run folder {path.parent} is in use: {who}{where}, started {holder.get('started', 'just now')}"


class Signals:
    """Turns SIGTERM and SIGINT into `requested`; a second SIGINT raises KeyboardInterrupt. Restores old handlers."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # not print, which is not reentrant: the signal may interrupt a print
        text = f"{signal.Signals(number).name}: saving and stopping; a second Ctrl-C stops at once without saving\n"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
