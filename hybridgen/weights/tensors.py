"""Lazy tensors (name, shape and dtype known, values read on demand), and the checks that all readers share.

    tensor.shape, tensor.dtype          # reads nothing
    np.asarray(tensor)                  # reads the bytes of this tensor only

Files are not trusted: sizes are Python integers, so no product overflows; they are compared with the file's size before
memory is allocated; JSON is rejected where parsers differ (a duplicate key, NaN, deep nesting).
"""

import dataclasses
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hybridgen.core.errors import UserError

MAX_DIMS = 32
MAX_NAME = 1024
EXPANDED = 2**24  # bytes by which a tensor may exceed its storage: buffers saved with a stride of 0

# name in safetensors -> dtype, in the order of the official enumeration; its files have the reverse order
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}


class Malformed(Exception):
    """A file violates its format; the reader that knows the file's name turns this into a UserError."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A little-endian tensor in the file `path` from byte `start` on; `strides` in elements, None for C order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    start: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that `read` allocates."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, in a new C-contiguous array. Raises UserError if the file ends before the tensor does."""
        try:
            raw = self._contiguous() if self.strides is None else self._strided()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot read the tensor {self.name!r}: {error}") from None
        # a bool must be 0 or 1, but a file may contain other bytes
        values = raw.astype(np.bool_) if self.dtype == np.bool_ else raw.view(self.dtype)
        return values.reshape(self.shape)

    def _contiguous(self) -> np.ndarray:
        raw = np.empty(self.nbytes, np.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(raw.data) != self.nbytes:
                raise ValueError(f"the file ends before its {self.nbytes} bytes")
        return raw

    def _strided(self) -> np.ndarray:
        """Reads through a memory map: for a thin slice of a large storage, only the pages that it touches."""
        item = self.dtype.itemsize
        units = np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[item])
        mapped = np.memmap(self.path, units, "r", self.start, (extent(self.shape, self.strides),))
        steps = tuple(step * item for step in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(mapped, self.shape, steps), order="C", subok=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype or self.dtype, copy=False)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of storage elements that a strided tensor spans, from its first to its last element."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def shown(value: Any) -> str:
    """A short text for a value, also for a large or deeply nested one."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = type(value).__name__
    return text if text.isprintable() else ascii(text)


def is_count(value: Any) -> bool:
    """Whether `value` is an integer (not a bool) from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def checked_name(name: Any) -> str:
    """`name`, if it is valid for a tensor. Raises Malformed otherwise."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise Malformed(f"{shown(name)} is not a valid name of a tensor")
    return name


def checked_shape(name: str, shape: Any, dtype: np.dtype) -> tuple[int, ...]:
    """`shape` as a tuple that NumPy supports. Raises Malformed otherwise."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
        raise Malformed(f"the tensor {name!r} has the invalid shape {shown(shape)}")
    # NumPy limits the other dimensions even if one is 0
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**62:
        raise Malformed(f"the tensor {name!r} has the shape {shown(shape)}, too large for any file")
    return tuple(shape)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs. Raises Malformed for a duplicate key: parsers differ in which one they keep."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Malformed(f"the key {twice[:80]!a} occurs twice")
    return out


def strict_json(raw: bytes) -> Any:
    """The value of a JSON text. Raises Malformed for invalid JSON, duplicate keys, NaN and too deep nesting."""

    def refuse(word: str) -> Any:
        raise Malformed(f"{word} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise Malformed("its JSON is nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"it is not valid JSON: {str(error)[:80]}") from None


def regular(path: Path) -> int:
    """The size of a regular file in bytes. Raises UserError for anything else, such as a pipe, which would block."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a valid file name: {error}") from None
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file")
    return info.st_size
