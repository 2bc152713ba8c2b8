"""The names that a pickle of weights may use, and the record that replaces each: named modules are never imported.

`CALLS` lists all functions that such a file can call. A PyTorch weights file needs a few functions that rebuild
tensors; the others are for what official checkpoints contain besides weights: the arguments of a run
(`argparse.Namespace`), NumPy numbers, keys of Lightning.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from hybridgen.weights.tensors import Malformed, shown

_STORAGES = {
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
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "Untyped": np.uint8,
}
STORAGES = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for name, dtype in _STORAGES.items()
    for module in ("torch", "torch.storage")
}
_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
DTYPES = {f"torch.{name}": np.dtype(getattr(ml_dtypes, name, None) or getattr(np, name)) for name in _DTYPES}
# classes that Lightning uses as dictionary keys: only their names are kept
NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Mapping:
    """A dictionary, or with `attributes` an object's attributes, as (key, value) pairs in order."""

    pairs: list[tuple[Any, Any]]
    attributes: bool = False


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """Memory that tensors share: `count` elements from element `offset` of the storage `key` in the file."""

    key: str
    dtype: np.dtype
    count: int
    offset: int = 0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A view into a storage; offset and strides in elements of `dtype`. Offset, shape and strides are unchecked."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Name:
    """An allowed name, as written in the file. It is never imported."""

    text: str


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Malformed(f"a tensor is built from {shown(storage)} instead of a storage")
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(*arguments: Any) -> Tensor:
    tensor, (_grad, _hooks, dtype, *_) = _tensor(*arguments), arguments[4:]
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise Malformed(f"a tensor has the unknown dtype {shown(dtype)}")
    return dataclasses.replace(tensor, dtype=DTYPES[dtype.text])


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Malformed("a parameter is not a tensor")
    return data


def _mapping(pairs: Any = ()) -> Mapping:
    if isinstance(pairs, Mapping):
        return Mapping(list(pairs.pairs))
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise Malformed("a dictionary is not built from pairs")
    return Mapping([tuple(pair) for pair in pairs])


def _sequence(items: Any = ()) -> list:
    if not isinstance(items, list | tuple):
        raise Malformed("a sequence is not built from a list")
    return list(items)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as pickles of protocol 2 encode them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Malformed("bytes are not encoded as latin1")
    return text.encode("latin1")


def _device(kind: Any, number: Any = 0) -> str:
    if not isinstance(kind, str) or not isinstance(number, int):
        raise Malformed("a device is not a name and a number")
    return kind


def _numpy_dtype(code: Any, *_: Any) -> np.dtype:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise Malformed(f"a NumPy number has the unknown dtype {shown(code)}")
    return np.dtype(code)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise Malformed("a NumPy number does not match its dtype")
    return np.frombuffer(data, dtype)[0].item()


# every function that a file may call, and the function that is called instead
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: Mapping([]),
    "builtins.dict": _mapping,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "builtins.list": _sequence,
    "argparse.Namespace": lambda: Mapping([], True),
    "pytorch_lightning.utilities.parsing.AttributeDict": _mapping,
    "lightning_fabric.utilities.data.AttributeDict": _mapping,
    "torch.Size": lambda items=(): tuple(_sequence(items)),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
KNOWN = {*CALLS, *STORAGES, *DTYPES, *NAMES}


def name_of(module: Any, name: Any) -> Name:
    """The Name of a module's attribute. Raises Malformed, stating the name, if it is not in the table."""
    text = f"{module}.{name}".replace("__builtin__.", "builtins.")
    if text not in KNOWN:
        raise Malformed(f"its pickle uses {ascii(text[:120])}, which weights do not need; none of its code was run")
    return Name(text)
