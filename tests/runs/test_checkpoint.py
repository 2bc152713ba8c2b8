"""Checkpoints are restored bit for bit on any devices; old steps are deleted, the newest valid one is kept."""

import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    abstract,
    empty_folder,
    files_of,
    finish,
    flip,
    free_port,
    same,
    script,
    state_of,
    three_steps,
)

from hybridgen.core.errors import UserError
from hybridgen.runs.checkpoint import Checkpointer, SaveError, digest
from hybridgen.runs.fingerprint import check_fingerprint


@pytest.fixture
def saved(tmp_path):
    return three_steps(tmp_path / "checkpoints")


def test_round_trip_bit_for_bit(saved):
    with Checkpointer(saved, keep=3) as saver:
        assert saver.good_steps() == [1, 2, 3] and saver.newest_good() == 3
        for step in (1, 3):
            assert same(saver.restore(step, abstract(state_of())), state_of(step))
        assert not same(saver.restore(1, abstract(state_of())), state_of(3))
        assert saver.meta(3) == {"parts": {"tokenizer": "abc"}}


def test_parts_without_the_optimiser(saved):
    want = state_of(3)
    for path in files_of(saved / "3" / "training"):
        path.unlink()  # neither read nor missed
    with Checkpointer(saved, read_only=True) as reader:
        assert reader.newest_good() == 3
        found = reader.restore_params(3)
        assert same(found, {name: want[name] for name in ("params", "ema", "extra")})
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
        assert same(reader.restore_params(3, "params/blocks"), want["params"]["blocks"])
        assert reader.restore_params(3, "ema") == {}
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        requested = []
        placed = reader.restore_params(3, "params/blocks", lambda path, shape: requested.append((path, shape)) or place)
        assert same(placed, want["params"]["blocks"]) and placed["bias"].sharding == place
        assert ("params/blocks/kernel", (7, 6)) in requested
        with pytest.raises(UserError, match="no 'params/block'; top level: .*params"):
            reader.restore_params(3, "params/block")
    with Checkpointer(saved) as saver:
        assert saver.newest_good(report=lambda line: None) == 2  # a trainer does miss it


def test_another_config_is_named_by_its_keys(saved):
    want = abstract(state_of())
    want["params"]["blocks"]["kernel"] = jax.ShapeDtypeStruct((7, 5), jnp.bfloat16)
    want["params"]["blocks"]["bias"] = jax.ShapeDtypeStruct((5,), jnp.float16)
    want["opt"]["other"] = want["opt"].pop("group")
    with Checkpointer(saved) as saver, pytest.raises(UserError) as error:
        saver.restore(3, want)
    text = str(error.value)
    assert "\n" not in text
    assert "params/blocks/kernel bfloat16[7, 6] instead of bfloat16[7, 5]" in text
    assert "params/blocks/bias float32[5] instead of float16[5]" in text
    assert "lacks opt/other/count" in text and "has the extra opt/group/count" in text and "opt/group/mu" in text


def test_a_missing_step_is_refused(saved):
    with Checkpointer(saved) as saver, pytest.raises(UserError, match="no checkpoint 7 .*1, 2, 3"):
        saver.restore(7, abstract(state_of()))


def test_the_same_step_twice_is_saved_once(saved):
    before = (saved / "3" / "manifest.json").stat().st_mtime_ns
    with Checkpointer(saved, keep=3) as saver:
        assert saver.save(3, state_of(9)) is False
        assert saver.save(4, state_of(4)) is True
        assert saver.save(4, state_of(9)) is False
        assert same(saver.restore(3, abstract(state_of())), state_of(3))
        assert same(saver.restore(4, abstract(state_of())), state_of(4))
    assert (saved / "3" / "manifest.json").stat().st_mtime_ns == before


def test_donated_state_does_not_reach_the_save(tmp_path):
    """On a CPU the arrays that Orbax writes are views of the very buffers that the next step is given."""

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = step({"params": {str(i): jnp.full((256, 1024), float(i)) for i in range(6)}})
    with Checkpointer(tmp_path) as saver:
        for n in (10, 20, 30):
            want = {"params": {name: np.array(jnp.copy(x)) for name, x in state["params"].items()}}
            like = abstract(state)
            saver.save(n, state)
            for _ in range(10):
                state = step(state)
            jax.block_until_ready(state)
            assert same(saver.restore(n, like), want)
            restored = saver.restore(n, like)
            state = step(restored)  # and a restored state may be donated
            assert float(state["params"]["0"][0, 0]) == want["params"]["0"][0, 0] + 1
            assert same(saver.restore(n, like), want)


