"""Weights files are read lazily and exactly, and written byte for byte like the official library."""

import argparse
import json
import pickle
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torchfile

from hybridgen.core.errors import UserError
from hybridgen.weights import safetensors
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
KINDS = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]


def name_of(kind):
    return np.dtype(kind).name


def some(shape=(3, 4), dtype=np.float32, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 9).astype(dtype)


def same(tensor, array):
    read = tensor.read()
    assert tensor.shape == array.shape and tensor.dtype == array.dtype and tensor.nbytes == array.nbytes
    assert read.dtype == array.dtype and read.shape == array.shape and read.tobytes() == array.tobytes()
    assert read.flags.c_contiguous and read.flags.writeable


# ---- safetensors


def test_bytes_are_those_of_the_official_library(tmp_path):
    """What safetensors 0.8.0 wrote for the same arrays."""
    arrays = {"b": np.arange(3, dtype=np.int16), "a": np.ones(2, np.float32), "é": np.ones((), np.bool_)}
    safetensors.write(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    header = (
        '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I16",'
        '"shape":[3],"data_offsets":[8,14]},"é":{"dtype":"BOOL","shape":[],"data_offsets":[14,15]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    data = b"\0\0\x80?\0\0\x80?\0\0\1\0\2\0\1"
    assert (tmp_path / "a.safetensors").read_bytes() == len(header).to_bytes(8, "little") + header + data
    safetensors.write(tmp_path / "b.safetensors", {})
    assert (tmp_path / "b.safetensors").read_bytes() == b"\x08\0\0\0\0\0\0\0{}      "


def test_against_the_official_library(tmp_path):
    official = pytest.importorskip("safetensors.numpy")
    arrays = {f"x.{np.dtype(kind).name}": some((2, 5), kind) for kind in (*KINDS, np.uint64, ml_dtypes.float8_e4m3fn)}
    arrays |= {"empty": np.zeros((0, 7), np.float32), "one": np.float64(3).reshape(()), 'q"\\': np.ones(1, np.int8)}
    safetensors.write(tmp_path / "a.safetensors", arrays, {"format": "np"})
    assert (tmp_path / "a.safetensors").read_bytes() == official.save(arrays, {"format": "np"})


@pytest.mark.parametrize("kind", [*KINDS, np.uint32, np.complex64, ml_dtypes.float8_e5m2], ids=name_of)
def test_round_trip(tmp_path, kind):
    arrays = {
        "a.b": some((2, 3, 4), kind),
        "turned": some((5, 7), kind).T,
        "none": some((0, 3), kind),
        "one": some((), kind),
    }
    safetensors.write(tmp_path / "w.safetensors", arrays, {"z": "1", "a": "ü\n"})
    weights = open_weights(tmp_path / "w.safetensors")
    assert set(weights) == set(arrays) and len(weights) == 4 and "one" in weights
    assert weights.metadata == {"a": "ü\n", "z": "1"}
    for name, array in arrays.items():
        same(weights[name], np.array(array, order="C"))
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]


def test_nothing_is_written_of_what_the_format_does_not_take(tmp_path):
    path = tmp_path / "w.safetensors"
    for arrays, metadata in [
        ({"a": np.ones(2, "O")}, None),
        ({"a": np.ones(2, ">f4")}, None),
        ({"__metadata__": np.ones(2)}, None),
        ({"a\n": np.ones(2)}, None),
        ({"": np.ones(2)}, None),
        ({"a": np.ones(2)}, {"x": 1}),
    ]:
        with pytest.raises(UserError):
            safetensors.write(path, arrays, metadata)
    with pytest.raises(UserError, match="cannot write"):
        safetensors.write(tmp_path / "none" / "w.safetensors", {"a": np.ones(2)})
    path.write_text("old")

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        safetensors.write(path, {"a": np.ones(2), "b": Broken()})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_one_tensor_at_a_time(tmp_path):
    """A file of 16 tensors is read and rewritten in the memory of about one."""
    one = np.zeros(2**19, np.float32)  # 2 MiB
    safetensors.write(tmp_path / "a.safetensors", {str(i): one for i in range(16)})
    storage = torchfile.Storage(np.zeros(2**22, np.float32))
    parts = {str(i): torchfile.tensor(storage, i, (2**10, 2**9), (2**9, 1) if i else (1, 2**10)) for i in range(16)}
    torchfile.save(tmp_path / "b.pt", parts)
    for name in ("a.safetensors", "b.pt"):
        tracemalloc.start()
        weights = open_weights(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        safetensors.write(tmp_path / "out.safetensors", weights)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * 2**20, (name, peak)


# ---- torch


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_torch_dtypes(tmp_path, kind, legacy):
    arrays = {"a": some((2, 3), kind), "none": some((0, 3), kind), "one": some((), kind)}
    weights = open_weights(torchfile.save(tmp_path / "w.pt", torchfile.ordered(arrays), legacy=legacy))
    assert list(weights) == list(arrays) and not weights.other
    for name, array in arrays.items():
        same(weights[name], array)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_and_shared_storages(tmp_path, legacy):
    array = some((6, 5, 4))
    storage = torchfile.Storage(array)
    flat = array.reshape(-1)
    views = {
        "turned": (0, (4, 5, 6), (1, 4, 20), array.T),
        "tied": (0, (6, 5, 4), (20, 4, 1), array),
        "cut": (21, (2, 3), (20, 1), array[1:3, 0, 1:]),
        "ones": (3, (1, 4, 1), (77, 1, 99), flat[3:7, None][None]),
        "expanded": (7, (3, 2), (0, 1), np.broadcast_to(flat[7:9], (3, 2))),
    }
    value = {name: torchfile.tensor(storage, *place) for name, (*place, _) in views.items()}
    path = torchfile.save(tmp_path / "w.ckpt", {"state_dict": value}, legacy=legacy)
    assert path.stat().st_size < 2 * array.nbytes + 2000  # it is there once
    weights = open_weights(path)
    for name, (*_, seen) in views.items():
        same(weights[f"state_dict.{name}"], np.array(seen, order="C"))


def test_nesting_becomes_names_and_the_rest_is_other(tmp_path):
    number = torchfile.Global("numpy.core.multiarray", "scalar")
    state = (3, "<", None, None, None, -1, -1, 0)
    eight = torchfile.Call(torchfile.Global("numpy", "dtype"), ("f8", False, True), state)
    data = torchfile.Call(torchfile.Global("_codecs", "encode"), (np.float64(2.5).tobytes().decode("latin1"), "latin1"))
    callback = torchfile.Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    parameter = torchfile.Call(
        torchfile.Global("torch._utils", "_rebuild_parameter"),
        (
            torchfile.Call(
                torchfile.Global("torch._utils", "_rebuild_tensor_v3"),
                (
                    torchfile.Storage(some((4,), np.uint8), "UntypedStorage"),
                    0,
                    (2,),
                    (1,),
                    True,
                    None,
                    torchfile.Global("torch", "bfloat16"),
                ),
            ),
            True,
            None,
        ),
    )
    args = argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), name="xl", size=[16, 16], deep={"x": None})
    value = {
        "model": torchfile.ordered({"a.weight": some()}),
        "ema": {"a": [some(seed=1), {0: some(seed=2)}]},
        "epoch": 3,
        "flag": True,
        "args": torchfile.Raw(pickle.dumps(args, 2)[2:-1]),
        "p": parameter,
        "callbacks": {callback: {"best": torchfile.Call(number, (eight, data))}},
    }
    weights = open_weights(torchfile.save(tmp_path / "w.pth", value))
    assert list(weights) == ["model.a.weight", "ema.a.0", "ema.a.1.0", "p"]
    same(weights["ema.a.1.0"], some(seed=2))
    same(weights["p"], some((4,), np.uint8).view(ml_dtypes.bfloat16))
    name = f"callbacks.{callback.module}.{callback.name}.best"
    assert weights.other == {
        "epoch": 3,
        "flag": True,
        "args.lr": 1e-4,
        "args.betas": (0.9, 0.95),
        "args.name": "xl",
        "args.size": (16, 16),
        "args.deep.x": None,
        name: 2.5,
    }


