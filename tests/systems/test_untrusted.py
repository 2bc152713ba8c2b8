"""Hostile files are refused in one line, at once and with little memory, and nothing in them is executed."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchfile
from torchfile import Call, Global, Persistent, Raw, Storage

from hybridgen.core.errors import UserError
from hybridgen.weights import pickles, safetensors
from hybridgen.weights.files import open_weights

ROOT = Path(__file__).parents[2]
HUGE = 2**62


def refused(action, *args, megabytes=32):
    """The message of the UserError that `action` ends with: one line, in under a second, in little memory."""
    start = time.process_time()
    with pytest.raises(UserError) as error:
        action(*args)
    taken, message = time.process_time() - start, str(error.value)
    assert message.isprintable() and len(message) < 1000 and taken < 1, (message, taken)
    tracemalloc.start()  # again, since this makes it slow
    try:
        pytest.raises(UserError, action, *args)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20, (message, peak)
    return message


# ---- safetensors


def header(entries, data=b"\0" * 8, length=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = json.dumps(entry()).encode()
SAFETENSORS = {
    "empty file": (b"", "0 bytes"),
    "header of 2^62": (header({"a": entry()}, length=HUGE), f"says it has {HUGE} bytes"),
    "header of 100 MB": (header({"a": entry()}, length=10**8), "says it has 100000000 bytes"),
    "header beyond the limit": (header(b"{" + b" " * 2**23), "at most 8388608 are allowed"),
    "truncated header": (header({"a": entry()})[:30], "says it has"),
    "truncated data": (header({"a": entry()}, b"\0" * 7), "end at byte"),
    "data behind the last": (header({"a": entry()}, b"\0" * 9), "end at byte"),
    "overlap": (header({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}), "'b' overlaps"),
    "the same bytes twice": (header({"a": entry(), "b": entry()}), "'b' overlaps"),
    "gap": (header({"a": entry(shape=(1,), offsets=(4, 8))}), "'a' has a gap"),
    "offset beyond the end": (header({"a": entry(offsets=(HUGE, HUGE + 8))}), "'a' has a gap"),
    "offsets the wrong way": (
        header({"a": entry(offsets=(8, 0))}),
        "'a' has the offsets [8, 0], which do not span its 8 bytes",
    ),
    "offset of text": (header({"a": entry(offsets=("0", "8"))}), "'a' has the invalid offsets"),
    "product overflows": (header({"a": entry(shape=(HUGE, 4))}), "too large for any file"),
    "product is 8 in 64 bits": (header({"a": entry("U8", (2**63 - 1, 2**63 - 1, 8))}), "too large for any file"),
    "dimension beyond 64 bits": (header({"a": entry(shape=(2**70,))}), "has the invalid shape"),
    "overflow hidden by a zero": (
        header({"a": entry(shape=(0, HUGE, HUGE), offsets=(0, 0))}, b""),
        "too large for any file",
    ),
    "negative dimension": (header({"a": entry(shape=(-2,))}), "has the invalid shape [-2]"),
    "two negative dimensions": (header({"a": entry(shape=(-1, -2))}), "has the invalid shape"),
    "fraction": (header({"a": entry(shape=(2.0,))}), "has the invalid shape [2.0]"),
    "true": (header({"a": entry(shape=(True, 2))}), "has the invalid shape [True, 2]"),
    "many dimensions": (header({"a": entry(shape=(1,) * 100_000 + (2,))}), "has the invalid shape"),
    "size is not the shape's": (header({"a": entry(shape=(3,))}), "which do not span its 12 bytes"),
    "unknown dtype": (header({"a": entry("F33")}), "the dtype 'F33'"),
    "dtype of a list": (header({"a": entry(["F32"])}), "the dtype ['F32']"),
    "a key twice": (header(b'{"a":' + ONE + b',"a":' + ONE + b"}"), "the key 'a' occurs twice"),
    "a field twice": (header(b'{"a":{"dtype":"F64",' + ONE[1:] + b"}"), "the key 'dtype' occurs twice"),
    "a field too many": (header({"a": entry() | {"x": 1}}), "'a' does not have exactly the fields"),
    "a field too few": (header({"a": {"dtype": "F32"}}), "'a' does not have exactly the fields"),
    "no object": (header(b"[" + ONE + b"]"), "does not begin with"),
    "an entry that is none": (header({"a": 1}), "'a' does not have exactly the fields"),
    "deep nesting": (header(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "nested too deeply"),
    "deep shape": (
        header(b'{"a":{"dtype":"F32","shape":' + b"[" * 500 + b"]" * 500 + b',"data_offsets":[0,8]}}'),
        "has the invalid shape [[[[",
    ),
    "NaN": (header(b'{"a":NaN}'), "NaN is not JSON"),
    "a number of 5000 digits": (header(b'{"a":' + b"9" * 5000 + b"}"), "it is not valid JSON"),
    "no UTF-8": (header(b'{"\xff":1}'), "it is not valid JSON"),
    "name with a line end": (header({"a\n\x1b[2J": entry()}), "is not a valid name of a tensor"),
    "name of 10 kB": (header({"a" * 10_000: entry()}), "is not a valid name of a tensor"),
    "metadata of numbers": (header({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__"),
    "a pickle by this name": (pickle.dumps({"a": 1}), "says it has"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(tmp_path, case):
    data, says = SAFETENSORS[case]
    (tmp_path / "w.safetensors").write_bytes(data)
    message = refused(open_weights, tmp_path / "w.safetensors")
    assert says in message and str(tmp_path / "w.safetensors") in message


def test_a_header_of_empty_lists_takes_little_memory(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(header(b'{"a":[' + b"[]," * 2**18 + b"[]]}"))
    assert "'a' does not have exactly the fields" in refused(open_weights, tmp_path / "w.safetensors", megabytes=32)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    safetensors.write(tmp_path / "w.safetensors", {"a": np.ones(100_000, np.float32)})
    torchfile.save(tmp_path / "w.pt", {"a": np.ones((300, 300), np.float32).T})
    torchfile.save(tmp_path / "v.pt", {"a": torchfile.tensor(Storage(np.ones(90_000)), 0, (300, 300), (1, 300))})
    for name in ("w.safetensors", "w.pt", "v.pt"):
        tensor = open_weights(tmp_path / name)["a"]
        os.truncate(tmp_path / name, 1000)
        assert "cannot read the tensor 'a'" in refused(tensor.read)


# ---- pickles


class Code:
    """Python's own unpickler calls this."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value):
    """The opcodes of Python's own pickler, protocol 2 or as given, without the head and STOP."""
    return Raw(pickle.dumps(value, 2)[2:-1])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    touched = tmp_path / "touched"
    array = np.ones(3, np.float32)
    for value, names in [
        (pickled(Code(os.system, f"touch {touched}")), ("posix.system", "nt.system")),
        (pickled(Code(eval, f"open({str(touched)!r}, 'w')")), ("builtins.eval",)),
        (pickled(Code(exec, f"open({str(touched)!r}, 'w')")), ("builtins.exec",)),
        (pickled(Code(open, str(touched), "w")), ("io.open", "_io.open")),
        (pickled(Code(subprocess.Popen, ["touch", str(touched)])), (".Popen",)),
        (pickled(Code(getattr, "a", "b")), ("builtins.getattr",)),
        (Raw(b"cos\nsystem\n(S'touch " + str(touched).encode() + b"'\ntR"), ("os.system",)),
        (Raw(b"(S'touch " + str(touched).encode() + b"'\nios\nsystem\n"), ("os.system",)),
        (Raw(b"X\x02\0\0\0osX\x06\0\0\0system\x93X\x02\0\0\0ls\x85R"), ("os.system",)),
        (Raw(b"cbuiltins\neval\n)\x81"), ("builtins.eval",)),
        (Raw(b"cos\nsystem\n"), ("os.system",)),  # named and not even called
        (Call(Global("torch._utils", "_rebuild_tensor_v2.__globals__"), ()), ("__globals__",)),
        (Call(Global("torch.storage", "_load_from_bytes"), (b"x",)), ("torch.storage._load_from_bytes",)),
        (Call(Global("torch.nn.modules.linear", "Linear"), ()), ("torch.nn.modules.linear.Linear",)),
        (Global("x" * 5000, "\x1b[2J"), ("xxxx",)),
    ]:
        path = torchfile.save(tmp_path / "w.pt", {"a": array, "b": value}, legacy=legacy)
        before = set(sys.modules)
        message = refused(open_weights, path)
        assert any(name in message for name in names) and "none of its code was run" in message, message
        assert not touched.exists() and set(sys.modules) == before
    pickle.loads(pickle.dumps(Code(Path.touch, touched)))
    assert touched.exists()  # that is what such a file does


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Call(Global("collections", "OrderedDict"), (5,)), "not built from pairs"),
        (Call(Global("torch", "Size"), ("text",)), "not built from a list"),
        (Call(Global("torch", "FloatStorage"), ()), "something that is not an allowed function"),
        (Call(Global("torch", "device"), ([[1]],)), "a device"),
        (Call(Global("torch._utils", "_rebuild_tensor_v2"), (1, 2)), "damaged"),
        (Call(Global("torch._utils", "_rebuild_parameter"), (1,)), "not a tensor"),
        (Call(Global("_codecs", "encode"), ("a", "rot13")), "latin1"),
        (Call(Global("numpy", "dtype"), ("O",)), "'O'"),
        (Raw(b"0000"), "damaged"),
        (Raw(b"\xff"), "damaged"),
        (Raw(b"\x82\x01"), "EXT1"),
        (Raw(b"Pabc\n"), "PERSID"),
        (Raw(b"\x8e" + struct.pack("<Q", HUGE)), "damaged"),  # 2^62 bytes follow
        (Raw(b"\x8d" + struct.pack("<Q", 2**63)), "damaged"),
        (Raw(b"B" + struct.pack("<I", 2**32 - 1)), "damaged"),
        (Raw(b"Nr\xff\xff\xff\xff" * 3 + b"p99999999999999999999\n"), "a memo index is 2^32 or more"),
        (Raw(b"Nj\xff\xff\xff\xff"), "damaged"),
        (Raw(b"I" + b"9" * 100_000 + b"\n"), "damaged"),
        (Raw(b"]q\x01h\x01a"), "nested beyond 32 levels"),  # a list in itself
        (Raw(b"(" * 20_000), "damaged"),
        (Raw(b"]" * 20_000 + b"a" * 19_999), "nested beyond 32 levels"),
        (Raw(b")" + b"\x85" * 20_000), "nested beyond 32 levels"),
        ({(1, 2): 3}, "it has the key (1, 2)"),
        ({"a.b": 1, "a": {"b": 2}}, "'b.a.b' twice"),
        ({"\x1b[2J": 1}, "is not a valid name of a tensor"),
        (Storage(np.ones(3)), "a bare storage"),
        (Persistent(("storage", "FloatStorage", "0", "cpu", 3)), "something other than a storage"),
        (Persistent(("module", Global("torch", "FloatStorage"), "0", "cpu", 3)), "something other than a storage"),
        (Persistent(("storage", Global("torch", "FloatStorage"), "../../x", "cpu", HUGE * 4)), "a storage '../../x'"),
    ],
)
def test_pickles_of_nonsense(tmp_path, value, says):
    path = torchfile.save(tmp_path / "w.pt", {"a": np.ones(3, np.float32), "b": value})
    assert says in refused(open_weights, path, megabytes=64)


