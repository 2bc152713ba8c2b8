"""A folder of images, with or without captions and classes (layouts.py), whose content is not trusted.

Only PNG, JPEG and WebP decoders are used, image sizes are limited from the header before any pixel is decoded, and
names that lead out of the folder are refused. A record that cannot be read raises `BrokenRecord`.
"""

import collections
import errno
import hashlib
import io
import json
import os
import reprlib
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import storage, transforms
from hybridgen.data.sources import layouts
from hybridgen.data.sources.headers import FORMATS, header_size, may_turn
from hybridgen.data.sources.protocol import BrokenRecord, known

T = TypeVar("T")
SPLITS = ("train", "validation")
MAX_TEXT = 4096  # characters of one caption; the rest is cut off
MAX_CLASS = 65_535  # largest whole number that is a class
KINDS = ("training", "validation")
ABSENT = 0.1  # seconds after which a file that is not there is looked for again
LINES = tuple(f"{name} line" for name in layouts.METADATA)  # names of records whose file name cannot be read


class Folder:
    """A folder of images with captions or classes, in one of the layouts of layouts.py.

    path: the folder. layout: "auto" finds it. split: "train" or "validation". validation: the fraction of the images in
    the validation split, by a hash of the file name; or split_key: the field with the split. text_key: the field(s)
    with captions; a field has a text, a list of texts, or a mapping from language to text (`language` picks one;
    default: all); None: no captions. All captions of an image are in `texts`; training picks one at random, each field
    as often as `text_weights` states (integers, one per field). style_key: a field that is appended to each caption,
    after a comma. label_key: the field with the class: whole numbers mean themselves, names are numbered over both
    splits, in sorted order, or as `class_names` lists them: no others may occur then. background: the colour behind
    transparent pixels. max_pixels, max_bytes: limits per file; a larger file is a broken record.

    Items: `image` R R 3 uint8, `text` str, `texts` tuple of str, `label` int if label_key is given. Raises UserError
    for a missing folder, a split without a usable record, and options out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        resolution: int,
        layout: str = "auto",
        text_key: str | Sequence[str] | None = "text",
        language: str | None = None,
        text_weights: tuple[int, ...] = (),
        style_key: str | None = None,
        label_key: str | None = None,
        class_names: tuple[str, ...] = (),
        split_key: str | None = None,
        validation: float = 0.02,
        background: tuple[int, int, int] = transforms.WHITE,
        max_pixels: int = 2**25,
        max_bytes: int = 2**26,
    ):
        known("split of a folder", [split], SPLITS)
        for name, value, top in (
            ("resolution", resolution, 4096),
            ("max_pixels", max_pixels, 2**31),
            ("max_bytes", max_bytes, 2**31),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
                raise UserError(f"{name} is {value!r}, but must be an integer from 1 to {top}")
        if not 0 <= validation < 1:
            raise UserError(f"validation is {validation!r}, but must be a fraction of at least 0 and below 1")
        self.path, self.resolution = os.path.realpath(path), resolution
        self.text_keys = (text_key,) if isinstance(text_key, str) else tuple(text_key or ())
        self.language, self.label_key, self.style_key = language, label_key, style_key
        self.text_weights = tuple(text_weights) or (1,) * len(self.text_keys)
        if len(self.text_weights) != len(self.text_keys) or not all(
            type(weight) is int and 0 < weight <= 100 for weight in self.text_weights
        ):
            raise UserError(
                f"text_weights {tuple(text_weights)} must be integers from 1 to 100, one for each of the fields "
                f"{self.text_keys}"
            )
        self.background, self.max_pixels, self.max_bytes = tuple(background), max_pixels, max_bytes
        if not layouts.mode(self.path, stat.S_ISDIR):
            raise UserError(f"data.options.path: no folder of images at {path}")
        self.layout = layouts.find(self.path, layout)
        records = self._scan(split_key, validation)
        labels = {record[3] for record in records if record[3] is not None}
        self.class_names, self._classes = _classes(labels, class_names)
        self._sizes = collections.Counter(record[0] for record in records if record[4] is None)
        self._names = {os.path.normpath(record[1]) for record in records if record[4] is None}
        self._records = [record[1:] for record in records if record[0] == split]
        places = {os.path.dirname(record[0]) for record in self._records if record[3] is None}
        self._places = {place for place in places | {""} if layouts.filled(os.path.join(self.path, place))}
        broken, lines = self.problems(1)
        if broken == len(self._records):
            raise UserError(
                f"the folder {path} has no usable image for the split {split!r}: {len(records)} records in total, "
                f"{broken} in this split, {broken} of them broken{''.join(f'; {line}' for line in lines)}"
                f"{_unread(layouts.files(self.path).unread)}"
            )

    def summary(self) -> str:
        """How many of the folder's pictures are used, in one line."""
        found = layouts.files(self.path)
        used, total = len(self._names & set(found.pictures)), len(found.pictures)
        lacks = {"txt": "a .txt file", "classes": "a folder of a class"}.get(self.layout.kind)
        lacks = f"{total - used} without {lacks or f'a usable line in {self.layout.kind}'}"
        counts = ", ".join(f"{self._sizes[split]} for {name}" for split, name in zip(SPLITS, KINDS, strict=True))
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        left = f" ({lacks})" if used < total else ""
        return f"{used} of {total} pictures{left}, layout {self.layout}: {counts}{classes}{_unread(found.unread)}"

    def problems(self, limit: int = 20) -> tuple[int, list[str]]:
        """(number of records of this split with broken metadata, descriptions of the first few)."""
        broken = [index for index, record in enumerate(self._records) if record[3] is not None]
        return len(broken), [f"{self.name(index)}: {self._records[index][3]}" for index in broken[:limit]]

    def _scan(self, split_key, validation) -> list[tuple]:
        """(split, name, texts, label, None or why it is broken) of the records of both splits, in a fixed order."""
        tabled = self.layout.kind in layouts.METADATA
        if not tabled and (split_key or self.label_key):
            key = split_key or self.label_key
            raise UserError(f"the folder {self.path} has no metadata.jsonl or metadata.csv to read {key!r} from")
        keys = self.text_keys if tabled else ("text",) if self.text_keys and self.layout.kind == "txt" else ()
        label_key = self.label_key if tabled else "label" if self.layout.kind == "classes" else None
        rows = layouts.entries(self.path, self.layout)
        records = [self._record(row, keys, label_key, split_key) for row in rows]
        stated = split_key or any(split == "validation" for split, _ in self.layout.parts)
        return records if stated else _divide(records, validation)

    def _record(self, row: layouts.Entry, keys: Sequence[str], label_key: str | None, split_key: str | None) -> tuple:
        """One record. A broken line keeps its index: without it, all later records would be renumbered."""
        name, stated, inside, fields = row
        split, label = stated or "train", None
        try:
            record = fields()
            plain = layouts.safe_name(record.get("file_name")) if self.layout.kind in layouts.METADATA else name
            name = f"{inside}/{plain}" if inside else plain
            if split_key:
                split = record.get(split_key)
                if split not in SPLITS:
                    found, split = reprlib.repr(split), "train"
                    raise BrokenRecord(f"its {split_key!r} is {found}, not one of {SPLITS}")
            weights = self.text_weights if len(keys) == len(self.text_weights) else (1,) * len(keys)
            pairs = zip(keys, weights, strict=True)
            texts = tuple(text for key, weight in pairs for text in self._texts(record, key) * weight) or ("",)
            label = _label(record, label_key) if label_key else None
        except BrokenRecord as error:
            return split, name, ("",), None, str(error)
        return split, name, texts, label, None

    def _texts(self, record: dict, key: str) -> list[str]:
        value = record.get(key)
        if isinstance(value, dict):
            value = list(value.values()) if self.language is None else value.get(self.language)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            found = reprlib.repr(value)
            raise BrokenRecord(f"its {key!r} is {found}, not a text, a list of texts or a mapping by language")
        if self.style_key:
            style = record.get(self.style_key)
            if not isinstance(style, str) or not style:
                raise BrokenRecord(f"its {self.style_key!r} is {reprlib.repr(style)}, not a text")
            texts = [f"{text}, {style}" for text in texts]
        return [text[:MAX_TEXT] for text in texts]

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """The file name of a record, or its line in the metadata if that line is broken."""
        name = self._records[index][0]
        return name if name.isprintable() else ascii(name)

    def captions(self) -> Iterator[str]:
        """All captions of this split, from the metadata only."""
        for _, texts, _, _ in self._records:
            yield from texts

    def digest(self) -> str:
        """Digest of names, captions and labels, in order, which must be the same when a run resumes."""
        total = hashlib.sha256()
        for record in self._records:
            total.update(json.dumps(record).encode())
        if self.class_names and self.class_names[0] == 0 and set(self._classes) != set(self.class_names):
            total.update(b"numbers")  # labels that earlier versions numbered anew
        return total.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict:
        return self.at(index, (self.resolution, self.resolution))

    def at(self, index: int, shape: tuple[int, int]) -> dict:
        """A record with its image in the given shape (height, width)."""
        _, texts, label, _ = self._records[index]
        image = self._of_file(index, lambda name: self._picture(name, shape))
        item = {"image": image, "text": texts[0], "texts": texts}
        return item if label is None else item | {"label": self._classes[label]}

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a record's upright image, without decoding it. BrokenRecord if it cannot be read."""
        return self._of_file(index, self._upright)

    def _of_file(self, index: int, read: Callable[[str], T]) -> T:
        """`read` of a record's file. Raises BrokenRecord, with the record's name, unless the storage is at fault."""
        name, _, _, reason = self._records[index]
        if reason is None:
            try:
                return read(name)
            except BrokenRecord as error:
                reason = str(error)
            except Exception as error:  # decoders raise exceptions of many types for broken data
                if storage.passing(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
        raise BrokenRecord(f"{self.name(index)}: {reason}")

    def _upright(self, name: str) -> tuple[int, int]:
        data = self._bytes(name)
        width, height = header_size(data)
        self._check_size(width, height)
        if may_turn(data):
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = (height, width) if transforms.turned(image) else (width, height)
        return width, height

    def _picture(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """-> H W 3 uint8."""
        data = self._bytes(name)
        self._check_size(*header_size(data))
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            self._check_size(*image.size)  # again: the decoder's size may differ from that of the header
            image.draft("RGB", (2 * max(shape), 2 * max(shape)))  # JPEG: decode at about the needed size
            return transforms.cover(transforms.flatten(image, self.background), *shape)

    def _check_size(self, width: int, height: int) -> None:
        if not 0 < width * height <= self.max_pixels:
            raise BrokenRecord(f"{width} x {height} pixels; max_pixels is {self.max_pixels}")

    def _bytes(self, name: str) -> bytes:
        """The content of a file. Raises BrokenRecord for what stays wrong, another OSError for what may pass."""
        try:
            return self._read(name)
        except FileNotFoundError:
            time.sleep(ABSENT)  # perhaps the folder is being moved or mounted again
            place = os.path.dirname(name)
            here = all(layouts.filled(os.path.join(self.path, one)) for one in {place, ""} & self._places)
            if not here or os.path.exists(os.path.join(self.path, name)):
                raise storage.gone(os.path.join(self.path, name)) from None
            raise BrokenRecord("No such file") from None
        except OSError as error:
            if storage.passing(error):
                raise
            raise BrokenRecord(f"it cannot be read: {error.strerror}") from None

    def _read(self, name: str) -> bytes:
        path = os.path.realpath(os.path.join(self.path, name), strict=True)
        if os.path.commonpath([path, self.path]) != self.path:
            raise BrokenRecord("a link to a file outside the folder")
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe could block forever, reading a device never ends
            raise BrokenRecord("not a regular file")
        if info.st_size > self.max_bytes:
            raise BrokenRecord(f"{info.st_size} bytes; max_bytes is {self.max_bytes}")
        with open(path, "rb") as file:
            data = file.read(info.st_size)
        if len(data) < info.st_size:  # it became shorter since, or the rest could not be read
            raise OSError(errno.EIO, f"only {len(data)} of {info.st_size} bytes were read", path)
        return data


def _unread(counts: collections.Counter) -> str:
    """The images of formats that are not read, for a message."""
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    return f"; {listed} not read (only PNG, JPEG and WebP are)" if listed else ""


def _label(record: dict, key: str) -> str | int:
    label = record.get(key)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BrokenRecord(f"its {key!r} is {reprlib.repr(label)}, not a text or an integer")
    if isinstance(label, int) and not 0 <= label <= MAX_CLASS:
        raise BrokenRecord(f"its {key!r} is {reprlib.repr(label)}; a class number is from 0 to {MAX_CLASS}")
    return label


def _classes(labels: set, given: Sequence[str]) -> tuple[list, dict]:
    """(names of the classes, the number of each label). Whole numbers, also as text, mean themselves.

    Raises UserError for a label that is not among the classes `given`, in the order of their numbers, if there are any.
    """
    whole = {label: _whole(label) for label in labels}
    if labels and None not in whole.values() and not set(map(str, labels)) <= set(given):
        if given and max(whole.values()) >= len(given):
            raise UserError(
                f"the class {max(whole.values())} is none of the {len(given)} of class_names: {_some(given)}"
            )
        return list(given) or list(range(max(whole.values()) + 1)), whole
    names = sorted(map(str, labels))
    if given and (odd := [name for name in names if name not in given]):
        raise UserError(f"{len(odd)} classes are not among class_names ({_some(given)}): {_some(odd)}")
    names = list(given) if given and labels else names
    return names, {label: names.index(str(label)) for label in labels}


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    listed = ", ".join(map(reprlib.repr, names[:8]))
    return f"{listed} and {len(names) - 8} more" if len(names) > 8 else listed


def _whole(label: str | int) -> int | None:
    digits = str(label).isascii() and str(label).isdigit() and len(str(label)) < 10
    return int(label) if digits and int(label) <= MAX_CLASS else None


def _divide(records: list[tuple], validation: float) -> list[tuple]:
    """Puts a fraction of the records into validation by a hash of the name, so that new files move no existing ones.

    Of two or more records at least one is in validation, since evaluation needs one. A line of metadata without a valid
    name stays in training.
    """
    top = 2**64
    parts = [
        top
        if record[1].startswith(LINES)
        else int.from_bytes(hashlib.blake2b(os.fsencode(record[1]), digest_size=8).digest(), "big")
        for record in records
    ]
    good = [part for part, record in zip(parts, records, strict=True) if record[4] is None]
    threshold = int(validation * top)
    if validation and len(good) > 1:
        threshold = max(threshold, min(good) + 1)
    return [
        ("validation" if part < threshold else "train", *record[1:])
        for part, record in zip(parts, records, strict=True)
    ]
