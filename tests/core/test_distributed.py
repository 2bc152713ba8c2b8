"""Processes connect, name missing processes, agree, and report stragglers. Whole trainings are in test_hosts.py."""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hybridgen.cli import command, make_parser
from hybridgen.core import arguments, distributed, meshes, placement
from hybridgen.core.errors import PeerError, UserError
from hybridgen.training import watchdog

ROOT = Path(__file__).parents[2]


def options(*line: str) -> argparse.Namespace:
    parser = make_parser("train", "Trains.")
    arguments.add_processes(parser)
    return parser.parse_args(line)


def free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def meet_all(address: str, processes: list[tuple[int, int]], timeout: float = 10) -> dict:
    """{process: "met", or the error} of threads that meet."""
    out = {}

    def one(process: int, count: int) -> None:
        try:
            distributed.meet(address, count, process, timeout)
            out[process] = "met"
        except (UserError, PeerError) as error:
            out[process] = error

    threads = [threading.Thread(target=one, args=pair) for pair in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 10)
    return out


def test_without_options_there_is_one_process():
    distributed.start(options())
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--coordinator", "h:1"], "must be given together"),
        (
            ["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"],
            "process-id 2 is not within 0 and --num-processes 2 - 1",
        ),
        (
            ["--coordinator", "h:1", "--num-processes", "0", "--process-id", "0"],
            "not within 0 and --num-processes 0 - 1",
        ),
        (["--coordinator", "h", "--num-processes", "2", "--process-id", "0"], "'h' is not HOST:PORT"),
        (["--coordinator", "h:99999", "--num-processes", "2", "--process-id", "1"], "is not HOST:PORT"),
        (
            ["--coordinator", "203.0.113.1:80", "--num-processes", "2", "--process-id", "0"],
            "cannot listen at this address",
        ),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "1", "--init-timeout", "0"], "init-timeout"),
    ],
)
def test_options_that_do_not_fit(line, says):
    with pytest.raises(UserError, match=says):
        distributed.start(options(*line))


def test_all_go_on_when_all_have_come():
    assert meet_all(free(), [(0, 4), (1, 4), (2, 4), (3, 4)]) == dict.fromkeys(range(4), "met")


def test_the_others_may_come_first():
    address, out = free(), {}
    late = threading.Thread(target=lambda: out.update(meet_all(address, [(1, 2)])))
    late.start()
    time.sleep(0.7)
    assert meet_all(address, [(0, 2)]) == {0: "met"}
    late.join()
    assert out == {1: "met"}


def test_a_process_that_does_not_fit_is_told():
    out = meet_all(free(), [(0, 2), (1, 3)], timeout=2)
    assert isinstance(out[1], UserError) and "process 1 of 3 does not fit" in str(out[1])
    assert isinstance(out[0], PeerError) and "1 of 2 processes (process 1) did not connect in time" in str(out[0])


def test_a_stranger_at_the_port_harms_nobody():
    address = free()
    host, port = address.split(":")
    out = {}
    first = threading.Thread(target=lambda: out.update(meet_all(address, [(0, 2)])))
    first.start()
    for message in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 3000, b'{"process": 7, "of": 2}'):
        while True:
            try:
                with socket.create_connection((host, int(port)), timeout=2) as link:
                    link.sendall(message)
                    assert "error" in json.loads(link.recv(4096))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    out.update(meet_all(address, [(1, 2)]))
    first.join()
    assert out == {0: "met", 1: "met"}


def test_who_is_missing_is_named_with_its_command(capfd, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 0.3)
    words = ["hybridgen", "train", "--config", "a b.py", "--process-id", "0", "--num-processes=3"]
    monkeypatch.setattr(sys, "argv", words)
    out = meet_all(free(), [(0, 3), (2, 3)], timeout=1.5)
    assert "1 of 3 processes (process 1) did not connect in time" in str(out[0])
    err = capfd.readouterr().err
    assert "waiting for 1 of 3 processes (process 1)" in err
    assert "hybridgen train --config 'a b.py' --num-processes=3 --process-id 1" in err
    out = meet_all(free(), [(2, 3)], timeout=1.0)
    assert "process 0" in str(out[2])
    assert "--process-id 0" in capfd.readouterr().err


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
UNDER_SLURM = """
import sys, jax
from hybridgen.core import arguments, distributed
from hybridgen.cli import make_parser
parser = make_parser("train", "Trains.")
arguments.add_processes(parser)
distributed.PATIENCE = 1.0
distributed.start(parser.parse_args(sys.argv[1:]))
print(jax.process_index(), jax.process_count(), jax.config._read("jax_cuda_visible_devices"), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("tasks", "explicit", "shown"),
    [("1(x2)", True, "all"), ("1(x2)", False, "all"), ("2", False, "0")],  # JAX: the GPU of a task's number on its node
    ids=["told", "found", "found, two on a node"],
)
def test_a_task_of_slurm_has_the_gpus_of_its_node(tasks, explicit, shown):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    who = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"] if explicit else []
    started = []
    for task in (0, 1):
        given = {"SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks}
        line = [sys.executable, "-c", UNDER_SLURM, *who, *([str(task)] if explicit else [])]
        settings = os.environ | SLURM | given | {"JAX_COORDINATOR_PORT": str(port), "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(line, env=settings, stderr=subprocess.PIPE, text=True))
    for task, process in enumerate(started):
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and err.splitlines()[-1] == f"{task} 2 {shown}", err


def test_under_slurm_the_missing_are_named_too(monkeypatch, capfd):
    """The message has the command as given, which contains no process numbers."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    given = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3", "JAX_COORDINATOR_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PATIENCE", 0.3)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a"])
    with pytest.raises(PeerError, match=r"2 of 3 processes \(processes 1, 2\) did not connect in time"):
        distributed.start(options("--init-timeout", "1"))
    reported = "waiting for 2 of 3 processes (processes 1, 2); start it with\n  hybridgen train --config a\n"
    assert reported in capfd.readouterr().err


