"""Reads PyTorch weights files (.pt, .pth, .bin, .ckpt) lazily, without PyTorch and without running their code.

    tensors, other = read(path)     # {"state_dict.conv.weight": LazyTensor}, {"epoch": 3, "args.lr": 1e-4}

Nested containers give dotted names. There are two formats: a zip archive of `data.pkl` and one file for each storage
(PyTorch 1.6 and later), and before that a sequence of pickles followed by the storages. In both, the pickle only
describes where the bytes are (pickles.py). PyTorch writes them uncompressed, so tensors are read in place; a compressed
file is rejected, so a small file cannot expand into a large one.
"""

import dataclasses
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.weights import pickles
from hybridgen.weights.allowed import STORAGES, Mapping, Name, Storage, Tensor
from hybridgen.weights.tensors import (
    EXPANDED,
    LazyTensor,
    Malformed,
    checked_name,
    checked_shape,
    extent,
    is_count,
    regular,
    shown,
)

MAX_READ = 2**23  # bytes that a parser may read at once: the list of a zip's files, a text in a pickle
MAX_LINE = 2**16
MAX_FILES = 60_000
MAX_LEAVES = 300_000
MAX_DEPTH = 32
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before 1.6
ZIP = b"PK\x03\x04"

Places = dict[str, tuple[int, int]]  # storage -> [first byte, end) in the file


@dataclasses.dataclass
class Window:
    """Bytes `start` to `end` of a file as a file object; a read of more than `MAX_READ` bytes raises Malformed."""

    file: BinaryIO
    start: int
    end: int

    def __post_init__(self) -> None:
        self.file.seek(self.start)

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, offset: int, whence: int = 0) -> int:
        origin = (self.start, self.file.tell(), self.end)[whence]
        if not self.start <= origin + offset <= self.end:
            raise OSError("a position outside of the file")
        self.file.seek(origin + offset)
        return self.tell()

    def read(self, count: int = -1) -> bytes:
        left = self.end - self.file.tell()
        count = left if count < 0 else min(count, left)
        if count > MAX_READ:
            raise Malformed(f"it needs to read {count} bytes at once, at most {MAX_READ} are allowed")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline(min(MAX_LINE, self.end - self.file.tell()))


def read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """(tensors, all other values) of a file, by dotted name. Raises UserError for an invalid file."""
    size = regular(path)
    try:
        with path.open("rb") as file:
            first = file.read(2)
            if first == ZIP[:2]:
                value, places = _zip(file, size)
            elif first[:1] == b"\x80":
                value, places = _legacy(Window(file, 0, size))
            else:
                raise Malformed(f"it begins with {first!r}: not a zip archive or pickle (or older than PyTorch 0.1)")
        return _flatten(path, value, places)
    except Malformed as error:
        raise UserError(f"{path} is not a valid PyTorch weights file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _zip(file: BinaryIO, size: int) -> tuple[Any, Places]:
    """(the value of data.pkl, the positions of its storages)."""
    try:
        entries = zipfile.ZipFile(Window(file, 0, size)).infolist()  # the list only; files are read in place
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error, OSError) as error:
        raise Malformed(f"its list of files is damaged: {shown(str(error))}") from None
    if len(entries) > MAX_FILES:
        raise Malformed(f"it has {len(entries)} files, at most {MAX_FILES} are allowed")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise Malformed("it is a program (TorchScript), not weights; save its state_dict() with torch")
    pickle = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickle) != 1:
        raise Malformed(f"it has {len(pickle)} files named data.pkl instead of one")
    places = {entry.filename: _place(file, entry, size) for entry in entries}
    if len(places) != len(entries):
        raise Malformed("it contains two files of the same name")
    at = 0
    for (start, end), name in sorted((place, name) for name, place in places.items()):
        if start < at:
            raise Malformed(f"its file {name!r} overlaps another")
        at = end
    root = pickle[0].removesuffix("data.pkl")
    if f"{root}byteorder" in places and _bytes(file, places[f"{root}byteorder"]) != b"little":
        raise Malformed("it is big-endian")
    value = pickles.read(Window(file, *places[pickle[0]]), lambda key: _storage(key, 5))
    prefix = f"{root}data/"
    return value, {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}