def test_shared_lists_do_not_multiply(tmp_path):
    """A kilobyte that expands to 2^60 values, and lists that are shared many times."""
    laughs = b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(20))
    path = torchfile.save(tmp_path / "w.pt", {"a": Raw(b"](NNeq\x000" + laughs + b"h\x14")})
    start = time.process_time()
    with pytest.raises(UserError, match="nested beyond .* 300000 values"):
        open_weights(path)
    assert time.process_time() - start < 5
    again = b"](" + b"N" * 50_000 + b"eq\x00cbuiltins\nset\nq\x01" + b"h\x01h\x00\x85R0" * 10_000
    assert "steps" in refused(open_weights, torchfile.save(tmp_path / "w.pt", Raw(again)))


def test_work_is_counted():
    """Reading takes seconds at most, by the limit and not by the file."""
    start = time.process_time()
    with pytest.raises(Exception, match=f"more than {pickles.MAX_STEPS} steps"):
        pickles.read(io.BytesIO(b"\x80\x02" + b"N" * 3 * pickles.MAX_STEPS + b"."), lambda key: key)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ((0, (4,), (1,)), "reaches beyond"),
        ((1, (3,), (1,)), "reaches beyond"),
        ((0, (2,), (3,)), "reaches beyond"),
        ((HUGE, (1,), (1,)), "reaches beyond"),
        ((-1, (1,), (1,)), "offset -1"),
        ((0, (HUGE, 8), (1, 1)), "too large for any file"),
        ((0, (2**40,), (0,)), "larger than its storage"),
        ((0, (2,), (-1,)), "strides (-1,)"),
        ((0, (-2,), (1,)), "the invalid shape (-2,)"),
        ((0, (3,), (1, 1)), "strides (1, 1)"),
        ((0, (3,), (2**70,)), "strides"),
        ((0, (0, HUGE, HUGE), (1, 1, 1)), "too large for any file"),
        ((0, (True,), (1,)), "the invalid shape (True,)"),
        ((0, (1,) * 100, (1,) * 100), "the invalid shape"),
        ((0, (2,), (HUGE,)), "reaches beyond"),
        ((1.0, (1,), (1,)), "offset 1.0"),
    ],
)
def test_tensors_that_leave_their_storage(tmp_path, place, says, legacy):
    value = {"x": torchfile.tensor(Storage(np.ones(3, np.float32)), *place)}
    assert says in refused(open_weights, torchfile.save(tmp_path / "w.pt", value, legacy=legacy))


