"""Several processes on this machine train, stop, break and go on as one program would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_sharding import QUICK, check

ROOT = Path(__file__).parents[1]
WAIT = 300


def environment(**more: str) -> dict[str, str]:
    """Of a process with one device, whatever this one has."""
    settings = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + QUICK, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return os.environ | settings | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | more


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def together(count: int, *line: str) -> list[subprocess.CompletedProcess]:
    """A script in `count` processes that train as one; all must end well."""
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
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0, err[-4000:]
        done.append(subprocess.CompletedProcess(process.args, 0, out, err))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "prior", "cascade"])
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
