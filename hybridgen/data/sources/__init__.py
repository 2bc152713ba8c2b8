"""Random-access data sources by name, for one split of a config's data.

    source = build(config.data, "train")
    len(source); source[3]  ->  {"image": R R 3 uint8, "text": str, ...}; source.name(3) -> its name in messages

`config.data` is a plain mapping (its other keys are read by `pipeline` and `text`):

    {"source": "shapes", "options": {"objects": (1, 2)}, "resolution": 32, "flip": False, "workers": 0, "threads": 1,
     "text": {"kind": "words", "length": 24}}
    {"source": "folder", "options": {"path": "pictures", "text_key": ("text", "text_zh"), "split_key": "split"}, ...}
    {"source": "records", "options": {"path": "written"}, ...}   written by data.prepare.write or hybridgen cache
    {"source": "tfds", "options": {"path": "prepared data set", "text_key": "caption"}, ...}
    {"source": "mixture", "options": {"sources": {"a": {"source": ..., "options": ..., "weight": 3}, "b": ...}}, ...}
    {"source": "my_package.my_source.MySource", "options": {...}, ...}   your own class: see protocol.py

With the option `buckets`, a table of data/sources/buckets.py, a folder has batches of several shapes; `shapes` in a
run's config.json lists those that it was trained on, and `class_names` its classes.

A record that cannot be read raises `BrokenRecord`; `reading.read` replaces it by a fixed rule. Optional members of a
source are `class_names`, `summary()` (a line that training prints), `captions()`, `words` (its vocabulary, by
frequency), `digest()`, `view(index, own)` (of a record with several views, the one that the random number `own` picks),
`arrange(positions, batch, seed, shuffle)` (the source's own order), `batches_once(batch)` (the number of batches in a
sequential pass), `after(index, step)` (the replacement of a broken record) and `source_of(index)` (of a mixture).
Sources with batches of several shapes have `shapes` (all (height, width)) and `occurring(batch, whole)` (the shapes of
whole batches, or of all batches).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hybridgen.core import importing
from hybridgen.core.errors import UserError
from hybridgen.data import storage
from hybridgen.data.sources import own
from hybridgen.data.sources.buckets import Buckets
from hybridgen.data.sources.folder import MAX_TEXT, Folder
from hybridgen.data.sources.headers import header_size
from hybridgen.data.sources.layouts import MAX_LINE
from hybridgen.data.sources.mixture import Mixture
from hybridgen.data.sources.protocol import BrokenRecord, Source, known
from hybridgen.data.sources.records import Records
from hybridgen.data.sources.shapes import Shapes
from hybridgen.data.sources.tfds import Tfds

__all__ = ["MAX_LINE", "MAX_TEXT", "BrokenRecord", "Folder", "build", "describe", "encoders", "fits", "header_size"]

KEYS = ("source", "options", "resolution", "text", "flip", "workers", "threads", "retry", "shapes", "class_names")
BUCKETS = "buckets"  # option of a folder: the table of data/sources/buckets.py
KINDS = {"shapes": Shapes, "folder": Folder, "records": Records, "tfds": Tfds, "mixture": Mixture}


def build(data_config: Mapping[str, Any], split: str) -> Source:
    """The source that a config names, for one split. Raises UserError for an unknown source, key, option or split."""
    known("data key", data_config.keys(), KEYS)
    for key in ("source", "resolution"):
        if key not in data_config.keys():
            raise UserError(f"data.{key} is missing")
    kind, options = data_config["source"], dict(data_config.get("options", {}))
    retry = data_config.get("retry", storage.RETRY)
    source = storage.patiently(lambda: _build(kind, options, split, data_config["resolution"], "data"), retry)
    cached = sorted(encoders(source))
    if cached and data_config.get("flip", False):
        raise UserError(
            f"data.flip is true, but the cached {cached[0]!r} cannot be flipped: set data.flip=false and cache with "
            f"--views flip"
        )
    return source


def _build(kind: str, options: dict, split: str, resolution: int, where: str):
    options = checked(kind, options, where)
    table = options.pop(BUCKETS, None)  # shapes and batches by aspect ratio
    if kind == "mixture":
        options["sources"] = {
            name: _member(name, entry, split, resolution) for name, entry in options.get("sources", {}).items()
        }
    made = kind_of(kind, f"{where}.source")
    if kind not in KINDS:
        return own.make(made, kind, split, resolution, options, f"{where}.source")
    source = made(split=split, resolution=resolution, **options)
    return Buckets(source, table, split) if table else source


def kind_of(kind: str, where: str = "data.source") -> Callable[..., Source]:
    """The class of a source by its name or as "package.module.Class". Raises UserError if there is none."""
    if not isinstance(kind, str) or "." not in kind:
        known(where, [kind], tuple(KINDS))
        return KINDS[kind]
    return importing.member(kind, where)


def checked(kind: str, options: Mapping, where: str = "data") -> dict:
    """The options of a source, converted. Raises UserError for an unknown option or another type than its default's."""
    made = kind_of(kind, f"{where}.source")
    if not callable(made):
        raise UserError(f"{where}.source {kind!r} is not a class")
    takes_of = inspect.signature(made).parameters
    takes = {name: parameter for name, parameter in takes_of.items() if name not in ("split", "resolution")}
    known(f"option of the source {kind!r}:", options, [*takes, *((BUCKETS,) if kind == "folder" else ())])
    if "path" in takes and not options.get("path"):
        what = {"folder": "the folder of images", "records": "the folder of records"}.get(kind, "the data set")
        raise UserError(f"{where}.options.path is missing: give {what}")
    return {
        name: _fitting(f"{where}.options.{name}", value, takes[name]) if name in takes else value
        for name, value in options.items()
    }


