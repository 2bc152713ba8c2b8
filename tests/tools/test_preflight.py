"""Preflight: results and messages on this machine, and real compilations for TPUs, which need libtpu but no TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hybridgen import cli, preflight
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.cost import chips, hlo, programs, roofline, suggest, topology

ROOT = Path(__file__).parents[2]
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


@pytest.mark.slow
def test_this_machine(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert preflight.main([*PRIOR, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["topology"] is None and report["fits"] and report["device"] == "cpu"
    for name in ("train", "sample"):
        entry = report[name]
        assert entry["fits"] and entry["spare"] == report["capacity"] - entry["memory"]["peak"]
        top = entry["roofline"]
        assert top["seconds"] == top["times"][top["limit"]] == max(top["times"].values())
        assert top["mfu"] <= 1 and entry["collectives"] == [] and entry["changes"] == []
    # parameters, two moments and what is counted, and nothing that is donated is there twice
    state = 3 * 4 * report["parameters"]
    assert state < report["train"]["memory"]["arguments"] < 1.5 * state
    shown = capsys.readouterr().out
    assert "GiB to spare" in shown and "limited by" in shown


@pytest.mark.slow
def test_a_program_over_the_capacity_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "capacity", lambda: 2**20)
    assert preflight.main(PRIOR) == 1
    shown = capsys.readouterr().out
    assert "does not fit by 0.0" in shown and "try more devices" in shown


SCANNED = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from hybridgen.core import meshes
from hybridgen.cost import hlo

mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
def place(shape, *spec):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec)))

def layer(x, w):  # whose weights are gathered
    return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, PartitionSpec())), None

def step(x, w):
    return jax.lax.scan(layer, x, w)[0].sum()

with jax.set_mesh(mesh):
    compiled = jax.jit(step).lower(place((64, 64), ("data", "fsdp")), place((5, 64, 64), None, "fsdp")).compile()
print(json.dumps(hlo.read(compiled.as_text(), mesh)))
"""


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCANNED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    collectives, memory = json.loads(done.stdout.splitlines()[-1])
    whole = 64 * 64 * 4
    gathers = [it for it in collectives if it["kind"] == "all-gather" and it["axis"] == "fsdp"]
    assert sum(it["bytes"] for it in gathers) == 5 * whole and all(it["group"] == 4 for it in gathers)
    sums = [it for it in collectives if it["kind"] == "all-reduce"]
    assert {it["axis"] for it in sums} == {"data+fsdp"} and sum(it["bytes"] for it in sums) == 4
    # each turn reads a slice of the weights and writes it gathered, and reads that
    assert 5 * 2 * whole < memory < 5 * 8 * whole


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [0, 1]),
        ("replica_groups={}, to_apply=%add", []),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [0, 2]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, channel_id=1", [0, 1]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", None),
        ("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}, channel_id=1", [1, 2]),
    ],
)
def test_the_ways_a_group_is_written(text, group):
    found = hlo.first_group(text)
    assert (found is None) if group is None else found.tolist() == group


