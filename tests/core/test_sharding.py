"""Meshes: equal results on 1, 2, 4 and 8 devices, parameters that are really sharded, and clear errors.

Cases with several devices run in a separate process (sharded_cases.py) with eight host devices. The full product of
systems, meshes and precisions is marked slow; a selection of it is not.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from hybridgen.core import meshes, param_rules, sharding, trees
from hybridgen.core.errors import UserError
from hybridgen.core.param_rules import Rule

ROOT = Path(__file__).parents[2]
ONE = {"data": 1}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = {  # 2, 4 and 8 devices and every axis, for each precision
    "float32": ({"tensor": 2}, {"fsdp": 2, "tensor": 2}, {"data": 8}, {"dcn": 2, "fsdp": 4}),
    "float64": ({"data": 2}, {"fsdp": 4}, MIXED),
}
# large programs then compile in a sixth of the time; XLA ends at a flag it does not know, so only where it was tried
QUICK = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
SYSTEMS = ("fsq", "moving", "prior", "decoder", "cascade")


def on(name: str, dtype: str, steps: int, *meshes: dict, **changes) -> list[dict]:
    """What sharded_cases.py measures for this system on each mesh."""
    flags = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
    line = [sys.executable, str(ROOT / "tests/sharded_cases.py"), name, dtype, str(steps), *flags]
    settings = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8{QUICK}"}
    settings |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line += [json.dumps(mesh) for mesh in meshes]
    done = subprocess.run(line, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert len(found) == len(meshes)
    return found


def gap(one: dict, many: dict) -> float:
    """Largest relative difference of the losses."""
    a, b = np.asarray(one["losses"]), np.asarray(many["losses"])
    return float((np.abs(a - b) / np.abs(a)).max())


def check(found: list[dict], tolerance: float, exact: float) -> None:
    """Losses within `tolerance` (relative) of the first mesh's, the final arrays within `exact` of their size."""
    one, *others = found
    steps = len(one["losses"])
    assert np.isfinite(one["losses"]).all() and len(set(one["losses"])) == steps > 1
    for many in others:
        size = int(np.prod(list(many["mesh"].values())))
        assert many["devices"] == [size] and many["dtype"] == one["dtype"]
        assert many["skipped"] == 0 and many["pinned"] and many["donated"] and many["copies"], many["mesh"]
        assert gap(one, many) < tolerance, (many["mesh"], gap(one, many))
        assert set(many["final"]) == set(one["final"])
        for path, value in one["final"].items():
            value, other = np.asarray(value), np.asarray(many["final"][path])
            assert np.abs(value - other).max() <= exact * max(np.abs(value).max(), 1e-3), (many["mesh"], path)


def cut(found: dict, *groups: str) -> dict[str, float]:
    """The share of each array (of these groups of the state) on one device."""
    return {
        path: np.prod(part) / np.prod(whole)
        for path, (whole, part) in found["shards"].items()
        if path.startswith(groups)
    }


# ---------------------------------------------------------------- the same numbers


@pytest.mark.slow
def test_a_moving_codebook_is_merged_over_devices():
    """`extra` is updated by sums over the tokens of all devices; dead codes are reset identically."""
    one, many = found = on("moving", "float64", 10, ONE, {"dcn": 2, "data": 2, "fsdp": 2})
    check(found, 1e-9, 1e-9)
    assert {"extra/count", "extra/codebook", "extra/total"} <= set(many["final"])
    start = np.ones(16)
    assert np.abs(np.asarray(one["final"]["extra/count"]) - start).max() > 0.1


