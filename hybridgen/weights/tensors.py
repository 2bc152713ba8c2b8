"""A tensor in a file: name, shape and dtype known, the values read on demand; and what every reader checks.

    tensor.shape, tensor.dtype          # nothing is read
    np.asarray(tensor)                  # now: this tensor's bytes and no others

Files are read as if somebody hostile had written them: numbers are Python's, so no product overflows; sizes are held
against the file before anything is allocated; JSON is refused where parsers differ (a key twice, NaN, deep nesting).
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
EXPANDED = 2**24  # bytes that a tensor may have beyond its storage: buffers saved with a stride of 0

# name in safetensors -> dtype, in the order of the official enumeration, which is that of its files (backwards)
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
    """A file is not what its format says; the reader that knows the file's name makes a UserError of it."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that lies in `path` from byte `start` on, little-endian; `strides` in elements, None for C order."""

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
        """The values, in a C-contiguous array of its own. Raises UserError if the file ends before they do."""
        try:
            raw = self._contiguous() if self.strides is None else self._strided()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot read the tensor {self.name!r}: {error}") from None
        # of a bool only 0 and 1 mean something; a file may hold others
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
        """Through a map: of a thin slice of a large storage only the pages that it touches are read."""
        item = self.dtype.itemsize
        units = np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[item])
        mapped = np.memmap(self.path, units, "r", self.start, (extent(self.shape, self.strides),))
        steps = tuple(step * item for step in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(mapped, self.shape, steps), order="C", subok=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype or self.dtype, copy=False)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of storage from the first to behind the last one of a strided tensor."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def shown(value: Any) -> str:
    """A value in few words, however large or deeply nested it is."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        text = type(value).__name__
    return text if text.isprintable() else ascii(text)


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number, not negative, that fits an offset (and not a bool)."""
    return type(value) is int and 0 <= value < 2**63


def checked_name(name: Any) -> str:
    """`name` if a tensor may be called so. Raises Malformed."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise Malformed(f"{shown(name)} is not the name of a tensor")
    return name


def checked_shape(name: str, shape: Any, dtype: np.dtype) -> tuple[int, ...]:
    """`shape` as a tuple that numpy can hold. Raises Malformed."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
        raise Malformed(f"the tensor {name!r} has the shape {shown(shape)}")
    # a dimension of 0 hides the others from the product, not from numpy
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**62:
        raise Malformed(f"the tensor {name!r} has the shape {shown(shape)}, more than any file holds")
    return tuple(shape)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs. Raises Malformed for a key that is there twice: parsers differ in which one they take."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Malformed(f"the key {twice[:80]!a} is there twice")
    return out


def strict_json(raw: bytes) -> Any:
    """What JSON text holds. Raises Malformed for what is not JSON, a key twice, NaN and nesting beyond the parser."""

    def refuse(word: str) -> Any:
        raise Malformed(f"{word} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise Malformed("its JSON is nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"not JSON: {str(error)[:80]}") from None


def regular(path: Path) -> int:
    """The size of a regular file. Raises UserError for anything else: a pipe would block, a device never end."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not the name of a file: {error}") from None
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file")
    return info.st_size