# ---- folders


def sharded(folder, suffix=".safetensors"):
    folder.mkdir(exist_ok=True)
    arrays = {f"layer.{i}": some(seed=i) for i in range(4)}
    where = {}
    for piece, names in enumerate((["layer.0", "layer.2"], ["layer.1", "layer.3"])):
        file = f"model-{piece}{suffix}"
        part = {name: arrays[name] for name in names}
        safetensors.write(folder / file, part) if suffix == ".safetensors" else torchfile.save(folder / file, part)
        where |= dict.fromkeys(names, file)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return arrays


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_folder(tmp_path, suffix):
    arrays = sharded(tmp_path, suffix)
    for path in (tmp_path, tmp_path / f"model{suffix}.index.json", str(tmp_path)):
        weights = open_weights(path)
        assert set(weights) == set(arrays)
        for name, array in arrays.items():
            same(weights[name], array)
    index = json.loads((tmp_path / f"model{suffix}.index.json").read_text())
    index["weight_map"]["layer.0"] = index["weight_map"]["layer.1"]
    (tmp_path / f"model{suffix}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="the tensor 'layer.0' in 'model-1.*which does not contain it"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["index.fp16", "index.non_ema", "index-fp16", "fp16.index", "index.a.b"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_of_a_variant(tmp_path, name, suffix):
    arrays = sharded(tmp_path, suffix)
    (tmp_path / f"model{suffix}.index.json").rename(tmp_path / f"model{suffix}.{name}.json")
    for path in (tmp_path, tmp_path / f"model{suffix}.{name}.json"):
        assert {key: tensor.shape for key, tensor in open_weights(path).items()} == {
            k: x.shape for k, x in arrays.items()
        }


def test_which_of_several_indexes(tmp_path):
    """That without a variant; of two variants none, they are named."""
    sharded(tmp_path)
    for variant in ("fp16", "non_ema"):
        (tmp_path / f"model.safetensors.index.{variant}.json").write_text("{}")
    assert open_weights(tmp_path).path.name == "model.safetensors.index.json"
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="2 weights files, give one of them: model.safetensors.index.fp16.json,"):
        open_weights(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_shards_without_their_index(tmp_path, count):
    for number in range(count):
        safetensors.write(tmp_path / f"model-0000{number + 1}-of-0000{count}.fp16.safetensors", {"a": some()})
    if count == 1:
        return same(open_weights(tmp_path)["a"], some())
    message = "shards such as model-00001-of-00002.*, but not their index, model.fp16.safetensors.index.json"
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_the_cache_of_the_hub_is_a_folder_like_any(tmp_path):
    """Its snapshots are links into the blobs beside them; no other link leads out of a folder."""
    home = tmp_path / "models--x" / "snapshots" / "abc"
    home.mkdir(parents=True)
    arrays = sharded(home)
    (tmp_path / "models--x" / "blobs").mkdir()
    for file in home.glob("model-*"):
        blob = tmp_path / "models--x" / "blobs" / file.name[6]
        file.rename(blob)
        file.symlink_to(blob)
    same(open_weights(home)["layer.3"], arrays["layer.3"])
    (tmp_path / "models--x" / "blobs").rename(tmp_path / "elsewhere")
    (home / "model-0.safetensors").unlink()
    (home / "model-0.safetensors").symlink_to(tmp_path / "elsewhere" / "0")
    with pytest.raises(UserError, match="'model-0.safetensors' is a link to a place outside the folder"):
        open_weights(home)


def test_a_folder_of_one_file(tmp_path):
    with pytest.raises(UserError, match="contains no weights"):
        open_weights(tmp_path)
    torchfile.save(tmp_path / "pytorch_model.bin", {"a": some()})
    same(open_weights(tmp_path)["a"], some())
    safetensors.write(tmp_path / "model.safetensors", {"b": some()})
    assert list(open_weights(tmp_path)) == ["b"]
    safetensors.write(tmp_path / "model.fp16.safetensors", {"b": some()})
    with pytest.raises(UserError, match="2 weights files, give one of them: model.fp16.safetensors, model.safetensors"):
        open_weights(tmp_path)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded checkpoints are not there")
def test_recorded_checkpoints_are_rewritten_byte_for_byte(tmp_path):
    """They were written by the official library, from torch."""
    files = sorted(GOLDEN.glob("*/weights.safetensors"))
    assert len(files) > 40
    for file in files:
        weights = open_weights(file)
        safetensors.write(tmp_path / "w.safetensors", weights, weights.metadata or None)
        assert (tmp_path / "w.safetensors").read_bytes() == file.read_bytes(), file
