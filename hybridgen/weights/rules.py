"""The rule engine: converts official tensors to our arrays and back, by an ordered table of rules.

    rules = (Rule("down.{l}.block.{i}.conv{n}.weight", "params/encoder/block_{l}_{i}/conv_{n}/kernel", conv),
             Rule("layers.{i}.attn.wo.weight", "params/blocks/attention/out/kernel", heads, stack="i"))
    arrays = load(weights, rules, shapes)     # {path: array}
    tensors = export(arrays, rules)           # {official name: Lazy}, for safetensors.write

A field such as `{l}` matches a number, `{n:1|2}` a regular expression. A field has the same value on both sides, or is
counted from the other end if `flip` gives its count. With `stack`, our array has a leading axis over that field.
Several official names are the parts of one of our arrays.

`views(array)` returns for one of our arrays one view per part, in the official order. Import assigns to these views and
export reads them, so that one definition serves both directions, no array is copied, and the round trip is bit-equal.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hybridgen.core.errors import UserError

FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")

# ---------------------------------------------------------------- views: our layout -> the official one


def same(x: np.ndarray) -> tuple[np.ndarray]:
    """The same layout: biases, scales, tables."""
    return (x,)


def matrix(x: np.ndarray) -> tuple[np.ndarray]:
    """Kernel `[d, f]` of a linear map -> weight `[f, d]`."""
    return (x.T,)


def pointwise(x: np.ndarray) -> tuple[np.ndarray]:
    """Kernel `[d, f]` of a linear map -> weight `[f, d, 1, 1]` of a 1x1 convolution."""
    return (x.T[:, :, None, None],)


def conv(x: np.ndarray) -> tuple[np.ndarray]:
    """Kernel `[h, w, c, f]` -> weight `[f, c, h, w]`."""
    return (x.transpose(3, 2, 0, 1),)


def heads(x: np.ndarray) -> tuple["Part"]:
    """Kernel `[h, g, k, d]` behind attention -> weight `[d, hgk]`."""
    return (Part(np.moveaxis(x, -1, 0), (x.shape[-1], math.prod(x.shape[:-1]))),)


def qkv(x: np.ndarray) -> tuple["Part", ...]:
    """Kernel `[d, h, g+2, k]` of attention -> weights `[hgk, d]`, `[hk, d]`, `[hk, d]`; bias `[h, g+2, k]` likewise."""
    parts, weight = (x[..., :-2, :], x[..., -2, :], x[..., -1, :]), x.ndim == 4
    out = []
    for part in parts:
        width = part.size // x.shape[0] if weight else part.size
        out.append(Part(np.moveaxis(part, 0, -1), (width, x.shape[0])) if weight else Part(part, (width,)))
    return tuple(out)


def interleaved_qkv(x: np.ndarray) -> tuple["Part"]:
    """Kernel `[d, h, g+2, k]` -> one weight `[hgk + hk + hk, d]`; rotary pairs (i, i + k/2) -> (2i, 2i + 1)."""
    d, k = x.shape[0], x.shape[-1]
    turned = x.reshape(*x.shape[:-1], 2, k // 2).swapaxes(-1, -2)  # d h g+2 k/2 2
    pieces = (turned[:, :, :-2], turned[:, :, -2], x[:, :, -1])
    return (Part(tuple(np.moveaxis(piece, 0, -1) for piece in pieces), (x.size // d, d)),)


def as_convs(views: "Views") -> "Views":
    """`views` whose weights `[f, d]` are 1x1 convolutions, `[f, d, 1, 1]`."""
    return lambda x: tuple(Part(part.view, (*part.shape, 1, 1)) for part in parts_of(views, x))


class Part(NamedTuple):
    """A view of one of our arrays, and the shape of the official tensor that has the same numbers in the same order.

    A tensor that needs several views has them one after the other.
    """

    view: np.ndarray | tuple[np.ndarray, ...]
    shape: tuple[int, ...]

    @property
    def pieces(self) -> tuple[np.ndarray, ...]:
        return self.view if isinstance(self.view, tuple) else (self.view,)

    def fill(self, tensor: np.ndarray) -> None:
        """Assigns the official tensor to the views."""
        flat, at = tensor.reshape(-1), 0
        for piece in self.pieces:
            piece[...] = flat[at : at + piece.size].reshape(piece.shape)
            at += piece.size


Views = Callable[[np.ndarray], Iterable[np.ndarray | Part]]


def parts_of(views: Views, x: np.ndarray) -> list[Part]:
    """The official tensors that make up an array."""
    return [view if isinstance(view, Part) else Part(view, view.shape) for view in views(x)]


# ---------------------------------------------------------------- rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table; see the file's head. dtype: the official one, if it differs from ours.

    copies: further names of the same tensor in a file (tied embeddings), for a rule without fields.
    """

    official: str | tuple[str, ...]
    ours: str
    views: Views = same
    stack: str = ""
    flip: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    copies: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.official,) if isinstance(self.official, str) else self.official

    def read(self, name: str) -> tuple[int, dict[str, str]] | None:
        """(part, fields in our counting) of an official name, or None."""
        for part, pattern in enumerate(self.parts):
            if match := _pattern(pattern).fullmatch(name):
                return part, self._flipped(match.groupdict())
        return None

    def path(self, fields: Mapping[str, str]) -> str:
        return _filled(self.ours, fields)

    def fields(self, path: str) -> dict[str, str] | None:
        """The fields of one of our paths (without the stacked one), or None."""
        match = _pattern(self.ours).fullmatch(path)
        return match.groupdict() if match else None

    def name(self, part: int, fields: Mapping[str, str]) -> str:
        return _filled(self.parts[part], self._flipped(fields))

    def _flipped(self, fields: Mapping[str, str]) -> dict[str, str]:
        turned = {key: str(self.flip[key] - 1 - int(fields[key])) for key in self.flip if key in fields}
        return {**fields, **turned}


