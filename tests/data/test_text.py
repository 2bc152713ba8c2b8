"""Tokenizers: lossless up to normalisation, fixed length, strict with prompts; vocabularies in a fixed order."""

import argparse
import json

import numpy as np
import pytest

from hybridgen import sample
from hybridgen.core.errors import UserError
from hybridgen.data import sources, text
from hybridgen.data.text import prompts

CAPTIONS = (
    "a small red circle left of a large blue square",
    "Three GREEN stars, on (grey)!",
    "it's 12 o'clock: 3/4 past",
    "一个红色的圆形在蓝色方块的左边，背景是灰色。",
    "a red 圆形 and 2 方块",
    "naïve café Straße",
    "",
)


def words(length=40):
    return text.Words(text.count_words(CAPTIONS), length)


@pytest.mark.parametrize("make", [words, lambda: text.Bytes(120)])
@pytest.mark.parametrize("caption", CAPTIONS)
def test_round_trip(make, caption):
    tokenizer = make()
    ids, mask = tokenizer.encode(caption)
    assert ids.shape == mask.shape == (tokenizer.length,) and ids.dtype == np.int32 and mask.dtype == bool
    assert ids.max(initial=0) < tokenizer.vocab_size and np.array_equal(ids != text.PAD, mask)
    again, _ = tokenizer.encode(tokenizer.decode(ids))
    np.testing.assert_array_equal(again, ids)
    same = text.from_json(json.loads(json.dumps(tokenizer.to_json())))
    np.testing.assert_array_equal(same.encode(caption)[0], ids)
    assert text.digest(same) == text.digest(tokenizer)


def test_readable_again():
    for caption in (CAPTIONS[0], "three green stars, on (grey)!", "一个红色的圆形在左边"):
        assert words().decode(words().encode(caption)[0]) == caption
    for caption in CAPTIONS:
        assert text.Bytes(120).decode(text.Bytes(120).encode(caption)[0]) == caption


def test_split():
    assert text.split("A red  cube: 12 x红色圆") == ["a", "red", "cube", ":", "1", "2", "x", "红", "色", "圆"]
    assert text.split("ＲＥＤ，") == ["red", ","]  # full-width forms are the same words


def test_vocabulary_order_and_cap():
    captions = ["b a", "b c", "b a", "d"]
    assert text.count_words(captions) == ["b", "a", "c", "d"]
    assert text.count_words(reversed(captions)) == ["b", "a", "c", "d"]
    tokenizer = text.Words(text.count_words(captions, 2), 4)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("a c b")[0].tolist() == [3, text.UNKNOWN, 2, 0]
    assert tokenizer.decode([3, 1, 2, 0]) == "a <unk> b"


def test_training_text_is_cut():
    ids, mask = text.Words(["a", "b"], 3).encode("a b a b b")
    assert ids.tolist() == [2, 3, 2] and mask.all()
    ids, mask = text.Bytes(5).encode("红色")  # three bytes a character: the second does not fit whole
    assert mask.tolist() == [True] * 3 + [False] * 2 and text.Bytes(5).decode(ids) == "红"
    text.Bytes(5).encode("\ud800")  # legal in JSON, not in UTF-8


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("", "empty"),
        (" \n\u3000", "empty"),
        ("a red cricle", "'cricle'.*'circle'"),
        ("a " * 50, "50 tokens.*at most 40"),
        ("红色的圆" * 11, "44 tokens.*at most 40"),
        ("a" * 20_000, "20000 bytes.*16384"),
        (7, "int"),
    ],
)
def test_strict_prompts(prompt, says):
    with pytest.raises(UserError, match=says) as error:
        words().encode(prompt, strict=True)
    assert "\n" not in str(error.value)


