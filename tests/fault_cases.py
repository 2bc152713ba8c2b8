"""Training runs with injected faults, shared by the tests of faults; as a program, one such run.

    python tests/fault_cases.py '{"nan": [7, 8]}' --config ... --workdir ...

Faults by number of the global batch: "nan" and "times" change its images (to NaN, by a factor), "hang" blocks it;
"process" restricts them to one process. Faults by step of the loop: "fail" raises, "full" (first, end, bytes) limits
the size of files. Further entries: "data": a source and its options; "compiled": prints how many programs were found in
the compile cache, and how many were not; "begun": prints the digest of the first state.
"""

import atexit
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from hybridgen import cli, train
from hybridgen.core import config, placement
from hybridgen.data import pipeline
from hybridgen.runs import checkpoint
from hybridgen.runs.checkpoint import Checkpointer

ROOT = Path(__file__).parents[1]
# all that a state may hold: moments, an average, and a codebook that learns without gradients; some ms a step
SMALL = (
    f"{ROOT}/configs/tokenizers/vq.py:vq,batch=4,data.resolution=16,model.channels=(16,),model.attention=False,"
    "model.quantizer.codebook_size=32,ema.decay=0.9,log.every=1,checkpoint.keep=3"
)


def words(steps: int, every: int, *more: str) -> str:
    """The small config for a command line, with a number of steps and a checkpoint every `every` steps."""
    return ",".join([SMALL, f"steps={steps}", f"checkpoint.every={every}", *more])


MEASURED = re.compile("second|mfu|memory")  # of the machine, not of the run


def log_of(folder: Path) -> list[dict]:
    """The metrics log without its times and notes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not MEASURED.search(name)} for line in lines if "note" not in line]


def notes_of(folder: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["note"], line["text"]) for line in lines if "note" in line]


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in log_of(folder) if "loss" in line]


def state_of(folder: Path, step: int) -> dict[str, Any]:
    """The whole state of a checkpoint, which must verify, as numpy."""
    with Checkpointer(folder / "checkpoints", read_only=True) as saved:
        model = saved.restore_params(step)
        return model | saved._read(step, "training", saved._metadata(step, "training"), numpy=True)


def final(folder: Path, step: int) -> str:
    """Digest of the whole state of a checkpoint."""
    state = state_of(folder, step)
    assert {"params", "ema", "extra", "opt", "step", "health"} == set(state)
    return checkpoint.digest(state)


def newest(folder: Path) -> int | None:
    with Checkpointer(folder / "checkpoints", read_only=True) as saved:
        return saved.newest_good(report=print)


def happening(make: Callable, nan=(), times=(), hang=None, process=None) -> Callable:
    """`pipeline.batches` with injected faults."""

    def batches(*args, start=0, shuffle=True, **options):
        here = shuffle and process in (None, jax.process_index())
        for number, batch in enumerate(make(*args, start=start, shuffle=shuffle, **options), start):
            if here and number == hang:
                time.sleep(1000)
            factor = np.nan if number in nan else dict(times).get(number, 1)
            yield batch | {"image": batch["image"] * np.float32(factor)} if here else batch

    return batches


def looking(look: Callable, fail: int = -1, full: tuple = (-1, -1, 0), begun: bool = False) -> Callable:
    """`train.look` with injected faults."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def seen(job, state, step, due):
        nonlocal begun
        if begun:
            begun = False
            print("begun:", checkpoint.digest(placement.whole(state)), flush=True)
        if step == fail:
            raise RuntimeError(f"step {step} fails")
        if step == full[0]:
            job.saved.wait_until_saved()
            resource.setrlimit(resource.RLIMIT_FSIZE, (full[2], hard))
        if step == full[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        look(job, state, step, due)

    return seen


def on_data(config: ConfigDict, source: str, options: dict) -> ConfigDict:
    with config.unlocked():
        config.data.source, config.data.options = source, ConfigDict(options)
    return config


def start(folder: Path, config: str, what: dict | None = None, *more: str, **environment: str) -> subprocess.Popen:
    """The training command in a process of its own."""
    line = [sys.executable, str(ROOT / "tests" / "fault_cases.py"), json.dumps(what or {})]
    line += ["--config", config, "--workdir", str(folder), *more]
    settings = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=os.environ | settings, **pipes)


def ends(process: subprocess.Popen, code: int = 0, seconds: float = 200) -> tuple[str, str]:
    """(stdout, stderr) of a process that must exit with this code."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"goes on after {seconds} s: {out[-1000:]} {err[-3000:]}") from None
    assert process.returncode == code, f"{process.returncode}: {out[-1000:]} {err[-3000:]}"
    return out, err


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


def logged(folder: Path) -> int:
    """The newest step in the log of a running process."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def main() -> None:
    what = json.loads(sys.argv.pop(1))
    train.look = looking(train.look, **{name: what.pop(name) for name in ("fail", "full", "begun") if name in what})
    if "data" in what:
        load, data = config.load, what.pop("data")
        config.load = lambda *line: on_data(load(*line), *data)
    if what.pop("compiled", False):
        counts: dict[str, int] = {}
        jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
        names = [f"/jax/compilation_cache/cache_{name}" for name in ("hits", "misses")]
        atexit.register(lambda: print("found, not found:", *(counts.get(name, 0) for name in names)))
    pipeline.batches = happening(pipeline.batches, **what)
    cli.command(train.main)


if __name__ == "__main__":
    main()
