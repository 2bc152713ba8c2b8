"""The TPU kernel against the plain one, run by its interpreter on a CPU; and compiled for a TPU, which needs libtpu."""

import functools
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

from hybridgen.core.errors import UserError
from hybridgen.nn.attention import Mask, attend, pick

ROOT = Path(__file__).parents[2]
B = 2
# t, s, key heads, queries per key head, head width, mask, whether some keys are hidden
CASES = {
    "causal, padded, two blocks": (150, 150, 1, 1, 64, Mask("causal"), False),
    "prefix, grouped queries, hidden keys": (77, 77, 1, 2, 72, Mask("prefix", 16), True),
    "full, other lengths, hidden keys": (130, 77, 2, 1, 80, Mask(), True),
    "full, padded keys": (77, 130, 1, 1, 128, Mask(), False),
    "causal, from an offset, hidden keys": (40, 140, 1, 2, 64, Mask("causal", offset=100), True),
}


def arrays(t, s, h, g, k, hidden, b=B):
    draw = np.random.default_rng(0)
    shapes = (b, t, h, g, k), (b, s, h, k), (b, s, h, k), (b, t, h, g, k)
    q, k, v, out = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    valid = draw.uniform(size=(b, s)) < 0.7
    valid[0, :20] = False  # rows of a causal mask, or of a prefix, that see no key at all
    return q, k, v, out, jnp.asarray(valid) if hidden else None


QUICK = ("prefix, grouped queries, hidden keys", "full, other lengths, hidden keys")  # the interpreter is slow


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_value_and_gradient_are_those_of_the_plain_kernel(case):
    *shape, mask, hidden = CASES[case]
    q, k, v, weight, valid = arrays(*shape, hidden)
    mask = mask._replace(valid=valid)

    @functools.partial(jax.jit, static_argnums=0)
    def both(kernel):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), q, k, v)
        return out, *back(weight)

    for ours, plain in zip(both("splash interpreted"), both("xla"), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


MESHED = """
import json
import jax, numpy as np
from test_flash import arrays
from hybridgen.core import meshes, placement
from hybridgen.nn.attention import Mask, attend

worst = []
for heads, rows in ((2, 4), (3, 4), (2, 3)):  # heads or rows that do not divide stay whole
    q, k, v, weight, valid = arrays(20, 20, heads, 1, 8, True, rows)
    def both(kernel):
        out, back = jax.vjp(lambda *x: attend(*x, Mask("causal", valid=valid), kernel), q, k, v)
        return out, *back(weight)
    plain = both("xla")
    mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        ours = jax.jit(lambda: both("splash interpreted"))()
    worst += [float(abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(ours, plain, strict=True)]
    split = len({str(shard.index) for shard in ours[0].addressable_shards}) == 4
    worst.append(0.0 if split == (heads == 2 and rows == 4) else 9.0)
print(json.dumps(worst))
"""


def process(code, **environment):
    """What a process of its own prints last, from JSON."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/nn'}"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_on_a_mesh_each_device_has_its_rows_and_heads():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    assert max(process(MESHED, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)) < 1e-5


COMPILED = """
import json
import jax, jax.numpy as jnp
from hybridgen import preflight
from hybridgen.core import meshes, placement
from hybridgen.cost import topology
from hybridgen.nn.attention import Mask, attend

jax.config.update("jax_platforms", "cpu")
mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, topology.describe("v5e:2x2")[0])
rows = placement.batch_sharding(mesh)
found = []
for t, s, h, g, k, kind, prefix, hidden, dtype in CASES:
    q, kv = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for shape in ((4, t, h, g, k), (4, s, h, k)))
    valid = jax.ShapeDtypeStruct((4, s), bool, sharding=rows) if hidden else None
    def loss(q, k, v, valid):
        return attend(q, k, v, Mask(kind, prefix, valid)).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, valid)
        found.append(lowered.compile(compiler_options=preflight.QUICK).as_text().count('"tpu_custom_call"'))
print(json.dumps(found))
"""
ON_A_TPU = [
    (321, 321, 4, 1, 128, "prefix", 64, True, "bfloat16"),
    (321, 321, 2, 2, 72, "causal", 0, False, "bfloat16"),
    (1025, 1025, 4, 1, 64, "full", 0, False, "bfloat16"),
    (1024, 77, 4, 1, 80, "full", 0, True, "bfloat16"),
    (257, 257, 3, 1, 72, "causal", 0, True, "float32"),
    (77, 77, 2, 1, 64, "causal", 0, False, "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
def test_it_is_what_a_tpu_runs_where_it_fits():
    # forward, gradient of keys and values, gradient of queries; the last is short, and stays with the plain kernel
    assert process(COMPILED.replace("CASES", repr(ON_A_TPU))) == [3, 3, 3, 3, 3, 0]


def test_what_it_cannot_do_is_left_to_the_plain_kernel():
    q, k, v, _, _ = arrays(300, 300, 1, 1, 8, False)
    assert pick(q, k, Mask("causal")) == "xla"  # this is no TPU
    with pytest.raises(UserError, match="needs a static mask offset"):
        jax.jit(lambda i: attend(q, k, v, Mask("causal", offset=i), "splash"))(3)
    with pytest.raises(UserError, match="'flash' is not one of 'auto', 'xla', 'cudnn', 'splash'"):
        attend(q, k, v, Mask(), "flash")
