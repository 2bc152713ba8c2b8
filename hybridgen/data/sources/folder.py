"""A folder of images, with or without captions in `metadata.jsonl`, whose content is not trusted.

Only PNG, JPEG and WebP decoders are used, image sizes are limited from the header before any pixel is decoded, and
names that lead out of the folder are refused. A record that cannot be read raises `BrokenRecord`.
"""

import difflib
import hashlib
import io
import json
import os
import reprlib
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import transforms

SPLITS = ("train", "validation")
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_LINE = 2**20  # bytes of one line of metadata
MAX_TEXT = 4096  # characters of one caption; the rest is cut off
MAX_NAME = 1024
MAX_SEGMENTS = 65_536  # of a JPEG header, where a byte of padding counts as one
LINE = "metadata.jsonl line"  # name of a record whose file name cannot be read


class BrokenRecord(Exception):
    """A record cannot be read; the message names it and the reason."""


def known(what: str, given: Iterable[str], names: Collection[str]) -> None:
    """Raises UserError for the first of `given` that is not in `names`, with the nearest known name."""
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0)[0]
            raise UserError(f"unknown {what} {name!r}; the nearest known one is {near!r} (known: {', '.join(names)})")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP from its header, without a decoder. Raises BrokenRecord for other data.

    PIL's WebP reader allocates the canvas when it opens a file, so the size must be checked before.
    """
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return struct.unpack(">II", data[16:24])
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_size(data)
    except (struct.error, IndexError):
        raise BrokenRecord("the header is cut off") from None
    raise BrokenRecord(f"not an image in {', '.join(FORMATS)}")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise BrokenRecord("the JPEG has no frame header")
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # padding, and markers without a body
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    raise BrokenRecord(f"the JPEG has no frame header in its first {MAX_SEGMENTS} segments")


class Folder:
    """A folder of images, with one JSON object per line in `metadata.jsonl`; without that file there are no captions.

    path: the folder. split: "train" or "validation". validation: the fraction of the images in the validation split, by
    a hash of the file name; or split_key: the field with the split. text_key: the field(s) with captions; a field has a
    text, a list of texts, or a mapping from language to text (`language` picks one; default: all); None: no captions.
    All captions of an image are in `texts`; training picks one at random, each field as often as `text_weights` states
    (integers, one per field). style_key: a field that is appended to each caption, after a comma. label_key: the field
    with the class; classes are numbered over both splits, in sorted order (`class_names`). background: the colour
    behind transparent pixels. max_pixels, max_bytes: limits per file; a larger file is a broken record.

    Items: `image` R R 3 uint8, `text` str, `texts` tuple of str, `label` int if label_key is given. Raises UserError
    for a missing folder, a split without a usable record, and options out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        resolution: int,
        text_key: str | Sequence[str] | None = "text",
        language: str | None = None,
        text_weights: tuple[int, ...] = (),
        style_key: str | None = None,
        label_key: str | None = None,
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
        if not os.path.isdir(path):
            raise UserError(f"data.options.path: no folder of images at {path}")
        records = self._scan(split_key, validation)
        self.class_names = sorted({record[3] for record in records if record[3] is not None}, key=_class_order)
        self._classes = {name: i for i, name in enumerate(self.class_names)}
        self._records = [record[1:] for record in records if record[0] == split]
        broken, lines = self.problems(1)
        if broken == len(self._records):
            raise UserError(
                f"the folder {path} has no usable image for the split {split!r}: {len(records)} records in total, "
                f"{broken} in this split, {broken} of them broken{''.join(f'; {line}' for line in lines)}"
            )

    def problems(self, limit: int = 20) -> tuple[int, list[str]]:
        """(number of records of this split with broken metadata, descriptions of the first few)."""
        broken = [index for index, record in enumerate(self._records) if record[3] is not None]
        return len(broken), [f"{self.name(index)}: {self._records[index][3]}" for index in broken[:limit]]

    def _scan(self, split_key, validation) -> list[tuple]:
        """(split, name, texts, label, None or why it is broken) of the records of both splits, in a fixed order."""
        metadata = os.path.join(self.path, "metadata.jsonl")
        if not os.path.lexists(metadata):
            if split_key or self.label_key:
                raise UserError(
                    f"the folder {self.path} has no metadata.jsonl to read {split_key or self.label_key!r} from"
                )
            records = [("train", name, ("",), None, None) for name in _pictures(self.path)]
        elif not os.path.isfile(metadata):
            raise UserError(f"{metadata} is not a file")
        elif os.path.commonpath([os.path.realpath(metadata), self.path]) != self.path:
            raise UserError(f"{metadata} is a link to a file outside the folder")
        else:
            records = [self._record(number, line, split_key) for number, line in _lines(metadata)]
        return records if split_key else _divide(records, validation)

    def _record(self, number: int, line: bytes | None, split_key) -> tuple:
        """One line of metadata. A broken line keeps its index: without it, all later records would be renumbered."""
        split, name, label = "train", f"{LINE} {number}", None
        try:
            record = _object(line)
            name = _safe_name(record.get("file_name"))
            if split_key:
                split = record.get(split_key)
                if split not in SPLITS:
                    found, split = reprlib.repr(split), "train"
                    raise BrokenRecord(f"its {split_key!r} is {found}, not one of {SPLITS}")
            pairs = zip(self.text_keys, self.text_weights, strict=True)
            texts = tuple(text for key, weight in pairs for text in self._texts(record, key) * weight) or ("",)
            if self.label_key:
                label = record.get(self.label_key)
                if isinstance(label, bool) or not isinstance(label, (str, int)):
                    raise BrokenRecord(f"its {self.label_key!r} is {reprlib.repr(label)}, not a text or an integer")
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
        return total.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict:
        return self.at(index, (self.resolution, self.resolution))

    def at(self, index: int, shape: tuple[int, int]) -> dict:
        """A record with its image in the given shape (height, width)."""
        name, texts, label, reason = self._records[index]
        if reason is None:
            try:
                image = self._picture(name, shape)
            except BrokenRecord as error:
                reason = str(error)
            except Exception as error:  # decoders raise exceptions of many types for broken data
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            raise BrokenRecord(f"{self.name(index)}: {reason}")
        item = {"image": image, "text": texts[0], "texts": texts}
        return item if label is None else item | {"label": self._classes[label]}

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a record's image, from its header. Raises BrokenRecord if it cannot be read."""
        name, _, _, reason = self._records[index]
        try:
            width, height = header_size(self._bytes(name)) if reason is None else (0, 0)
        except OSError as error:
            raise BrokenRecord(f"{self.name(index)}: {error.strerror}") from None
        self._check_size(width, height)
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
        path = os.path.realpath(os.path.join(self.path, name))
        if os.path.commonpath([path, self.path]) != self.path:
            raise BrokenRecord("a link to a file outside the folder")
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe could block forever, reading a device never ends
            raise BrokenRecord("not a regular file")
        if info.st_size > self.max_bytes:
            raise BrokenRecord(f"{info.st_size} bytes; max_bytes is {self.max_bytes}")
        with open(path, "rb") as file:
            return file.read(info.st_size)


