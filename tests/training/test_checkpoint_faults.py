"""Damaged checkpoints: the bad file is named and the newest valid step is used, for any kind of damage."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from checkpoint_cases import (
    abstract,
    empty_folder,
    files_of,
    finish,
    flip,
    flip_200,
    same,
    script,
    state_of,
    three_steps,
)

from hybridgen.core.errors import UserError
from hybridgen.runs.checkpoint import Checkpointer, SaveError


@pytest.fixture
def saved(tmp_path):
    return three_steps(tmp_path / "checkpoints")


def test_any_flipped_bit_is_found(saved):
    flip_200(saved, 3)
    folder = saved / "3"
    files = [path for path in files_of(folder) if path.stat().st_size]
    with Checkpointer(saved, keep=3) as saver:
        flip(files[-1], 3)
        lines = []
        assert saver.newest_good(report=lines.append) == 2
        assert len(lines) == 1 and str(files[-1].relative_to(folder)) in lines[0]


def _truncate(folder: Path) -> str:
    path = max(files_of(folder / "model"), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)
    return path.name


def _empty_file(folder: Path) -> str:
    os.truncate(folder / "model" / "_METADATA", 0)
    return "model/_METADATA"


def _missing_file(folder: Path) -> str:
    path = files_of(folder / "training" / "ocdbt.process_0")[0]
    path.unlink()
    return path.name


def _missing_marker(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def _half_marker(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 100)
    return "manifest.json"


def _marker_of_another_step(folder: Path) -> str:
    shutil.copy(folder.parent / "2" / "manifest.json", folder)
    return "manifest.json"


def _a_folder_in_its_place(folder: Path) -> str:
    (folder / "about" / "metadata").unlink()
    (folder / "about" / "metadata").mkdir()
    return "about/metadata"


FAULTS = [_truncate, _empty_file, _missing_file, _missing_marker, _half_marker, empty_folder, _marker_of_another_step]


@pytest.mark.parametrize("fault", [*FAULTS, _a_folder_in_its_place])
def test_falls_back_and_names_the_file(saved, fault):
    name, lines = fault(saved / "3"), []
    with Checkpointer(saved, keep=3) as saver:
        start = time.perf_counter()
        assert saver.newest_good(report=lines.append) == 2
        assert time.perf_counter() - start < 5
        assert len(lines) == 1 and name in lines[0] and "checkpoint 3 " in lines[0] and "\n" not in lines[0]
        with pytest.raises(UserError, match=re.escape(name)):
            saver.restore(3, abstract(state_of()))
        assert saver.save(3, state_of(33))  # reached again: the bad one is replaced
        saver.wait_until_saved()
        assert saver.newest_good() == 3 and same(saver.restore(3, abstract(state_of())), state_of(33))


def test_all_bad_is_none_and_other_names_are_no_steps(saved):
    for step in (1, 2, 3):
        empty_folder(saved / str(step))
    for name in ("007", "12.tmp", "-1", "x"):
        (saved / name).mkdir()
    lines = []
    with Checkpointer(saved) as saver:
        assert saver.newest_good(report=lines.append) is None and len(lines) == 3


def test_what_is_not_there_or_not_writable(tmp_path):
    with Checkpointer(tmp_path / "none", read_only=True) as reader:
        assert reader.newest_good() is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_leftovers_of_a_killed_save_are_removed(saved):
    leftover = saved / "4.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with Checkpointer(saved, read_only=True):
        assert leftover.exists()
    with Checkpointer(saved):
        assert not leftover.exists()


KILLED = """
import sys, numpy as np
from hybridgen.runs.checkpoint import Checkpointer
saver = Checkpointer(sys.argv[1], keep=3)
step = saver.newest_good(report=lambda line: None) or 0
while True:
    step += 1
    saver.save(step, {"params": {str(i): np.full((200, 1000), float(step)) for i in range(4)}, "step": np.int32(step)})
    print("saving", flush=True)  # so the step before is there
"""


def kill_during_saves(directory: Path, times: int, chance: random.Random) -> None:
    reached = 0
    for _ in range(times):
        process = script(KILLED, directory)
        process.stdout.readline()
        start = time.perf_counter()
        process.stdout.readline()
        time.sleep(chance.uniform(0, 2) * (time.perf_counter() - start))  # within the next two saves
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Checkpointer(directory, keep=3) as saver:
            good = saver.good_steps()
            assert good[-1] > reached  # what was there is there
            reached = good[-1]
            for step in good:
                for name, leaf in saver.restore_params(step)["params"].items():
                    assert (leaf == step).all(), (step, name)


def test_sigkill_in_a_save(tmp_path):
    kill_during_saves(tmp_path, 2, random.Random(1))


@pytest.mark.slow
def test_sigkill_in_20_saves(tmp_path):
    kill_during_saves(tmp_path, 20, random.Random(2))


DISK_FULL = """
import resource, sys, numpy as np
from checkpoint_cases import abstract, same
from hybridgen.runs.checkpoint import Checkpointer, SaveError
state = lambda n: {"params": {"x": np.random.default_rng(n).random((400, 400), np.float32)}, "step": np.int32(n)}
saver = Checkpointer(sys.argv[1], keep=2)
saver.save(1, state(1)); saver.wait_until_saved()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
failed = 0
for step, limit in ((2, 100_000), (3, 50), (4, 700)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        saver.save(step, state(step)); saver.wait_until_saved()
    except SaveError as error:
        failed += 1
        assert str(step) in str(error), error
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert saver.newest_good(report=print) == 1
    assert [p.name for p in saver.directory.iterdir()] == ["1"], list(saver.directory.iterdir())
assert failed == 3
saver.save(4, state(4)); saver.wait_until_saved()  # tried again
assert sorted(p.name for p in saver.directory.iterdir()) == ["1", "4"]
assert saver.newest_good() == 4 and same(saver.restore(4, abstract(state(4))), state(4))
saver.close()
"""


def test_disk_full_is_reported_and_survived(tmp_path):
    finish(script(DISK_FULL, tmp_path / "checkpoints"))


def test_a_failed_save_is_reported_by_the_next_call(saved, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    with Checkpointer(saved, keep=3) as saver:
        with monkeypatch.context() as patch:
            patch.setattr("hybridgen.runs.manifest.write", broken)
            saver.save(4, state_of(4))
            saver._thread.join()
        with pytest.raises(SaveError, match="4 .*No space left"):
            saver.save(5, state_of(5))
        assert saver.save(5, state_of(5))  # reported once
        saver.wait_until_saved()
        assert saver.good_steps() == [2, 3, 5]
