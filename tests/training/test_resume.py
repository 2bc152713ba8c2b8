"""A killed and resumed run, or one that starts from another, is correct bit for bit, or refused with a message."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import fault_cases
import pytest
import tiny
from fault_cases import ends, final, log_of, newest, notes_of

from hybridgen import train
from hybridgen.core import config
from hybridgen.core.errors import UserError
from hybridgen.runs import manifest
from hybridgen.runs.checkpoint import Checkpointer
from hybridgen.runs.reading import load

ROOT = Path(__file__).parents[2]
STEPS, EVERY, KILLS = 800, 20, 20


def kill(folder: Path, config: str, chance: random.Random, inside_a_save: bool, settings: dict) -> None:
    """Starts the run, or goes on with it, and kills it at a moment of chance, some steps further."""
    process = fault_cases.start(folder, config, None, **settings)
    try:
        steps = chance.randint(1, 3 * EVERY)
        for line in process.stdout:
            steps -= bool(re.match(rf"train +\d+/{STEPS} ", line))
            if not steps:
                break
        time.sleep(chance.uniform(0, 0.2))
        limit = time.monotonic() + 20
        while inside_a_save and process.poll() is None and time.monotonic() < limit:
            if any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
                time.sleep(chance.uniform(0, 0.05))
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_20_random_moments_it_is_the_uninterrupted_run(tmp_path):
    config, settings = fault_cases.words(STEPS, EVERY), {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    ends(fault_cases.start(tmp_path / "whole", config, None, **settings))
    chance, folder = random.Random(3), tmp_path / "killed"
    reached, half = [], 0
    for number in range(KILLS):
        kill(folder, config, chance, number % 2 == 1, settings)
        half += any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        reached.append(newest(folder) or 0)
    print(reached, half)
    assert reached == sorted(reached) and 0 < reached[-1] < STEPS, "killed after its end: nothing was tested"
    assert half >= 3, "no kill was inside a save"
    ends(fault_cases.start(folder, config, None, **settings))
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert final(folder, STEPS) == final(tmp_path / "whole", STEPS)


def config_of(path: str, *overrides: str):
    return config.load(f"{ROOT}/{path}", [*overrides])


@pytest.mark.slow
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


@pytest.mark.slow
def test_init_from_a_run(tmp_path):
    """The whole, with the codebook that is no parameter; a subtree; and subtrees that are not there."""
    words = ["steps=3", "batch=4", "model.channels=(16,)", "model.attention=False", "model.quantizer.codebook_size=32"]
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
    with pytest.raises(UserError, match=r"has shape \(32, 8\), but this model has \(64, 8\)"):
        begun("other", {"all": "../first"}, quantizer={"codebook_size": 64})
    for name in ("bad", "other"):
        assert not list((tmp_path / name / "checkpoints").iterdir())


def test_a_failed_save_is_noted_and_the_run_goes_on(tmp_path, monkeypatch):
    write, failing = manifest.write, {2}

    def sometimes(folder, step):
        if step in failing:
            failing.discard(step)
            raise OSError(28, "No space left on device")
        return write(folder, step)

    monkeypatch.setattr("hybridgen.runs.manifest.write", sometimes)
    words = ["steps=6", "batch=4", "model.channels=(16,)", "model.attention=False", "log.every=1"]
    words += ["checkpoint.every=2", "checkpoint.keep=5"]
    assert train.run(config_of("configs/tokenizers/vq.py:vq", *words), tmp_path / "run")
    ((step, note, text),) = notes_of(tmp_path / "run")
    assert note == "save failed" and "checkpoint 2 was not saved" in text and step == 4
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as saved:
        assert saved.good_steps() == [4, 6]

    failing = {6}
    with pytest.raises(UserError, match="checkpoint 6 was not saved.*No space left"):
        train.run(config_of("configs/tokenizers/vq.py:vq", *words), tmp_path / "last")
    with Checkpointer(tmp_path / "last" / "checkpoints", read_only=True) as saved:
        assert saved.good_steps() == [2, 4]
