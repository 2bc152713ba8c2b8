"""Preflight: verdicts and messages on this machine, and real compilations for TPUs, which need libtpu and no TPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridgen import cli, preflight
from hybridgen.errors import UserError

ROOT = Path(__file__).parents[1]
GIB = 2**30
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
PRIOR = ["--config", "configs/ar/raster.py:tiny", "--config.parts.tokenizer=configs/tokenizers/vq.py:tiny"]


def run(tmp_path, *arguments):
    """(exit code, report, what was printed) of a process of its own: libtpu does not belong into this one."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "hybridgen.preflight", *arguments, "--json", str(file)]
    # without JAX_PLATFORMS: the tool itself must see to it that nothing looks for an accelerator
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, json.loads(file.read_text()) if file.exists() else done.stderr, done.stdout


def test_this_machine(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert preflight.main([*PRIOR, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["topology"] is None and report["fits"] and report["device"] == "cpu"
    for name in ("train", "sample"):
        entry = report[name]
        assert entry["fits"] and entry["spare"] == report["capacity"] - entry["memory"]["peak"]
    # parameters, two moments and what is counted, and nothing that is donated is there twice
    state = 3 * 4 * report["parameters"]
    assert state < report["train"]["memory"]["arguments"] < 1.5 * state
    assert "GiB to spare" in capsys.readouterr().out


def test_a_program_over_the_capacity_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "capacity", lambda: 2**20)
    assert preflight.main(PRIOR) == 1
    assert "over by 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message, gib",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) "
            "exceeds available HBM (15.75G).",
            4.25,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.00G "
            "of 15.75G hbm. Exceeded hbm capacity by 8.25G.\n\nTotal hbm usage >= 24.25G",
            8.25,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64 bytes", 0.0),
        ("INVALID_ARGUMENT: Mosaic failed", None),
    ],
)
def test_what_a_compiler_says_of_memory(message, gib):
    assert preflight.exceeded(message) == (None if gib is None else pytest.approx(gib * GIB))


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v9:2x2", "v5e:4", "v5e:2x2x2", "v5p:4x4", "5x5", "v5e:3x5"])
def test_an_unknown_topology_names_the_known_ones(name):
    pytest.importorskip("libtpu") if name == "v5e:3x5" else None
    with pytest.raises(UserError, match=r"topology .*known are .*v5e:16x16"):
        preflight.topology(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hybridgen\[tpu\]"):
        preflight.topology("v5e:4x4")


def test_wrong_arguments_exit_with_2(capsys):
    for argument in ("--topologie=v5e:2x2", "--config.batch=7.5"):
        with pytest.raises(SystemExit) as stop:
            cli.command(lambda argument=argument: preflight.main([*PRIOR, argument]))
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@needs_libtpu
def test_a_tpu_topology_on_a_cpu(tmp_path):
    code, report, shown = run(tmp_path, *PRIOR, "--topology", "v5e:2x2", "--config.mesh.fsdp=2", "--cached")
    assert code == 0, report
    assert report["devices"] == 4 and report["mesh"] == {"data": 2, "fsdp": 2} and "TPU" in report["device"]
    assert report["capacity"] == 15.75 * GIB and report["count"] == 16
    # the state lies on two devices in halves, the batch in quarters
    assert report["train"]["memory"]["arguments"] < 0.8 * 3 * 4 * report["parameters"]
    assert shown.count("GiB to spare") == 2


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("config, billions", [("configs/ar/raster.py:3b", 2.9), ("configs/diffusion/dit.py:xl", 0.68)])
def test_large_models_fit_a_pod_slice(tmp_path, config, billions):
    start = time.monotonic()
    code, report, _ = run(tmp_path, "--config", config, "--topology", "v5e:16x16")
    assert code == 0, report
    assert time.monotonic() - start < 180
    assert report["devices"] == 256 and report["parameters"] == pytest.approx(billions * 1e9, rel=0.1)
    for name in ("train", "sample"):
        assert report[name]["spare"] > 0
    # 6 FLOPs a parameter and position, roughly: 321 positions of the prior, 256 of the decoder
    positions = report["batch"] * (321 if "raster" in config else 256)
    assert report["train"]["flops"]["total"] == pytest.approx(6 * report["parameters"] * positions, rel=0.3)


@needs_libtpu
@pytest.mark.slow
def test_an_oversized_config_says_by_how_much(tmp_path):
    arguments = ["--config", "configs/ar/raster.py:3b", "--topology", "v5e:16x16", "--config.mesh.fsdp=1"]
    code, report, shown = run(tmp_path, *arguments, "--what", "train")
    assert code == 1 and not report["fits"]
    # 12 bytes a parameter on every device, and more
    assert report["train"]["spare"] < 15.75 * GIB - 12 * report["parameters"]
    assert f"over by {-report['train']['spare'] / GIB:.2f} GiB" in shown
