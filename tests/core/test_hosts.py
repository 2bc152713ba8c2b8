"""Several processes on this machine train, stop, fail and resume as one program would."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_cases import files_of, flip_200
from fault_cases import ends, final, log_of, logged, newest, start, steps_of, wait_for, words
from test_launch import SRUN, stub
from test_sharding import QUICK, check

ROOT = Path(__file__).parents[2]
PATIENCE = 600


def environment(**more: str) -> dict[str, str]:
    """Of a process with one device, whatever this one has."""
    settings = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + QUICK, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return os.environ | settings | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | more


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def together(count: int, *line: str) -> list[subprocess.CompletedProcess]:
    """Runs a script in `count` processes of one training; all must succeed."""
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, *line],
            cwd=ROOT,
            env=environment(HOSTS=f"{address} {count} {i}") if count > 1 else environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err[-4000:]
        done.append(subprocess.CompletedProcess(process.args, 0, out, err))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "prior"])
def test_processes_train_as_one(name):
    line = (str(ROOT / "tests/sharded_cases.py"), name, "float64", "50")
    one = json.loads(together(1, *line, '{"data": 1}')[0].stdout)
    found = [one]
    # with "tensor" the parts of one product lie on different hosts
    found += [json.loads(text) for text in _lines(together(2, *line, '{"data": 2}', '{"tensor": 2}'))]
    found += [json.loads(text) for text in _lines(together(4, *line, '{"fsdp": 2, "tensor": 2}'))]
    check(found, 1e-9, 1e-7)


def _lines(done: list[subprocess.CompletedProcess]) -> list[str]:
    assert not any("{" in process.stdout for process in done[1:])  # process 0 speaks
    return [line for line in done[0].stdout.splitlines() if line.startswith("{")]


# ---- faults, over two processes that train the small run of fault_cases.py

STEPS, EVERY = 90, 25


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """Settings of a shared compile cache for the processes of this file."""
    least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("cache")), **least)


def pair(folder: Path, cache: dict, what: dict | None = None, *more: str) -> list[subprocess.Popen]:
    """Two processes that train in `folder`."""
    who = ["--coordinator", free_address(), "--num-processes", "2", "--process-id"]
    return [start(folder, words(STEPS, EVERY), what, *more, *who, str(i), **cache) for i in (0, 1)]


def both_end(processes: list, code: int = 0, seconds: float = 200) -> list[tuple[str, str]]:
    try:
        return [ends(process, code, seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    both_end(pair(folder, cache))
    assert steps_of(folder) == list(range(1, STEPS + 1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reported", [(1,), (0, 1)])
def test_sigterm_to_one_or_both(whole, cache, tmp_path, reported):
    """There is a checkpoint at the last finished step, and no step runs twice."""
    processes = pair(tmp_path, cache)
    wait_for(lambda: logged(tmp_path) >= 10, "no steps")
    requested = time.monotonic()
    for i in reported:
        processes[i].send_signal(signal.SIGTERM)
    both_end(processes, 130, 20)
    took = time.monotonic() - requested
    stopped = newest(tmp_path)
    print(f"stopped at {stopped} after {took:.1f} s")
    assert took < 10 and 10 <= stopped < STEPS and stopped % EVERY
    assert steps_of(tmp_path) == list(range(1, stopped + 1))
    (out, _), _ = both_end(pair(tmp_path, cache))
    assert f"steps {stopped} to {STEPS}" in out and not re.search(rf"^train +{stopped}/", out, re.M)
    assert log_of(tmp_path) == log_of(whole) and final(tmp_path, STEPS) == final(whole, STEPS)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, cache) -> tuple[Path, Path]:
    """(a run of one process on one device, the same run stopped after its first checkpoint)."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "off")]
    ends(start(folders[0], words(STEPS, EVERY), None, **cache))
    ends(start(folders[1], words(STEPS, EVERY), {"fail": EVERY + 10}, **cache), 1)
    assert newest(folders[1]) == EVERY
    return folders[0], folders[1]


