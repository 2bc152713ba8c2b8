"""Reference files of ADM's evaluator (Dhariwal & Nichol 2021): an .npz with statistics of features, pictures, or both.

    mu [d], sigma [d, d]     mean and covariance of the features of all pictures of a data set
    mu_s, sigma_s            of its spatial features; not used here
    arr_0 [n, H, W, 3] uint8 some of its pictures

The file is read as if somebody hostile had made it: no pickle, shapes from the heads before any data, pictures a batch
at a time and never whole.
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

MAX_WIDTH, MAX_SIDE = 2**14, 2**12  # of features, and of a picture
FAULTS = (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
    """What a file has: `statistics` (mean, covariance) or None, `count` pictures of `side` (H, W), or 0."""

    path: Path
    statistics: tuple[np.ndarray, np.ndarray] | None
    count: int
    side: tuple[int, int]

    def pictures(self, count: int, batch: int) -> Iterator[np.ndarray]:
        """The first `count` pictures, `[b, H, W, 3]` uint8. Raises UserError where the file is damaged."""
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
    """Heads and statistics of a file. Raises UserError naming it and what is wrong."""
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
        raise UserError(f"{path} is no reference file: it has neither mu and sigma nor pictures as arr_0")
    return ReferenceFile(path, statistics, count, side)


def _refuse(path: Path, error: Exception) -> NoReturn:
    text = " ".join(str(error).split())[:120]
    raise UserError(f"{path} is not a good reference file: {text if text.isprintable() else ascii(text)}") from None


def _head(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of an .npy file, which stands behind its head then."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of the format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of the shape {shape}")
    return shape, fortran, dtype


def _exactly(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The next numbers of a file."""
    data = file.read(math.prod(shape) * dtype.itemsize)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("it is cut off")
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
            raise ValueError(f"{name} has numbers that are not finite")
    mu, sigma = out
    if len(mu) != len(sigma):
        raise ValueError(f"mu is of {len(mu)} features and sigma of {len(sigma)}")
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max() or np.diag(sigma).min() < -1e-6 * np.abs(sigma).max():
        raise ValueError("sigma is no covariance: not symmetric, or of negative variance")
    return mu, sigma


def _pictures(packed: zipfile.ZipFile) -> tuple[int, tuple[int, int]]:
    with packed.open("arr_0.npy") as file:
        shape, fortran, dtype = _head(file)
    good = len(shape) == 4 and shape[0] and shape[3] == 3 and all(1 <= side <= MAX_SIDE for side in shape[1:3])
    if dtype != np.uint8 or fortran or not good:
        raise ValueError(f"arr_0 is {dtype} of shape {shape}, not pictures n H W 3 of uint8")
    return shape[0], (shape[1], shape[2])
