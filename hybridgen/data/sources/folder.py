"""A folder of pictures, with captions in `metadata.jsonl` or without, read as if somebody hostile had filled it.

Only PNG, JPEG and WebP decoders are used, sizes are capped from the header before any pixel is unpacked, and a name
that leads out of the folder is refused. A record that cannot be read raises `BrokenRecord`.
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
MAX_TEXT = 4096  # characters of one caption; the rest is cut
MAX_NAME = 1024
MAX_SEGMENTS = 65_536  # steps through the head of a JPEG, a byte of padding being one
LINE = "metadata.jsonl line"  # what a record is called whose name cannot be read


class BrokenRecord(Exception):
    """One record that cannot be read: which, and why."""


def known(what: str, given: Iterable[str], names: Collection[str]) -> None:
    """Raises UserError for the first of `given` that is not in `names`, with the nearest that is."""
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0)[0]
            raise UserError(f"unknown {what} {name!r}; the nearest known one is {near!r} (known: {', '.join(names)})")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP from its header, without a decoder; BrokenRecord if it is none of them.

    PIL's WebP reader allocates the canvas while it opens a file, so the cap cannot wait for PIL.
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
    raise BrokenRecord(f"not a picture in {', '.join(FORMATS)}")


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
            raise BrokenRecord("a JPEG without a frame header")
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # padding, and markers without a body
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    raise BrokenRecord(f"a JPEG without a frame header in its first {MAX_SEGMENTS} segments")


class Folder:
    """A folder of pictures, with one JSON object a line in `metadata.jsonl` or, without that file, no captions.

    path: the folder. split: "train" or "validation": `validation` is the fraction, by a hash of the file name, that
    goes to the latter; with `split_key` the metadata says it. text_key: the field(s) with captions; a field holds a
    text, a list of texts or a mapping from language to text (then `language` picks one, or all are used); None for no
    captions. An example with several has them all in `texts`; training picks one by the sample's own seed, those of a
    field as often as `text_weights` says (whole numbers, one a field). style_key: a field to follow each caption, after
    a comma. label_key:
    the field with the class; classes are numbered over both splits, in order (`class_names`). background: what shows
    through transparent pixels. max_pixels, max_bytes: of one file; a larger one is a broken record.
    Items: `image` R R 3 uint8, `text` str, `texts` tuple of str, `label` int if label_key is given.
    UserError for a missing folder, one without a usable record in this split, and options out of range.
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
                raise UserError(f"{name} is {value!r}, it must be a whole number between 1 and {top}")
        if not 0 <= validation < 1:
            raise UserError(f"validation is {validation!r}, it must be a fraction from 0 to below 1")
        self.path, self.resolution = os.path.realpath(path), resolution
        self.text_keys = (text_key,) if isinstance(text_key, str) else tuple(text_key or ())
        self.language, self.label_key, self.style_key = language, label_key, style_key
        self.text_weights = tuple(text_weights) or (1,) * len(self.text_keys)
        if len(self.text_weights) != len(self.text_keys) or not all(
            type(weight) is int and 0 < weight <= 100 for weight in self.text_weights
        ):
            raise UserError(
                f"text_weights {tuple(text_weights)} are not whole numbers from 1 to 100, one for each of "
                f"the fields {self.text_keys}"
            )
        self.background, self.max_pixels, self.max_bytes = tuple(background), max_pixels, max_bytes
        if not os.path.isdir(path):
            raise UserError(f"no folder of pictures at {path}")
        records = self._scan(split_key, validation)
        self.class_names = sorted({record[3] for record in records if record[3] is not None}, key=_class_order)
        self._classes = {name: i for i, name in enumerate(self.class_names)}
        self._records = [record[1:] for record in records if record[0] == split]
        broken, lines = self.problems(1)
        if broken == len(self._records):
            raise UserError(
                f"the folder {path} has no picture for the split {split!r}: {len(records)} records in all, "
                f"{broken} in this split, {broken} of them broken{''.join(f'; {line}' for line in lines)}"
            )

    def problems(self, limit: int = 20) -> tuple[int, list[str]]:
        """How many records of this split the metadata alone shows to be broken, and the first few in words."""
        broken = [index for index, record in enumerate(self._records) if record[3] is not None]
        return len(broken), [f"{self.name(index)}: {self._records[index][3]}" for index in broken[:limit]]

    def _scan(self, split_key, validation) -> list[tuple]:
        """(split, name, texts, label, why it is broken or None) of the records of both splits, in a fixed order."""
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
            raise UserError(f"{metadata} is a link out of the folder")
        else:
            records = [self._record(number, line, split_key) for number, line in _lines(metadata)]
        return records if split_key else _divide(records, validation)

    def _record(self, number: int, line: bytes | None, split_key) -> tuple:
        """One line of metadata. A broken one keeps its place: taking it out would renumber all the others."""
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
                    raise BrokenRecord(f"its {self.label_key!r} is {reprlib.repr(label)}, not a text or a whole number")
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
            raise BrokenRecord(f"its {key!r} is {found}, not a text, a list of texts or texts by language")
        if self.style_key:
            style = record.get(self.style_key)
            if not isinstance(style, str) or not style:
                raise BrokenRecord(f"its {self.style_key!r} is {reprlib.repr(style)}, not a text")
            texts = [f"{text}, {style}" for text in texts]
        return [text[:MAX_TEXT] for text in texts]

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """The file name of a record, or its line where the metadata itself is broken."""
        name = self._records[index][0]
        return name if name.isprintable() else ascii(name)

    def captions(self) -> Iterator[str]:
        """Every caption of this split; reads no picture."""
        for _, texts, _, _ in self._records:
            yield from texts

    def digest(self) -> str:
        """Digest of names, captions and labels, in order: what a resumed run must find again."""
        total = hashlib.sha256()
        for record in self._records:
            total.update(json.dumps(record).encode())
        return total.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict:
        return self.at(index, (self.resolution, self.resolution))

    def at(self, index: int, shape: tuple[int, int]) -> dict:
        """A record with its picture in a shape of its own, (height, width)."""
        name, texts, label, reason = self._records[index]
        if reason is None:
            try:
                image = self._picture(name, shape)
            except BrokenRecord as error:
                reason = str(error)
            except Exception as error:  # decoders raise whatever they like on broken data; all of it means one thing
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            raise BrokenRecord(f"{self.name(index)}: {reason}")
        item = {"image": image, "text": texts[0], "texts": texts}
        return item if label is None else item | {"label": self._classes[label]}

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a record's file, from its header; BrokenRecord if it has none."""
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
            self._check_size(*image.size)  # again: what the decoder believes may not be what the header said first
            image.draft("RGB", (2 * max(shape), 2 * max(shape)))  # JPEG: decode near the size needed
            return transforms.cover(transforms.flatten(image, self.background), *shape)

    def _check_size(self, width: int, height: int) -> None:
        if not 0 < width * height <= self.max_pixels:
            raise BrokenRecord(f"{width} x {height} pixels, at most {self.max_pixels} in all are read")

    def _bytes(self, name: str) -> bytes:
        path = os.path.realpath(os.path.join(self.path, name))
        if os.path.commonpath([path, self.path]) != self.path:
            raise BrokenRecord("a link out of the folder")
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # a pipe would block for ever, a device never end
            raise BrokenRecord("not a regular file")
        if info.st_size > self.max_bytes:
            raise BrokenRecord(f"{info.st_size} bytes, at most {self.max_bytes} are read")
        with open(path, "rb") as file:
            return file.read(info.st_size)


def _class_order(name: str | int) -> tuple:
    return isinstance(name, str), name


def _pictures(root: str) -> list[str]:
    """Relative names of the pictures under a folder, sorted; links to folders are not followed."""
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
    """Sends a fraction of the records to validation by a hash of the name, so that new files move no old ones.

    At least one, where there are two: a small folder too needs something to be evaluated on. A line of metadata too
    broken to have a name stays in training.
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
    """(line number from 1, line), blank lines left out; None for a line over `MAX_LINE`, which is never held whole."""
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
        raise BrokenRecord(f"a line of more than {MAX_LINE} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(record, dict):
        raise BrokenRecord(f"a JSON {type(record).__name__}, not an object")
    return record


def _safe_name(name) -> str:
    """A relative file name that stays in its folder; BrokenRecord otherwise."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise BrokenRecord(f"its 'file_name' is {reprlib.repr(name)}, not the name of a file")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise BrokenRecord(f"its 'file_name' {name[:80]!r} leads out of the folder")
    if not name.isprintable():  # no file of this world, and an escape sequence to whoever prints it
        raise BrokenRecord(f"its 'file_name' {name[:80]!a} is not printable")
    return name
