"""Records in ArrayRecord shards with random access: images, captions, and cached batch entries.

    FOLDER/SPLIT/index.json           fields of the records, number of records per shard, digest
    FOLDER/SPLIT/00000.arrayrecord    ...

A record is four bytes n (little-endian), n bytes of JSON (`text`, `texts`, `label`, ...; `png`: the sizes of its
images in bytes), and its arrays in the order of `fields` in the index, images as PNG. Every array has a leading axis of
views (crops, flips, captions). The folder of a split is written atomically, by a rename.

Letters: k views, H W image.
"""

import bisect
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import storage
from hybridgen.data.files import whole_folder
from hybridgen.data.sources.headers import header_size
from hybridgen.data.sources.protocol import BrokenRecord, known

FORMAT, INDEX = 1, "index.json"
MAX_INDEX = 2**26  # bytes
MAX_RECORD = 2**28
PLAIN = ("name", "text", "texts", "label", "scene")  # entries of an item that are not arrays
# group_size 1: each record is read by itself, and damage affects only one; zstd compresses tokens (PNGs hardly)
WRITE, READ = "group_size:1,zstd:1", "readahead_buffer_size:0,max_parallelism:0"
FAILED = re.compile(
    r"\b(open|p?read|l?seek|f?stat)\(\) failed"
)  # in ArrayRecord's messages: the storage, not the content
TAIL = 2**20  # bytes at the end of a shard, where the places of its records are


# ---- one record


def fields_of(item: Mapping) -> dict[str, dict]:
    """The arrays of an item, {name: {"dtype", "shape"}}; shapes include the leading axis of views."""
    return {
        name: {"dtype": "png" if name == "image" else value.dtype.name, "shape": list(value.shape)}
        for name, value in item.items()
        if isinstance(value, np.ndarray)
    }


def encode(item: Mapping, fields: Mapping) -> bytes:
    """The bytes of a record from an item with arrays `[k, ...]`. Raises UserError if these do not match `fields`."""
    head = {name: item[name] for name in PLAIN if name in item}
    found, parts = fields_of(item), []
    if found != dict(fields):
        raise UserError(f"a record has the arrays {found}, but earlier records have {dict(fields)}")
    for name, about in fields.items():
        if about["dtype"] == "png":
            pictures = [_png(picture) for picture in item[name]]
            head["png"] = [len(data) for data in pictures]
            parts += pictures
        else:
            array = np.ascontiguousarray(item[name])
            parts.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
    text = json.dumps(head, ensure_ascii=True, separators=(",", ":")).encode()
    return b"".join((struct.pack("<I", len(text)), text, *parts))


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=3)
    return out.getvalue()


def decode(data: bytes, fields: Mapping, view: int) -> dict:
    """The item of a record, with one view of each array (`view` modulo their number). Raises BrokenRecord.

    Integers become int32 and floats float32. With features of captions, the caption is that of the view.
    """
    if not 4 <= len(data) <= MAX_RECORD:
        raise BrokenRecord(f"{len(data)} bytes are not a record")
    (size,) = struct.unpack_from("<I", data)
    try:
        head = json.loads(data[4 : 4 + size].decode())
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"not valid JSON: {str(error)[:80]}") from None
    item, at = _plain(head), 4 + size
    for name, about in fields.items():
        shape = tuple(about["shape"])
        if about["dtype"] == "png":
            item[name], at = _picture(data, at, head.get("png"), shape, view), at + sum(head["png"])
            continue
        kind = np.dtype(about["dtype"]).newbyteorder("<")
        count = math.prod(shape[1:])
        start, at = at + view % shape[0] * count * kind.itemsize, at + shape[0] * count * kind.itemsize
        if at > len(data):
            raise BrokenRecord(f"it has {len(data)} bytes, but {name!r} needs {at}")
        array = np.frombuffer(data, kind, count, start).reshape(shape[1:])
        item[name] = array.astype({"b": np.bool_, "f": np.float32}.get(kind.kind, np.int32))
        if name == "text_features" and "texts" in item:
            text = item["texts"][view % shape[0] % len(item["texts"])]
            item |= {"text": text, "texts": (text,)}
    if at != len(data):
        raise BrokenRecord(f"it has {len(data)} bytes, but its arrays end at {at}")
    return item


def _plain(head) -> dict:
    """The checked entries of a record's JSON."""
    if not isinstance(head, dict) or not isinstance(head.get("text"), str):
        raise BrokenRecord("it has no 'text'")
    item = {name: head[name] for name in PLAIN if name in head}
    texts = head.get("texts", [head["text"]])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BrokenRecord("its 'texts' are not a list of texts")
    if type(head.get("label", 0)) is not int:
        raise BrokenRecord("its 'label' is not an integer")
    return item | ({"texts": tuple(texts)} if "texts" in head else {})


