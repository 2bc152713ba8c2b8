"""A family and a data source in a package outside of hybridgen (examples/own_package), used by the commands."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
OWN = ROOT / "examples" / "own_package"


@pytest.fixture
def run(tmp_path):
    """Runs the console script, for which only the package is in PYTHONPATH: the clone is not in Python's path."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "hybridgen").symlink_to(ROOT / "hybridgen")
    environment = os.environ | {"PYTHONPATH": f"{OWN}{os.pathsep}{site}", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-P", "-c", "from hybridgen.cli import main; main()"]

    def command(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*line, *words], env=environment, cwd=ROOT, capture_output=True, text=True)

    return command


@pytest.mark.slow
def test_it_trains_and_samples_with_its_own_option(tmp_path, run):
    config = str((OWN / "config.py").relative_to(ROOT))
    for variant, place in ((":tokenizer", "tokenizer"), ("", "prior")):
        done = run("train", "--config", config + variant, "--workdir", str(tmp_path / place))
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "prior" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]

    drawing = ("sample", "--run", str(tmp_path / "prior"), "--label", "1", "--count", "3")
    shown = " ".join(run(*drawing, "--help").stdout.split())
    assert "share of an even distribution in each draw; 0 to 1; default 0.0" in shown
    assert "classifier-free guidance scale of the prior (1: none); 0.0 to 100.0; default 1.5" in shown  # of the run
    pictures = []
    for flatness in ("0", "0.5"):
        done = run(*drawing, "--flatness", flatness, "--out", str(tmp_path / flatness))
        assert done.returncode == 0, done.stderr
        pictures.append(np.stack([np.asarray(Image.open(tmp_path / flatness / f"0000{i}.png")) for i in range(3)]))
    assert pictures[0].shape == (3, 32, 32, 3) and (pictures[0] != pictures[1]).any()  # the option reaches the model
    for words, says in (
        (("--flatness", "2"), "prior.flatness 2.0 is not within 0 and 1 (--flatness)"),
        (("--flatnes", "1"), "unrecognized arguments: --flatnes 1; did you mean --flatness?"),
    ):
        done = run(*drawing, *words, "--out", str(tmp_path / "bad"))
        assert done.returncode == 2 and says in done.stderr

    bundle = str(tmp_path / "bundle")
    done = run("export", str(tmp_path / "prior"), bundle)
    assert done.returncode == 0, done.stderr
    hint = shlex.split(done.stdout.partition("try: hybridgen ")[2])
    assert hint == ["sample", "--run", bundle, "--trust", "my_package", "--label", "0"]
    done = run(*hint, "--count", "1", "--out", str(tmp_path / "traded"))  # the command of the hint works
    assert done.returncode == 0, done.stderr
    done = run("sample", "--run", bundle, "--label", "0")
    assert done.returncode == 2
    assert "uses 'my_package.my_prior' and 'my_package.my_source', which is not part of hybridgen" in done.stderr
    assert "if you trust them, give --trust my_package" in done.stderr