def test_times_of_a_program_on_a_chip():
    chip = chips.find("TPU v5 lite")
    assert chip is chips.CHIPS["v5e"] and chips.find("TPU v5p") is chips.CHIPS["v5p"]
    assert chips.find("NVIDIA H100 80GB HBM3") is chips.CHIPS["h100"] and chips.find("cpu") is None
    devices = [SimpleNamespace(platform="tpu", coords=[i % 4, i // 4, 0]) for i in range(16)]
    mesh = SimpleNamespace(devices=np.array(devices).reshape(1, 4, 4, 1), axis_names=("dcn", "data", "fsdp", "tensor"))
    gathered = {"kind": "all-gather", "axis": "fsdp", "group": 4, "bytes": 90e9}
    summed = {"kind": "all-reduce", "axis": "data+fsdp", "group": 16, "bytes": 90e9}  # over two sides of the torus
    assert roofline.seconds(chip, mesh, gathered) == pytest.approx(0.75)
    assert roofline.seconds(chip, mesh, summed) == pytest.approx(15 / 16)
    top = roofline.roofline(chip, "bfloat16", mesh, 16 * 197e12, 8 * 197e12, 819e9, [gathered], 32, 10)
    assert top["times"] == pytest.approx({"compute": 1.5, "memory": 1.0, "network": 0.75})
    assert top["limit"] == "compute" and top["mfu"] == pytest.approx(2 / 3)
    assert top["images_per_s"] == pytest.approx(2 / 1.5) and top["tokens_per_s"] == pytest.approx(20 / 1.5)


def test_what_to_change(monkeypatch):
    options = ["parts.tokenizer=configs/tokenizers/vq.py:tiny", "batch=64"]
    built = programs.build(*programs.choose(config_lib.load("configs/ar/raster.py:tiny", options), None))
    holding = programs.bytes_each(built.state)
    entry = {"spare": -1.0, "memory": {"peak": 20 * holding, "temporaries": 18 * holding}}
    reported = roofline.changes(built, "train", entry, 8.0 * holding)
    assert reported[0].startswith("--config.model.remat=full") and reported[1].startswith("--config.accumulate=4 ")
    assert roofline.changes(built, "train", entry, 1.0 * holding)[0].startswith("more devices, about 4")
    for name in ("train", "sample"):  # a smaller batch would not make it fit
        assert len(roofline.changes(built, name, entry, 0.25 * holding)) == 1
    assert roofline.changes(built, "sample", entry, 8.0 * holding) == ["--count 8 (instead of 16 images per call)"]


@pytest.mark.slow
def test_suggestions_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(suggest, "COMPILED", 2)
    file = tmp_path / "report.json"
    assert preflight.main([*PRIOR, "--suggest", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["tried"] == 15 and report["compiled"] == 2  # three policies, five batches
    best, second = report["suggestions"]
    assert best["fits"] and best["images_per_s"] >= second["images_per_s"]
    assert f"--config.batch={best['batch']}" in best["options"] and best["remat"] in best["options"]


SUGGESTED = """
import json, sys
from hybridgen import preflight
from hybridgen.cost import suggest

suggest.COMPILED = 3
prior, file = sys.argv[1:-1], sys.argv[-1]
assert preflight.main([*prior, "--suggest", "--json", file]) == 0
best = json.load(open(file))["suggestions"][0]
assert preflight.main([*prior, *best["options"].split(), "--what", "train", "--json", file + ".best"]) == 0
"""


@pytest.mark.slow
def test_suggestions_of_meshes(tmp_path):
    """Of eight devices; what is suggested is what preflight says of the options that it is suggested with."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env |= {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    file = tmp_path / "report.json"
    line = [sys.executable, "-c", SUGGESTED, *PRIOR, str(file)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(file.read_text())
    found = report["suggestions"]
    assert report["tried"] > 3 * 4 and len({str(entry["mesh"]) for entry in found}) > 1
    assert all(np.prod(list(entry["mesh"].values())) == 8 for entry in found)
    rates = [entry["images_per_s"] for entry in found]
    assert rates == sorted(rates, reverse=True) and all(entry["fits"] for entry in found)
    again = json.loads(Path(f"{file}.best").read_text())
    assert again["mesh"] == found[0]["mesh"] and again["batch"] == found[0]["batch"]
    # its rate is by what this machine shows it can do, anew each time; its memory is not
    assert again["train"]["memory"]["peak"] == pytest.approx(report["capacity"] - found[0]["spare"])


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


CHAIN = """HloModule chain

%start (p: bf16[8,4]) -> (bf16[8,4], bf16[16,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %ag = bf16[16,4]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %s = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[8,4], q: bf16[16,4], x: f32[64]) -> (f32[64], bf16[8,4], bf16[16,4]) {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %q = bf16[16,4]{1,0} parameter(1)
  %x = f32[64]{0} parameter(2)
  %ag.1 = bf16[16,4]{1,0} all-gather(%p.1), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="1"}
  %y = f32[64]{0} add(%x, %x)
  ROOT %t = (f32[64]{0}, bf16[8,4]{1,0}, bf16[16,4]{1,0}) tuple(%y, %p.1, %ag.1)
}

ENTRY %main (w: bf16[8,4], v: f32[64]) -> f32[64] {
  %w = bf16[8,4]{1,0} parameter(0)
  %v = f32[64]{0} parameter(1)
  %one = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %in = bf16[8,4]{1,0} get-tuple-element(%one), index=0
  %out = bf16[16,4]{1,0} get-tuple-element(%one), index=1
  %two = (f32[64]{0}, bf16[8,4]{1,0}, bf16[16,4]{1,0}) fusion(%in, %out, %v), kind=kOutput, calls=%beside
  ROOT %z = f32[64]{0} get-tuple-element(%two), index=0
}
"""


def test_a_collective_beside_several_fusions_is_one():
    mesh = SimpleNamespace(shape={"data": 2})
    (gather,), moved = hlo.read(CHAIN, mesh)
    assert gather == {"kind": "all-gather", "axis": "data", "group": 2, "count": 1, "bytes": 16 * 4 * 2}
    # the start reads its argument and writes both of its results; the fusion beside reads and writes 64 floats
    assert moved == 8 * 4 * 2 + (8 + 16) * 4 * 2 + 2 * 64 * 4


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v9:2x2", "v5e:4", "v5e:2x2x2", "v5p:4x4", "5x5", "v5e:3x5"])
def test_an_unknown_topology_names_the_known_ones(name):
    pytest.importorskip("libtpu") if name == "v5e:3x5" else None
    with pytest.raises(UserError, match=r"topology .*known: .*v5e:16x16"):
        topology.describe(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'\.\[tpu\]'"):
        topology.describe("v5e:4x4")


def test_wrong_arguments_exit_with_2(capsys):
    for argument in ("--topologie=v5e:2x2", "--config.batch=7.5"):
        with pytest.raises(SystemExit) as stop:
            cli.command(lambda argument=argument: preflight.main([*PRIOR, argument]))
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_topology_on_a_cpu(tmp_path):
    code, report, shown = run(tmp_path, *PRIOR, "--topology", "v5e:2x2", "--config.mesh.fsdp=2", "--cached")
    assert code == 0, report
    assert report["devices"] == 4 and report["mesh"] == {"data": 2, "fsdp": 2} and "TPU" in report["device"]
    assert report["capacity"] == 15.75 * GIB and report["count"] == 16
    # the state lies on two devices in halves, the batch in quarters
    assert report["train"]["memory"]["arguments"] < 0.8 * 3 * 4 * report["parameters"]
    assert shown.count("GiB to spare") == 2
    train = report["train"]
    kinds = {(it["kind"], it["axis"]): it["bytes"] for it in train["collectives"]}
    # what is sharded over fsdp is gathered, in either pass or once for both
    assert 0.8 < kinds["all-gather", "fsdp"] / (4 * report["parameters"]) < 3
    assert train["roofline"]["times"]["network"] > 0 and train["roofline"]["memory_bytes"] > 4 * report["parameters"]


@pytest.mark.slow
@needs_libtpu
def test_two_slices(tmp_path):
    code, report, shown = run(tmp_path, *PRIOR, "--topology", "v5e:2x2", "--slices", "2", "--cached", "--what", "train")
    assert code == 0, report
    assert report["devices"] == 8 and report["slices"] == 2 and report["mesh"] == {"dcn": 2, "data": 4}
    across = [it for it in report["train"]["collectives"] if it["axis"] == "dcn"]
    # gradients are summed over the slices, once: whole, or what each of four devices has after a sum within its slice
    assert 0.2 < sum(it["bytes"] for it in across) / (4 * report["parameters"]) < 1.2


@needs_libtpu
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, topology, billions, positions",  # of the prior with its text, of the decoder
    [
        ("configs/ar/raster.py:3b", "v5e:16x16", 2.9, 321),
        ("configs/diffusion/dit.py:xl", "v5e:16x16", 0.68, 256),
        ("configs/ar/raster.py:20b", "v5p:8x8x4", 20.2, 1088),
        ("configs/hybrid/cascade.py:large", "v6e:16x16", 3.5, 321),
    ],
)
def test_large_models_fit_a_pod_slice(tmp_path, config, topology, billions, positions):
    code, report, _ = run(tmp_path, "--config", config, "--topology", topology)
    assert code == 0, report
    assert report["devices"] == 256 and report["parameters"] == pytest.approx(billions * 1e9, rel=0.1)
    for name in ("train", "sample"):
        assert report[name]["lower_s"] + report[name]["compile_s"] < 180
        assert report[name]["spare"] > 0
        # everything is sharded over fsdp, and gathered
        assert any(it["kind"] == "all-gather" and "fsdp" in it["axis"] for it in report[name]["collectives"])
    # 6 FLOPs a parameter and position, roughly
    about = 6 * report["parameters"] * report["batch"] * positions
    assert report["train"]["flops"]["total"] == pytest.approx(about, rel=0.3)
    # layers are counted as often as they are there: weights are gathered at least once for each pass, in bfloat16
    gathered = sum(it["bytes"] for it in report["train"]["collectives"] if it["kind"] == "all-gather")
    assert 2 * 2 * report["parameters"] < gathered < 4 * 4 * report["parameters"]
    # and to draw, once for all tokens or solver steps
    gathered = sum(it["bytes"] for it in report["sample"]["collectives"] if it["kind"] == "all-gather")
    assert gathered < 4 * 2 * report["parameters"]


@needs_libtpu
@pytest.mark.slow
def test_an_oversized_config_says_by_how_much(tmp_path):
    arguments = ["--config", "configs/ar/raster.py:3b", "--topology", "v5e:16x16", "--config.mesh.fsdp=1"]
    code, report, shown = run(tmp_path, *arguments, "--what", "train")
    assert code == 1 and not report["fits"]
    # 12 bytes a parameter on every device, and more
    assert report["train"]["spare"] < 15.75 * GIB - 12 * report["parameters"]
    assert f"does not fit by {-report['train']['spare'] / GIB:.2f} GiB" in shown
    assert "try --config.mesh.fsdp=8 " in shown