@functools.cache
def _pattern(template: str) -> re.Pattern:
    text, at = "", 0
    seen: set[str] = set()
    for field in FIELD.finditer(template):
        name, regex = field[1], field[2] or "0|[1-9][0-9]*"
        text += re.escape(template[at : field.start()])
        text += f"(?P={name})" if name in seen else f"(?P<{name}>{regex})"
        seen.add(name)
        at = field.end()
    return re.compile(text + re.escape(template[at:]))


def _filled(template: str, fields: Mapping[str, str]) -> str:
    return FIELD.sub(lambda field: fields[field[1]], template)


def _shown(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# ---------------------------------------------------------------- in

Index = tuple[int, int]  # (index on the stacked axis, part)
Places = dict[str, tuple[Rule, dict[Index, str]]]


def load(
    tensors: Mapping[str, Any], rules: Iterable[Rule], shapes: Mapping[str, Any], dropped: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Official tensors (lazy ones: shape, dtype, read on np.asarray) -> {path: array} as `shapes` specifies.

    shapes: {path: object with shape and dtype}, every array of the model. dropped: patterns of names that the model
    does not use. Besides the arrays, one tensor is in memory at a time. Raises UserError before any tensor is read,
    naming a tensor that no rule or two rules match, or that is missing or has another shape or kind of number; and when
    it is read, a tensor with numbers that are not finite.
    """
    places = check(tensors, rules, shapes, dropped)
    arrays = {}
    for path, spec in shapes.items():
        rule, names = places[path]
        arrays[path] = np.empty(spec.shape, spec.dtype)
        for index, name in names.items():
            _part(rule, arrays[path], index).fill(_finite(name, np.asarray(tensors[name]), spec.dtype))
        for copy in filter(tensors.__contains__, rule.copies):
            if not np.array_equal(np.asarray(tensors[name]), np.asarray(tensors[copy])):
                raise UserError(f"the tensors {name!r} and {copy!r} are tied in this model, but have different values")
    return arrays


def check(
    tensors: Mapping[str, Any], rules: Iterable[Rule], shapes: Mapping[str, Any], dropped: Iterable[str]
) -> Places:
    """Where each of our arrays comes from. Raises the UserErrors of `load` for names, shapes and kinds of numbers."""
    places = _places(tensors, tuple(rules), tuple(dropped), shapes)
    for path, spec in shapes.items():
        _check(path, spec, places[path], tensors)
    return places


def dropped_names(names: Iterable[str], dropped: Iterable[str]) -> set[str]:
    """The names that one of the patterns `dropped` matches."""
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in dropped)}


def _finite(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """`tensor`. Raises UserError if a number is not finite, also if it is so only in our `dtype`."""
    if _kind(dtype) != "f":
        return tensor
    for kind in dict.fromkeys((tensor.dtype, np.dtype(dtype))):
        with np.errstate(over="ignore"):
            bad = int(tensor.size - np.isfinite(tensor.astype(kind, copy=False)).sum())
        if bad:
            what = f"{bad} of the {tensor.size} numbers of the tensor {name!r} are NaN or infinite"
            raise UserError(what if kind == tensor.dtype else f"{what} as {kind}, the dtype of the model")
    return tensor


def _places(tensors: Mapping[str, Any], rules: tuple[Rule, ...], dropped: tuple[str, ...], shapes: Mapping) -> Places:
    """For each of our arrays in `shapes`, its rule and the names of the tensors that make it up."""
    places: Places = {}
    copies = {copy for rule in rules for copy in rule.copies}
    for name in tensors:
        if name in copies:
            continue
        found = [(rule, read) for rule in rules if (read := rule.read(name))]
        if not found and dropped_names((name,), dropped):
            continue
        if len(found) != 1:
            raise UserError(f"the tensor {name!r} is matched by {len(found) or 'no'} rule{'s' * (len(found) > 1)}")
        rule, (part, fields) = found[0]
        path = rule.path(fields)
        if path not in shapes:
            raise UserError(f"the tensor {name!r} maps to {path!r}, which a model of this config does not have")
        index = (int(fields[rule.stack]) if rule.stack else 0, part)
        known, names = places.setdefault(path, (rule, {}))
        if known is not rule or index in names:
            raise UserError(f"the tensors {name!r} and {next(iter(names.values()))!r} both map to {path!r}")
        names[index] = name
    for path in shapes:
        if path not in places:
            rule, fields = _rule_of(path, rules)
            raise UserError(f"the tensor {rule.name(0, {**fields, rule.stack: '0'})!r} is missing")
    return places


def _rule_of(path: str, rules: Iterable[Rule]) -> tuple[Rule, dict[str, str]]:
    """The one rule for an array of ours. Raises ValueError if the table has none or several."""
    found = [(rule, fields) for rule in rules if (fields := rule.fields(path)) is not None]
    if len(found) != 1:
        raise ValueError(f"the table has {len(found)} rules for {path!r}, not one")
    return found[0]


def _check(path: str, spec: Any, place: tuple[Rule, dict[Index, str]], tensors: Mapping[str, Any]) -> None:
    rule, names = place
    outline = np.broadcast_to(np.empty((), spec.dtype), spec.shape)  # an array of that shape without memory
    layers = spec.shape[0] if rule.stack else 1
    wanted = {(layer, part) for layer in range(layers) for part in range(len(rule.parts))}
    fields = rule.fields(path)
    for layer, part in sorted(wanted - set(names)):
        raise UserError(f"the tensor {rule.name(part, {**fields, rule.stack: str(layer)})!r} is missing")
    for index, name in sorted(names.items()):
        if index not in wanted:
            raise UserError(f"the tensor {name!r} is beyond the {layers} layers of {path!r}")
        tensor, shape = tensors[name], _part(rule, outline, index).shape
        if tuple(tensor.shape) != shape:
            raise UserError(f"the tensor {name!r} has the shape {_shown(tensor.shape)}, {_shown(shape)} is expected")
        if _kind(tensor.dtype) != _kind(spec.dtype):
            raise UserError(f"the tensor {name!r} has the dtype {tensor.dtype}, {spec.dtype} is expected")


def _kind(dtype: Any) -> str:
    """A dtype's kind: b, i or f. NumPy gives the small floats of ml_dtypes the kind V."""
    kind = np.dtype(dtype).kind
    return {"V": "f", "u": "i"}.get(kind, kind)


def _part(rule: Rule, array: np.ndarray, index: Index) -> Part:
    layer, part = index
    return parts_of(rule.views, array[layer] if rule.stack else array)[part]


# ---------------------------------------------------------------- out


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor in the official layout that is copied only when it is written."""

    pieces: tuple[np.ndarray, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self.pieces) == 1:
            return np.ascontiguousarray(self.pieces[0], dtype or self.dtype).reshape(self.shape)
        out, at = np.empty(self.shape, dtype or self.dtype), 0
        for piece in self.pieces:
            out.reshape(-1)[at : at + piece.size].reshape(piece.shape)[...] = piece
            at += piece.size
        return out


def export(arrays: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict[str, Lazy]:
    """Our arrays {path: array} -> {official name: Lazy}. Raises UserError for an array without a rule."""
    rules, out = tuple(rules), {}
    for path, array in arrays.items():
        try:
            rule, fields = _rule_of(path, rules)
        except ValueError:
            raise UserError(f"the array {path!r} of shape {_shown(array.shape)} has no official name") from None
        for layer, slab in enumerate(np.asarray(array) if rule.stack else [np.asarray(array)]):
            parts = parts_of(rule.views, slab)
            if sum(math.prod(part.shape) for part in parts) != slab.size or len(parts) != len(rule.parts):
                raise ValueError(f"the parts of {path!r} do not cover the array")
            for number, part in enumerate(parts):
                name = rule.name(number, {**fields, rule.stack: str(layer)})
                if name in out:
                    raise ValueError(f"the table gives {name!r} twice")
                out[name] = Lazy(part.pieces, part.shape, np.dtype(rule.dtype or slab.dtype))
            out |= dict.fromkeys(rule.copies, out[name]) if rule.copies else {}
    return out