@pytest.mark.slow
def test_a_masked_loss_on_every_mesh():
    """Also with microbatches of different weights, which are sharded again."""
    meshes = (ONE, *MESHES["float32"], *MESHES["float64"])
    whole = on("toy", "float64", 50, *meshes)
    by_parts = on("toy", "float64", 50, *meshes[::2], accumulate=2)
    check(whole, 1e-9, 1e-9)
    check([whole[0], *by_parts[1:]], 1e-9, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [("float32", 10, 1e-5), ("float64", 50, 1e-9)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_on_every_mesh(name, dtype, steps, tolerance):
    # Adam makes whole steps of gradients that are nothing but rounding, and a code that falls the other way is a jump
    changes = {"optim__eps": 1e-4} if name == "fsq" else {}
    found = on(name, dtype, steps, ONE, *MESHES[dtype], **changes)
    assert found[0]["dtype"] == [dtype]
    check(found, tolerance, 1e-7 if dtype == "float64" else 1e-2)
    if name == "prior":
        for many in found[1:]:
            check_cuts(many)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_heads_that_do_not_divide(name):
    """Their kernels are sharded by head width, with equal results."""
    one, many = found = on(name, "float64", 10, ONE, {"fsdp": 2, "tensor": 4}, heads=2)
    check(found, 1e-9, 1e-7)
    shares = cut(many, "params/blocks/layers/attention/")
    assert {shares[f"params/blocks/layers/attention/{kernel}/kernel"] for kernel in ("qkv", "out")} == {1 / 8}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moving", "prior"])
def test_microbatches_on_a_mesh(name):
    check(on(name, "float64", 10, ONE, {"data": 2, "fsdp": 2}, accumulate=2), 1e-9, 1e-7)


# ---------------------------------------------------------------- really cut


def check_cuts(found: dict) -> None:
    """Shares of a prior that a device holds, by hand."""
    fsdp, tensor = (found["mesh"].get(axis, 1) for axis in ("fsdp", "tensor"))
    layers = "blocks/layers"
    both = 1 / (fsdp * tensor)
    want = {
        f"{layers}/attention/qkv/kernel": both,
        f"{layers}/attention/out/kernel": both,
        f"{layers}/mlp/up/kernel": both,
        f"{layers}/mlp/down/kernel": both,
        "text/blocks/layers/mlp/up/kernel": both,
        "tokens/table": both,
        "head/kernel": both,
        f"{layers}/attention_norm/scale": 1,
    }
    shares = cut(found, "params/", "opt/", "ema/")
    for name, share in want.items():
        own = re.compile(f"(params|ema|.*/mu|.*/nu)/{name}$")  # the parameter, its average and two moments
        copies = {path: value for path, value in shares.items() if own.match(path)}
        assert len(copies) == 4, (name, sorted(shares))
        assert set(copies.values()) == {share}, (found["mesh"], copies)


@pytest.mark.slow
def test_a_prior_on_eight_devices_is_the_prior_on_one_and_is_cut():
    """Parameters, optimizer moments and EMA are sharded, with equal losses."""
    one, many = found = on("prior", "float32", 10, ONE, MIXED)
    check(found, 1e-5, 1e-2)
    check_cuts(many)
    holding = sum(np.prod(part) for whole, part in many["shards"].values())
    assert holding < 0.35 * sum(np.prod(whole) for whole, part in many["shards"].values())
    assert set(cut(one, "params/").values()) == {1}


def test_rows_of_a_batch_are_cut_and_so_is_the_work():
    sizes = [{"data": -1, "tensor": 2}, {"dcn": 2, "data": 2, "fsdp": 2}, {"tensor": 8}]
    paired, eight, whole = on("places", "float32", 0, *sizes)
    assert paired["shape"] == {"dcn": 1, "data": 4, "fsdp": 1, "tensor": 2}
    rows = [list(range(i, i + 4)) for i in (0, 0, 4, 4, 8, 8, 12, 12)]  # the two of a tensor pair hold the same ones
    assert [[2 * row for row in part] for part in rows] == [holding for _, holding in sorted(paired["rows"])]
    assert [holding for _, holding in sorted(eight["rows"])] == [[4 * i, 4 * i + 2] for i in range(8)]
    assert all(holding == list(range(0, 32, 2)) for _, holding in whole["rows"])
    for found in (paired, eight, whole):
        assert found["local"] == list(range(16))

    one, many = on("memory", "float32", 0, ONE, {"data": 8})
    assert many["temporary"] < 0.3 * one["temporary"]


def test_a_kernel_is_not_gathered_over_tensor_where_its_product_is_smaller():
    """With few rows no kernel is gathered, also if heads do not divide; adaLN's never is, also with many rows."""
    (found,) = on("gathers", "float32", 0, {"data": 2, "tensor": 4})
    width, heads = 64, 64  # kernels: qkv 64 x 192, mlp 64 x 2 x 96, out 64 x 64, modulation 64 x 6 x 64
    assert found["step"] <= 2 * heads  # queries of the two rows of a device
    assert found["rows"] <= width * heads  # a part of the qkv kernel


# ---------------------------------------------------------------- rules, on one device


def abstract(**sizes) -> AbstractMesh:
    """A mesh without real devices."""
    shape = tuple(sizes.get(axis, 1) for axis in meshes.MESH_AXES)
    return AbstractMesh(shape, meshes.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_a_mesh_that_does_not_fit_is_refused():
    six = list(range(6))  # whatever they are: nothing is placed on them
    with pytest.raises(UserError, match=r"mesh \{'data': 4\} needs 4 devices, but there are 6"):
        meshes.make_mesh({"data": 4}, six)
    with pytest.raises(UserError, match="needs 3 devices, but there are 6"):
        meshes.make_mesh({"data": 3}, six)  # it divides, and would leave three idle
    with pytest.raises(UserError, match="needs 4 devices, but there are 6"):
        meshes.make_mesh({"data": -1, "tensor": 4}, six)
    with pytest.raises(UserError, match="at most one may be -1"):
        meshes.make_mesh({"data": -1, "fsdp": -1}, six)
    for size in (0, -2):
        with pytest.raises(UserError, match="sizes must be positive"):
            meshes.make_mesh({"data": size}, six)
    with pytest.raises(UserError, match="mesh axis 'model' is not one of dcn, data, fsdp, tensor"):
        meshes.make_mesh({"model": 6}, six)
    mesh = meshes.make_mesh({"fsdp": -1}, jax.devices()[:1])
    assert mesh.axis_names == ("dcn", "data", "fsdp", "tensor") and set(mesh.axis_types) == {AxisType.Auto}


def test_a_batch_that_does_not_divide_is_refused():
    mesh = abstract(dcn=2, data=2, fsdp=2, tensor=3)
    meshes.check_batch(mesh, 16)
    meshes.check_batch(mesh, 32, accumulate=4)
    assert [meshes.padded(mesh, rows) for rows in (1, 8, 9)] == [8, 8, 16]
    with pytest.raises(UserError, match="batch 12 in 1 accumulation steps does not divide over 8 data-parallel"):
        meshes.check_batch(mesh, 12)
    with pytest.raises(UserError, match="batch 16 in 4 accumulation steps does not divide over 8"):
        meshes.check_batch(mesh, 16, accumulate=4)
    with pytest.raises(UserError, match="batch 16 in 3 accumulation steps"):
        meshes.check_batch(abstract(), 16, accumulate=3)


def test_two_logical_axes_on_one_mesh_axis_are_an_error():
    assert sharding.logical_spec("batch", None, "mlp") == PartitionSpec(("dcn", "data", "fsdp"), None, ("tensor",))
    for names in (("heads", "mlp"), ("batch", "batch"), ("vocab", None, "vocab")):
        with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
            sharding.logical_spec(*names)
        with jax.sharding.use_abstract_mesh(abstract(data=2)), pytest.raises(ValueError, match="on one mesh axis"):
            jax.eval_shape(lambda x, names=names: sharding.shard(x, *names), jnp.zeros((2,) * len(names)))


def test_activations_are_constrained_where_there_is_a_mesh():
    x = jnp.zeros((8, 3, 4))
    assert sharding.shard(x, "batch", None, "mlp") is x
    with jax.sharding.use_abstract_mesh(abstract(data=2, tensor=2)):
        program = jax.make_jaxpr(lambda x: sharding.shard(x, "batch", "heads", None))(x)
        (constraint,) = program.eqns
        assert constraint.primitive.name == "sharding_constraint"
        # three heads over two devices stay whole
        assert constraint.params["sharding"].spec == PartitionSpec(("dcn", "data", "fsdp"), None, None)
        with pytest.raises(ValueError, match=r"2 axis names \('batch', None\) for an array of shape \(8, 3, 4\)"):
            jax.eval_shape(lambda x: sharding.shard(x, "batch", None), x)


# ---------------------------------------------------------------- parameters, by shape


PODS = (abstract(fsdp=16), abstract(fsdp=4, tensor=4))


def misplaced(params: dict) -> list[str]:
    """Large parameters that are replicated on a pod, and block matrices that are not sharded over `tensor`.

    params: arrays or their shapes, nested. A ValueError for a parameter without a rule.
    """
    found = []
    for mesh in PODS:
        for path, leaf in trees.flatten(params).items():
            spec = sharding.param_spec(path, leaf.shape, mesh)
            if leaf.size <= 1e6:
                continue
            where = f"{path} {leaf.shape} on {dict(mesh.shape)}"
            if NamedSharding(mesh, spec).shard_shape(leaf.shape) == leaf.shape:
                found.append(f"{where}: replicated on every device")
            block = "blocks/" in path or "layers" in path
            if mesh.shape["tensor"] > 1 and block and leaf.ndim > 2 and "tensor" not in spec:
                found.append(f"{where}: not divided over tensor")
    return found


def test_every_parameter_needs_a_rule_of_its_path_and_rank():
    mesh = abstract(fsdp=2, tensor=2)
    for path, shape in (
        ("blocks/odd", (3, 4)),
        ("joint/text_gate/kernel", (16, 8)),  # no rule is for whatever is a kernel ...
        ("joint/text_gate/bias", (8,)),  # ... or a bias
        ("x/mlp/down/kernel", (3, 3, 16, 8)),
        ("blocks/layers/mlp/down/kernel", (16, 8)),  # has no layer axis
    ):
        message = (
            rf"no sharding rule matches parameter '{path}' of shape {re.escape(str(shape))}: in the file of your family"
        )
        with pytest.raises(ValueError, match=message):
            sharding.param_spec(path, shape, mesh)
    for path, shape, spec in (
        ("blocks/layers/mlp/up/kernel", (5, 8, 2, 16), (None, "fsdp", None, "tensor")),
        ("x/mlp/down/kernel", (16, 8), ("tensor", "fsdp")),
        ("time/out/kernel", (16, 8), ("tensor", "fsdp")),
        ("time/out/kernel", (5, 16, 8), (None, "tensor", "fsdp")),  # an embedder a layer
        ("layers/mlp_norm/scale", (5, 8), (None, None)),
        ("block_1/project/kernel", (1, 1, 16, 8), (None, None, None, "fsdp")),
        ("encoder/project/kernel", (16, 8), ("fsdp", None)),
    ):
        assert sharding.param_spec(path, shape, mesh) == PartitionSpec(*spec), path


def test_what_does_not_divide_goes_to_the_next_axis_of_its_rule():
    one, both = PODS
    path = "joint/text_qkv/kernel"
    for mesh, shape, spec in (
        (both, (24, 1536, 24, 3, 64), (None, "fsdp", "tensor", None, None)),
        (one, (24, 1536, 24, 3, 64), (None, "fsdp", None, None, None)),
        (both, (24, 1536, 6, 3, 64), (None, "fsdp", None, None, "tensor")),  # 6 heads over 4
        (one, (24, 1533, 24, 3, 64), (None, None, None, None, "fsdp")),
        (both, (24, 1533, 6, 3, 64), (None, None, None, None, "tensor")),  # an axis is divided once
    ):
        assert sharding.param_spec(path, shape, mesh) == PartitionSpec(*spec), (mesh, shape)
        assert not misplaced({"joint": {"text_qkv": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}}})


def test_a_large_parameter_that_would_lie_whole_everywhere_is_refused():
    one, both = PODS
    odd = {"blocks": {"layers": {"text_qkv": {"kernel": jax.ShapeDtypeStruct((24, 1533, 6, 3, 63), "float32")}}}}
    start = r"parameter 'blocks/layers/text_qkv/kernel' of shape \(24, 1533, 6, 3, 63\), 41,722,128 elements, would be "
    with pytest.raises(
        UserError, match=start + r"replicated on every device: mesh axis fsdp 16 divides none of d 1533, k 63"
    ):
        sharding.param_shardings(odd, one)
    with pytest.raises(UserError, match="tensor 4 divides none of h 6, k 63; mesh axis fsdp 4 divides none of d 1533"):
        sharding.param_shardings(odd, both)
    assert [text.rpartition(": ")[2] for text in misplaced(odd)] == [
        "replicated on every device",
        "replicated on every device",
        "not divided over tensor",
    ]
    sharding.param_shardings(odd, abstract(data=16))  # data parallel: all of them are whole
    small = {"text_qkv": {"kernel": jax.ShapeDtypeStruct((33, 3, 3, 3), "float32")}}
    assert not any(sharding.param_shardings(small, both)["text_qkv"]["kernel"].spec)
    conv = {"conv_1": {"kernel": jax.ShapeDtypeStruct((3, 3, 512, 512), "float32")}}
    sharding.param_shardings(conv, abstract(tensor=4))  # its rule has no axis for `tensor`
    norm = {"norm": {"scale": jax.ShapeDtypeStruct((2_000_000,), "float32")}}
    with pytest.raises(UserError, match="its rule lists no axis to shard"):
        sharding.param_shardings(norm, both)


def test_a_family_of_ones_own_brings_its_rules(monkeypatch):
    monkeypatch.setattr(param_rules, "PARAM_RULES", list(param_rules.PARAM_RULES))
    mixing = Rule("mixer/weights", "de", fsdp="ed"), Rule("head/kernel", "dv")
    param_rules.add_rules(*mixing)
    param_rules.add_rules(*mixing)  # its file is read again
    assert param_rules.PARAM_RULES[-2:] == list(mixing) and param_rules.PARAM_RULES.count(mixing[0]) == 1
    mesh = abstract(fsdp=2)
    assert sharding.param_spec("blocks/layers/mixer/weights", (2, 8, 8), mesh) == PartitionSpec(None, None, "fsdp")
    assert sharding.param_spec("head/kernel", (8, 8), mesh) == PartitionSpec("fsdp", None)  # what there was comes first


def test_what_mirrors_parameters_is_placed_like_them():
    mesh = abstract(fsdp=4, tensor=2)
    params = {"head": {"kernel": jnp.zeros((8, 3))}, "skip": {"kernel": jnp.zeros((6, 3))}}
    state = {"0": {"mu": params, "count": jnp.zeros(())}, "odd": jnp.zeros((8, 3))}
    places = sharding.mirror_shardings(state, params, mesh)
    for found in (sharding.param_shardings(params, mesh), places["0"]["mu"]):
        assert found["head"]["kernel"].spec == PartitionSpec("fsdp", None)
        assert found["skip"]["kernel"].spec == PartitionSpec(None, None)  # 6 over 4
    factored = sharding.mirror_shardings({"row": {"head": {"kernel": jnp.zeros(8)}}}, params, mesh)
    for whole in (places["0"]["count"], places["odd"], factored["row"]["head"]["kernel"]):
        assert not any(whole.spec)
    with pytest.raises(ValueError, match="no sharding rule matches parameter 'count'"):
        sharding.param_shardings({"count": jnp.zeros(())}, mesh)
