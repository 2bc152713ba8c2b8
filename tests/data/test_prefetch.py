"""Prefetched batches arrive in order and on the device, and every thread and process ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from test_pipeline import TOKENIZER, Numbers, same, take

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline

# ---- prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_delivers_all_in_order_on_the_device():
    with pipeline.prefetch(iter(range(20)), jax.numpy.asarray) as loader:
        assert [int(item) for item in loader] == list(range(20))
        with pytest.raises(StopIteration):
            next(loader)
    assert not prefetch_threads()


def test_prefetch_runs_ahead_by_its_depth():
    made = []
    with pipeline.prefetch((made.append(i) or i for i in range(100)), lambda item: item, depth=3) as loader:
        assert next(loader) == 0
        time.sleep(0.3)
        assert 4 <= len(made) <= 5  # one taken, three waiting, one in hand


@pytest.mark.parametrize("where", ["loader", "put"])
def test_prefetch_raises_after_the_batches_before(where):
    def load():
        yield 0
        yield 1
        if where == "loader":
            raise UserError("bad record")
        yield 2

    def put(item):
        if item == 2:
            raise UserError("bad record")
        return item

    loader = pipeline.prefetch(load(), put)
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(UserError, match="bad record"):
        next(loader)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):  # not a hang
        next(loader)


def test_prefetch_closes_early_with_its_loader():
    closed = []

    def load():
        try:
            while True:
                yield np.zeros(10)
        finally:
            closed.append(threading.current_thread().name)

    loader = pipeline.prefetch(load(), lambda item: item)
    next(loader)
    loader.close()
    loader.close()
    assert closed == ["prefetch"] and not prefetch_threads()
    with pytest.raises(KeyboardInterrupt), pipeline.prefetch(load(), lambda item: item):
        raise KeyboardInterrupt
    assert len(closed) == 2 and not prefetch_threads()


def test_prefetch_ends_with_its_object():
    loader = pipeline.prefetch(iter(int, 1), lambda item: item)
    next(loader)
    del loader
    assert not prefetch_threads()


def test_prefetch_over_batches_leaves_no_thread():
    before = threading.active_count()
    loader = pipeline.batches(Numbers(), TOKENIZER, batch=8, seed=5)
    with pipeline.prefetch(loader, lambda batch: batch) as ahead:
        assert same(next(ahead), take(1)[0])
    deadline = time.time() + 5  # Grain does not wait for its threads, they end by themselves
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


SCRIPT = """
    import signal
    import jax
    from hybridgen.data import pipeline, sources, text
    config = {"source": "shapes", "options": {"size": 100}, "resolution": 16}
    if __name__ == "__main__":
        stopped = []
        source = sources.build(config, "train")
        loader = pipeline.batches(source, text.Bytes(8), batch=4, seed=0, workers=WORKERS)
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(i))
        for i, batch in enumerate(pipeline.prefetch(loader, jax.device_put)):
            if i == 2:
                print("running", flush=True)
            if FAIL and i == 2:
                raise RuntimeError("in the loop")
            if stopped and i > stopped[0] + 20:
                break
"""


def script(tmp_path, fail, workers):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(SCRIPT).replace("WORKERS", str(workers)).replace("FAIL", str(fail)))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=env,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_program_that_fails_exits_with_its_traceback(tmp_path):
    """An exception with an unclosed prefetch gives a traceback and exit code 1, no abort and no hang."""
    program = script(tmp_path, fail=True, workers=0)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1 and errors.strip().endswith("RuntimeError: in the loop")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_worker_processes_end_with_the_program(tmp_path, signum):
    """Ctrl-C and SIGTERM reach the whole process group, but the program decides; after SIGKILL no worker remains."""
    program = script(tmp_path, fail=False, workers=2)
    try:
        assert program.stdout.readline() == "running\n"
        if signum == signal.SIGKILL:
            program.kill()
        else:
            os.killpg(program.pid, signum)
        errors = program.communicate(timeout=50)[1]  # returns when the last worker has let go of the pipe
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
    if signum == signal.SIGINT:
        assert errors.count("Traceback") == 1 and errors.strip().endswith("KeyboardInterrupt")
    elif signum == signal.SIGTERM:
        assert program.returncode == 0 and "Traceback" not in errors