# ---- retention, fingerprint, digest


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_retention_is_by_step_and_after_the_manifest(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as saver:
        for step in range(1, 11):
            clock = 2_000_000_000 - 1000 * step  # runs backwards
            monkeypatch.setattr(time, "time", lambda clock=clock: clock)
            saver.save(step, state_of(step))
            saver.wait_until_saved()
            os.utime(tmp_path / str(step), (clock, clock))
            assert steps_in(tmp_path)[-2:] == ([step - 1, step] if step > 1 else [1])
    assert steps_in(tmp_path) == [4, 8, 9, 10]


def test_the_only_good_step_stays(saved):
    """Damaged steps do not count as kept steps, and do not cause deletions."""
    flip(saved / "3" / "model" / "_METADATA", 5)
    empty_folder(saved / "2")
    with Checkpointer(saved, keep=1) as saver:
        assert saver.newest_good(report=lambda line: None) == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hybridgen.runs.manifest.write", lambda *_: (_ for _ in ()).throw(OSError("disk")))
            saver.save(5, state_of(5))
            with pytest.raises(SaveError):
                saver.wait_until_saved()
        assert saver.newest_good(report=lambda line: None) == 1
        saver.save(2, state_of(22))  # the run goes on from 1; step 3, newer but bad, must not push 2 out
        saver.wait_until_saved()
        assert saver.newest_good(report=lambda line: None) == 2
        saver.save(6, state_of(6))
        saver.wait_until_saved()
    assert steps_in(saved) == [6]


def test_fingerprint_names_every_key(saved):
    old = {"config": {"seed": 0, "shape": (2, 3), "optim": {"lr": 1e-3}}, "data": {"length": 10}, "parts": {}}
    check_fingerprint(json.loads(json.dumps(old)), old)
    new = {"config": {"seed": 1, "shape": (2, 4), "optim": {"lr": 1e-3, "b2": 0.9}}, "data": {}, "parts": {"t": "ab"}}
    with pytest.raises(UserError) as error:
        check_fingerprint(json.loads(json.dumps(old)), new)
    text = str(error.value)
    assert "config.seed was 0 and is 1" in text and "config.shape was [2, 3] and is [2, 4]" in text
    assert 'parts.t was missing and is "ab"' in text
    assert "data.length was 10 and is missing" in text and "config.optim.b2 was missing and is 0.9" in text
    with pytest.raises(UserError, match="config.shape") as error:
        check_fingerprint(old, new, allow=("config.seed", "config.opt", "data", "parts.t"))
    assert "seed" not in str(error.value) and "optim.b2" in str(error.value) and "length" not in str(error.value)
    check_fingerprint(old, new, allow=("config", "data.length", "parts"))
    with Checkpointer(saved, fingerprint={"config": {"lr": 2}}) as saver:
        with pytest.raises(UserError, match="config.lr was 1 and is 2"):
            saver.check_fingerprint(3)
        saver.check_fingerprint(3, allow=["config.lr"])


def test_digest_sees_path_shape_dtype_and_bytes():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.int32(1)}
    others = [
        {"a": {"x": np.arange(6, dtype=np.float32)}, "c": np.int32(1)},
        {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.int32(1)},
        {"a": {"b": np.arange(6, dtype=np.float32).view(np.int32)}, "c": np.int32(1)},
        {"a": {"b": np.nextafter(np.arange(6, dtype=np.float32), 9)}, "c": np.int32(1)},
    ]
    assert len({digest(tree) for tree in (tree, *others)}) == 5
    assert digest(tree) == digest(dict(reversed(jax.tree.map(jnp.asarray, tree).items())))


def test_threads_and_files_do_not_grow(tmp_path):
    def count():
        lasting = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return len(lasting), len(os.listdir("/proc/self/fd"))

    with Checkpointer(tmp_path) as saver:
        for step in range(12):
            saver.save(step, state_of(step))
            saver.wait_until_saved()
            saver.restore(step, abstract(state_of()))
            if step == 4:
                before = count()
        assert count() == before


