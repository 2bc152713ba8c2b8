"""A run that was killed, or goes on from another, is the run that it is to be: bit for bit, or refused in words."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from hybridgen import checkpoint, config, manifest, train
from hybridgen.checkpoint import Checkpointer
from hybridgen.errors import UserError
from hybridgen.experiment import load

ROOT = Path(__file__).parents[1]
STEPS = 150
# all that a state may hold: moments, an average, and a codebook that learns without gradients
SMALL = (
    f"{ROOT}/configs/tokenizers/vq.py:vq,steps={STEPS},batch=8,model.channels=(16,),model.attention=False,model.codes=64,"
    "ema.decay=0.9,log.every=1,checkpoint.every=5,checkpoint.keep=3"
)


def start(folder: Path) -> subprocess.Popen:
    line = [sys.executable, "-m", "hybridgen.train", "--config", SMALL, "--workdir", str(folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, **quiet)


def log_of(folder: Path) -> list[dict]:
    """The metrics log without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if "second" not in name} for line in lines]


def final(folder: Path, step: int = STEPS) -> str:
    with Checkpointer(folder / "checkpoints", read_only=True) as saved:
        return checkpoint.digest(saved.restore_params(step)) + json.dumps(_training(folder, step))


def _training(folder: Path, step: int) -> dict:
    """Digests of the rest of a state: optimiser, step and health."""
    files = manifest.read(folder / "checkpoints" / str(step), step)
    assert any(name.startswith("training/") for name in files)
    with Checkpointer(folder / "checkpoints", read_only=True) as saved:
        tree = saved._metadata(step, "training")
        return {"training": checkpoint.digest(saved._read(step, "training", tree, numpy=True))}


def kill(folder: Path, chance: random.Random, inside_a_save: bool) -> None:
    """Starts the run, or goes on with it, and kills it at a moment of chance."""
    process = start(folder)
    try:
        for line in process.stdout:
            if re.match(rf"train +\d+/{STEPS} ", line):
                break
        time.sleep(chance.uniform(0.3, 2.0))  # a save takes a part of a second
        limit = time.monotonic() + 20
        while inside_a_save and process.poll() is None and time.monotonic() < limit:
            if any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_random_moments_it_is_the_uninterrupted_run(tmp_path):
    assert start(tmp_path / "whole").wait(timeout=300) == 0
    chance, folder = random.Random(3), tmp_path / "killed"
    reached = []
    for number in range(5):
        kill(folder, chance, inside_a_save=number % 2 == 1)
        with Checkpointer(folder / "checkpoints", read_only=True) as saved:
            reached.append(saved.newest_good(report=print) or 0)
    assert reached == sorted(reached) and 0 < reached[-1] < STEPS, "killed after its end: nothing was tested"
    assert start(folder).wait(timeout=300) == 0
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert final(folder) == final(tmp_path / "whole")


def config_of(path: str, *overrides: str):
    return config.load(f"{ROOT}/{path}", [*overrides])


def test_a_part_that_was_swapped_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run("configs/tokenizers/vq.py").folder, tmp_path / "tokenizer")
    words = [f"parts.tokenizer={tmp_path / 'tokenizer'}", "log.every=1", "model.width=32", "model.depth=1"]
    assert train.run(config_of("configs/ar/raster.py:tiny", *words, "steps=2"), tmp_path / "prior")
    before = sorted(path.name for path in (tmp_path / "prior").rglob("*"))
    shutil.rmtree(tmp_path / "tokenizer")
    assert train.run(config_of("configs/tokenizers/vq.py:tiny", "steps=1", "seed=1"), tmp_path / "tokenizer")
    longer = config_of("configs/ar/raster.py:tiny", *words, "steps=4")
    with pytest.raises(UserError, match=r"parts\.tokenizer was"):
        train.run(longer, tmp_path / "prior", allow=("config.steps",))
    assert sorted(path.name for path in (tmp_path / "prior").rglob("*")) == before
    assert train.run(longer, tmp_path / "prior", allow=("config.steps", "parts.tokenizer"))


def test_init_from_a_run(tmp_path):
    """The whole, with the codebook that is no parameter; a subtree; and subtrees that are not there."""
    words = ["steps=3", "batch=4", "model.channels=(16,)", "model.attention=False", "model.codes=32"]
    first = config_of("configs/tokenizers/vq.py:vq", *words)
    assert train.run(first, tmp_path / "first")
    source = load(tmp_path / "first").part

    def begun(name: str, init_from: dict, **changes):
        second = config_of("configs/tokenizers/vq.py:vq", *words, "steps=0", "seed=1").copy_and_resolve_references()
        with second.unlocked():
            second.init_from.update(init_from)
            second.model.update(changes)
        assert train.run(second, tmp_path / name)
        return load(tmp_path / name).part

    fresh = begun("fresh", {})
    assert not tiny.same(fresh.extra["codebook"], source.extra["codebook"])
    whole = begun("whole", {"all": "../first"})
    assert tiny.same(whole.params, source.params) and tiny.same(whole.extra, source.extra)
    part = begun("part", {"decoder": "../first:decoder"})
    assert tiny.same(part.params["decoder"], source.params["decoder"])
    assert tiny.same(part.params["encoder"], fresh.params["encoder"]) and tiny.same(part.extra, fresh.extra)
    with pytest.raises(UserError, match="no subtree 'head'; it has decoder, encoder"):
        begun("bad", {"decoder": "../first:head"})
    with pytest.raises(UserError, match=r"has shape \(32, 8\) and is to have \(64, 8\)"):
        begun("other", {"all": "../first"}, codes=64)
    for name in ("bad", "other"):
        assert not list((tmp_path / name / "checkpoints").iterdir())


def test_a_failed_save_is_noted_and_the_run_goes_on(tmp_path, monkeypatch):
    write, failing = manifest.write, {2}

    def sometimes(folder, step):
        if step in failing:
            failing.discard(step)
            raise OSError(28, "No space left on device")
        return write(folder, step)

    monkeypatch.setattr("hybridgen.manifest.write", sometimes)
    words = ["steps=6", "batch=4", "model.channels=(16,)", "model.attention=False", "log.every=1"]
    words += ["checkpoint.every=2", "checkpoint.keep=5"]
    assert train.run(config_of("configs/tokenizers/vq.py:vq", *words), tmp_path / "run")
    (note,) = [line for line in log_of(tmp_path / "run") if "note" in line]
    assert note["note"] == "save failed" and "checkpoint 2 was not saved" in note["text"] and note["step"] == 4
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as saved:
        assert saved.good_steps() == [4, 6]

    failing = {6}
    with pytest.raises(UserError, match="checkpoint 6 was not saved.*No space left"):
        train.run(config_of("configs/tokenizers/vq.py:vq", *words), tmp_path / "last")
    with Checkpointer(tmp_path / "last" / "checkpoints", read_only=True) as saved:
        assert saved.good_steps() == [2, 4]
