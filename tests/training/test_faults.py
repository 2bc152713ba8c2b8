"""Faults in a run of one process: bad batches, hangs, full disks, changed configs. Several processes: test_hosts.py."""

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import fault_cases
import numpy as np
import pytest
from checkpoint_cases import files_of, flip, flip_200
from fault_cases import ends, final, log_of, newest, notes_of, state_of, wait_for, words
from PIL import Image

from hybridgen import train
from hybridgen.core import config, trees
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline
from hybridgen.runs.checkpoint import Checkpointer
from hybridgen.training import batches as batch_stream
from hybridgen.training import rollback

SLOW = pytest.mark.slow


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, faults, steps, every, more...) -> the folder of a run that finished, or failed as requested."""
    make, look = pipeline.batches, train.look

    def go(name: str, what: dict, steps: int, every: int, *more: str, **options) -> Path:
        other = {key: x for key, x in what.items() if key not in ("fail", "data")}
        monkeypatch.setattr(pipeline, "batches", fault_cases.happening(make, **other))
        monkeypatch.setattr(train, "look", fault_cases.looking(look, what.get("fail", -1)))
        resolved = configured(steps, every, *more)
        if "data" in what:
            fault_cases.on_data(resolved, *what["data"])
        with pytest.raises(RuntimeError, match="fails") if "fail" in what else contextlib.nullcontext():
            assert train.run(resolved, tmp_path / name, **options)
        return tmp_path / name

    return go


def configured(steps: int, every: int, *more: str):
    # intervals hold commas
    plain, rest = [x for x in more if "((" not in x], [x for x in more if "((" in x]
    return config.load(words(steps, every, *plain), rest)


def skipped_in(folder: Path) -> list:
    file = folder / "skipped.json"
    return json.loads(file.read_text()) if file.exists() else []


# ---- bad batches


@SLOW
def test_one_bad_batch_is_counted_and_nothing_else(run):
    """The run equals one that skips this batch, in parameters, EMA, codebook, optimizer, counters and log."""
    bad = run("bad", {"nan": [6]}, 12, 5)
    skip = run("skip", {}, 12, 5, "health.skip=((6,7),)")
    assert final(bad, 12) == final(skip, 12)
    assert int(state_of(bad, 12)["health"]["skipped"]) == 1 and skipped_in(bad) == [] == notes_of(bad)
    assert [line for line in log_of(bad) if line["step"] != 7] == log_of(skip)
    (line,) = (line for line in log_of(bad) if line["step"] == 7)
    assert line["loss"] == "nan" and (line["skipped"], line["streak"]) == (1, 1)


CASES = {
    # name: (what, config words, [first, end) that must be skipped)
    "middle": ({"nan": [11, 12, 13]}, (24, 5), [10, 14]),
    "first": ({"nan": [0, 1, 2]}, (12, 5), [0, 3]),
    "last": ({"nan": [21, 22, 23]}, (24, 5), [20, 24]),
    "saved amid": ({"nan": [13, 14, 15]}, (24, 5, "checkpoint.keep=1"), [10, 16]),
    "saved at its end": ({"nan": [12, 13, 14]}, (24, 5, "checkpoint.keep=1", "eval.every=5"), [10, 15]),
    "saved each step": ({"nan": [11, 12, 13]}, (24, 1, "checkpoint.keep=1"), [11, 14]),
    "spike": ({"times": [[n, 30] for n in (24, 25, 26)]}, (32, 5), [20, 27]),
}


@SLOW
@pytest.mark.parametrize("case", CASES)
def test_bad_batches_in_a_row_are_rolled_back_over(run, case):
    """The run equals, bit for bit, a run without faults that is given the same intervals from the start."""
    what, options, (first, end) = CASES[case]
    bad, steps = run("bad", what, *options), options[0]
    assert skipped_in(bad) == [[first, end]]
    known = run("known", {}, *options, f"health.skip=(({first},{end}),)")
    assert final(bad, steps) == final(known, steps)
    assert log_of(bad) == log_of(known)
    (note,) = notes_of(bad)
    assert note[:2] == (end, "rolled back") and f"batches {first} to {end - 1} are skipped" in note[2]
    assert int(state_of(bad, steps)["health"]["skipped"]) == end - first


@SLOW
def test_killed_while_it_rolls_back_and_after_it(run, tmp_path):
    what, options = {"nan": [61, 62, 63]}, (160, 20)
    folder = tmp_path / "killed"
    for ready in (lambda: skipped_in(folder), lambda: fault_cases.logged(folder) >= 75):
        process = fault_cases.start(folder, words(*options), what)
        wait_for(ready, "it does not come so far")
        process.kill()
        process.communicate()
    reached = newest(folder)
    assert 60 <= reached < 160, "killed after its end: nothing was tested"
    ends(fault_cases.start(folder, words(*options), what))
    known = run("known", {}, *options, "health.skip=((60,64),)")
    assert skipped_in(folder) == [[60, 64]]
    assert final(folder, 160) == final(known, 160) and log_of(folder) == log_of(known)


@SLOW
def test_too_many_bad_intervals_end_the_run(tmp_path):
    line = words(60, 10, "health.rollbacks=2")
    _, err = ends(fault_cases.start(tmp_path, line, {"nan": list(range(12, 60))}), 2)
    assert "error: 3 bad steps in a row up to step 21, and 2 intervals were skipped before" in err.splitlines()[-1]
    assert skipped_in(tmp_path) == [[10, 15], [10, 18]] and newest(tmp_path) == 20  # amid bad steps, to look at


def test_intervals_at_the_end_and_beyond_it(run):
    """What is skipped may begin or end behind the last step; a rule that can never hold is refused."""
    folder = run("run", {}, 6, 5, "health.skip=((4,9),(30,40))")
    assert fault_cases.steps_of(folder) == [1, 2, 3, 4] and newest(folder) == 6
    with pytest.raises(UserError, match=r"\(4, 4\) is not an interval"):
        run("wrong", {}, 6, 5, "health.skip=((4,4),)")
    with pytest.raises(UserError, match="health.streak"):
        run("wrong", {}, 6, 5, "health.streak=0")


BAD = {"nan": range(6)}
NO_GOOD_STEP = [(BAD, ["health.streak=9"]), pytest.param(BAD, ["health.streak=2"], marks=SLOW)]  # to the end; undone
NO_GOOD_STEP += [({}, ["health.skip=((0,6),)"])]  # no batch at all


@pytest.mark.parametrize(("what", "more"), NO_GOOD_STEP, ids=["bad", "rolled back", "skipped"])
def test_a_run_without_a_good_step_is_not_done(run, tmp_path, what, more):
    for _ in range(2):  # also when it is started again
        with pytest.raises(UserError, match="none of 6 steps was good, so the parameters are still those of step 0"):
            run("run", what, 6, 5, *more)
    run("one", {"nan": range(5)}, 6, 5, "health.streak=9")
    run("none", {}, 0, 5)  # an assembled model trains nothing


@pytest.mark.parametrize("text", ['{"a": 1}', "3", "[[1, 2], 5]", '["12"]', "[[2, 1]]"])
def test_a_list_of_intervals_that_is_none(tmp_path, text):
    (tmp_path / "skipped.json").write_text(text)
    with pytest.raises(UserError, match=r"skipped\.json: .* is not an interval"):
        rollback.intervals(configured(6, 5), tmp_path)


# ---- ends


@SLOW
def test_sigterm_saves_the_last_finished_step(run, tmp_path):
    options = (300, 40)
    whole = run("whole", {}, *options)
    process = fault_cases.start(tmp_path / "run", words(*options))
    wait_for(lambda: fault_cases.logged(tmp_path / "run") >= 10, "no steps")
    requested = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ends(process, 130, 20)
    took, stopped = time.monotonic() - requested, newest(tmp_path / "run")
    print(f"stopped at {stopped} after {took:.1f} s")
    assert took < 10 and 10 <= stopped < 300
    assert fault_cases.steps_of(tmp_path / "run") == list(range(1, stopped + 1))
    out, _ = ends(fault_cases.start(tmp_path / "run", words(*options)))
    assert f"steps {stopped} to 300" in out and not re.search(rf"^train +{stopped}/", out, re.M)
    assert log_of(tmp_path / "run") == log_of(whole) and final(tmp_path / "run", 300) == final(whole, 300)


@SLOW
def test_a_loader_that_hangs(tmp_path):
    process = fault_cases.start(tmp_path, words(60, 20, "health.hang=8"), {"hang": 12})
    wait_for(lambda: fault_cases.logged(tmp_path) >= 11, "no steps")
    began = time.monotonic()
    _, err = ends(process, 42, 60)
    took = time.monotonic() - began
    print(f"ended after {took:.1f} s")
    assert 6 < took < 8 + 5
    assert "step 12, data; the stacks follow" in err and "Thread 0x" in err
    assert "in batches" in err and "in train_loop" in err  # where the loader sleeps, and where the loop waits


@SLOW
def test_an_exception_leaves_nothing_behind(tmp_path):
    process = fault_cases.start(tmp_path, words(400, 20, "data.workers=2"), {"fail": 100})
    wait_for(lambda: fault_cases.logged(tmp_path) >= 60, "no steps")
    workers = children(process.pid)
    wait_for(lambda: fault_cases.logged(tmp_path) >= 100, "no steps")
    began = time.monotonic()
    _, err = ends(process, 1, 20)
    took = time.monotonic() - began
    print(f"ended after {took:.1f} s")
    assert took < 5 and "RuntimeError: step 100 fails" in err
    assert len(workers) >= 2
    wait_for(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "a worker is left", 5 - took)
    assert newest(tmp_path) == 80  # what was under way is whole; the step that failed is not saved


def children(pid: int) -> list[int]:
    """All processes below this one."""
    found = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return found + [other for child in found for other in children(child)]


# ---- disks


@SLOW
def test_a_full_disk_is_told_of_and_survived(run, tmp_path):
    """While no file may exceed 3,000 bytes, a save and the logs fail; then the run continues."""
    options = (60, 10, "checkpoint.keep=9")
    whole = run("whole", {}, *options)
    out, err = ends(fault_cases.start(tmp_path / "run", words(*options), {"full": [18, 37, 3000]}))
    assert re.search(r"^train 30/60  save failed: checkpoint 20 was not saved: .*File too large", out, re.M), out
    assert len(re.findall("cannot write the logs in .*: File too large; the run continues", err)) == 1
    assert "Traceback" not in err and len(err.splitlines()) < 5  # Orbax has one for each write
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as saved:
        assert saved.good_steps() == [10, 40, 50, 60]
    assert final(tmp_path / "run", 60) == final(whole, 60)

    _, err = ends(fault_cases.start(tmp_path / "full", words(*options), {"full": [18, 99, 3000]}), 2)
    assert re.search("^error: .*not saved", err, re.M)
    assert newest(tmp_path / "full") == 10
    out, _ = ends(fault_cases.start(tmp_path / "full", words(*options)))
    assert "steps 10 to 60" in out and final(tmp_path / "full", 60) == final(whole, 60)


def test_any_flipped_bit_of_a_training_checkpoint_is_found(run):
    folder = run("run", {}, 4, 2)
    flip_200(folder / "checkpoints", 4)


@SLOW
def test_a_rotten_step_is_fallen_back_from(run, capsys):
    options = (12, 5)
    folder, whole = run("run", {}, *options), run("whole", {}, *options)
    path = max(files_of(folder / "checkpoints" / "12" / "model"), key=lambda path: path.stat().st_size)
    flip(path, 8 * (path.stat().st_size // 2) + 3)
    capsys.readouterr()
    run("run", {}, *options)
    out = capsys.readouterr().out
    assert re.search(rf"checkpoint 12 in \S+ is damaged and not used: model/\S*{path.name}: its SHA-256 differs", out)
    assert "steps 10 to 12" in out and final(folder, 12) == final(whole, 12) and log_of(folder) == log_of(whole)


# ---- going on


@SLOW
def test_another_run_is_refused_by_its_keys(run):
    run("run", {}, 3, 5)
    changes = {
        "seed=1": ["config.seed was 0 and is 1", "data.seed"],
        "batch=8": ["config.batch was 4 and is 8", "data.batch"],
        "data.text.kind=bytes": ["data.text.digest was ", 'data.text.kind was "words" and is "bytes"'],
        "model.quantizer.codebook_size=64": ["config.model.quantizer.codebook_size was 32 and is 64"],
        "optim.lr=1e-4": ["config.optim.lr was 0.003 and is 0.0001"],
    }
    for change, says in changes.items():
        with pytest.raises(UserError) as refused:
            run("run", {}, 3, 5, change)
        for words_of_it in says:
            assert words_of_it in str(refused.value)
        assert f"--allow {says[0].split()[0]}" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="data.source.length was 100000 and is 500"):
        run("run", {"data": ["shapes", {"size": 500}]}, 3, 5)
    with pytest.raises(UserError, match=r"extra/codebook float32\[32, 8\] instead of float32\[64, 8\]"):
        run("run", {}, 3, 5, "model.quantizer.codebook_size=64", allow=("config.model.quantizer.codebook_size",))
    run("run", {}, 6, 5, "seed=1", "batch=8", allow=("config.seed", "config.batch", "config.steps", "data"))
    run("run", {}, 4, 5, allow=("config", "data"))  # fewer steps than there are already


def test_a_checkpoint_has_consumed_its_number_of_batches(run, monkeypatch):
    """Steps, good steps, updates, position in the data and log agree, also after a failure; nothing is done twice."""
    began, make = [], batch_stream.training

    def noticed(*args):
        batches = make(*args)
        return lambda start: began.append(start) or batches(start)

    monkeypatch.setattr(batch_stream, "training", noticed)
    options = (12, 5, "eval.every=4", "eval.batches=1", "sample.every=0")
    what = {"nan": [3]}
    whole = run("whole", what, *options)
    monkeypatch.setattr(pipeline, "batches", noticed)
    folder = run("run", what | {"fail": 9}, *options)
    assert newest(folder) == 5
    counts(state_of(folder, 5), 5, 1)
    run("run", what, *options)
    assert began == [0, 0, 5]
    counts(state_of(folder, 12), 12, 1)
    assert fault_cases.steps_of(folder) == list(range(1, 13))
    assert [line["step"] for line in log_of(folder) if "eval/loss" in line] == [4, 8, 12]
    assert log_of(folder) == log_of(whole) and final(folder, 12) == final(whole, 12)


def counts(state: dict, step: int, skipped: int) -> None:
    """The numbers in a state, which say how far it is; each update moves the schedule on by one."""
    assert (int(state["step"]), int(state["health"]["skipped"])) == (step, skipped)
    assert int(state["health"]["count"]) == step - skipped
    found = {path: int(leaf) for path, leaf in trees.flatten(state["opt"]).items() if path.endswith("count")}
    assert len(found) >= 2 and set(found.values()) == {step - skipped}, found


@SLOW
def test_broken_records_are_named_once_also_after_a_failure(run, tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(200):
        path = tmp_path / "pictures" / f"{number:03}.png"
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        if number % 100 == 50:
            path.write_bytes(path.read_bytes()[:60])
    options = (140, 60, "log.every=70", "data.text.kind=bytes")  # almost three times through
    what = {"data": ["folder", {"path": str(tmp_path / "pictures")}]}
    whole = run("whole", what, *options)
    notes = notes_of(whole)
    assert sorted(text.split(":")[0] for _, _, text in notes) == ["050.png", "150.png"]
    assert [text.rpartition(" (")[2] for _, _, text in notes] == ["1 so far)", "2 so far)"]
    folder = run("run", what | {"fail": 100}, *options)
    assert newest(folder) == 60
    run("run", what, *options)
    assert notes_of(folder) == notes and final(folder, 140) == final(whole, 140)


# ---- what it takes


def test_the_account_of_time_is_complete(run, monkeypatch):
    """Of each start, over restarts; steps that are done again are lost."""
    walls, whole = [], train.run

    def timed(*args):
        began = time.perf_counter()
        try:
            return whole(*args)
        finally:
            walls.append(time.perf_counter() - began)

    monkeypatch.setattr(train, "run", timed)
    folder = run("run", {"fail": 33}, 60, 25, "eval.every=20")
    run("run", {}, 60, 25, "eval.every=20")
    entries = json.loads((folder / "time.json").read_text())
    assert [(entry["from"], entry["to"]) for entry in entries] == [(0, 25), (25, 60)]
    for entry, wall in zip(entries, walls, strict=True):
        print(entry, wall)
        assert sum(entry["seconds"].values()) == pytest.approx(wall, rel=0.01)
        assert min(entry["seconds"].values()) >= 0
    first, second = (set(entry["seconds"]) for entry in entries)
    assert {"init", "lost"} <= first and "restore" in second and "lost" not in second
    assert {"build", "compile", "data", "step", "save", "eval", "other"} <= first & second


@SLOW
def test_a_second_start_compiles_no_step(tmp_path):
    reported = []
    for folder in ("first", "second"):
        settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        out, _ = ends(fault_cases.start(tmp_path / folder, words(3, 5), {"compiled": True}, **settings))
        reported.append([int(number) for number in out.splitlines()[-1].split()[-2:]])
    print(reported)
    assert reported[0][1] > 0 and reported[1][1] == 0 and reported[1][0] >= reported[0][1]


@SLOW
def test_5000_steps_take_no_more_than_500(tmp_path):
    more = ("log.every=25", "eval.every=250", "eval.batches=1", "sample.every=250", "sample.count=2")
    process = fault_cases.start(tmp_path, words(5000, 250, *more))
    seen = {}
    for line in process.stdout:
        if found := re.match(r"train +(\d+)/5000 .*s/step", line):
            seen[int(found[1])] = resources(Path(f"/proc/{process.pid}"))
    assert process.wait(30) == 0
    print({step: seen[step] for step in (50, 500, 1000, 2000, 3000, 4000, 4975)})
    assert seen[4975][0] < 1.05 * seen[500][0]

    def least(first: int) -> list[int]:  # a save takes threads and files for a moment
        return [min(seen[step][i] for step in range(first, first + 500, 25)) for i in (1, 2)]

    assert all(late <= early for early, late in zip(least(500), least(4500), strict=True)), (least(500), least(4500))


def resources(process: Path) -> tuple[int, int, int]:
    """(resident memory in kB, threads, open files); TensorStore's pool of threads, at most 8, comes and goes."""
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    threads = 0
    for task in (process / "task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            threads += "ts_pool_worker" not in (task / "comm").read_text()
    return int(status["VmRSS"].split()[0]), threads, len(list((process / "fd").iterdir()))
