"""ArrayRecord data sets give the same samples as their source; damage is named, replaced or refused."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text
from hybridgen.data.prepare import write
from hybridgen.data.sources import folder, records

SHAPES = {"source": "shapes", "options": {"size": 40}, "resolution": 16, "text": {"kind": "words", "length": 16}}


def written(out, data, split="train", shards=3):
    return write.write(data, split, out, shards, threads=2, report=lambda line: None)


def reading(path, data):
    return {**data, "source": "records", "options": {"path": str(path)}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 12 pictures with two captions and a class each, number 5 broken."""
    path = tmp_path_factory.mktemp("pictures")
    draw, lines = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (9, 13, 3), np.uint8)).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"a {i}", f"第{i}"], "kind": "ab"[i % 2]}))
    (path / "5.png").write_bytes(b"no picture")
    (path / "metadata.jsonl").write_text("\n".join(lines))
    options = {"path": str(path), "label_key": "kind", "validation": 0}
    return {"source": "folder", "options": options, "resolution": 8, "flip": True, "text": {"kind": "words"}}


@pytest.mark.parametrize("which", ["shapes", "folder"])
def test_records_are_their_source(which, pictures, tmp_path):
    data = SHAPES if which == "shapes" else pictures
    index = written(tmp_path, data)
    again = reading(tmp_path, data)
    one, two = sources.build(data, "train"), sources.build(again, "train")
    assert len(one) == len(two) == index["count"] and len(list((tmp_path / "train").glob("*.arrayrecord"))) == 3
    assert text.digest(text.build(data, one)) == text.digest(text.build(again, two))
    assert index["broken"] == {"count": which == "folder", "names": ["5.png"] if which == "folder" else []}
    assert getattr(one, "class_names", []) == two.class_names
    if which == "shapes":
        assert one[7]["scene"] == two[7]["scene"]
    loaders = [pipeline.batches(source, text.build(data, one), batch=8, seed=3, flip=True) for source in (one, two)]
    for _ in range(6):  # several epochs: flips, captions and replaced records too
        a, b = (next(loader) for loader in loaders)
        a.pop("broken"), b.pop("broken")
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    for loader in loaders:
        loader.close()


def test_the_same_source_gives_the_same_digest(pictures, tmp_path):
    digests = [written(tmp_path / name, pictures, shards=shards)["digest"] for name, shards in (("a", 1), ("b", 4))]
    other = written(tmp_path / "c", {**pictures, "resolution": 9})["digest"]
    assert digests[0] == digests[1] != other


def test_a_broken_record_is_named_and_replaced(tmp_path):
    written(tmp_path, SHAPES)
    good = sources.build(reading(tmp_path, SHAPES), "train")
    file = tmp_path / "train" / "00001.arrayrecord"
    data = bytearray(file.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 4  # ArrayRecord keeps what does not compress as it is
    file.write_bytes(data)
    source = pickle.loads(pickle.dumps(sources.build(reading(tmp_path, SHAPES), "train")))  # as a worker gets it
    read = [pipeline.read(source, index) for index in range(40)]
    bad = [index for index, (_, broken) in enumerate(read) if broken >= 0]
    assert len(bad) == 1 and 13 <= bad[0] < 26 and read[bad[0]][1] == bad[0]
    for index, (item, _) in enumerate(read):
        true = good[index + (index == bad[0])]
        assert np.array_equal(item["image"], true["image"]) and item["text"] == true["text"]
    with pytest.raises(folder.BrokenRecord, match=rf"record {bad[0]} in 00001.arrayrecord: .*mismatch") as error:
        source[bad[0]]
    assert "\n" not in str(error.value)


def test_nothing_half_written_has_the_name(tmp_path, monkeypatch):
    real, calls = records.Writer.add, []

    def failing(self, item):
        calls.append(item)
        if len(calls) == 30:
            raise KeyboardInterrupt
        real(self, item)

    monkeypatch.setattr(records.Writer, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, SHAPES)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    written(tmp_path, SHAPES)
    with pytest.raises(UserError, match="already exists"):
        written(tmp_path, SHAPES)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda path: cut(path / "00001.arrayrecord"), "is damaged: it has .* bytes instead of"),
        (lambda path: (path / "00002.arrayrecord").unlink(), "'00002.arrayrecord'"),
        (lambda path: (path / "index.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "index.json").unlink(), r"no records of the split 'train'.*none"),
        (lambda path: edit(path, format=2), "has the format 2; supported is 1"),
        (lambda path: edit(path, count=41), "damaged.*41"),
        (lambda path: edit(path, shards=[{"file": "../x", "count": 40, "bytes": 1}]), "damaged"),
        (lambda path: edit(path, fields={"image": {"dtype": "png", "shape": [1, 16, 16]}}), "damaged"),
        (lambda path: edit(path, fields={"x": {"dtype": "O", "shape": [1]}}), "damaged"),
        (lambda path: edit(path, resolution=32), "data.resolution is 16, but the records in .* have 32"),
    ],
)
def test_what_is_refused(tmp_path, harm, says):
    written(tmp_path, SHAPES)
    harm(tmp_path / "train")
    with pytest.raises(UserError, match=says):
        sources.build(reading(tmp_path, SHAPES), "train")


def edit(path, **changes):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | changes))


def test_a_hostile_record_is_only_broken():
    """Any truncated or changed record gives an item or a `BrokenRecord`, nothing else."""
    item = {"text": "a", "image": np.zeros((1, 4, 4, 3), np.uint8), "tokens": np.arange(6, dtype=np.uint16)[None]}
    fields = records.fields_of(item)
    data = records.encode(item, fields)
    assert records.decode(data, fields, 0)["tokens"].tolist() == list(range(6))
    cases = [data[:n] for n in range(len(data))] + [data + b"x", b""]
    cases += [data[:n] + bytes([data[n] ^ 0x15]) + data[n + 1 :] for n in range(len(data))]
    broken = 0
    for case in cases:
        try:
            records.decode(case, fields, 0)
        except folder.BrokenRecord:
            broken += 1
    assert broken >= len(data) + 2


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "hybridgen.data.prepare.write", "--config", "configs/recipes/shapes.py:tiny"]
    done = subprocess.run([*command, f"--out={tmp_path}", "--stage=decodr"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'decoder'?" in done.stderr and not list(tmp_path.iterdir())
