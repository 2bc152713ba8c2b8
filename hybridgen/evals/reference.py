"""Reference files of ADM's evaluator (Dhariwal & Nichol 2021): an .npz with statistics of features, pictures, or both.

    mu [d], sigma [d, d]     mean and covariance of the features of all pictures of a data set
    mu_s, sigma_s            the same of its spatial features; not used here
    arr_0 [n, H, W, 3] uint8 some of its pictures

The file is not trusted: pickles are not read, shapes are checked before any data is read, and pictures are read in
batches.
"""

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hybridgen.core.errors import UserError

MAX_WIDTH, MAX_SIDE = 2**14, 2**12  # limits for the number of features, and for a picture's sides
FAULTS = (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
    """The content of a file: `statistics` (mean, covariance) or None; `count` pictures (or 0) of `side` (H, W)."""

    path: Path
    statistics: tuple[np.ndarray, np.ndarray] | None
    count: int
    side: tuple[int, int]

    def pictures(self, count: int, batch: int) -> Iterator[np.ndarray]:
        """Batches of the first `count` pictures, `[b, H, W, 3]` uint8. Raises UserError if the file is damaged."""
        count = min(count, self.count)
        try:
            with zipfile.ZipFile(self.path) as packed, packed.open("arr_0.npy") as file:
                _head(file)
                for start in range(0, count, batch):
                    rows = min(batch, count - start)
                    yield _exactly(file, (rows, *self.side, 3), np.dtype(np.uint8))
        except FAULTS as error:
            _refuse(self.path, error)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None


def open_reference(path: Path) -> ReferenceFile:
    """Reads the array headers and the statistics of a file. Raises UserError for an invalid file."""
    try:
        with zipfile.ZipFile(path) as packed:
            names = packed.namelist()
            statistics = _statistics(packed) if {"mu.npy", "sigma.npy"} <= {*names} else None
            count, side = _pictures(packed) if "arr_0.npy" in names else (0, (0, 0))
    except UserError:
        raise
    except FAULTS as error:
        _refuse(path, error)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if statistics is None and not count:
        raise UserError(f"{path} is not a reference file: it has neither mu and sigma nor pictures as arr_0")
    return ReferenceFile(path, statistics, count, side)


def _refuse(path: Path, error: Exception) -> NoReturn:
    text = " ".join(str(error).split())[:120]
    raise UserError(f"{path} is not a valid reference file: {text if text.isprintable() else ascii(text)}") from None


def _head(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of an .npy file, which is left at the end of its header."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array has the unsupported format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array has the invalid shape {shape}")
    return shape, fortran, dtype


def _exactly(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next array of a file. Raises ValueError if the file ends before."""
    data = file.read(math.prod(shape) * dtype.itemsize)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("it is truncated")
    return np.frombuffer(data, dtype).reshape(shape)


def _statistics(packed: zipfile.ZipFile) -> tuple[np.ndarray, np.ndarray]:
    out = []
    for name, dims in (("mu", 1), ("sigma", 2)):
        with packed.open(f"{name}.npy") as file:
            shape, fortran, dtype = _head(file)
            if dtype.kind != "f" or len(shape) != dims or not 1 <= max(shape) <= MAX_WIDTH or len({*shape}) != 1:
                raise ValueError(f"{name} is {dtype} of shape {shape}, not numbers for at most {MAX_WIDTH} features")
            values = _exactly(file, shape, dtype).astype(np.float64)
        out.append(values.T if fortran else values)
        if not np.isfinite(out[-1]).all():
            raise ValueError(f"{name} contains numbers that are not finite")
    mu, sigma = out
    if len(mu) != len(sigma):
        raise ValueError(f"mu has {len(mu)} features, but sigma {len(sigma)}")
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max() or np.diag(sigma).min() < -1e-6 * np.abs(sigma).max():
        raise ValueError("sigma is not a covariance: it is not symmetric or has a negative variance")
    return mu, sigma


def _pictures(packed: zipfile.ZipFile) -> tuple[int, tuple[int, int]]:
    with packed.open("arr_0.npy") as file:
        shape, fortran, dtype = _head(file)
    good = len(shape) == 4 and shape[0] and shape[3] == 3 and all(1 <= side <= MAX_SIDE for side in shape[1:3])
    if dtype != np.uint8 or fortran or not good:
        raise ValueError(f"arr_0 is {dtype} of shape {shape}, not uint8 pictures n H W 3")
    return shape[0], (shape[1], shape[2])
