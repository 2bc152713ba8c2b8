"""Outages of the storage change no sample: a file that cannot be read now is read again, or the command ends."""

import errno
import os
import resource
import threading
import time

import numpy as np
import pytest
from PIL import Image
from test_folder import folder_of, read
from test_records import SHAPES, reading, written

from hybridgen import cli
from hybridgen.core.errors import StorageError, UserError
from hybridgen.data import pipeline, sources, storage, transforms
from hybridgen.data.sources import layouts

PASSING = [
    *(OSError(number, "") for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN)),
    *(MemoryError(), TimeoutError(), ConnectionResetError(), OSError("out of memory when reading image file")),
]
FINAL = [
    *(OSError(number, "") for number in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)),
    *(OSError("image file is truncated"), Image.UnidentifiedImageError(), SyntaxError("broken PNG"), ValueError()),
]


@pytest.mark.parametrize("error", PASSING + FINAL, ids=repr)
def test_what_passes(error):
    assert storage.passing(error) == any(error is one for one in PASSING)


def few_files():
    """Allows no new open file; a function that allows them again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)


def later(work, seconds=0.15):
    thread = threading.Timer(seconds, work)
    thread.start()
    return thread


def moved(path):
    path.rename(path.with_name("away"))
    return lambda: path.with_name("away").rename(path)


def unmounted(path):
    """What is left of a folder when its file system is unmounted: an empty folder."""
    back = moved(path)
    path.mkdir()
    return lambda: (path.rmdir(), back())


OUTAGES = {
    "too many files": lambda path: few_files(),
    "moved": lambda path: moved(path / "in"),
    "a folder in it moved": lambda path: moved(path / "in" / "train"),
    "unmounted": lambda path: unmounted(path / "in"),
    "a folder in it unmounted": lambda path: unmounted(path / "in" / "train"),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_changes_no_sample(outage, tmp_path):
    folder_of(tmp_path / "in" / "train")
    source = read(tmp_path / "in")
    want = source[3]["image"]
    thread = later(OUTAGES[outage](tmp_path))
    try:
        item, broken = pipeline.read(source, 3)
    finally:
        thread.join()
    assert broken == -1 and np.array_equal(item["image"], want)


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_that_lasts_is_no_user_error(outage, tmp_path):
    folder_of(tmp_path / "in" / "train")
    loader = pipeline.batches(read(tmp_path / "in"), None, batch=2, seed=0, retry=0.2, threads=0)
    end = OUTAGES[outage](tmp_path)
    try:
        with pytest.raises(StorageError, match=r"cannot be read: OSError: .*tried again for 0\.2 s \(data\.retry\)"):
            next(loader)
    finally:
        end()


def test_the_exit_code_is_one_that_launchers_restart(capsys):
    def main():
        raise StorageError("the data cannot be read")

    with pytest.raises(SystemExit) as ended:
        cli.command(main)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: the data cannot be read\n"


def test_worker_processes_pass_the_error_on(tmp_path):
    source = read(folder_of(tmp_path / "in"))
    moved(tmp_path / "in")
    loader = pipeline.batches(source, None, batch=2, seed=0, retry=0.1, workers=1)
    with pytest.raises(StorageError, match=r"tried again for 0\.1 s"):
        next(loader)
    loader.close()


def missing(path):
    (path / "3.png").unlink()


def a_folder(path):
    (path / "3.png").unlink()
    (path / "3.png").mkdir()


def a_loop(path):
    (path / "3.png").unlink()
    (path / "3.png").symlink_to("3.png")


def a_file_for_a_folder(path):
    (path / "metadata.jsonl").write_text('{"file_name": "0.png/3.png", "text": ""}\n' * 8, encoding="utf-8")


@pytest.mark.parametrize("harm", [missing, a_folder, a_loop, a_file_for_a_folder])
def test_what_lasts_is_a_broken_record_at_once(harm, tmp_path):
    harm(folder_of(tmp_path))
    source, began = read(tmp_path), time.monotonic()
    for act in (source.__getitem__, source.size):
        with pytest.raises(sources.BrokenRecord):
            act(3)
    assert time.monotonic() - began < 2


def failing(times, error, work):
    """`work`, which fails the first times."""
    left = [error] * times

    def once(*args, **options):
        if left:
            raise left.pop()
        return work(*args, **options)

    return once


def test_memory_that_a_decoder_lacks_breaks_no_record(tmp_path, monkeypatch):
    source = read(folder_of(tmp_path))
    monkeypatch.setattr(transforms, "cover", failing(2, MemoryError(), transforms.cover))
    assert pipeline.read(source, 3)[1] == -1


def test_a_file_that_is_read_in_part_is_read_again(tmp_path, monkeypatch):
    source, stat = read(folder_of(tmp_path)), os.stat

    def longer(*args, **options):
        found = stat(*args, **options)
        return os.stat_result([*found[:6], found.st_size + 1, *found[7:]])

    monkeypatch.setattr(os, "stat", longer)
    with pytest.raises(OSError, match=r"only \d+ of \d+ bytes were read"):
        source[3]


@pytest.mark.parametrize("name", ["scandir", "listdir", "stat"])
def test_a_failing_list_leaves_no_picture_out(name, tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}", encoding="utf-8")
    data = {"source": "folder", "options": {"path": str(tmp_path), "validation": 0}, "resolution": 8}
    want = sources.build(data, "train").digest()
    monkeypatch.setattr(os, name, failing(1, OSError(errno.EIO, "Input/output error"), getattr(os, name)))
    assert sources.build(data, "train").digest() == want
    monkeypatch.setattr(layouts, "_parts", failing(99, OSError(errno.EIO, "Input/output error"), None))
    with pytest.raises(StorageError, match="Input/output error"):
        sources.build(data | {"retry": 0.1}, "train")


def test_records_survive_an_outage(tmp_path):
    written(tmp_path, SHAPES, shards=1)
    source = sources.build(reading(tmp_path, SHAPES), "train")  # opens its file when it is first read
    want = sources.build(reading(tmp_path, SHAPES), "train")[7]["image"]

    def same():
        item, broken = pipeline.read(source, 7)
        return broken == -1 and np.array_equal(item["image"], want)

    thread = later(few_files())
    try:
        assert same()
    finally:
        thread.join()
    for handle in os.listdir("/proc/self/fd"):  # the outage has made the handle stale
        if os.path.realpath(f"/proc/self/fd/{handle}").endswith(".arrayrecord"):
            os.close(int(handle))
    assert same()


class Remote:
    """A source outside of the package, whose storage fails twice."""

    def __init__(self, split, resolution, error):
        self.get = failing(2, error, lambda: {"image": np.zeros((resolution, resolution, 3), np.uint8), "text": ""})

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.get()

    def name(self, index):
        return str(index)


def test_a_source_of_ones_own():
    def source(error):
        return sources.own.make(Remote, "Remote", "train", 8, {"error": error}, "data.source")

    assert pipeline.read(source(TimeoutError("the server does not answer")), 0)[1] == -1
    with pytest.raises(UserError, match="FileNotFoundError"):
        pipeline.read(source(FileNotFoundError(errno.ENOENT, "gone")), 0)
    with pytest.raises(StorageError):
        pipeline.read(source(TimeoutError()), 0, retry=0)
