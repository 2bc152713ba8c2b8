"""NVIDIA GPUs: masks in cuDNN's form, and programs compiled for GPUs that this machine lacks.

The compilations need the extra `gpu`: JAX's CUDA plugin and cuDNN, and no GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flash import arrays

from hybridgen.core import meshes
from hybridgen.core.errors import UserError
from hybridgen.cost import chips, topology
from hybridgen.nn.attention import Mask, attend

ROOT = Path(__file__).parents[2]
PLUGIN = bool(importlib.util.find_spec("jax_plugins")) and any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13)
)
needs_plugin = pytest.mark.skipif(not PLUGIN, reason="needs the extra `gpu`")
# t, s, key heads, queries per key head, mask, whether some keys are hidden; and whether scores are added
MASKS = {
    "causal": (8, 8, 2, 1, Mask("causal"), False, False),
    "causal, hidden keys, odd lengths": (27, 27, 1, 2, Mask("causal"), True, True),
    "prefix, hidden keys": (30, 30, 2, 1, Mask("prefix", 6), True, True),
    "full": (9, 5, 1, 2, Mask(), False, False),
    "full, hidden keys, odd lengths": (9, 25, 1, 2, Mask(), True, True),
    "causal, from an offset": (4, 24, 1, 1, Mask("causal", offset=20), False, True),
    "causal, from a traced offset": (4, 24, 1, 1, Mask("causal", offset=jnp.int32(20)), True, True),
}
ALL = MASKS | {
    "prefix, hidden keys, large": (321, 321, 2, 1, Mask("prefix", 65), True, True),
    "causal, large": (1024, 1024, 2, 2, Mask("causal"), False, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_cudnn_is_given_the_mask_in_a_form_that_it_takes(monkeypatch, name):
    *shape, mask, hidden, added = MASKS[name]
    q, k, v, weight, valid = arrays(*shape, 8, hidden)
    mask, plain, seen = mask._replace(valid=valid), jax.nn.dot_product_attention, []

    def cudnn(q, k, v, *, mask=None, is_causal=False, implementation):
        assert implementation == "cudnn" and k.shape == v.shape
        if mask is not None:  # what cuDNN says of added scores
            assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1]) and not q.shape[1] % 2 and not k.shape[1] % 2
        seen.append(mask is not None)
        return plain(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)

    def both(kernel):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), q, k, v)
        return out, *back(weight)

    for ours, other in zip(both("cudnn"), both("xla"), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)
    assert seen == [added]


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no accelerator here, or JAX_PLATFORMS=cpu")
@pytest.mark.parametrize("name", ALL)
def test_attention_on_this_device_is_the_plain_one(name):
    *shape, mask, hidden, _ = ALL[name]
    q, k, v, weight, valid = arrays(*shape, 64, hidden)
    mask = mask._replace(valid=valid)

    def both(kernel, dtype):
        given = (x.astype(dtype) for x in (q, k, v))
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), *given)
        return [np.asarray(x, np.float32) for x in (out, *back(weight.astype(dtype)))]

    with jax.default_matmul_precision("highest"):
        exact = both("xla", "float32")
    for ours, plain in zip(both("auto", "bfloat16"), exact, strict=True):
        np.testing.assert_allclose(ours, plain, atol=0.03 * np.abs(plain).max())


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:2x2x8", "h100:0", "h1000:8"])
def test_an_unknown_topology_of_gpus_says_what_there_is(name):
    with pytest.raises(UserError, match="h100:8"):
        topology.describe(name)


def test_slices_of_gpus_are_hosts_in_the_name():
    with pytest.raises(UserError, match=r"--slices 4 .* h100:4x8"):
        topology.describe("h100:8", 4)


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def missing(platform, **options):
        raise NotImplementedError(f"topology not implemented for {platform}")

    monkeypatch.setattr(topology, "_devices", missing)
    with pytest.raises(UserError, match=r"'\.\[gpu\]'"):
        topology.describe("h100:8")


def test_what_the_compiler_is_told_of_a_gpu():
    reported = topology.target(topology.GPUS["h100"], chips.CHIPS["h100"])
    for line in ("core_count: 132", "memory_bandwidth: 3350000000000", "cuda_compute_capability { major: 9 }"):
        assert line in reported.splitlines()
    for name, gpu in topology.GPUS.items():  # of the device's name the peak rates are found
        assert chips.find(gpu.name) is chips.CHIPS[name]


def test_hosts_of_gpus_are_no_slices():
    class Device:
        platform, device_kind = "gpu", "NVIDIA H100"

        def __init__(self, number):
            self.id, self.process_index, self.slice_index = number, number // 2, number // 2

    devices = [Device(number) for number in range(4)]
    mesh = meshes.make_mesh({"fsdp": 4, "data": 1}, devices)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3] and mesh.shape["fsdp"] == 4


def process(code: str) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMPILED = """
import json
import jax
from hybridgen.core import config
from hybridgen.cost import hlo, programs, topology

jax.config.update("jax_platforms", "cpu")
built_for = config.load("configs/ar/raster.py:1b,model.depth=3,model.width=256,model.heads=4,batch=8")
built_for.mesh.fsdp = 2
built = programs.build(built_for, {}, devices=topology.describe("h100:1x2")[0], count=8, cached=True)
found = {"devices": built.experiment.mesh.devices.size, "kind": built.experiment.mesh.devices.flat[0].device_kind}
with jax.set_mesh(built.experiment.mesh):
    train = built.step.lower(*built.train_arguments()).compile().as_text()
    decoding = built.decoding()
    plan = decoding.plan.lower(*built.sample_arguments()).compile().as_text()
name = 'custom_call_target="__cudnn$fmhaScaleBiasSoftmax{}"'
found["attention"] = [train.count(name.format(end)) for end in ("", "Backward")]
found["kinds"] = sorted({(it["kind"], it["axis"]) for it in hlo.read(train, built.experiment.mesh)[0]})
collectives, moved = hlo.read(plan, built.experiment.mesh)
found["gathered"] = sum(it["bytes"] for it in collectives if it["kind"] == "all-gather")
found["weights"] = 4 * sum(leaf.size for leaf in jax.tree.leaves(built.state["params"]))
found["moved"], found["must"] = moved, decoding.bytes * decoding.steps
print(json.dumps(found))
"""


@needs_plugin
@pytest.mark.slow
def test_programs_for_gpus_compile_on_a_cpu():
    found = process(COMPILED)
    assert found["devices"] == 2 and found["kind"].startswith("NVIDIA H100")
    assert found["attention"][0] >= 3 and found["attention"][1] == 3  # every layer, forward (also again) and back
    assert ["all-gather", "fsdp"] in found["kinds"]
    assert found["gathered"] < 2 * found["weights"]  # before the 255 steps, and not in each
    # what a token must read, and not the weights as stored, nor copies of them; small layers also move activations
    assert found["moved"] < 3 * found["must"]
