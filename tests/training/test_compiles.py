"""Nothing compiles after the first steps, in training with evaluation, samples and saves, and in sampling."""

import contextlib
import json
from pathlib import Path

import jax
import pytest
from PIL import Image

from hybridgen import evaluate, sample, train
from hybridgen.core import config
from hybridgen.cost import chips
from hybridgen.runs.restore import restore
from hybridgen.training import logging

ROOT = Path(__file__).parents[2]


class Compilations:
    """How many programs XLA has compiled since this was made."""

    def __init__(self) -> None:
        self.count, self.names = 0, []

    def heard(self, event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.names.append(str(about.get("fun_name")))


@pytest.fixture
def compilations():
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter.heard)
    jax.jit(lambda x: x * 3 + 1)(1.5)
    assert counter.count >= 1, "the event has another name: this counts nothing"
    counter.count = 0
    yield counter
    with contextlib.suppress(Exception):
        jax.monitoring.unregister_event_duration_listener(counter.heard)


@pytest.mark.parametrize(("steps", "every"), [(12, 3), pytest.param(200, 20, marks=pytest.mark.slow)])
def test_training_compiles_nothing_after_its_first_round(tiny_run, tmp_path, compilations, monkeypatch, steps, every):
    """Now and then it evaluates, draws and saves; the step after the first time has seen every program.

    On a device whose peak is known, the log has all rates.
    """
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["h200"]._replace(kinds=("cpu",), float32=1e12))
    seen: dict[int, int] = {}
    step = logging.Writer.step

    def counted(self, number, report):
        step(self, number, report)
        seen[number] = compilations.count

    monkeypatch.setattr(logging.Writer, "step", counted)
    tokenizer = tiny_run("configs/tokenizers/vq.py").folder
    seen.clear()
    compilations.count, compilations.names = 0, []
    words = [f"parts.tokenizer={tokenizer}", f"steps={steps}", "log.every=1", "model.width=32", "model.depth=1"]
    words += [f"{what}.every={every}" for what in ("eval", "sample", "checkpoint")]
    words += ["eval.batches=2", "sample.count=3"]  # a grid that is not full
    assert train.run(config.load(f"{ROOT}/configs/ar/raster.py:tiny", words), tmp_path / "run")
    assert list((tmp_path / "run" / "images").glob("samples-*.png")), "no samples were drawn"
    assert seen[1] > 0 and sorted(seen) == list(range(1, steps + 1))
    assert seen[every + 1] > seen[2]  # evaluation and drawing
    assert {seen[number] for number in range(every + 1, steps + 1)} == {seen[every + 1]}
    assert sum("train_step" in name for name in compilations.names) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "step_seconds" in line]
    assert [line["step"] for line in logged] == list(range(1, steps + 1))
    for line in logged:
        assert line["images_per_second"] == pytest.approx(8 / line["step_seconds"])
        assert line["tokens_per_second"] == pytest.approx(16 * line["images_per_second"])
        assert line["mfu"] * line["step_seconds"] == pytest.approx(logged[0]["mfu"] * logged[0]["step_seconds"])
        assert 0 < line["mfu"] < 1 and line["learning_rate"] > 0 and line["memory_gib"] > 0


@pytest.mark.slow
def test_drawing_compiles_once_whatever_the_number(tiny_run, tmp_path, compilations):
    """A last batch that is not full, other prompts and another seed are the same program."""
    loaded = restore(tiny_run("configs/ar/raster.py").folder, {})

    def draw(prompts: list[str], count: int, seed: int) -> int:
        compilations.count = 0
        sample.sample(loaded, [(prompt, None) for prompt in prompts], count, seed, 4, tmp_path / "out", draft=False)
        return compilations.count

    first = draw(["a small red circle in the centre"], 4, 0)
    assert first >= 1
    assert draw(["a large blue square at the top", "a small red circle in the centre"], 3, 1) == 0

    def measure(count: int) -> int:
        compilations.count = 0
        evaluate.evaluate(loaded, ("validation",), count, 4, 0, tmp_path / f"report{count}")
        return compilations.count

    measure(8)
    assert measure(8) == 0
    assert measure(10) == 0  # a last batch of two, padded
    report = json.loads((tmp_path / "report10" / "report.json").read_text())
    verdict = report["splits"]["validation"]["from captions"]["render"]["judge"]["all"]
    assert verdict["pictures"] == 10 and 0 <= verdict["all_right"] <= 1
    table = (tmp_path / "report10" / "report.md").read_text()
    assert f"| from captions, render | 10 | all | {100 * verdict['all_right']:.1f} %" in table
    assert Image.open(tmp_path / "report10" / "validation.png").width > 3 * 64
