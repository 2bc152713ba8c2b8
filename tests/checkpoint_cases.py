"""Helpers for checkpoint tests: a small state with every dtype, three saved steps, ways to damage them."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.runs.checkpoint import Checkpointer, digest

ROOT = Path(__file__).parents[1]


def state_of(seed: int = 0) -> dict:
    bits = np.random.default_rng(seed).integers(0, 2**16, (7, 6), dtype=np.uint16)  # nan, inf and denormals too
    return {
        "step": jnp.uint32(seed),
        "params": {
            "blocks": {"kernel": jnp.asarray(bits.view(jnp.bfloat16)), "bias": jnp.arange(5.0) + seed},
            "codes": jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, 9, dtype=np.uint32)),
        },
        "opt": {"group": {"mu": jnp.full((3, 4), -0.0), "count": jnp.int32(-seed), "flag": jnp.array([True, False])}},
        "ema": {},
        "extra": {"usage": jnp.arange(4), "empty": {}},
    }


def abstract(tree: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(a: dict, b: dict) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and digest(a) == digest(b)


def three_steps(directory: Path) -> Path:
    """Steps 1, 2 and 3, as `state_of` makes them."""
    with Checkpointer(directory, keep=3, fingerprint={"config": {"lr": 1}}) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step), meta={"parts": {"tokenizer": "abc"}})
    return directory


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def script(code: str, *args: object, env: dict | None = None) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | (env or {})
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out


def empty_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "manifest.json"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def flip_200(checkpoints: Path, step: int) -> None:
    """200 random bits of a step of training, in turn over its files: each is found and its file named."""
    chance, folder = random.Random(step), checkpoints / str(step)
    files = [path for path in files_of(folder) if path.stat().st_size]
    with Checkpointer(checkpoints, keep=9) as saved:
        for trial in range(200):
            path = files[trial % len(files)]
            bit = chance.randrange(8 * path.stat().st_size)
            flip(path, bit)
            problems = saved.verify(step)
            assert problems and problems[0].startswith(str(path.relative_to(folder))), (path, bit, problems)
            if trial == 199:
                began, lines = time.perf_counter(), []
                assert saved.newest_good(report=lines.append) not in (None, step)
                assert time.perf_counter() - began < 5 and str(path.relative_to(folder)) in lines[0]
            flip(path, bit)
        assert saved.verify(step) == []