# ---- many devices, many processes

SHARDED = """
import sys, jax, numpy as np, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hybridgen.runs.checkpoint import Checkpointer, digest
def mesh(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
want = {"params": {"w": np.random.default_rng(0).random((16, 24), np.float32), "s": np.float32(3)}}
def put(mesh, spec, make=jax.device_put):
    return {"params": {"w": make(want["params"]["w"], NamedSharding(mesh, spec)),
                       "s": make(want["params"]["s"], NamedSharding(mesh, P()))}}
like = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
saver = Checkpointer(sys.argv[1])
saver.save(1, put(mesh(4, 2), P("a", "b")))
specs = {(8, 1): P("a"), (2, 4): P("b", "a"), (1, 1): P(), (4, 2): P(None, ("a", "b")), (2, 1): P()}
for shape, spec in specs.items():
    target = put(mesh(*shape), spec, like)
    got = saver.restore(1, target)
    assert digest(got) == digest(want)
    assert got["params"]["w"].sharding == target["params"]["w"].sharding, got["params"]["w"].sharding
place, everywhere = NamedSharding(mesh(8, 1), P(None, "a")), NamedSharding(mesh(8, 1), P())
got = saver.restore_params(1, "params", lambda path, shape: place if path == "params/w" else everywhere)
assert got["w"].sharding == place and digest(got) == digest(want["params"])
saver.close()
print(digest(want))
"""


def test_restores_to_other_shardings(tmp_path):
    out = finish(script(SHARDED, tmp_path, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}))
    with Checkpointer(tmp_path) as saver:  # saved on 8 devices, read on 1
        like = {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32), "s": jax.ShapeDtypeStruct((), jnp.float32)}
        assert digest(saver.restore(1, {"params": like})) == out.split()[-1]


TWO = """
import os, sys, jax, numpy as np
from pathlib import Path
directory, port, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, me)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from checkpoint_cases import flip
from hybridgen.runs.checkpoint import Checkpointer
place = NamedSharding(jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,)), P("a"))
def state(n):
    whole = np.random.default_rng(n).random((4, 8), np.float32)
    return {"params": {"w": jax.make_array_from_callback(whole.shape, place, lambda i: whole[i])}}, whole
saver = Checkpointer(directory, keep=2)
for step in (1, 2, 3):
    saver.save(step, state(step)[0])
saver.wait_until_saved()
multihost_utils.sync_global_devices("saved")
assert {p.name for p in Path(directory, "3").glob("manifest*")} == {"manifest.json", "manifest.1.json"}
assert saver.newest_good() == 3
multihost_utils.sync_global_devices("seen")
if me == 0:  # each of the first files in turn: they are in the shares of different processes
    for path in sorted(Path(directory, "3", "model").rglob("*.ocdbt")):
        flip(path, 9)
        break
multihost_utils.sync_global_devices("broken")
lines = []
assert saver.newest_good(report=lines.append) == 2 and len(lines) == 1, lines
like = {"params": {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=place)}}
got = saver.restore(2, like)["params"]["w"]
for shard in got.addressable_shards:
    assert (np.asarray(shard.data) == state(2)[1][shard.index]).all()
assert (saver.restore_params(2)["params"]["w"] == state(2)[1]).all()
saver.save(3, state(33)[0]); saver.wait_until_saved()
multihost_utils.sync_global_devices("again")
assert saver.newest_good() == 3
saver.close()
print(lines[0])
"""


@pytest.mark.slow
def test_two_processes_share_the_digests(tmp_path):
    port = free_port()
    processes = [script(TWO, tmp_path, port, me) for me in (0, 1)]
    lines = [finish(process) for process in processes]
    assert sum(".ocdbt" in line for line in lines) == 1 and sum("other processes" in line for line in lines) == 1
    with Checkpointer(tmp_path) as saver:  # by one process
        assert saver.newest_good() == 3
        (tmp_path / "3" / "manifest.1.json").unlink()
        lines = []
        assert saver.newest_good(report=lines.append) == 2 and "manifest.1.json" in lines[0]