def _class_order(name: str | int) -> tuple:
    return isinstance(name, str), name


def _pictures(root: str) -> list[str]:
    """Relative names of the images below a folder, sorted; links to folders are not followed."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)


def _divide(records: list[tuple], validation: float) -> list[tuple]:
    """Puts a fraction of the records into validation by a hash of the name, so that new files move no existing ones.

    Of two or more records at least one is in validation, since evaluation needs one. A line of metadata without a valid
    name stays in training.
    """
    top = 2**64
    parts = [
        top
        if record[1].startswith(LINE)
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


def _lines(path: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) without blank lines; None for a line over `MAX_LINE`, which is not stored."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            elif line.strip():
                yield number, line


def _object(line: bytes | None) -> dict:
    if line is None:
        raise BrokenRecord(f"the line has more than {MAX_LINE} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"not valid JSON: {str(error)[:80]}") from None
    if not isinstance(record, dict):
        raise BrokenRecord(f"a JSON {type(record).__name__}, not an object")
    return record


def _safe_name(name) -> str:
    """A relative file name inside the folder. Raises BrokenRecord for any other name."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise BrokenRecord(f"its 'file_name' is {reprlib.repr(name)}, not a file name")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise BrokenRecord(f"its 'file_name' {name[:80]!r} leads out of the folder")
    if not name.isprintable():  # may contain escape sequences for the terminal
        raise BrokenRecord(f"its 'file_name' {name[:80]!a} is not printable")
    return name
