"""A broken record in a folder is replaced by a fixed rule, and no other sample changes."""

import gc
import sys

import numpy as np
import pytest
from test_folder import EMOJI, folder_of, read

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text, transforms
from hybridgen.runs.fingerprint import check_fingerprint

# ---- a broken record among good ones


def drain(path, count=6, **options):
    source = read(path, **options)
    loader = pipeline.batches(source, text.Bytes(16), batch=5, seed=3)
    out = [next(loader) for _ in range(count)]
    loader.close()
    return source, out


def test_a_broken_record_changes_only_its_own_samples(tmp_path):
    _, before = drain(folder_of(tmp_path, 12))
    (tmp_path / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source, after = drain(tmp_path)
    broken = 0
    for old, new in zip(before, after, strict=True):
        for row in range(5):
            if new["broken"][row] < 0:
                assert all(np.array_equal(old[key][row], new[key][row]) for key in old)
                continue
            broken += 1
            assert source.name(new["broken"][row]) == "5.png" and old["id"][row] == new["id"][row]
            np.testing.assert_array_equal(new["image"][row], transforms.to_float(source[6]["image"]))
    assert 2 <= broken <= 3  # thirty samples of twelve records
    assert sum(len(pipeline.take_broken(batch)) for batch in after) == broken and "broken" not in after[0]


def test_a_broken_line_of_metadata_renumbers_nothing(tmp_path):
    _, before = drain(folder_of(tmp_path, 12))
    lines = (tmp_path / "metadata.jsonl").read_bytes().split(b"\n")
    lines[5] = b"{" + lines[5]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    source, after = drain(tmp_path)
    hit = [index for batch in after for index in batch["broken"].tolist() if index >= 0]
    assert {source.name(index) for index in hit} == {"metadata.jsonl line 6"}
    same = [
        np.array_equal(old["image"][row], new["image"][row])
        for old, new in zip(before, after, strict=True)
        for row in range(5)
    ]
    assert same.count(False) == len(hit)


def test_the_last_record_is_replaced_by_the_first(tmp_path):
    folder_of(tmp_path, 4)
    (tmp_path / "3.png").unlink()
    item, broken = pipeline.read(read(tmp_path), 3)
    assert item["text"] == "number 0" and broken == 3
    assert [item["broken"] for item in pipeline.examples(read(tmp_path), [0, 3])] == [-1, 3]


def test_a_folder_of_broken_pictures_is_an_error_not_a_loop(tmp_path):
    folder_of(tmp_path, 4)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    loader = pipeline.batches(read(tmp_path), text.Bytes(4), batch=2, seed=0)
    with pytest.raises(UserError, match="4 records in a row.*png: "):
        next(loader)


def test_memory_stays_flat_over_broken_records(tmp_path):
    folder_of(tmp_path, 6)
    (tmp_path / "2.png").write_bytes(b"\x89PNG")
    source, blocks = read(tmp_path), []
    gc.disable()  # nothing may wait for the collector either: an exception that holds its own frame would
    try:
        for _ in range(4):
            for _ in range(400):
                assert pipeline.read(source, 2)[1] == 2
            blocks.append(sys.getallocatedblocks())
    finally:
        gc.enable()
    assert blocks[-1] - blocks[-2] < 200, blocks  # the first rounds fill caches; one block a read would be 400


def test_fingerprint_follows_the_records_not_the_path(tmp_path):
    def fingerprint(name, **fields):
        config = {"source": "folder", "options": {"path": str(folder_of(tmp_path / name, **fields))}, "resolution": 8}
        return pipeline.fingerprint(config, sources.build(config, "train"), text.Bytes(8), batch=4, seed=0)

    assert fingerprint("a") == fingerprint("b")
    with pytest.raises(UserError, match="--allow source.records.$"):
        check_fingerprint(fingerprint("a"), fingerprint("c", text="other"))


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emoji pictures are not there")
def test_emoji():
    config = {
        "source": "folder",
        "resolution": 32,
        "text": {"kind": "words", "length": 24},
        "options": {"path": str(EMOJI), "text_key": ("text", "text_zh"), "split_key": "split"},
    }
    train, validation = sources.build(config, "train"), sources.build(config, "validation")
    assert len(train) == 3458 and len(validation) == 354 and train.problems() == (0, [])
    tokenizer = text.build(config, train)
    assert 2000 < tokenizer.vocab_size < 4000 and "旗" in tokenizer.words and "flag" in tokenizer.words
    seen = list(pipeline.batches(validation, tokenizer, batch=128, seed=0, shuffle=False))
    assert sum(batch["valid"].sum() for batch in seen) == 354 and all((batch["broken"] < 0).all() for batch in seen)
    assert all(batch["image"].min() >= -1 and batch["image"].max() <= 1 for batch in seen)
