"""Reads records of any source: checks each, and replaces a broken one by a fixed rule.

A record that a source cannot read raises BrokenRecord and is replaced. Failures of storage that pass (storage.py) break
no record: it is read again. A record that is not what the interface demands
(an image of floats, a label without a class) is a mistake in the source: it raises UserError, which stops a run.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.data import storage
from hybridgen.data.sources.own import Own, described
from hybridgen.data.sources.protocol import BrokenRecord, Source

TRIES = 100  # broken records in a row after which a run is stopped: then the source itself is broken


def read(source: Source, index: int, own: int | None = None, retry: float = storage.RETRY) -> tuple[Mapping, int]:
    """-> (item, -1); or, if record `index` is broken, (item of the next valid record, `index`).

    The rule is fixed (index + 1, + 2, ... modulo the length, or the source's own), so a broken record changes no other
    sample. own: a random number of the sample, which picks the view of a record that has several; None takes the first.
    retry: seconds for which a record is read again while the storage fails. Raises UserError after `TRIES` broken
    records in a row and for a record that is not what it must be, StorageError when `retry` has passed.
    """
    tried = min(len(source), TRIES)
    for step in range(tried):
        place = source.after(index, step) if hasattr(source, "after") else (index + step) % len(source)
        try:
            return storage.patiently(lambda at=place: _read(source, at, own), retry), index if step else -1
        except BrokenRecord as error:
            last = str(error)  # not the exception, which would make a reference cycle with this frame
    raise UserError(f"{tried} records in a row cannot be read, from {source.name(index)} on; the last error: {last}")


def why_broken(source: Source, index: int) -> str:
    """The name of a broken record and the reason, by reading it again."""
    name = str(source.name(index))
    try:
        storage.patiently(lambda: _read(source, index, None))
    except BrokenRecord as error:
        text = str(error)
        return text if name in text else f"{name}: {text}"
    return f"{name}: it could not be read, but now it can"


def _read(source: Source, index: int, own: int | None) -> Mapping:
    """One record, checked. An exception inside a source from outside of this package becomes a UserError."""
    leaf = source.source_of(index) if hasattr(source, "source_of") else source  # of a mixture
    try:
        item = source.view(index, own) if own is not None and hasattr(source, "view") else source[index]
    except (BrokenRecord, UserError):
        raise
    except Exception as error:
        if not isinstance(leaf, Own) or storage.passing(error):
            raise
        raise UserError(f"{_where(source, leaf, index)} (index {index}): {described(error)}") from error
    fault = _fault(item, leaf)
    if fault:
        raise UserError(f"{_where(source, leaf, index)} {fault}")
    return item


def _where(source: Source, leaf: Source, index: int) -> str:
    kind = leaf.kind if isinstance(leaf, Own) else type(leaf).__name__.lower()
    return f"data.source {kind!r}: record {str(source.name(index))!r}"


def _fault(item: Any, leaf: Source) -> str:
    """What is wrong with a record of a source, or ""."""
    if not isinstance(item, Mapping):
        return f"is of type {type(item).__name__}; it must be a dict with 'image', 'text' and, with classes, 'label'"
    if "image" in item or not getattr(leaf, "encoders", None):  # cached entries need no image
        side = leaf.resolution if isinstance(leaf, Own) else None
        if fault := _image_fault(item.get("image"), side):
            return fault
    text, texts = item.get("text"), item.get("texts", ())
    if not isinstance(text, str):
        found = f"has a text that is {_kind(text)}" if "text" in item else "has no text"
        return f'{found}: give a str, or "" for no caption'
    if not isinstance(texts, tuple | list) or not all(isinstance(one, str) for one in texts):
        return f"has texts that are {_kind(texts)}; they must be a tuple of str"
    return _label_fault(item["label"], getattr(leaf, "class_names", ())) if "label" in item else ""


def _image_fault(image: Any, side: int | None) -> str:
    if image is None:
        return "has no image: give an array of uint8, height x width x 3"
    if not isinstance(image, np.ndarray):
        hint = "np.asarray(image.convert('RGB'))" if hasattr(image, "convert") else "np.asarray(image)"
        return f"has an image that is {_kind(image)}; it must be an array: {hint}"
    shape = "x".join(map(str, image.shape))
    if image.dtype != np.uint8:
        ones = image.dtype.kind == "f" and image.size and image.min() >= 0 and image.max() <= 1
        hint = ": (image * 255).round().astype(np.uint8)" if ones else ""
        return f"has an image of {image.dtype}; it must be uint8 from 0 to 255{hint}"
    if image.ndim != 3 or image.shape[2] != 3:
        grey = image.ndim == 2 or image.ndim == 3 and image.shape[2] == 1
        hint = ": np.stack([image] * 3, -1)" if image.ndim == 2 else ": image.repeat(3, -1)" if grey else ""
        return f"has an image of {shape}; it must be height x width x 3{hint}"
    if side and image.shape != (side, side, 3):
        return f"has an image of {shape}; data.resolution {side} asks for {side}x{side}x3"
    return ""


def _label_fault(label: Any, names: Any) -> str:
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        return f"has a label that is {_kind(label)}; it must be a whole number, the place of its class in class_names"
    if len(names) and not 0 <= label < len(names):
        return f"has the label {label}, but class_names has {len(names)} classes: 0 to {len(names) - 1}"
    return f"has the label {label}; it must be at least 0" if label < 0 else ""


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