def _place(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """[first byte, end) of a file in the zip. Raises Malformed unless the entry is as PyTorch writes it."""
    name = entry.filename
    parts = name.split("/")
    if name != entry.orig_filename or not name.isprintable() or "\\" in name or {"..", "."} & {*parts} or not parts[0]:
        raise Malformed(f"its file {shown(entry.orig_filename)} has an unsafe path")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise Malformed(f"its file {shown(name)} is compressed or encrypted, which PyTorch never does")
    if not 0 <= entry.header_offset <= size - 30:
        raise Malformed(f"its file {shown(name)} is not within the file")
    file.seek(entry.header_offset)
    head = file.read(30)
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if head[:4] != ZIP or begin + entry.file_size > size:
        raise Malformed(f"its file {shown(name)} is truncated or not at its listed position")
    return begin, begin + entry.file_size


def _bytes(file: BinaryIO, place: tuple[int, int]) -> bytes:
    return Window(file, *place).read()


def _storage(key: Any, fields: int) -> Storage:
    """The storage of a persistent id in a pickle."""
    if not isinstance(key, tuple) or len(key) != fields or key[0] != "storage" or not isinstance(key[1], Name):
        raise Malformed("its pickle refers to something other than a storage")
    _, kind, name, _, count, *view = key
    if kind.text not in STORAGES or not isinstance(name, str) or not is_count(count):
        raise Malformed(f"its pickle has a storage {shown(name)} of {shown(kind.text)} with {shown(count)} elements")
    offset = 0
    if view and view[0] is not None:  # (key of the view, first element, number of elements)
        if not isinstance(view[0], tuple) or len(view[0]) != 3 or not all(map(is_count, view[0][1:])):
            raise Malformed(f"its pickle has a damaged view of the storage {shown(name)}")
        offset = view[0][1]
    return Storage(name, STORAGES[kind.text], count, offset)


def _legacy(stream: Window) -> tuple[Any, Places]:
    """Like `_zip`, for the format before 1.6: magic, protocol, machine, value, storage keys, then the storages."""
    found: dict[str, Storage] = {}

    def persistent(key: Any) -> Storage:
        storage = _storage(key, 6)
        if found.setdefault(storage.key, storage).dtype != storage.dtype:
            raise Malformed(f"its storage {shown(storage.key)} has two dtypes")
        return storage

    for wanted in (MAGIC, PROTOCOL):
        if pickles.read(stream, persistent) != wanted:
            raise Malformed("it is a pickle, but not one of PyTorch")
    machine = pickles.read(stream, persistent)
    pairs = machine.pairs if isinstance(machine, Mapping) else []
    if not any(key == "little_endian" and value is True for key, value in pairs):
        raise Malformed("it is big-endian")
    value = pickles.read(stream, persistent)
    keys = pickles.read(stream, persistent)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in found for key in keys):
        raise Malformed("its list of storages does not match its tensors")
    places, at = {}, stream.tell()
    for key in keys:
        stream.seek(at)
        count, head = found[key].count, stream.read(8)
        if head != struct.pack("<Q", count):
            raise Malformed(f"its storage {shown(key)} does not begin with its {count} elements")
        end = at + 8 + count * found[key].dtype.itemsize
        if end > stream.end or key in places:
            raise Malformed(f"its storage {shown(key)} of {count} elements is truncated or listed twice")
        places[key] = (at + 8, end)
        at = end
    return value, places


def _flatten(path: Path, value: Any, places: Places) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Dotted names of all values in nested containers, which may share content, but must not contain themselves."""
    tensors: dict[str, LazyTensor] = {}
    other: dict[str, Any] = {}
    visits = 0

    def visit(value: Any, names: tuple[str, ...]) -> None:
        nonlocal visits
        visits += 1
        name = checked_name(".".join(names) or "value")
        if len(names) > MAX_DEPTH or visits > MAX_LEAVES:  # also for a list that contains itself
            raise Malformed(f"it is nested beyond {MAX_DEPTH} levels or {MAX_LEAVES} values, at {shown(name)}")
        if isinstance(value, Mapping) and not value.pairs and names:
            other[name] = {}
        elif isinstance(value, Mapping):
            for key, item in value.pairs:
                visit(item, (*names, _key(key)))
        elif isinstance(value, list | tuple) and not _is_plain(value):
            for index, item in enumerate(value):
                visit(item, (*names, str(index)))
        elif name in tensors or name in other:
            raise Malformed(f"it has {name!r} twice")
        elif isinstance(value, Tensor):
            tensors[name] = _lazy(path, name, value, places)
        elif isinstance(value, Storage):
            raise Malformed(f"{name!r} is a bare storage, not a tensor")
        else:
            other[name] = _leaf(value)

    visit(value, ())
    return tensors, other


def _is_plain(items: list | tuple) -> bool:
    """Whether a sequence is a value (a shape, a pair of betas) rather than a container."""
    return len(items) <= 16 and not any(isinstance(item, Mapping | list | tuple | Tensor | Storage) for item in items)


def _leaf(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_leaf(item) for item in value)
    return value.text if isinstance(value, Name) else str(value) if isinstance(value, np.dtype) else value


def _key(key: Any) -> str:
    """A dictionary's key as part of a dotted name."""
    if isinstance(key, Name):
        return key.text
    if isinstance(key, str) or is_count(key):
        return str(key)
    raise Malformed(f"it has the key {shown(key)}, neither a string nor an integer")


def _lazy(path: Path, name: str, tensor: Tensor, places: Places) -> LazyTensor:
    """The LazyTensor of a Tensor. Raises Malformed unless all of it is inside its storage."""
    storage, item = tensor.storage, tensor.dtype.itemsize
    if storage.key not in places:
        raise Malformed(f"the tensor {name!r} is in the storage {shown(storage.key)}, which is missing")
    start, end = places[storage.key]
    if end - start != storage.count * storage.dtype.itemsize:
        raise Malformed(f"the storage {shown(storage.key)} has {end - start} bytes, not {storage.count} elements")
    shape = checked_shape(name, tensor.shape, tensor.dtype)
    strides = tensor.strides
    if len(strides) != len(shape) or not all(map(is_count, strides)) or not is_count(tensor.offset):
        raise Malformed(f"the tensor {name!r} has invalid strides {shown(strides)} or offset {shown(tensor.offset)}")
    first = (storage.offset * storage.dtype.itemsize) + tensor.offset * item
    if first + extent(shape, strides) * item > end - start:
        raise Malformed(f"the tensor {name!r} of shape {shown(list(shape))} reaches beyond its storage")
    if math.prod(shape) * item > end - start + EXPANDED:
        raise Malformed(f"the tensor {name!r} of shape {shown(list(shape))} is larger than its storage")
    dense = _contiguous(shape, strides)
    return LazyTensor(name, shape, tensor.dtype, path, start + first, None if dense else strides)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are those of C order; the stride of a dimension of size 1 is ignored."""
    expected = 1
    for count, step in zip(reversed(shape), reversed(strides), strict=True):
        if count > 1 and step != expected:
            return math.prod(shape) == 0
        expected *= count
    return True