# ---- zip files


def test_zips_that_torch_does_not_write(tmp_path):
    path, value = tmp_path / "w.pt", {"a": np.zeros(10_000_000, np.uint8)}
    torchfile.save(path, value, compression=zipfile.ZIP_DEFLATED)  # a bomb: 10 MB in 10 kB
    assert path.stat().st_size < 20_000 and "is compressed" in refused(open_weights, path)
    for name in ("../../etc/x", "..", "a/../b", "\\..\\x", "x\x1b[2J"):
        torchfile.save(path, {"a": np.ones(3)}, **{name: b"x"})
        assert "an unsafe path" in refused(open_weights, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("/etc/x", b"x")
    assert "an unsafe path" in refused(open_weights, path)
    torchfile.save(path, {"a": np.ones(3)}, byteorder=b"big")
    assert "big-endian" in refused(open_weights, path)
    torchfile.save(path, {"a": np.ones(3)}, **{"more/data.pkl": b"."})
    assert "2 files named data.pkl" in refused(open_weights, path)
    torchfile.save(path, {"a": np.ones(3)}, **{"constants.pkl": b"."})
    assert "a program (TorchScript)" in refused(open_weights, path)
    torchfile.save(path, {"a": np.ones(3)}, **{"data/0": b"\0" * 8})
    assert "has 8 bytes, not 3 elements" in refused(open_weights, path)
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"x")
    assert "two files of the same name" in refused(open_weights, path)
    torchfile.save(path, {"a": np.ones(3)})
    good = path.read_bytes()
    for cut in (3, 30, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        refused(open_weights, path)
    at = good.index(b"PK\x01\x02")  # the list: every storage where the pickle is, or far beyond
    for offset in (good.index(b"PK\x03\x04", 4), 2**31):
        path.write_bytes(good[: at + 42] + struct.pack("<I", offset) + good[at + 46 :])
        assert "overlaps" in (says := refused(open_weights, path)) or "not within" in says
    with path.open("wb") as file:  # 10 GB of list, on paper
        file.write(b"PK\x03\x04")
        file.seek(2**31)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**31 - 100, 4, 0))
    assert "bytes at once, at most" in refused(open_weights, path)


