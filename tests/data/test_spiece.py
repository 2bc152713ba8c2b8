"""T5's `spiece.model` gives the same ids as the equivalent tokenizer.json; damaged files are refused.

The file is written here from the recorded tokenizer of T5, in the format's encoding.
"""

import base64
import json
import struct
from pathlib import Path

import pytest

from hybridgen.core.errors import UserError
from hybridgen.data.text.published import Published

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def whole(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + whole(rest) if rest else bytes([low])


def field(number: int, value) -> bytes:
    if isinstance(value, float):
        return whole(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return whole(number << 3) + whole(value % 2**64)
    data = value.encode() if isinstance(value, str) else value
    return whole(number << 3 | 2) + whole(len(data)) + data


def model(pieces, trainer: dict, normaliser: dict) -> bytes:
    parts = [field(1, b"".join(field(i + 1, part) for i, part in enumerate(piece))) for piece in pieces]
    parts += [
        field(number, b"".join(field(*pair) for pair in about.items()))
        for number, about in ((2, trainer), (3, normaliser))
    ]
    return b"".join(parts)


def of_t5(trainer=(), normaliser=(), kinds=()) -> bytes:
    """The recorded tokenizer as T5's file: padding 0, end 1, unknown 2."""
    about = json.loads((GOLDEN / "t5" / "tokenizer.json").read_text())
    special = {0: 3, 1: 3, 2: 2} | dict(kinds)
    pieces = [(piece, float(score), special.get(i, 1)) for i, (piece, score) in enumerate(about["model"]["vocab"])]
    table = base64.b64decode(about["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    message = {3: 1, 40: 2, 41: -1, 42: 1, 43: 0} | dict(trainer)
    return model(pieces, message, {1: "nmt_nfkc", 2: table, 3: 1, 4: 1, 5: 1} | dict(normaliser))


def test_ids_are_those_of_the_recorded_tokenizer(tmp_path):
    (tmp_path / "spiece.model").write_bytes(of_t5())
    reader, known = Published.read(str(tmp_path), 128), Published.read(str(GOLDEN / "t5"), 128)
    for caption, true in zip(EXPECTED["texts"], EXPECTED["ids"]["t5"], strict=True):
        ids, mask = reader.encode(caption)
        assert ids[mask].tolist() == true, caption
        assert (ids[~mask] == known.pad).all()
    assert reader.vocab_size == known.vocab_size + 100
    last = reader.vocab_size - 1
    assert reader.encode("a <extra_id_0> </s>")[0][1:4].tolist() == [last, 1, 1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    assert Published.read(str(tmp_path), 128).vocab_size == known.vocab_size


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (of_t5(trainer={3: 2}), "model type 2 is not supported, only Unigram"),
        (of_t5(normaliser={3: 0}), "keeps extra spaces or adds no dummy prefix"),
        (of_t5(kinds={5: 4}), "user-defined symbols are not supported"),
        (of_t5(trainer={42: 9999}), "is not a SentencePiece model: IndexError"),
        (of_t5()[:-5], "is not a SentencePiece model: .*cut off"),
        (field(1, 7), "is not a SentencePiece model: TypeError"),
        (b"\xff" * 12, "is not a SentencePiece model: .*ten bytes"),
        (b"", "is not a SentencePiece model"),
    ],
)
def test_what_is_damaged_or_not_built_is_refused(tmp_path, data, says):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        Published.read(str(tmp_path), 8)
    assert "\n" not in str(error.value)
