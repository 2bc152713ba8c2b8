"""Byte-pair encoding restores any text and trains deterministically; published tokenizers give the recorded ids."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.data import text
from hybridgen.data.prepare import bpe as prepare
from hybridgen.data.text import bpe, steps
from hybridgen.data.text.published import Published

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
CAPTIONS = [
    "a small red circle left of a large blue square",
    "three red stars and a red circle",
    "一个红色的圆形在蓝色方块的左边",
    "红色的圆形和红色的星形",
    "a heart 😀😀, naïve café (2024)!",
] * 3
HARD = [
    "  two  spaces ",
    "tab\tnew\nline\r\n",
    "",
    " ",
    "👩‍👩‍👧 🇩🇪",
    "e\u0301 ½ Ⅷ ²",
    "_under_score",
    "\x00\x7f",
    "ไทย عربى",
    "x" * 500,
]


@pytest.fixture(scope="module")
def tokenizer():
    return text.from_json({"kind": "bpe", "length": 600, "merges": [list(pair) for pair in bpe.train(CAPTIONS, 400)]})


@pytest.mark.parametrize("caption", [*CAPTIONS[:5], *HARD])
def test_any_text_comes_back(caption, tokenizer):
    ids, mask = tokenizer.encode(caption)
    assert tokenizer.decode(ids) == caption and np.array_equal(ids != text.PAD, mask)
    assert ids.max(initial=0) < tokenizer.vocab_size
    same = text.from_json(json.loads(json.dumps(tokenizer.to_json())))
    np.testing.assert_array_equal(same.encode(caption)[0], ids)
    assert text.digest(same) == text.digest(tokenizer)


def test_training_is_that_of_the_definition():
    """Compared with counting all pairs again for every merge; independent of the order of the captions."""
    merges = bpe.train(CAPTIONS, 330)
    words = [[byte + 1 for byte in word.encode()] for caption in CAPTIONS for word in bpe.WORD.findall(caption)]
    for rank, pair in enumerate(merges):
        counts = {}
        for ids in words:
            for two in zip(ids, ids[1:], strict=False):
                counts[two] = counts.get(two, 0) + 1
        assert pair == min(counts, key=lambda two: (-counts[two], two)), rank
        for ids in words:
            place = 0
            while place < len(ids) - 1:
                if (ids[place], ids[place + 1]) == pair:
                    ids[place : place + 2] = [bpe.FIRST + rank]
                place += 1
    assert len(merges) == 330 - bpe.FIRST
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert bpe.train(shuffled, 330) == merges
    reader = bpe.Bpe(merges, 64)
    once = [i for word in bpe.WORD.findall(CAPTIONS[0]) for i in reader._word(word)]
    assert once == [i for ids in words[: len(bpe.WORD.findall(CAPTIONS[0]))] for i in ids]


def test_training_ends_where_no_pair_comes_twice():
    assert bpe.train(["ab", "cd"], 300) == [] and len(bpe.train(["abab"], 300)) == 1


def test_merging_is_lowest_rank_first_and_leftmost():
    draw = random.Random(1)
    ranks = {pair: (rank, 10 + rank) for rank, pair in enumerate([(1, 1), (2, 1), (10, 1), (11, 10), (10, 10), (3, 2)])}
    for _ in range(300):
        symbols = [draw.randint(1, 3) for _ in range(draw.randint(0, 12))]
        slow = list(symbols)
        while pairs := [(ranks[two][0], i) for i, two in enumerate(zip(slow, slow[1:], strict=False)) if two in ranks]:
            _, i = min(pairs)
            slow[i : i + 2] = [ranks[slow[i], slow[i + 1]][1]]
        assert bpe.merge(symbols, ranks) == slow


def test_prompts_are_strict(tokenizer):
    short = bpe.Bpe(tokenizer.merges, 4)
    assert short.encode("a red circle and a star")[1].all()
    with pytest.raises(UserError, match="tokens, but this model reads at most 4"):
        short.encode("a red circle and a star", strict=True)
    with pytest.raises(UserError, match="empty"):
        short.encode(" ", strict=True)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "bpe.json"
    options = ["--config", "configs/recipes/shapes.py:tiny", "--size", "300", "--count", "200", "--out", str(out)]
    assert prepare.main(options) == 0 and "300 ids" in capsys.readouterr().out
    config = {"source": "shapes", "text": {"kind": "bpe", "path": str(out), "length": 20}}
    reader = text.build(config, None)
    ids, mask = reader.encode("a red circle", strict=True)
    assert reader.vocab_size == 300 and mask.sum() < 12 and reader.decode(ids) == "a red circle"
    with pytest.raises(UserError, match="already exists"):
        prepare.main(options)


@pytest.mark.parametrize(
    "merges, says",
    [
        (None, "no list"),
        ([[1, 2], [0, 3]], "merge 1"),
        ([[258, 1]], "merge 0"),
        ([[1, 2], [1, 2]], "twice"),
        ([[1, 2, 3]], "merge 0"),
        ([[1, 1], *([i, i] for i in range(257, 300))], "merge 12"),
    ],
)
def test_damaged_merges_are_refused(merges, says):
    with pytest.raises(UserError, match=says):
        text.from_json({"kind": "bpe", "length": 8, "merges": merges})


# ---- published tokenizers


@pytest.mark.parametrize("name", EXPECTED["ids"])
def test_published_ids(name):
    reader = Published.read(str(GOLDEN / name), 128)
    again = text.from_json(json.loads(json.dumps(reader.to_json())))
    for caption, true in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        for one in (reader, again):
            ids, mask = one.encode(caption)
            assert ids[mask].tolist() == true, caption
            assert (ids[~mask] == one.pad).all()
    if name in ("gpt2", "llama3", "llama"):
        for caption in EXPECTED["texts"][:4]:
            assert reader.decode(reader.encode(caption)[0]) == caption
    else:
        assert reader.decode(reader.encode(EXPECTED["texts"][0])[0]) == EXPECTED["texts"][0]


def test_the_end_mark_stays_when_a_text_is_cut():
    reader = Published.read(str(GOLDEN / "clip"), 6)
    begin, end = (reader.about["model"]["vocab"][f"<|{name}|>"] for name in ("startoftext", "endoftext"))
    ids, mask = reader.encode("a small red circle left of a large blue square")
    assert ids[0] == begin and ids[-1] == end and mask.all() and end not in ids[1:-1]
    assert reader.encode("a")[0][3:].tolist() == [end] * 3 and reader.pad == end  # CLIP fills prompts up with it
    with pytest.raises(UserError, match="at most 4"):
        reader.encode("a small red circle left of a large blue square", strict=True)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model": {"type": "WordLevel", "vocab": {}}}, "'WordLevel' is not supported"),
        ({"normalizer": {"type": "Nmt"}}, "'Nmt' is not supported"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "'UnicodeScripts' is not supported"),
        ({"post_processor": {"type": "Other"}}, "'Other' is not supported"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}},
            "repeats a group",
        ),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
            "cannot read the text tokenizer",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAA"}}, "cannot read the text tokenizer"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "cannot read the text tokenizer"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "cannot read the text tokenizer"),
        ({"model": {"type": "BPE", "vocab": [], "merges": [], "dropout": 0.1}}, "dropout"),
        ({"added_tokens": [{"id": 0, "content": "x", "single_word": True}]}, "single_word"),
        ({"added_tokens": 7}, "cannot read the text tokenizer"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, says):
    about = json.loads((GOLDEN / "gpt2" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(about | changes))
    with pytest.raises(UserError, match=says):
        Published.read(str(tmp_path), 8)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor"):
        Published.read(str(tmp_path), 8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        text.build({"source": "shapes", "text": {"kind": "published", "path": str(tmp_path)}}, None)
    with pytest.raises(UserError, match="data.text.path is missing"):
        text.build({"source": "shapes", "text": {"kind": "published"}}, None)


def test_categories_in_patterns():
    cut = steps.pattern(r"[^\s\p{L}\p{N}]+|\p{Lu}")
    assert cut.findall("Ab1 ²!?É 红—") == ["A", "!?", "É", "—"]
