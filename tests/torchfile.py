"""Writes files as torch does, and as it never would, without torch: a pickler of a few opcodes, and the two formats.

torchfile.save(path, {"state_dict": {"a": array}, "epoch": 3})
torchfile.save(path, {"a": torchfile.tensor(storage, offset, shape, strides)}, legacy=True)
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(dtype): f"{name}Storage"
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    """A value that reading would call for: function(*arguments), then the state, if there is one."""

    function: Global
    arguments: tuple
    state: Any = None


class Persistent(NamedTuple):
    key: tuple


class Raw(NamedTuple):
    """Opcodes as they are."""

    opcodes: bytes


class Storage:
    """A flat array; tensors that share one are views into it."""

    def __init__(self, array: np.ndarray, kind: str | None = None):
        self.array, self.kind = array.reshape(-1), kind or STORAGES[array.dtype]


def ordered(pairs: dict) -> Call:
    """A state_dict: an OrderedDict with the attribute `_metadata`. Its items come as one list of pairs."""
    metadata = {"_metadata": Call(Global("collections", "OrderedDict"), ())}
    return Call(Global("collections", "OrderedDict"), ([[key, value] for key, value in pairs.items()],), metadata)


def tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Call:
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, hooks))


def dumps(value: Any, storages: dict[int, tuple[str, Storage]], legacy: bool = False) -> bytes:
    """A pickle of protocol 2. Storages that it meets go into `storages`."""
    return b"\x80\x02" + _opcodes(value, storages, legacy) + b"."


def _opcodes(value: Any, storages: dict, legacy: bool) -> bytes:
    def write(*values: Any) -> bytes:
        return b"".join(_opcodes(one, storages, legacy) for one in values)

    if isinstance(value, np.ndarray):
        steps = tuple(step // value.itemsize for step in np.empty(value.shape, value.dtype).strides)
        return write(tensor(Storage(value), 0, value.shape, steps))
    if isinstance(value, Storage):
        key, _ = storages.setdefault(id(value), (str(len(storages)), value))
        view = (None,) if legacy else ()
        return write(Persistent(("storage", Global("torch", value.kind), key, "cpu", value.array.size, *view)))
    if isinstance(value, Raw):
        return value.opcodes
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = b"" if value.state is None else write(value.state) + b"b"
        return write(value.function, value.arguments) + b"R" + state
    if isinstance(value, Persistent):
        return write(value.key) + b"Q"
    if isinstance(value, dict):
        return b"}(" + write(*(one for pair in value.items() for one in pair)) + b"u"
    if isinstance(value, tuple):
        return b"(" + write(*value) + b"t"
    if isinstance(value, list):
        return b"](" + write(*value) + b"e"
    return pickle.dumps(value, 2)[2:-1]  # numbers and text


def save(path: Path, value: Any, *, legacy: bool = False, compression: int = 0, **entries: bytes) -> Path:
    """Writes `value`; `entries`: more files for the zip, or others in place of its own."""
    storages: dict[int, tuple[str, Storage]] = {}
    body = dumps(value, storages, legacy)
    if legacy:
        path.write_bytes(_legacy(body, storages))
        return path
    files = {"archive/data.pkl": body, "archive/byteorder": b"little"}
    files |= {f"archive/data/{key}": storage.array.tobytes() for key, storage in storages.values()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (files | {f"archive/{name}": data for name, data in entries.items()}).items():
            archive.writestr(name, data)
    return path


def _legacy(body: bytes, storages: dict) -> bytes:
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    data = b"".join(dumps(head, {}) for head in heads) + body + dumps([key for key, _ in storages.values()], {})
    for _, storage in storages.values():
        data += struct.pack("<Q", storage.array.size) + storage.array.tobytes()
    return data
