"""The run folder: one trainer at a time, atomic files, and signals that request a stop."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hybridgen import recipe, train
from hybridgen.core.errors import StorageError, UserError
from hybridgen.runs import folder as run_folder

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
from hybridgen.runs import folder as run_folder
with run_folder.lock(Path(sys.argv[1])):
    print("held", flush=True)
    {work}
"""


ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def holder(folder: Path, work: str = "time.sleep(60)") -> subprocess.Popen:
    words = [sys.executable, "-c", HOLDER.format(work=work), str(folder)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_trainer_is_refused_by_host_and_pid(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError) as error, run_folder.lock(tmp_path):
            pass
        assert f"host {socket.gethostname()}, pid {process.pid}" in str(error.value) and "\n" not in str(error.value)
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == process.pid  # as it was
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "lock.json").exists()  # killed: not tidied
    with run_folder.lock(tmp_path):  # and yet free
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_a_worker_of_a_dead_trainer_does_not_hold_the_folder(tmp_path):
    process = holder(tmp_path, "import os\n    pid = os.fork()\n    pid and print(pid, flush=True)\n    time.sleep(60)")
    worker = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives, with the lock's file open
        with run_folder.lock(tmp_path):
            assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


HERE = {"host": socket.gethostname(), "boot": "b", "namespace": "pid:[1]", "started": "now"}
DEAD = 2**22 + 1  # above the largest pid


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"pid": DEAD}, {"host": "other", "pid": DEAD}, {"pid": os.getpid()}, {"pid": DEAD, "boot": "other"}),
        *({"pid": DEAD, "namespace": "pid:[2]"}, {"pid": "1"}, {"pid": -1}, {"pid": None, "boot": None}, [], None),
    ],
    ids=range(11),
)
def test_a_held_lock_is_in_use_whatever_it_says(content, tmp_path, monkeypatch):
    """As between two containers with one hostname, where the pid of one is none in the other."""
    monkeypatch.setattr(run_folder, "_place", lambda: {name: HERE[name] for name in ("boot", "namespace")})
    body = json.dumps(HERE | content if isinstance(content, dict) else content)
    with (tmp_path / "lock.json").open("w", encoding="utf-8") as file:
        file.write(body)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use: host .*, pid .*, started"), run_folder.lock(tmp_path):
            pass
    assert (tmp_path / "lock.json").read_text(encoding="utf-8") == body
    with run_folder.lock(tmp_path):  # released
        pass


def test_a_trainer_in_another_container_is_seen(tmp_path):
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    process = holder(tmp_path)
    check = "import sys, pathlib; from hybridgen.runs import folder\nwith folder.lock(pathlib.Path(sys.argv[1])): pass"
    line = [*words, sys.executable, "-c", check, str(tmp_path)]
    try:
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert done.returncode and f"pid {process.pid} (of another machine or container)" in done.stderr


@pytest.mark.parametrize(
    "changes, taken",
    [
        ({}, False),
        ({"pid": DEAD}, True),
        ({"boot": "other"}, True),
        ({"namespace": "pid:[2]"}, True),
        ({"pid": 0}, True),
        ({"pid": True}, True),
    ],
    ids=str,
)
def test_without_locks_a_pid_counts_only_where_it_is_one(changes, taken, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder, "_place", lambda: {name: HERE[name] for name in ("boot", "namespace")})
    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "lock.json").write_text(json.dumps(HERE | {"pid": os.getpid()} | changes), encoding="utf-8")
    with contextlib.nullcontext() if taken else pytest.raises(UserError, match="is in use"):
        with run_folder.lock(tmp_path):
            pass


def test_a_lock_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match=r"cannot lock .*lock\.json: Input/output error"), run_folder.lock(tmp_path):
        pass


def test_the_lock_is_released_by_an_exception_and_refused_within_a_process(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder.lock(tmp_path):
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), run_folder.lock(tmp_path):
            pass
        _ = 1 / 0
    files = len(os.listdir("/proc/self/fd"))
    with run_folder.lock(tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_lock_that_is_none(tmp_path):
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(UserError, match=r"cannot open .*lock\.json: Is a directory"), run_folder.lock(tmp_path):
        pass


def test_sigterm_and_sigint_ask_once():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with run_folder.Signals() as signals:
            assert not signals.requested
            os.kill(os.getpid(), number)
            assert signals.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # impatience of a scheduler does not lose the save
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_signals_in_a_thread_leave_the_handlers_alone():
    found = []

    def work():
        with run_folder.Signals() as signals:
            found.append((signals.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_folder_is_the_owners(tmp_path):
    old = os.umask(0o022)
    try:
        folder = run_folder.make(tmp_path / "runs" / "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o750)
    assert run_folder.make(folder) == folder and stat.S_IMODE(folder.stat().st_mode) == 0o750  # the owner's wish
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot create the folder"):
            run_folder.make(wrong)
    (tmp_path / "a:b").mkdir()
    assert run_folder.make(tmp_path / "a:b" / "run").is_dir()  # a colon alone is a name


@pytest.mark.parametrize("main", [train.main, recipe.main])
def test_an_empty_path_is_no_run_folder(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir: the path is empty"):
        main(["--config", "configs/tokenizers/vq.py:tiny", "--workdir="])


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for where in (Path("gs://bucket/run"), "gs://bucket/run", Path("s3://bucket"), Path("hdfs://host/run")):
        with pytest.raises(UserError, match="not a path on a file system"):
            run_folder.make(where)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        run_folder.make(tmp_path)


def test_json_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    run_folder.write_json(path, {"a": [1, "ä"]})
    assert run_folder.read_json(path) == {"a": [1, "ä"]}
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": 1, "b": object()})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        run_folder.write_json(path, {"b": 2})
    assert run_folder.read_json(path) == {"a": [1, "ä"]} and os.listdir(tmp_path) == ["config.json"]
    with pytest.raises(UserError, match="cannot read"):
        run_folder.read_json(tmp_path / "none.json")
    path.write_text('{"a": ')
    with pytest.raises(UserError, match="is not valid JSON"):
        run_folder.read_json(path)