def test_files_that_are_no_weights(tmp_path):
    for name, data, says in [
        ("a.pt", b"", "not a zip archive or pickle"),
        ("a.ckpt", b"hello", "not a zip archive"),
        ("a.bin", pickle.dumps({"a": 1}), "but not one of PyTorch"),
        ("a.npz", b"x", "its name must end in one of"),
        ("a.pth", b"\x80\x02N", "before seeing STOP"),
        ("a.index.json", b"[]", "'weight_map'"),
    ]:
        (tmp_path / name).write_bytes(data)
        assert says in refused(open_weights, tmp_path / name)
    for suffix in (".pt", ".safetensors", ".index.json"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name in (f"pipe{suffix}", f"zero{suffix}"):
            assert "is not a regular file" in refused(open_weights, tmp_path / name)
        assert "No such file" in refused(open_weights, tmp_path / f"none{suffix}")
    assert "null" in refused(open_weights, "a\0.pt")


def test_indexes_that_lead_out(tmp_path):
    safetensors.write(tmp_path / "secret.safetensors", {"a": np.ones(3)})
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    safetensors.write(folder / "ok.safetensors", {"a": np.ones(3)})
    safetensors.write(folder / "sub" / "ok.safetensors", {"a": np.ones(3)})
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    index = folder / "model.safetensors.index.json"
    names = [
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "sub/ok.safetensors",
        "link.safetensors",
        "..\\secret.safetensors",
        "",
        ".",
        "..",
        "/dev/zero",
        "ok.safetensors\0",
        "a\n.safetensors",
        7,
        None,
        ["ok.safetensors"],
        "none.safetensors",
        "pipe.safetensors",
        "notes.txt",
        "model.safetensors.index.json",
    ]
    for name in names:
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(open_weights, folder)
    twice = b'{"weight_map":{"a":"ok.safetensors","a":"ok.safetensors"}}'
    for raw in [
        b"{",
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b"[" * 100_000,
        b"\xff",
        twice,
        b'{"weight_map":{"\\u0000":"ok.safetensors"}}',
    ]:
        index.write_bytes(raw)
        assert "is not a valid index" in refused(open_weights, folder)
    index.write_text(json.dumps({"weight_map": {"a": "ok.safetensors"}}))
    assert list(open_weights(folder)) == ["a"]
