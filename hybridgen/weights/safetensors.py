"""Reads safetensors files lazily and strictly, and writes them one tensor at a time.

    tensors, metadata = read(path)                # name -> LazyTensor, text -> text
    write(path, {"a": array, "b": lazy_tensor}, {"format": "np"})

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header {name: {"dtype",
"shape", "data_offsets": [begin, end)}}, padded with spaces to 8 bytes, then the data without gaps. The official package
is not used: it silently keeps the second of two equal keys, cannot return float8 to NumPy, raises NumPy's errors for
shapes such as [0, 2^63], and writes from a dict with all tensors in memory. Files are the same byte for byte (except
for the order of metadata entries, which is random in the package).
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.weights.tensors import (
    DTYPES,
    LazyTensor,
    Malformed,
    checked_name,
    checked_shape,
    is_count,
    regular,
    shown,
    strict_json,
)

MAX_HEADER = 2**23  # bytes: some 80,000 tensors; larger checkpoints are sharded
FIELDS = {"dtype", "shape", "data_offsets"}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {name: rank for rank, name in enumerate(DTYPES)}


def read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(tensors by name, metadata) of a file; reads its header only. Raises UserError for an invalid file."""
    size = regular(path)
    try:
        with path.open("rb") as file:
            return _tensors(path, *_header(file, size), size)
    except Malformed as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _header(file: Any, size: int) -> tuple[dict, int]:
    """(the header, where the data begins)."""
    if size < 8:
        raise Malformed(f"it has {size} bytes, a header needs at least 8")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise Malformed(f"its header says it has {length} bytes, the file has {size}")
    if length > MAX_HEADER:
        raise Malformed(f"its header has {length} bytes, at most {MAX_HEADER} are allowed")
    raw = file.read(length)
    if raw[:1] != b"{":
        raise Malformed("its header does not begin with '{'")
    return strict_json(raw), 8 + length


def _tensors(path: Path, header: dict, start: int, size: int) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Malformed("its __metadata__ is not a mapping of strings")
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensor, end = _tensor(path, checked_name(name), entry, start)
        tensors[name] = tensor
        ranges.append((tensor.start, end, name))
    at = start
    for begin, end, name in sorted(ranges):  # every byte must belong to exactly one tensor
        if begin != at:
            raise Malformed(f"the tensor {name!r} {'overlaps another' if begin < at else 'has a gap before it'}")
        at = end
    if at != size:
        raise Malformed(f"its tensors end at byte {at}, but the file has {size} bytes")
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Any, start: int) -> tuple[LazyTensor, int]:
    """(the tensor, where it ends in the file)."""
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        raise Malformed(f"the tensor {name!r} does not have exactly the fields {', '.join(sorted(FIELDS))}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise Malformed(f"the tensor {name!r} has the dtype {shown(entry['dtype'])}, not one of {', '.join(DTYPES)}")
    dtype, offsets = DTYPES[entry["dtype"]], entry["data_offsets"]
    shape = checked_shape(name, entry["shape"], dtype)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise Malformed(f"the tensor {name!r} has the invalid offsets {shown(offsets)}")
    tensor = LazyTensor(name, shape, dtype, path, start + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise Malformed(f"the tensor {name!r} has the offsets {offsets}, which do not span its {tensor.nbytes} bytes")
    return tensor, start + offsets[1]


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays (NumPy, JAX or lazy ones), one in memory at a time, and replaces `path` atomically.

    Raises UserError for a name, dtype or metadata that the format does not support, before anything is written, and for
    a file that cannot be written.
    """
    kinds = {name: _kind(name, value) for name, value in tensors.items()}
    names = sorted(tensors, key=lambda name: (-ORDER[kinds[name]], name))  # widest dtype first: all are aligned
    header, at = {} if metadata is None else {"__metadata__": _texts(metadata)}, 0
    for name in names:
        end = at + math.prod(tensors[name].shape) * DTYPES[kinds[name]].itemsize
        header[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for name in names:
                array = np.ascontiguousarray(tensors[name])
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _kind(name: Any, value: Any) -> str:
    """The format's name of an array's dtype."""
    try:
        checked_name(name)
    except Malformed as error:
        raise UserError(f"cannot write safetensors: {error}") from None
    if name == "__metadata__" or np.dtype(value.dtype) not in NAMES:
        raise UserError(f"the tensor {name!r} of dtype {value.dtype} cannot be written as safetensors")
    return NAMES[np.dtype(value.dtype)]


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise UserError(f"safetensors metadata must map strings to strings, not {dict(metadata)!r}")
    return dict(sorted(metadata.items()))
