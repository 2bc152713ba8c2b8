"""What a pickle of weights may name, and what that becomes: records of ours, never an object of the module named.

`CALLS` is everything that such a file can have called. A weights file of torch needs a few functions that rebuild
tensors; the rest is there for what official checkpoints carry beside their weights: the arguments of a run
(`argparse.Namespace`), numbers of numpy, keys of Lightning.
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
# classes that Lightning uses as keys, and enumerations that say nothing about weights: names only
NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Mapping:
    """A dictionary, or an object that is only its attributes (`attributes`), as pairs in order."""

    pairs: list[tuple[Any, Any]]
    attributes: bool = False


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """Memory that tensors share: its key in the file, `count` elements, beginning at element `offset` of that key."""

    key: str
    dtype: np.dtype
    count: int
    offset: int = 0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A view into a storage; offset, shape and strides in elements of `dtype`, unchecked."""

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Name:
    """A name of the table, as the file has it. Never looked up anywhere else."""

    text: str


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Malformed(f"a tensor of {shown(storage)}, not of a storage")
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(*arguments: Any) -> Tensor:
    tensor, (_grad, _hooks, dtype, *_) = _tensor(*arguments), arguments[4:]
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise Malformed(f"a tensor of a dtype that is {shown(dtype)}")
    return dataclasses.replace(tensor, dtype=DTYPES[dtype.text])


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Malformed("a parameter that is not a tensor")
    return data


def _mapping(pairs: Any = ()) -> Mapping:
    if isinstance(pairs, Mapping):
        return Mapping(list(pairs.pairs))
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise Malformed("a dictionary that is not made of pairs")
    return Mapping([tuple(pair) for pair in pairs])


def _sequence(items: Any = ()) -> list:
    if not isinstance(items, list | tuple):
        raise Malformed("a sequence that is not made of a list")
    return list(items)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Malformed("bytes that are not written as latin1")
    return text.encode("latin1")


def _device(kind: Any, number: Any = 0) -> str:
    if not isinstance(kind, str) or not isinstance(number, int):
        raise Malformed("a device that is not a name and a number")
    return kind


def _numpy_dtype(code: Any, *_: Any) -> np.dtype:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise Malformed(f"a number of the dtype {shown(code)}")
    return np.dtype(code)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise Malformed("a number that does not fit its dtype")
    return np.frombuffer(data, dtype)[0].item()


# everything that a file may call, and what that does here
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
    """A name that a file gives. Raises Malformed, by that name, if it is not in the table."""
    text = f"{module}.{name}".replace("__builtin__.", "builtins.")
    if text not in KNOWN:
        raise Malformed(f"its pickle asks for {ascii(text[:120])}, which weights do not need; nothing of it was run")
    return Name(text)