def _fitting(where: str, value, parameter: inspect.Parameter):
    """The value of an option; a single value becomes a tuple if the source takes several."""
    default, plain = parameter.default, not isinstance(value, bool)
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, (tuple, list, range)) else (value,)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and plain,
        float: isinstance(value, (int, float)) and plain,
    }
    if parameter.annotation == int | None:  # the default None has no type
        good, such = value is None or fits[int], "an integer or none"
    else:
        good, such = fits.get(type(default), True), f"{type(default).__name__}, such as {default!r}"
    if not good:
        raise UserError(f"{where} takes {such}, not {value!r}")
    return value


def _member(name: str, entry, split: str, resolution: int) -> tuple:
    """(source, weight) of one entry of a mixture."""
    where = f"data.options.sources.{name}"
    if not hasattr(entry, "keys"):
        raise UserError(f"{where} is {entry!r}, but must be a mapping with `source`, `options` and `weight`")
    known(f"key of {where}:", entry.keys(), ("source", "options", "weight"))
    if "source" not in entry.keys() or entry["source"] == "mixture":
        raise UserError(f"{where}.source is {entry.get('source')!r}, but must be a source other than mixture")
    options = dict(entry.get("options", {}))
    if options.get(BUCKETS):
        raise UserError(f"{where}.options.{BUCKETS}: a mixture cannot have buckets, only a source 'folder' alone")
    return _build(entry["source"], options, split, resolution, where), entry.get("weight", 1)


def describe(data_config: Mapping[str, Any], source: Source) -> dict:
    """Plain values that identify a source: kind, options, length, digest of its records, encoders of cached entries.

    Paths are left out, since a folder may move.
    """
    out = {
        "kind": data_config["source"],
        "options": _placeless(dict(data_config.get("options", {}))),
        "length": len(source),
        "resolution": data_config.get("resolution"),
    }
    out |= {"records": source.digest()} if hasattr(source, "digest") else {}
    return out | ({"encoders": encoders(source)} if encoders(source) else {})


def _placeless(options) -> dict:
    return {
        key: _placeless(value) if hasattr(value, "items") else value
        for key, value in options.items()
        if key not in ("path", BUCKETS)
    }


def encoders(source: Source) -> dict[str, str]:
    """{entry of a batch, such as "tokens": digest of the model that made it}, for a source of cached entries."""
    return dict(getattr(source, "encoders", {}))


PARTS = {"tokens": ("tokenizer",), "latent": ("autoencoder", "tokenizer"), "text_features": ("text",)}


def fits(source: Source, digests: Mapping[str, str]) -> None:
    """Raises UserError if a part (`digests`, by name) is not the model that made the source's cached entries."""
    for entry, digest in encoders(source).items():
        name = next((name for name in PARTS.get(entry, ()) if name in digests), None)
        if name is not None and digests[name] != digest:
            raise UserError(
                f"part {name!r} has the digest {digests[name]}, but the cached {entry!r} were made with {digest}: "
                f"cache them again, or use that part"
            )
