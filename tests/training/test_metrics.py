"""The log has each step once, in every format, with rates of the training alone; time.json accounts for all time."""

import io
import json
import math
import re
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hybridgen.core import progress as progress_lib
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing, progress
from hybridgen.training import console, optim, rates
from hybridgen.training.logging import Timer, Writer, accounts, cut_back
from hybridgen.training.rates import Work


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, start, stop, total=10, **options):
    with Writer(folder, start_step=start, total_steps=total, tensorboard=False, **options) as writer:
        for step in range(start + 1, stop + 1):
            writer.step(step, {"loss": jnp.float32(step) / 2, "accuracy": np.float64(0.5)})


def test_a_resumed_log_is_the_uninterrupted_one(tmp_path):
    def losses(folder):
        return [(entry["step"], entry["loss"], entry["accuracy"]) for entry in entries(folder)]

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run(tmp_path / "a", 0, 10, every=2)
    run(tmp_path / "b", 0, 9, every=2)  # dies after 9; its checkpoint was made at 5
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # in the middle of a line
    run(tmp_path / "b", 5, 10, every=2)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == [(n, n / 2, 0.5) for n in (2, 4, 6, 8, 10)]


def test_cut_back_keeps_what_is_at_the_step_and_drops_the_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 3)
    assert not path.exists()
    lines = ['{"step": 3, "loss": 1}\n', '{"step": 3, "eval/loss": 2}\n', '{"step": 4, "note": "x"}\n']
    path.write_text("".join([*lines, '{"step": 2, "note": "late"}\n', "[1]\n", '{"step": 1}']))
    cut_back(path, 3)
    assert path.read_text() == lines[0] + lines[1] + '{"step": 2, "note": "late"}\n'
    path.write_bytes(lines[0].encode() + b"\xff\x00garbage\n")
    cut_back(path, 3)
    assert path.read_text() == lines[0]
    cut_back(path, 0)
    assert path.read_text() == ""


def test_values_are_read_only_when_a_line_is_due(tmp_path):
    class Lazy:
        reads = 0

        def __array__(self, dtype=None, copy=None):
            Lazy.reads += 1
            return np.asarray(1.5)

    with Writer(tmp_path, start_step=0, total_steps=7, every=5, tensorboard=False) as writer:
        for step in range(1, 8):
            Lazy.reads = 0
            writer.step(step, {"loss": Lazy()})
            assert (Lazy.reads > 0) == (step in (1, 5, 7))  # for the first line, and the log
            writer.ended(step, {"loss": Lazy()})  # the last line was printed just now
            assert (Lazy.reads > 0) == (step in (1, 5, 7))
            if step == 6:
                assert len(entries(tmp_path)) == 1
    assert [entry["step"] for entry in entries(tmp_path)] == [5, 7]  # and the last step