def test_where_nothing_says_who_the_others_are():
    with pytest.raises(UserError, match="the environment does not describe the other processes; give --coordinator"):
        distributed.start(options("--distributed"))


def test_it_listens_where_it_is_told_only():
    address = free()
    line = [sys.executable, "-c", f"from hybridgen.core import distributed; distributed.meet({address!r}, 2, 0, 6)"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    port = f":{int(address.split(':')[1]):04X}"
    listening = []
    while process.poll() is None and not listening:
        rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()]
        listening = [row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"]
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert listening == [f"0100007F{port}"]


def test_a_lost_peer_is_one_line_and_exit_code_1(capsys):
    def main() -> int:
        raise PeerError("process 1 did not come")

    with pytest.raises(SystemExit) as stop:
        command(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: process 1 did not come\n"


def test_alone_it_agrees_with_itself():
    assert distributed.Agreement(meshes.make_mesh({"data": -1})).most_of(3) == 3
    assert distributed.exchange("name", "text") == ["text"]


def test_a_name_may_be_used_again(monkeypatch):
    """Stages of a recipe reuse names, but the coordination service accepts each key once."""
    message: dict[str, str] = {f"hybridgen/stage/{turn}/1": f"other {turn}" for turn in (1, 2)}

    class Service:
        def key_value_set(self, key: str, text: str) -> None:
            assert message.setdefault(key, text) is text, f"{key} is there already"

        def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
            return message[key]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "client", Service)
    assert distributed.exchange("stage", "mine 1") == ["mine 1", "other 1"]
    assert distributed.exchange("stage", "mine 2") == ["mine 2", "other 2"]


def message(step: int, doing: str, when: float = 100.0) -> list:
    return [step, doing, 31.0, "tpu-7", 4242, when]


@pytest.mark.parametrize(
    ("where", "late"),
    [
        ({0: message(8, "step"), 1: message(7, "step"), 2: message(8, "step")}, [1]),  # a step behind
        (
            {0: message(8, "step"), 1: message(8, "data"), 2: message(8, "step")},
            [1],
        ),  # waits for its data, the others for it
        (
            {0: message(8, "step"), 1: message(8, "step", 50.0), 2: message(8, "step")},
            [1],
        ),  # stopped: says nothing any more
        ({0: message(8, "step"), 1: message(8, "step")}, []),
    ],
)
def test_the_straggler_is_named(where, late):
    lines = watchdog.behind(where, lately=90.0)
    named = [i for i in where if any(f"process {i} on host tpu-7 (pid 4242)" in line for line in lines)]
    assert named == late
    assert late or "there is no straggler" in lines[0]


def test_places_of_several_processes(monkeypatch):
    """`put` for several processes, which places each piece, gives the same as device_put."""
    mesh = meshes.make_mesh({"data": -1})
    tree = {"a": np.arange(24.0).reshape(8, 3), "b": np.int32(7)}
    places = {"a": placement.batch_sharding(mesh), "b": placement.replicated(mesh)}
    want = placement.put(tree, places)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = placement.put(tree, places)
    for name in tree:
        assert found[name].sharding == want[name].sharding
        assert np.array_equal(found[name], want[name])


@pytest.mark.parametrize(
    ("file", "steps", "ends"),
    [
        ("jax/_src/compiler.py", 0, False),
        ("jax/_src/compiler.py", 9, False),  # the first evaluation
        ("jax/_src/interpreters/mlir.py", 0, False),
        ("jax/_src/array.py", 0, True),
        ("hybridgen/data/pipeline.py", 0, True),
    ],
)
def test_compiling_is_no_hang(file, steps, ends, monkeypatch):
    """Even with a short timeout; but a compilation of ten minutes is a hang."""
    work = busy(0.7, file)
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, still: ended.append(still))
    with watchdog.Watchdog(0.2) as dog:
        for step in range(steps + 1):
            dog.beat(step, "step")
        exec(work)
        dog.beat(steps, "step")
    assert bool(ended) == ends and all(0.2 < still < 0.8 for still in ended)
    monkeypatch.setattr(watchdog, "START", 0.3)
    with watchdog.Watchdog(0.2):
        exec(work)
    assert ended


def busy(seconds, file):
    """Code that is busy so long in a file of a package."""
    return compile(f"import time; time.sleep({seconds})", str(Path(jax.__file__).parents[1] / file), "exec")


@pytest.mark.parametrize(("processes", "steps", "ends"), [(2, 0, False), (2, 9, True), (1, 0, True)])
def test_others_may_compile_more_slowly(monkeypatch, processes, steps, ends):
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, still: ended.append(still))
    monkeypatch.setattr(watchdog.Watchdog, "_tell", lambda self: None)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with watchdog.Watchdog(0.2) as dog:
        exec(busy(0.5, "jax/_src/compiler.py"))
        for step in range(steps + 1):
            dog.beat(step, "step")
        exec(busy(0.7, "jax/_src/array.py"))  # where it waits for them
    assert bool(ended) == ends
