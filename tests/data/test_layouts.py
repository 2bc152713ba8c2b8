"""The layouts of a folder: how captions, classes and splits are found, and what is said about them."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_folder import metadata, picture, read

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import sources, text
from hybridgen.data.prepare import bpe, write
from hybridgen.runs import experiment
from hybridgen.training import batches, resume


def pictures(root, *names):
    for name in names:
        picture(root / name, format="PNG")


def table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def captions(source):
    return {source.name(index): source[index]["text"] for index in range(len(source))}


def test_a_table(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table(
        tmp_path / "metadata.csv",
        [
            ("file_name", "text", "kind"),
            ("a.png", 'a "red", cat', 3),
            ("b.png", "two\nlines", 0),
            ("c.png", "", 1),
            ("d",),
        ],
    )
    source = read(tmp_path, label_key="kind")
    assert source[0]["text"] == 'a "red", cat' and source[1]["text"] == "two\nlines"
    assert [source[index]["label"] for index in (0, 1)] == [3, 0]
    count, lines = source.problems()
    assert count == 2 and lines[0].startswith("c.png: its 'text' is None, not a text")
    assert lines[1] == "metadata.csv line 6: not a row of the table: 1 cells, but the head has 3"
    assert source.summary().startswith(
        "2 of 3 pictures (1 without a usable line in metadata.csv), layout metadata.csv: 2"
    )


def test_text_files(tmp_path):
    pictures(tmp_path, "a.png", "b/c.png", "b/d.png", "e.png")
    (tmp_path / "a.txt").write_text(" a cat \n", encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b" / "d.txt").symlink_to("/dev/zero")
    source = read(tmp_path)
    assert source[0]["text"] == "a cat" and source.name(0) == "a.png" and len(source) == 3
    assert source.problems()[1][0].startswith("b/c.png: its text file is not UTF-8")
    assert source.problems()[1][1] == "b/d.png: its text file is a link to a file outside the folder"
    assert source.summary().startswith("1 of 4 pictures (3 without a .txt file), layout txt: 1 for training")


def test_a_folder_for_each_class(tmp_path):
    pictures(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    source = read(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [source[index]["label"] for index in range(3)] == [0, 0, 1] and set(captions(source).values()) == {""}
    assert source.summary() == "3 of 3 pictures, layout classes: 3 for training, 0 for validation, 2 classes"
    plain = read(tmp_path, layout="pictures")
    assert plain.class_names == [] and len(plain) == 3


@pytest.mark.parametrize("validation", ["validation", "val", None])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "classes"])
def test_folders_of_splits(tmp_path, validation, kind):
    for number, split in enumerate(filter(None, ("train", validation, "test"))):
        names = [f"{name}/{number}.png" for name in ("x", "y")]
        pictures(tmp_path / split, *names)
        if kind == "metadata.jsonl":
            metadata(tmp_path / split, [{"file_name": name, "text": f"{split} {name}"} for name in names])
    parts = {split: read(tmp_path, split=split, validation=0.1) for split in ("train", "validation")}
    names = {split: [source.name(index) for index in range(len(source))] for split, source in parts.items()}
    if validation:
        assert names == {
            "train": ["train/x/0.png", "train/y/0.png"],
            "validation": [f"{validation}/{n}/1.png" for n in "xy"],
        }
        assert f"layout {kind} in train and {validation}: 2 for training, 2 for validation" in parts["train"].summary()
    else:
        assert sorted(sum(names.values(), [])) == ["train/x/0.png", "train/y/0.png"] and len(names["validation"]) == 1
    if kind == "classes":
        assert parts["train"].class_names == ["x", "y"]
    else:
        assert captions(parts["train"])[names["train"][0]] == names["train"][0].replace("/", " ", 1)


def test_other_images_are_counted_and_two_tables_refused(tmp_path):
    pictures(tmp_path, "a.png")
    for name in ("b.HEIC", "c.heic", "d.avif", ".e.bmp"):
        (tmp_path / name).write_bytes(b"x")
    assert read(tmp_path).summary().endswith("; 1 .avif, 2 .heic not read (only PNG, JPEG and WebP are)")
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="0 records in total.*1 .avif, 2 .heic not read"):
        read(tmp_path)
    pictures(tmp_path, "a.png")
    metadata(tmp_path, [{"file_name": "a.png", "text": "json"}])
    table(tmp_path / "metadata.csv", [("file_name", "text"), ("a.png", "csv")])
    with pytest.raises(UserError, match="has metadata.jsonl and metadata.csv: name one with data.options.layout"):
        read(tmp_path)
    assert read(tmp_path, layout="metadata.csv")[0]["text"] == "csv"
    with pytest.raises(UserError, match="unknown layout of a folder 'csv'.*metadata.csv"):
        read(tmp_path, layout="csv")


@pytest.mark.parametrize("name", ["b\\a.png", ".\\b\\a.png", "b/a.png", "./b//a.png", "b\\/a.png"])
def test_backslashes_in_file_names(name, tmp_path):
    pictures(tmp_path, "b/a.png")
    metadata(tmp_path, [{"file_name": name, "text": "x"}])
    assert list(captions(read(tmp_path)).values()) == ["x"]
    assert read(tmp_path).summary().startswith("1 of 1 pictures, layout metadata.jsonl")


# ---- labels


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ((207, 360, 387), (207, 360, 387), list(range(388))),
        (("10", "9", "2"), (10, 9, 2), list(range(11))),
        (("dog", "cat", "dog"), (1, 0, 1), ["cat", "dog"]),
        (("n01", 3, "a"), (2, 0, 1), ["3", "a", "n01"]),
        (("20230101", "7", "7"), (0, 1, 1), ["20230101", "7"]),
    ],
)
def test_whole_numbers_mean_themselves(tmp_path, labels, numbers, names):
    pictures(tmp_path, *(f"{i}.png" for i in range(3)))
    metadata(tmp_path, [{"file_name": f"{i}.png", "text": "", "kind": kind} for i, kind in enumerate(labels)])
    source = read(tmp_path, label_key="kind")
    assert tuple(source[index]["label"] for index in range(3)) == numbers and source.class_names == names


@pytest.mark.parametrize("label", [-1, 65_536, 10**30])
def test_numbers_out_of_range_are_broken(tmp_path, label):
    pictures(tmp_path, "0.png", "1.png")
    records = [{"file_name": f"{i}.png", "text": "", "kind": kind} for i, kind in enumerate((label, 4))]
    metadata(tmp_path, records)
    source = read(tmp_path, label_key="kind")
    assert "a class number is from 0 to 65535" in source.problems()[1][0] and len(source.class_names) == 5


# ---- what is said


class Log:
    """The notes of a run."""

    def __init__(self, before=()):
        self.texts = list(before)

    def notes(self, name):
        return list(self.texts)

    def note(self, step, name, line):
        self.texts.append(line)


def lacking(root):
    pictures(root, *(f"{i}.png" for i in range(4)))
    metadata(root, [{"file_name": f"{i}.png", "text": None if i == 2 else f"number {i}"} for i in range(4)])
    return read(root)


def test_a_broken_record_is_logged_once_with_its_reason(tmp_path):
    source, log = lacking(tmp_path), Log()
    line = "2.png: its 'text' is None, not a text, a list of texts or a mapping by language (1 so far)"
    for _ in range(2):  # the second time as after a restart
        given = [{"broken": np.asarray(rows)} for rows in ([2, 2, -1], [2, -1])]
        with batches.training(lambda *_, given=given: iter(given), dict, source, log)(0) as stream:
            assert len(list(stream)) == 2
        assert log.texts == [line]


def test_writing_names_the_reasons(tmp_path):
    lacking(tmp_path / "in")
    data = {"source": "folder", "options": {"path": str(tmp_path / "in"), "validation": 0}, "resolution": 8}
    lines = []
    index = write.write(data, "train", tmp_path / "out", 1, 1, lines.append)
    assert index["broken"] == {"count": 1, "names": ["2.png"]}
    assert lines[1].startswith("train: replaced 1 broken records: 2.png: its 'text' is None, not a text")


# ---- data that nothing could ask for


def config_of(root, family="ar.raster", **model):
    config = {"family": family, "model": {"text_vocab": "auto", "classes": "auto"} | model}
    data = {"source": "folder", "options": {"path": str(root)}, "resolution": 8, "text": {"kind": "bytes", "length": 8}}
    return config_lib.from_plain(config | {"data": data})


def test_a_prior_without_captions_and_classes_is_refused(tmp_path):
    pictures(tmp_path / "plain", "a.png", "b.png")
    source = read(tmp_path / "plain")
    with pytest.raises(UserError, match="no captions and no classes.*metadata.jsonl.*metadata.csv.*label_key"):
        resume.conditioned(config_of(tmp_path / "plain"), source)
    resume.conditioned(config_of(tmp_path / "plain", "tokenizers.vq"), source)
    resume.conditioned(config_of(tmp_path / "plain", classes=0, text_vocab=0), source)
    pictures(tmp_path / "classes", "x/a.png", "y/b.png")
    resume.conditioned(config_of(tmp_path / "classes"), read(tmp_path / "classes"))
    assert not text.captioned(source) and text.captioned(lacking(tmp_path / "captions"))


TOKENIZER = "parts.tokenizer=examples/shapes/parts/tokenizer"
READS_TEXT = ("model.text_vocab=300", "model.text_length=8")


@pytest.mark.parametrize("caption", ["", " ", "\n\t"])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_model_that_reads_captions_which_are_all_empty_is_refused(kind, caption, tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    metadata(tmp_path, [{"file_name": f"{name}.png", "text": caption, "kind": name} for name in "ab"])
    settings = (TOKENIZER, "data.source=folder", f"data.options.path={tmp_path}", f"data.text.kind={kind}")
    settings += ("data.options.validation=0", "data.options.label_key=kind")
    config = config_lib.load("configs/ar/raster.py:tiny", [*settings, *READS_TEXT])
    with pytest.raises(UserError, match="model.text_vocab is 300, but the data has no captions"):
        experiment.build(config, tmp_path, sources.build(config.data, "train"))
    config = config_lib.load("configs/ar/raster.py:tiny", settings)  # "auto": it takes the classes alone
    options = experiment.build(config, tmp_path, sources.build(config.data, "train")).options
    assert (options["text_vocab"], options["classes"]) == (0, 2)


def test_no_encoding_is_trained_on_captions_that_are_all_empty(tmp_path):
    pictures(tmp_path / "in", "a.png", "b.png")
    words = ["--config", "configs/recipes/imagefolder.py:tiny", f"--config.path={tmp_path / 'in'}"]
    with pytest.raises(UserError, match="all captions of data.source 'folder' are empty"):
        bpe.main([*words, f"--out={tmp_path / 'bpe.json'}"])
    assert not (tmp_path / "bpe.json").exists()


def test_classes_are_kept_in_the_run(tmp_path):
    pictures(tmp_path, "x/a.png", "y/b.png")
    config, source = config_of(tmp_path), read(tmp_path)
    with config.unlocked():
        config.batch, config.seed = 2, 0
    resolved, _ = resume.described(config, SimpleNamespace(options={}, text=None, digests={}), source)
    assert resolved["data"]["class_names"] == ["x", "y"] and json.dumps(resolved)
    assert sources.build(resolved["data"] | {"options": {"path": str(tmp_path), "validation": 0}}, "train")