class Clock:
    """The time of a writer, which passes by `sleep` only."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in ("logging", "console"):
        monkeypatch.setattr(f"hybridgen.training.{module}.time", clock)
    return clock


OPTIM = {"lr": 0.5, "schedule": "constant", "warmup": 0, "final": 0.0, "groups": {"disc": {"lr": 0.25}}}


def test_the_line_of_a_person(tmp_path, capsys, clock):
    options = {"every": 10, "label": "prior", "tensorboard": False, "optim": OPTIM, "peak": 1e6}
    with Writer(tmp_path, start_step=0, total_steps=200, **options) as writer:
        for step in range(1, 11):
            with writer.time("step"):
                clock.sleep(0.2 if step == 1 else 0.01)
            writer.count(step, Work(images=32, tokens=320, flops=1000.0))
            report = {"accuracy": 0.25, "loss": jnp.float32(2.34567), "skipped": 0.0, "streak": 0.0}
            writer.step(step, report | ({"skipped": 3.0, "streak": 1.0} if step == 10 else {}))
        writer.scalars(10, {"eval/loss": 2.5})
        writer.note(11, "broken_record", "cat.png")
    first, line, evaluation, note, times = capsys.readouterr().out.splitlines()
    first, line = (re.sub(r"memory [\d.]+ GiB", "memory 1 GiB", text) for text in (first, line))
    assert first == (
        "prior   1/200   0%  loss 2.346  accuracy 0.25  lr 0.5  0.2 s/step  160 images/s  1600 tokens/s  MFU 0.5%  "
        "memory 1 GiB  ETA 40s"
    )
    assert line == (
        "prior  10/200   5%  loss 2.346  accuracy 0.25  skipped 3  streak 1  lr 0.5  0.01 s/step  3200 images/s  "
        "3.2e+04 tokens/s  MFU 10.0%  memory 1 GiB  ETA 1.9s"
    )
    assert evaluation == "prior 10/200  eval/loss 2.5" and note == "prior 11/200  broken_record: cat.png"
    assert times.startswith("prior: ") and "step" in times
    logged = entries(tmp_path)
    assert [entry["step"] for entry in logged] == [10, 10, 11]  # the line after the first step is for people only
    rate = {"step_seconds": 0.01, "images_per_second": 3200, "tokens_per_second": 32_000, "mfu": 0.1}
    assert {name: logged[0][name] for name in rate} == pytest.approx(rate)  # without the first step
    assert 0.01 < logged[0]["memory_gib"] < 1000 and logged[0]["skipped"] == 3
    assert logged[0]["learning_rate"] == 0.5 and logged[0]["learning_rate/disc"] == 0.25
    assert logged[1:] == [{"step": 10, "eval/loss": 2.5}, {"step": 11, "note": "broken_record", "text": "cat.png"}]


@pytest.mark.parametrize("what", ["eval", "sample", "save", "restore", "compile", "profile", "skip"])
def test_what_interrupts_the_training_is_not_in_its_step_time(tmp_path, what, clock):
    with Writer(tmp_path, start_step=0, total_steps=20, every=2, tensorboard=False) as writer:
        for step in range(1, 9):
            with writer.time("step"):
                clock.sleep(0.002)
            writer.count(step, Work(images=4))
            writer.step(step, {})
            if step in (2, 5):
                with writer.time(what):
                    clock.sleep(0.2)
        left = writer._rates.remaining(8, writer._rates.point(8), 0.002)
    assert [entry["step_seconds"] for entry in entries(tmp_path)] == pytest.approx([0.002] * 4)
    assert [entry["images_per_second"] for entry in entries(tmp_path)] == pytest.approx([2000] * 4)
    # twelve steps to go; evaluations, samples and saves come again, as often as so far: 0.4 s in 8 steps
    assert left == pytest.approx(12 * 0.002 + (12 / 8 * 0.4 if what in ("eval", "sample", "save") else 0))


def test_steps_that_a_skip_leaves_out_are_no_steps(tmp_path, clock):
    """Nor are those before a rollback."""
    with Writer(tmp_path, start_step=0, total_steps=2000, every=1000, tensorboard=False) as writer:
        for step in (1, 2, 3, 999, 1000):  # 4 to 998 are skipped
            with writer.time("step"):
                clock.sleep(0.01)
            writer.count(step, Work(images=1))
            writer.step(step, {})
        (entry,) = entries(tmp_path)
        assert entry["step_seconds"] == pytest.approx(0.01)
        writer.rewind(500)
        clock.sleep(0.3)
        with writer.time("step"):
            clock.sleep(0.01)
        writer.count(1000, Work(images=1))
        writer.step(1000, {})
    (entry,) = entries(tmp_path)
    assert entry["step_seconds"] == pytest.approx(0.01)


def test_lines_every_few_seconds_of_steps_that_have_ended(tmp_path, capsys, clock):
    with Writer(tmp_path, start_step=0, total_steps=1000, every=500, tensorboard=False) as writer:
        for step in range(1, 31):
            with writer.time("step"):
                clock.sleep(1.0)
            writer.count(step, Work(images=1))
            writer.step(step, {"loss": step})
            if step > 3:
                writer.ended(step - 3, {"loss": step - 3})
    *lines, _ = capsys.readouterr().out.splitlines()
    shown = [int(re.match(r"train +(\d+)/1000 ", line)[1]) for line in lines]
    assert shown == [1, 3, 8, 13, 18, 23]  # the first at once; each later one is three steps old
    assert all(f"  loss {step}  " in line for step, line in zip(shown, lines, strict=True))
    assert "  1 s/step  1 images/s  " in lines[0] and all("  ETA 16m" in line for line in lines)
    assert entries(tmp_path) == []  # `every` is for the log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setattr(console, "REDRAWN", 0.0)
    with Writer(tmp_path, start_step=0, total_steps=4, label="prior", tensorboard=False) as writer:
        writer.line("prior: a line before")
        for step in (1, 2):
            writer.count(step, Work(images=1))
            writer.step(step, {"loss": step})
        writer.scalars(2, {"eval/loss": 2.5})
    text = screen.getvalue()
    assert text.startswith("prior: a line before\n\r[#####...............] prior 1/4  25%  loss 1")
    assert re.search(r"\x1b\[K\r\[##########\.{10}\] ETA 0\.\ds prior 2/4  50%  loss 2", text)
    assert "\r\x1b[Kprior 2/4  eval/loss 2.5\n\r[##########" in text  # a line comes above the bar
    assert text.count("\n") == 4  # the first, the evaluation, the last state of the bar, where the time went


def test_quiet_prints_warnings_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress_lib, "_shown", False)
    with Writer(tmp_path, start_step=0, total_steps=2, tensorboard=False) as writer:
        with writer.waiting(0, "compiling", first=0):
            writer.step(1, {"loss": 1.0})
        writer.scalars(1, {"eval/loss": 2.5})
        writer.note(1, "broken_record", "cat.png")
    assert list(progress((time.sleep(0.02) or x for x in "ab"), "caching", seconds=0.01)) == ["a", "b"]
    with doing("loading", first=0.0):
        time.sleep(0.02)
    assert capsys.readouterr() == ("", "train 1/2  broken_record: cat.png\n")
    assert len(entries(tmp_path)) == 3


def test_work_that_takes_long_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "WAITING", 0.05)
    with Writer(tmp_path, start_step=3, total_steps=9, tensorboard=False) as writer:
        with writer.waiting(3, "compiling the training step", first=0):
            assert capsys.readouterr().out == "train: at step 3/9, compiling the training step\n"  # at once
            time.sleep(0.14)
        with writer.waiting(3, "evaluating"):
            pass
        first, *_ = capsys.readouterr().out.splitlines()
        assert first == "train: at step 3/9, compiling the training step: 0 s"
        with doing("loading runs/prior", first=0.02, every=9.0):
            time.sleep(0.1)
        with doing("nothing that takes long"):
            pass
        assert capsys.readouterr() == ("", "loading runs/prior: 0 s\n")


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 30, 50])
def test_the_learning_rate_is_the_optimizers(schedule, warmup):
    group = {"lr": 3e-3, "schedule": schedule, "warmup": warmup, "final": 0.1}
    expected = np.asarray(optim.schedule(group, 30)(jnp.arange(40)))
    assert [rates.learning_rate(group, 30, count) for count in range(40)] == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_learning_rate_counts_updates_not_steps(tmp_path):
    """A skipped step updates nothing: the next one has its learning rate."""
    group = {"lr": 1.0, "schedule": "linear", "warmup": 0, "final": 0.0}
    reports = [{"skipped": 0, "streak": 0}, {"skipped": 1, "streak": 1}, {"skipped": 1, "streak": 0}]
    with Writer(tmp_path, start_step=0, total_steps=10, tensorboard=False, optim=group) as writer:
        for step, report in enumerate(reports, 1):
            writer.step(step, report)
        writer.step(8, {"skipped": 5, "streak": 0})  # after a jump from 3 to 7
    assert [entry["learning_rate"] for entry in entries(tmp_path)] == pytest.approx([1.0, 0.9, 0.9, 0.8])


def test_nan_is_logged_as_json(tmp_path):
    with Writer(tmp_path, start_step=0, total_steps=1, tensorboard=False) as writer:
        writer.step(1, {"loss": jnp.float32("nan"), "norm": jnp.float32("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(float(entry["loss"])) and float(entry["norm"]) == math.inf


def test_a_metric_is_one_number(tmp_path):
    with Writer(tmp_path, start_step=0, total_steps=1, tensorboard=False) as writer:
        with pytest.raises(UserError, match=r"'loss' has shape \(3,\)"):
            writer.step(1, {"loss": jnp.ones(3)})


def test_pictures_and_tensorboard(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with Writer(tmp_path, start_step=0, total_steps=5, label="decoder") as writer:
        writer.step(5, {"loss": 1.25})
        path = writer.image(5, "samples", picture)
        with pytest.raises(ValueError, match="float64"):
            writer.image(5, "samples", picture / 2)
    assert (np.asarray(Image.open(path)) == picture).all()
    (board,) = (tmp_path / "tensorboard").iterdir()
    data = board.read_bytes()
    assert b"decoder/loss" in data and b"samples" in data and b"\x89PNG" in data


def test_notes_from_threads_are_whole_lines(tmp_path):
    with Writer(tmp_path, start_step=0, total_steps=5, tensorboard=False) as writer:

        def notes():
            for step in range(50):
                writer.note(step, "n", "x" * 200)

        work = [threading.Thread(target=notes) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    writer.note(1, "late", "after the end")  # a reader thread that was slow to stop
    assert len(entries(tmp_path)) == 200


def test_buckets_sum_to_the_whole_and_nest():
    start, timer = time.perf_counter(), Timer()
    with timer.time("data"):
        time.sleep(0.03)
    with timer.time("save"):
        time.sleep(0.02)
        with timer.time("step"):
            time.sleep(0.04)
    time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), timer.time("data"):
        _ = 1 / 0
    times, wall = timer.report(), time.perf_counter() - start
    total = times.pop("total")
    assert sum(times.values()) == pytest.approx(total) == pytest.approx(wall, rel=0.01)
    assert set(times) == {"data", "save", "step", "other"}
    for bucket, at_least in (("data", 0.03), ("save", 0.02), ("step", 0.04), ("other", 0.01)):
        assert times[bucket] >= at_least
    assert times["save"] < 0.04  # without the step in it


def test_steps_that_are_done_again_are_lost(tmp_path):
    """Also where a start was killed: its account says how far it was when it was last written."""
    path = tmp_path / "time.json"
    starts = [{"from": 0, "to": 100, "seconds": {"step": 10.0, "data": 1.0}}]
    starts += [{"from": 100, "to": 200, "seconds": {"step": 20.0, "lost": 2.0}}]
    path.write_text(json.dumps(starts))
    assert accounts(path, 200) == accounts(path, 300) == starts
    first, second = accounts(path, 150)
    assert first == starts[0] and second == {"from": 100, "to": 150, "seconds": {"step": 10.0, "lost": 12.0}}
    first, second = accounts(path, 50)  # two steps back
    assert first == {"from": 0, "to": 50, "seconds": {"step": 5.0, "data": 1.0, "lost": 5.0}}
    assert second == {"from": 100, "to": 100, "seconds": {"step": 0.0, "lost": 22.0}}
    path.write_text(json.dumps(starts)[:-9])
    assert accounts(path, 50) == [] == accounts(tmp_path / "none.json", 50)

    with Writer(tmp_path, start_step=0, total_steps=9, tensorboard=False) as writer:
        for step in (1, 2, 3):
            with writer.time("step"):
                time.sleep(0.01)
            writer.step(step, {})
            assert json.loads(path.read_text())[0]["to"] == 1  # the first at once, and then every ten seconds
    ((entry),) = json.loads(path.read_text())
    assert (entry["from"], entry["to"]) == (0, 3) and entry["seconds"]["step"] >= 0.02


def test_a_full_disk_is_told_of_once_and_ends_nothing(tmp_path, capsys):
    with Writer(tmp_path, start_step=0, total_steps=9) as writer:
        writer._file.close()
        with open("/dev/full", "a", buffering=1) as full, open("/dev/full", "wb", buffering=0) as board:
            writer._file, writer._board._file._py_recordio_writer._writer = full, board
            for step in range(1, 9):
                writer.step(step, {"loss": 1.0})
            writer.note(8, "name", "text")
            writer.rewind(2)
        writer.step(3, {"loss": 2.0})
    assert [entry["step"] for entry in entries(tmp_path)] == [3]
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot write the logs in " in line and line.endswith(": No space left on device; the run continues")


def test_progress_on_a_log(capsys):
    assert list(progress(3, "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(iter(()), "nothing")) == []
    slow = (time.sleep(0.01) or x for x in "abcdefgh")
    assert "".join(progress(slow, "caching", total=8, seconds=0.03)) == "abcdefgh"
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith("caching") and "/8" in line for line in lines)


def test_progress_within_an_item_that_takes_long(capsys):
    slow = (time.sleep(0.2) or x for x in "a")
    assert list(progress(slow, "generating", total=1, seconds=0.05)) == ["a"]
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("generating") and " 0/1 " in first
