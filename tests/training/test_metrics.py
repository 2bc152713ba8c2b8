"""The log has each step once, in every format; time.json accounts for all time."""

import json
import math
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.core.progress import progress
from hybridgen.training.logging import Timer, Writer, accounts, cut_back


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
            writer.step(step, {"loss": Lazy()})
            assert (Lazy.reads > 0) == (step >= 5)
            if step == 6:
                assert len(entries(tmp_path)) == 1
    assert [entry["step"] for entry in entries(tmp_path)] == [5, 7]  # and the last step


def test_the_line_of_a_person(tmp_path, capsys):
    options = {"every": 10, "batch": 32, "label": "prior", "tensorboard": False}
    with Writer(tmp_path, start_step=0, total_steps=200, **options) as writer:
        writer.step(1, {})
        time.sleep(0.09)
        writer.step(10, {"accuracy": 0.25, "loss": jnp.float32(2.34567)})
        writer.scalars(10, {"eval/loss": 2.5})
        writer.note(11, "broken_record", "cat.png")
    line, evaluation, note, times = capsys.readouterr().out.splitlines()
    assert line.startswith("prior  10/200   5%  loss 2.346  accuracy 0.25  0.0") and " s/step  " in line
    assert "samples/s  ETA " in line
    assert evaluation == "prior 10/200  eval/loss 2.5" and note == "prior 11/200  broken_record: cat.png"
    assert times.startswith("prior: ") and "other" in times
    logged = entries(tmp_path)
    assert 0.01 <= logged[0]["step_seconds"] < 0.05  # 9 steps took 0.09 s; the first, with its compilation, not counted
    assert logged[0]["samples_per_second"] == pytest.approx(32 / logged[0]["step_seconds"])
    assert logged[1:] == [{"step": 10, "eval/loss": 2.5}, {"step": 11, "note": "broken_record", "text": "cat.png"}]


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


def test_the_first_step_is_compilation(tmp_path):
    with Writer(tmp_path, start_step=0, total_steps=2, tensorboard=False) as writer:
        for pause in (0.05, 0.0):
            with writer.time("step"):
                time.sleep(pause)
        times = writer.timer.report()
    assert times["compile"] >= 0.05 > times["step"]


def test_progress_on_a_log(capsys):
    assert list(progress(3, "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    slow = (time.sleep(0.01) or x for x in "abcdefgh")
    assert "".join(progress(slow, "caching", total=8, seconds=0.03)) == "abcdefgh"
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith("caching") and "/8" in line for line in lines)
