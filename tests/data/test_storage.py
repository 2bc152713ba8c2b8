"""Storage that fails for a while changes no data; an error of one file makes a broken record."""

import errno
import os
import threading

import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import StorageError
from hybridgen.data import sources, storage
from hybridgen.data.sources.folder import Folder
from hybridgen.data.sources.protocol import BrokenRecord
from hybridgen.data.sources.reading import read


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(place / f"{number}.png")
    return place


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.001, 0.002))


def open_(place, **options):
    return Folder(place, resolution=8, text_key=None, validation=0.0, **options)


def failing(error, times):
    """A replacement of Folder._bytes that raises `error` the first `times` times."""
    left, whole = [times], Folder._bytes

    def read_bytes(self, name):
        if left[0]:
            left[0] -= 1
            raise error
        return whole(self, name)

    return read_bytes


TEMPORARY = [OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)]
TEMPORARY += [MemoryError(), RuntimeError(f"reader: {os.strerror(errno.EIO)}")]


@pytest.mark.parametrize("error", TEMPORARY, ids=str)
def test_an_error_that_passes_changes_nothing(error, folder, monkeypatch):
    source = open_(folder)
    true = source[1]["image"]
    monkeypatch.setattr(Folder, "_bytes", failing(error, 5))
    item, broken = read(source, 1)
    assert broken == -1 and np.array_equal(item["image"], true)
    monkeypatch.setattr(Folder, "_bytes", failing(error, 5))
    assert source.size(1) == (8, 8)


@pytest.mark.parametrize("error", TEMPORARY, ids=str)
def test_an_error_that_stays_ends_the_run_with_a_code_that_restarts(error, folder, monkeypatch):
    source = open_(folder, patience=0.01)
    monkeypatch.setattr(Folder, "_bytes", failing(error, 10**6))
    with pytest.raises(StorageError, match="images cannot be read for 0 s"):
        read(source, 1)
    with pytest.raises(StorageError):
        source.size(1)


def test_a_folder_that_is_moved_away_for_a_moment(folder, tmp_path):
    source, away = open_(folder), tmp_path / "away"
    true = source[2]["image"]
    folder.rename(away)
    back = threading.Timer(0.1, lambda: away.rename(folder))
    back.start()
    item, broken = read(source, 2)
    back.join()
    assert broken == -1 and np.array_equal(item["image"], true)


@pytest.mark.parametrize("case", ["gone", "not a file", "cut", "no image", "too large", "not readable"])
def test_an_error_of_one_file_is_a_broken_record_at_once(case, folder, monkeypatch):
    source = open_(folder, patience=1e6, max_bytes=10_000)
    file = folder / "1.png"
    if case == "gone":
        file.unlink()
    elif case == "not a file":
        file.unlink()
        os.mkfifo(file)
    elif case == "not readable":
        monkeypatch.setattr(Folder, "_bytes", failing(PermissionError(errno.EACCES, "Permission denied"), 1))
    else:
        file.write_bytes({"cut": file.read_bytes()[:50], "no image": b"text", "too large": bytes(10_001)}[case])
    with pytest.raises(BrokenRecord, match="1.png: "):
        source[1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_sizes_are_those_after_the_rotation_of_exif(suffix, tmp_path):
    """A phone stores a portrait as a landscape and an orientation; buckets must see the portrait."""
    for orientation in range(9):
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.{suffix}"
        Image.new("RGB", (40, 24), (200, 10, 10)).save(file, exif=exif)
        source = Folder(tmp_path, resolution=8, text_key=None, validation=0.0)
        size = source.size(len(source) - 1)
        assert size == ((24, 40) if orientation >= 5 else (40, 24)), (suffix, orientation)
        assert sources.header_size(file.read_bytes()) == (40, 24)
