"""Weights & Biases gets what the log gets: as a module that records its calls, and the real one offline."""

import json
import sys
import types

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.training import boards
from hybridgen.training.logging import Writer


class Service(types.ModuleType):
    """A module like wandb that records what it is given; `fault`: raised by what is written to a run."""

    def __init__(self, fault: Exception | None = None):
        super().__init__("wandb")
        self.Image, self.fault = (lambda picture: ("image", picture.shape)), fault
        self.started, self.axes, self.logged, self.ended = [], [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        if self.fault:
            raise self.fault
        self.logged.append(values)

    def finish(self):
        self.ended += 1


def tracked(folder, steps, project="pictures"):
    (board,) = boards.chosen({"log": {"every": 1, "wandb": project}}, folder, "prior", {"batch": 4})
    options = {"total_steps": 9, "label": "prior", "tensorboard": False, "boards": [board]}
    with Writer(folder, start_step=steps[0] - 1, **options) as writer:
        for step in steps:
            writer.step(step, {"loss": float(step)})
        writer.scalars(step, {"eval/loss": 2.5})
        writer.image(step, "samples", np.zeros((4, 6, 3), np.uint8))


def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    tracked(tmp_path, (1, 2))
    (start,) = service.started
    expected = {"project": "pictures", "name": "prior", "config": {"batch": 4}, "dir": str(tmp_path), "resume": "allow"}
    assert {name: start[name] for name in expected} == expected and service.axes == [("*", "step")]
    losses = [(entry["step"], entry["prior/loss"]) for entry in service.logged[:2]]
    assert losses == [(1, 1.0), (2, 2.0)] and service.ended == 1
    assert service.logged[2:] == [{"step": 2, "eval/loss": 2.5}, {"step": 2, "samples": ("image", (4, 6, 3))}]
    tracked(tmp_path, (3,))  # resumes the same run of the service, another project has another
    tracked(tmp_path, (4,), "others")
    first, second, third = (options["id"] for options in service.started)
    assert first == second != third
    assert boards.chosen({"log": {"every": 1, "wandb": ""}}, tmp_path, "prior", {}) == []
    assert boards.chosen({"log": {"every": 1}}, tmp_path, "prior", {}) == []  # the config of an earlier version


def test_weights_and_biases_that_fails_ends_nothing_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Service(RuntimeError("no route to host")))
    tracked(tmp_path, (1, 2))
    text = f"prior: warning: cannot write the logs in {tmp_path}: W&B: no route to host; the run continues\n"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert capsys.readouterr().err == text and len(lines) == 3
    monkeypatch.setattr(Service, "define_metric", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="config.log.wandb=pictures: W&B does not start: division by zero; log in with"):
        tracked(tmp_path, (3,))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.log.wandb needs wandb \(.*\): install the extra hybridgen\[wandb\]"):
        boards.checked({"log": {"wandb": "pictures"}})


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked(tmp_path, (1, 2))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert b"prior/loss" in data and b"eval/loss" in data and b"samples" in data
    tracked(tmp_path, (3,))  # the same run again