def _picture(data: bytes, at: int, sizes, shape: tuple, view: int) -> np.ndarray:
    """-> H W 3 uint8."""
    if not (isinstance(sizes, list) and len(sizes) == shape[0] and all(type(n) is int and n > 0 for n in sizes)):
        raise BrokenRecord("the sizes of its images ('png') are wrong")
    which = view % shape[0]
    png = data[at + sum(sizes[:which]) : at + sum(sizes[: which + 1])]
    if header_size(png) != (shape[2], shape[1]):
        raise BrokenRecord(f"its image has the size {header_size(png)}, not {(shape[2], shape[1])}")
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise exceptions of many types for broken data
        raise BrokenRecord(f"{type(error).__name__}: {error}") from None


# ---- writing


class Writer:
    """Writes `count` records into `shards` files of a folder, in order; `finish` writes and returns the index."""

    def __init__(self, folder: Path, count: int, shards: int):
        if not 1 <= shards <= max(count, 1):
            raise UserError(f"--shards {shards} must be from 1 to the number of records, {count}")
        self.folder, self.count = folder, count
        self.ends = [count * (i + 1) // shards for i in range(shards)]
        self.files: list[dict] = []
        self.fields: dict | None = None
        self._written, self._digest, self._open = 0, hashlib.sha256(), None

    def add(self, item: Mapping) -> None:
        """Appends an item with arrays `[k, ...]`; all items must have the same arrays."""
        if self.fields is None:
            self.fields = fields_of(item)
        data = encode(item, self.fields)
        if self._open is None:
            self._open = ArrayRecordWriter(str(self.folder / f"{len(self.files):05d}.arrayrecord"), WRITE)
        self._open.write(data)
        self._digest.update(struct.pack("<Q", len(data)))
        self._digest.update(data)
        self._written += 1
        if self._written == self.ends[len(self.files)]:
            self._close()

    def _close(self) -> None:
        path = self.folder / f"{len(self.files):05d}.arrayrecord"
        self._open.close()
        self._open = None
        with path.open("rb") as file:
            os.fsync(file.fileno())
        first = self.ends[len(self.files) - 1] if self.files else 0
        self.files.append({"file": path.name, "count": self._written - first, "bytes": path.stat().st_size})

    def finish(self, about: Mapping) -> dict:
        """Writes the index with the entries `about`, and returns it. Raises UserError if records are missing."""
        if self._written != self.count:
            raise UserError(f"only {self._written} of {self.count} records were written")
        described = json.dumps(dict(about), sort_keys=True).encode()
        self._digest.update(described)
        index = {
            "format": FORMAT,
            "count": self.count,
            "digest": self._digest.hexdigest()[:16],
            "fields": self.fields,
            "shards": self.files,
        } | about
        with (self.folder / INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        return index


@contextlib.contextmanager
def writing(folder: str | os.PathLike, split: str, count: int, shards: int) -> Iterator[Writer]:
    """Yields a `Writer` for one split; its folder is renamed to its final name when all is written."""
    with whole_folder(Path(folder) / split) as temporary:
        yield Writer(temporary, count, shards)


# ---- reading


def read_index(path: str | os.PathLike, split: str) -> dict:
    """The index of a split. Raises UserError if it is missing, damaged or of another format."""
    file = Path(path) / split / INDEX
    try:
        with file.open("rb") as handle:
            index = json.loads(handle.read(MAX_INDEX))
    except OSError as error:
        if storage.passing(error):
            raise
        here = Path(path)
        splits = sorted(p.parent.name for p in here.glob(f"*/{INDEX}") if not p.parent.name.startswith("."))
        raise UserError(
            f"no records of the split {split!r} in {path} ({error.strerror}; it has {', '.join(splits) or 'none'})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise UserError(f"{file} has the format {found!r}; supported is {FORMAT}")
    try:
        _check(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    return index


def _check(index: Mapping) -> None:
    for shard in index["shards"]:
        if not (
            isinstance(shard["file"], str)
            and shard["file"] == os.path.basename(shard["file"])
            and type(shard["count"]) is int
            and shard["count"] > 0
            and type(shard["bytes"]) is int
        ):
            raise ValueError(f"shard {shard}")
    if index["count"] != sum(shard["count"] for shard in index["shards"]) or not index["count"]:
        raise ValueError(f"count {index['count']}")
    for name, about in index["fields"].items():
        shape = about["shape"]
        sizes = isinstance(shape, list) and shape and all(type(n) is int and 0 < n < 2**20 for n in shape)
        kind = about["dtype"] == "png" or np.dtype(about["dtype"]).kind in "iufb"
        if not sizes or not kind or math.prod(shape) > MAX_RECORD or not name.isidentifier():
            raise ValueError(f"field {name!r} {about}")
        if (about["dtype"] == "png") != (name == "image") or (name == "image" and (len(shape), shape[-1]) != (4, 3)):
            raise ValueError(f"field {name!r} {about}")
    for name, kind in (
        ("digest", str),
        ("resolution", int),
        ("class_names", list),
        ("words", list),
        ("encoders", dict),
        ("source", dict),
    ):
        if not isinstance(index[name], kind):
            raise ValueError(f"{name} is a {type(index[name]).__name__}")


class Records:
    """Records of one split, written by data.prepare.write or `hybridgen cache`.

    path: the folder with one folder per split. Items are those of the original source with the cached entries. Of
    several views, `source[i]` has the first, and `view(i, own)` the one that the random number `own` picks: its lowest
    bit selects mirroring, others the crop and the caption. If latents have a standard deviation, `view` samples them.
    Raises UserError for missing or damaged shards, and for another resolution.
    """

    def __init__(self, path: str | os.PathLike, *, split: str = "train", resolution: int):
        self.path = os.path.join(os.path.realpath(path), split)
        index = read_index(path, split)
        if index["resolution"] != resolution:
            raise UserError(f"data.resolution is {resolution}, but the records in {path} have {index['resolution']}")
        self.class_names, self.words, self.encoders = index["class_names"], index["words"], index["encoders"]
        self._fields, self._digest = index["fields"], index["digest"]
        self._files = [os.path.join(self.path, shard["file"]) for shard in index["shards"]]
        self._counts = [shard["count"] for shard in index["shards"]]
        self._starts = [0, *itertools.accumulate(self._counts)]
        for file, shard in zip(self._files, index["shards"], strict=True):
            known("shard", [shard["file"]], [name for name in os.listdir(self.path) if name != INDEX] or ["none"])
            if os.path.getsize(file) != shard["bytes"]:
                raise UserError(f"{file} is damaged: it has {os.path.getsize(file)} bytes instead of {shard['bytes']}")
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:  # worker processes open files of their own
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        """The name of a record: its number and its shard."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return f"record {index} in {os.path.basename(self._files[shard])}"

    def digest(self) -> str:
        """Digest of all records in order, computed when they were written."""
        return self._digest

    def _bytes(self, index: int) -> bytes:
        shard = bisect.bisect_right(self._starts, index) - 1
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = self._opened(shard)
            reader = self._readers[shard]
        try:
            return reader.read([index - self._starts[shard]])[0]
        except RuntimeError as error:
            if not FAILED.search(str(error)):
                raise
            with self._lock:
                self._readers.pop(shard, None)  # an outage may have made its file handle stale
            raise OSError(errno.EIO, " ".join(str(error).split())[:200]) from None

    def _opened(self, shard: int) -> ArrayRecordReader:
        file, count = self._files[shard], self._counts[shard]
        with open(file, "rb"):  # ArrayRecord takes a file that cannot be opened for one without records
            pass
        reader = ArrayRecordReader(file, READ)
        if reader.num_records() == count:
            return reader
        with open(file, "rb") as content:
            content.seek(-min(os.path.getsize(file), TAIL), os.SEEK_END)
            content.read()  # raises what the storage has to say
        reader = ArrayRecordReader(file, READ)
        if reader.num_records() != count:
            raise RuntimeError(f"its shard has {reader.num_records()} records instead of {count}")
        return reader

    def _item(self, index: int, view: int) -> dict:
        try:
            return decode(self._bytes(index), self._fields, view)
        except BrokenRecord as error:
            reason = str(error)
        except Exception as error:  # of ArrayRecord, for a wrong checksum
            if storage.passing(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        raise BrokenRecord(f"{self.name(index)}: {' '.join(reason.split())[:200]}")

    def __getitem__(self, index: int) -> dict:
        item = self._item(index, 0)
        item.pop("latent_std", None)
        return item

    def view(self, index: int, own: int) -> dict:
        """A record in the view that the random number `own` picks."""
        item = self._item(index, 2 * (own >> 33) + (own & 1))
        if "latent_std" in item:
            noise = np.random.Generator(np.random.Philox(key=own)).standard_normal(item["latent"].shape, np.float32)
            item["latent"] = item["latent"] + item.pop("latent_std") * noise
        return item