ELSEWHERE = {
    "two processes": [],
    "two processes, tensor": ["mesh.data=1", "mesh.tensor=2"],
    "four devices, fed by workers": ["mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1", "data.workers=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_run_goes_on_elsewhere(broken_off, cache, tmp_path, where):
    """Every array is restored bit for bit with any sharding, followed by the same samples in the same order."""
    one, off = broken_off
    folder, more = shutil.copytree(off, tmp_path / "run"), [f"--config.{word}" for word in ELSEWHERE[where]]
    what = {"begun": True, "fail": EVERY + 6}
    if "processes" in where:
        ((out, _), _) = both_end(pair(folder, cache, what, *more), 1)
    else:
        flags = cache["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4" * ("four devices" in where)
        out, _ = ends(start(folder, words(STEPS, EVERY), what, *more, **cache | {"XLA_FLAGS": flags}), 1)
    assert f"steps {EVERY} to {STEPS}" in out and f"begun: {final(off, EVERY)}\n" in out
    losses = [{line["step"]: line["loss"] for line in log_of(path)} for path in (one, folder)]
    steps = range(EVERY + 1, EVERY + 7)
    wanted, found = ([each[step] for step in steps] for each in losses)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert min(abs(a / b - 1) for a, b in itertools.combinations(wanted, 2)) > 1e-3  # others would be seen


@pytest.mark.slow
def test_a_killed_peer_restarts_all(whole, cache, tmp_path):
    line = [ROOT / "launch" / "local.sh", "--processes", "2", "--grace", "2", "--chip", "none", "--"]
    line += ["--config", words(STEPS, EVERY), "--workdir", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    supervisor = subprocess.Popen(line, env=cache | {"PYTHON": sys.executable}, **pipes)
    try:
        wait_for(lambda: logged(tmp_path / "run") >= EVERY + 8, "no steps")
        pid = process_of(tmp_path / "run", 1)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: process_of(tmp_path / "run", 1) not in (None, pid), "no restart", 60)
        print(f"both started again after {time.monotonic() - killed:.1f} s")
        out, err = ends(supervisor)
    finally:
        supervisor.terminate()
        supervisor.communicate()
    assert "restart 1 of 10" in err and "restart 2" not in err and "steps 25 to 90" in out
    assert log_of(tmp_path / "run") == log_of(whole) and final(tmp_path / "run", STEPS) == final(whole, STEPS)


@pytest.mark.slow
def test_slurm_trains_with_a_process_a_node(whole, cache, tmp_path):
    """The batch script and the trainer itself; `srun` starts both processes here."""
    job = int(free_address().rpartition(":")[2]) % 10000  # its port is of its number
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        stub(tmp_path / "bin", name, text)
    settings = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "2"}
    settings |= {"SLURM_STEP_NODELIST": "x", "SLURM_LOCALID": "0", "RECORD": str(tmp_path / "record")}
    settings |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    line = ["bash", ROOT / "launch" / "slurm.sbatch", "--config", words(STEPS, EVERY), "--workdir", tmp_path / "run"]
    done = subprocess.run(line, env=cache | settings, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert log_of(tmp_path / "run") == log_of(whole) and final(tmp_path / "run", STEPS) == final(whole, STEPS)


def process_of(folder: Path, number: int) -> int | None:
    """Pid of this process of the run in `folder`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace").split("\0")
            if str(folder) in line and line[-3:-1] == ["--process-id", str(number)]:
                return int(path.parent.name)
    return None


@pytest.mark.slow
def test_bad_batches_of_one_process_roll_all_back(cache, tmp_path):
    both_end(pair(tmp_path / "bad", cache, {"nan": [31, 32, 33], "process": 1}))
    assert json.loads((tmp_path / "bad" / "skipped.json").read_text()) == [[25, 34]]
    both_end(pair(tmp_path / "known", cache, None, "--config.health.skip=((25,34),)"))
    assert final(tmp_path / "bad", STEPS) == final(tmp_path / "known", STEPS)
    assert log_of(tmp_path / "bad") == log_of(tmp_path / "known") and steps_of(tmp_path / "bad")[24:27] == [25, 35, 36]


HANG = 12


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a loader", "process 0 stopped", "process 1 stopped"])
def test_a_hang_ends_with_stacks_and_the_straggler(cache, tmp_path, how):
    what = {"hang": 12, "process": 1} if how == "a loader" else {}
    processes = pair(tmp_path, cache, what, f"--config.health.hang={HANG}")
    late = 0 if "0" in how else 1
    try:
        wait_for(lambda: logged(tmp_path) >= 11, "no steps")
        if how != "a loader":
            processes[late].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        out, err = ends(processes[1 - late], 42, 60)
        took = time.monotonic() - began
        if how == "a loader":
            err = ends(processes[late], 42, 10)[1] + err
            assert "batches" in err and "time.sleep" not in err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    print(f"ended after {took:.1f} s")
    assert HANG - 2 < took < HANG + 5
    assert "Thread 0x" in err and "train.py" in err and "the stacks follow" in err
    assert f"straggler: process {late} on host {socket.gethostname()} (pid {processes[late].pid})" in err
    assert f"straggler: process {1 - late} " not in err


@pytest.mark.slow
def test_any_flipped_bit_of_what_two_processes_saved_is_found(whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / str(STEPS)
    shares = [set(json.loads((folder / name).read_text())["files"]) for name in ("manifest.json", "manifest.1.json")]
    others = {str(path.relative_to(folder)) for path in files_of(folder)} - {"manifest.json", "manifest.1.json"}
    assert shares[0] | shares[1] == others and not shares[0] & shares[1] and abs(len(shares[0]) - len(shares[1])) <= 1
    flip_200(tmp_path / "checkpoints", STEPS)