def test_strict_bytes():
    with pytest.raises(UserError, match="6 bytes.*at most 5"):
        text.Bytes(5).encode("红色", strict=True)
    with pytest.raises(UserError, match="empty"):
        text.Bytes(5).encode("  ", strict=True)
    assert text.Bytes(6).encode("红色", strict=True)[1].all()


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"kind": "words"},
        {"kind": "words", "words": [1], "length": 3},
        {"kind": "words", "words": ["a", "a"], "length": 3},
        {"kind": "bytes", "length": "x"},
        {"kind": "bytes", "length": 0},
    ],
)
def test_from_json_refuses(bad):
    with pytest.raises(UserError):
        text.from_json(bad)


@pytest.mark.parametrize("languages", [("en",), ("zh",), ("en", "zh")])
def test_shapes_vocabulary_is_closed(languages):
    options = {
        "languages": languages,
        "objects": (1, 2, 3, 4),
        "counts": True,
        "backgrounds": ("white", "grey"),
        "sizes": ("small", "medium", "large"),
    }
    config = {"source": "shapes", "options": options, "resolution": 16, "text": {"kind": "words", "length": 96}}
    for split in ("train", "holdout"):
        source = sources.build(config, split)
        tokenizer = text.build(config, source)
        for index in range(150):
            caption = source[index]["text"]
            ids, _ = tokenizer.encode(caption, strict=True)
            np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids))[0], ids)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"kind": "word"}, "'word'"),
        ({"kind": "bytes", "lenght": 3}, "lenght"),
        ({"kind": "bytes", "length": True}, "True"),
    ],
)
def test_build_refuses(config, says):
    with pytest.raises(UserError, match=says):
        text.build({"source": "shapes", "text": config}, None)


def test_a_prompts_file_with_a_byte_order_mark_is_read_as_without(tmp_path):
    files = [tmp_path / "plain.txt", tmp_path / "marked.txt"]
    for file, encoding in zip(files, ("utf-8", "utf-8-sig"), strict=True):
        file.write_text("红心\na red circle\n", encoding=encoding)
    given = [argparse.Namespace(prompt=[], prompts=file, label=[]) for file in files]
    assert sample.read_requests(given[0]) == sample.read_requests(given[1]) == [("红心", None), ("a red circle", None)]


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "A Small Red Circle.",
            "A SMALL RED CIRCLE",
            "a small red circle!",
            "a small red circle...",
            "a small red circle ?",
        ),
        *(
            '"A small red circle."',
            "\u201ca small red circle\u201d",
            "a small red circle\u3002",
            "- a small red circle;",
        ),
        "  A\tsmall\n red circle .  ",
    ],
)
def test_case_and_punctuation_at_the_ends_do_not_matter(prompt):
    plain = text.Words(["a", "small", "red", "circle"], 8)
    expected = plain.encode("a small red circle", strict=True)
    assert all(np.array_equal(*pair) for pair in zip(plain.encode(prompt, strict=True), expected, strict=True))


def test_punctuation_that_captions_have_is_kept():
    known = text.Words(["a", "circle", "."], 8)
    assert known.decode(known.encode("A circle.!", strict=True)[0]) == "a circle."
    with pytest.raises(UserError, match="does not know the word ','"):
        known.encode("a, circle", strict=True)
    for prompt in ("...", "?!", "\u201d"):
        with pytest.raises(UserError, match="the prompt is empty: it has no words"):
            text.Words(["a"], 8).encode(prompt, strict=True)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        *(("cirle", "circle"), ("cricle", "circle"), ("circles", "circle"), ("kircle", "circle"), ("sqaure", "square")),
        *(("rde", "red"), ("blu", "blue"), ("triangel", "triangle"), ("reed", "red"), ("backgruond", "background")),
        *(
            ("cat", None),
            ("hat", None),
            ("is", None),
            ("dog", None),
            ("elephant", None),
            ("rectangle", None),
            ("x", None),
        ),
        ("a" * 5000, None),
    ],
)
def test_the_nearest_word_is_a_misspelling(word, near):
    known = ["at", "a", "left", "circle", "square", "triangle", "red", "blue", "background", "of"]
    assert prompts.nearest(word, known) == near
    if word == "cat":
        with pytest.raises(UserError, match=r"does not know the word 'cat' \(it knows 10 words: a, at, background, "):
            text.Words(known, 8).encode("a cat", strict=True)
