"""Several processes sample and evaluate together as one does: each image once, equal up to rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sharding import QUICK

from hybridgen.core.trees import flatten as flat

ROOT = Path(__file__).parents[2]
PRIOR = "configs/ar/raster.py"


def run(count: int, module: str, *words: str) -> None:
    """Runs a command in `count` processes; all must succeed."""
    settings = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + QUICK, "JAX_PLATFORMS": "cpu"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    line = [sys.executable, "-m", f"hybridgen.{module}", *words]
    hosts = [["--coordinator", address, "--num-processes", str(count), "--process-id", str(i)] for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(line + (host if count > 1 else []), cwd=ROOT, env=os.environ | settings, **pipes)
        for host in hosts
    ]
    for process in started:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-4000:]


def found(folder: Path) -> dict[str, np.ndarray | dict]:
    """All files of a folder: pictures as numbers, reports as they are."""
    files = sorted(folder.rglob("*.*"))
    out = {path.name: np.asarray(Image.open(path)).astype(int) for path in files if path.suffix == ".png"}
    return out | {path.name: json.loads(path.read_text()) for path in files if path.suffix == ".json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "words"),
    [
        # 5 pictures in batches of 4: the last is padded, also to what two processes share
        ("sample", ["--prompt", "a red circle", "--count", "5", "--batch", "3", "--guidance", "2"]),
        ("evaluate", ["--count", "6", "--batch", "4"]),
    ],
)
def test_two_processes_draw_the_pictures_of_one(tiny_run, tmp_path, module, words):
    prior = str(tiny_run(PRIOR).folder)
    for count in (1, 2):
        run(count, module, "--run", prior, "--out", str(tmp_path / str(count)), *words)
    one, two = (found(tmp_path / str(count)) for count in (1, 2))
    assert set(one) == set(two) and one
    for name, value in one.items():
        if name.endswith(".png"):  # a product of half as many rows rounds otherwise: a level in a pixel here and there
            assert np.abs(value - two[name]).max() <= 1 and (value != two[name]).mean() < 1e-3, name
        else:
            same = {path: pytest.approx(x, rel=1e-6) if isinstance(x, float) else x for path, x in flat(value).items()}
            assert flat(two[name]) == same, name
