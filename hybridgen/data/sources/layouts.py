"""How a folder of images states its captions, classes and splits; none of it is trusted.

    metadata.jsonl    one JSON object per line, with `file_name` and `text`
    metadata.csv      the same as a table
    txt               a text file beside each picture: cat.png, cat.txt
    classes           a folder of pictures for each class, named as the class
    pictures          neither captions nor classes

Each of these may also lie in folders `train` and `validation` (or `valid`, `val`), which are then the splits.
"""

import codecs
import collections
import csv
import json
import os
import reprlib
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hybridgen.core.errors import UserError
from hybridgen.data import storage
from hybridgen.data.files import decoded
from hybridgen.data.sources.protocol import BrokenRecord, known

METADATA = ("metadata.jsonl", "metadata.csv")
LAYOUTS = (*METADATA, "txt", "classes", "pictures")
CAPTIONED = (*METADATA, "a .txt file beside each picture", "a folder for each class")  # in messages
FOLDERS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREAD = (".heic", ".heif", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jxl")  # images that are counted, but not read
MAX_LINE = 2**20  # bytes of one line of metadata, or of a text file
MAX_NAME = 1024


class Layout(NamedTuple):
    """The layout of a folder: its kind and its splits, (split or None, folder relative to the root)."""

    kind: str
    parts: list[tuple[str | None, str]]

    def __str__(self) -> str:
        folders = [inside for split, inside in self.parts if split]
        return f"{self.kind} in {' and '.join(folders)}" if folders else self.kind


class Files(NamedTuple):
    """The files below a folder: pictures and text files by relative name, sorted, and other images by suffix."""

    pictures: list[str]
    texts: set[str]
    unread: collections.Counter


def files(root: str) -> Files:
    """Lists a folder; links to folders are not followed, hidden files and folders are left out."""
    pictures, texts, unread = [], set(), collections.Counter()
    for folder, folders, names in os.walk(root, onerror=_unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                pictures.append(os.path.relpath(os.path.join(folder, name), root))
            elif suffix == ".txt":
                texts.add(os.path.relpath(os.path.join(folder, name), root))
            elif suffix in UNREAD:
                unread[suffix] += 1
    return Files(sorted(pictures), texts, unread)


def _unlisted(error: OSError) -> None:
    """A folder that cannot be listed: its pictures must not be left out in silence."""
    if isinstance(error, FileNotFoundError):
        raise storage.gone(error.filename)
    if not storage.passing(error):
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}")
    raise error


def mode(path: str, kind: Callable[[int], bool]) -> bool:
    """Whether there is a file of a kind (such as stat.S_ISDIR). Errors other than its absence are raised."""
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def filled(folder: str) -> bool:
    """Whether a folder has any entry: where nothing is mounted there is none."""
    try:
        with os.scandir(folder) as listing:
            return next(listing, None) is not None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False


def find(root: str, wanted: str) -> Layout:
    """The layout of a folder; `wanted`: its kind, or "auto". Raises UserError for two kinds of metadata."""
    if wanted != "auto":
        known("layout of a folder", [wanted], ("auto", *LAYOUTS))
    parts = _parts(root)
    return Layout(_kind(os.path.join(root, parts[0][1])) if wanted == "auto" else wanted, parts)


def _parts(root: str) -> list[tuple[str | None, str]]:
    with os.scandir(root) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(".")]
    inside = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    plain = [entry.name for entry in entries if entry.name not in inside]
    own = any(name in METADATA or name.lower().endswith(SUFFIXES) for name in plain)
    if own or "train" not in inside or set(inside) - {*FOLDERS, "test"}:
        return [(None, "")]
    return [(FOLDERS[name], name) for name in FOLDERS if name in inside]


def _kind(folder: str) -> str:
    names = os.listdir(folder)
    given = [name for name in METADATA if name in names]
    if len(given) > 1:
        raise UserError(f"{folder} has {' and '.join(given)}: name one with data.options.layout")
    if given:
        return given[0]
    pictures, texts, _ = files(folder)
    if any(_text_name(name) in texts for name in pictures):
        return "txt"
    places = {os.path.dirname(name) for name in pictures}
    return "classes" if len(places) > 1 and all(place and os.sep not in place for place in places) else "pictures"


