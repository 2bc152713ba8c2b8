"""A family and a data source in a package outside of hybridgen (examples/own_package), used by the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.models import contract

ROOT = Path(__file__).parents[2]
OWN = ROOT / "examples" / "own_package"


def run(*words: str) -> subprocess.CompletedProcess:
    """A command of hybridgen, with the package in reach."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{OWN}", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"hybridgen.{words[0]}", *words[1:]]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_it_trains_and_samples_with_its_own_option(tmp_path):
    config = str(OWN / "config.py")
    for variant, place in ((":tokenizer", "tokenizer"), ("", "prior")):
        done = run("train", "--config", config + variant, "--workdir", str(tmp_path / place))
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "prior" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]

    drawing = ("sample", "--run", str(tmp_path / "prior"), "--label", "1", "--count", "3")
    shown = run(*drawing, "--help").stdout
    assert "--flatness" in shown and "share of an even distribution in each draw" in shown
    pictures = []
    for flatness in ("0", "0.5"):
        done = run(*drawing, "--flatness", flatness, "--out", str(tmp_path / flatness))
        assert done.returncode == 0, done.stderr
        pictures.append(np.stack([np.asarray(Image.open(tmp_path / flatness / f"0000{i}.png")) for i in range(3)]))
    assert pictures[0].shape == (3, 32, 32, 3) and (pictures[0] != pictures[1]).any()  # the option reaches the model
    done = run(*drawing, "--flatness", "2", "--out", str(tmp_path / "bad"))
    assert done.returncode == 2 and "prior.flatness 2.0 is not within 0 and 1" in done.stderr


def test_what_is_no_family_or_source_is_refused(tmp_path, monkeypatch):
    (tmp_path / "half_a_family.py").write_text("ROLE = 'prior'\ndef build(config): return 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"'half_a_family' is not a family: it has no function init\(model, key, specs, parts\)"
    ):
        contract.find("half_a_family")
    with pytest.raises(UserError, match="Python finds no module 'nowhere.at_all'"):
        contract.find("nowhere.at_all")
    data = {"source": "half_a_family.Flowers", "resolution": 32}
    with pytest.raises(UserError, match="data.source 'half_a_family.Flowers': module .* has no attribute 'Flowers'"):
        sources.build(data, "train")