def _text_name(picture: str) -> str:
    return f"{os.path.splitext(picture)[0]}.txt"


Entry = tuple[str, str | None, str, Callable[[], dict]]


def entries(root: str, layout: Layout) -> Iterator[Entry]:
    """Yields (name in messages, split or None, folder of its `file_name`, function -> fields or BrokenRecord)."""
    for split, inside in layout.parts:
        folder = os.path.join(root, inside) if inside else root
        if layout.kind in METADATA:
            path = _metadata(root, folder, layout.kind)
            rows = _json_rows(path) if layout.kind == METADATA[0] else _csv_rows(path)
            for number, row in rows:
                yield f"{layout.kind} line {number}", split, inside, row
            continue
        listed = files(folder)
        for name in listed.pictures:
            if layout.kind == "txt" and _text_name(name) in listed.texts:
                text = os.path.join(folder, _text_name(name))
                yield name, split, inside, lambda text=text: {"text": _text(root, text)}
            elif layout.kind == "classes" and os.path.dirname(name):
                yield name, split, inside, lambda name=name: {"label": name.split(os.sep)[0]}
            elif layout.kind == "pictures":
                yield name, split, inside, dict


def _metadata(root: str, folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not mode(path, stat.S_ISREG):
        raise UserError(f"{path} is not a file")
    if os.path.commonpath([os.path.realpath(path), root]) != root:
        raise UserError(f"{path} is a link to a file outside the folder")
    return path


def _text(root: str, listed: str) -> str:
    path = os.path.realpath(listed)
    if os.path.commonpath([path, root]) != root:
        raise BrokenRecord("its text file is a link to a file outside the folder")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could block forever
            raise BrokenRecord("its text file is not a regular file")
        with open(path, "rb") as file:
            return decoded(file.read(MAX_LINE)).strip()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(listed):
            raise storage.gone(listed) from None
        if storage.passing(error):
            raise
        raise BrokenRecord(f"its text file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BrokenRecord(f"its text file is not UTF-8: {str(error)[:80]}") from None


def _lines(path: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) without blank lines; None for a line over `MAX_LINE`, which is not stored."""
    try:
        file = open(path, "rb")
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is in UTF-16: save it in UTF-8")
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            elif line.strip():
                yield number, line


def _json_rows(path: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    for number, line in _lines(path):
        yield number, lambda line=line: _object(line)


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


def _csv_rows(path: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The rows of a table with a head, by number of their last line. An empty cell is a missing field."""
    text = (b"" if line is None else line for _, line in _lines(path))
    rows = csv.reader(line.decode("utf-8-sig", "replace") for line in text)
    head = next(rows, [])
    while True:
        try:
            row, fault = next(rows), ""
        except StopIteration:
            return
        except csv.Error as error:
            row, fault = [], str(error)[:80]
        if not fault and len(row) != len(head):
            fault = f"{len(row)} cells, but the head has {len(head)}"
        yield rows.line_num, lambda row=row, fault=fault: _row(head, row, fault)


def _row(head: list[str], row: list[str], fault: str) -> dict:
    if fault:
        raise BrokenRecord(f"not a row of the table: {fault}")
    return {name: cell for name, cell in zip(head, row, strict=True) if cell}


def safe_name(name: object) -> str:
    """A relative file name inside the folder, with "/". Raises BrokenRecord for any other name."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise BrokenRecord(f"its 'file_name' is {reprlib.repr(name)}, not a file name")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise BrokenRecord(f"its 'file_name' {name[:80]!r} leads out of the folder")
    if not name.isprintable():  # may contain escape sequences for the terminal
        raise BrokenRecord(f"its 'file_name' {name[:80]!a} is not printable")
    return "/".join(parts)
