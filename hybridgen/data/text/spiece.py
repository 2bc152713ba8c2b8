"""T5's `spiece.model` (SentencePiece; Kudo & Richardson 2018) as the description that `tokenizer.json` would give.

The file is a protocol buffer: pieces with scores, how they were trained, and a compiled table of replacements. Read are
Unigram models; extra ids stand behind the pieces, the last one first, as in checkpoints of T5.
"""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.data.files import MAX_FILE

PIECES, TRAINER, NORMALISER = 1, 2, 3  # fields of the file
MODEL_TYPE, BYTES, UNKNOWN, END, PAD = 3, 35, 40, 42, 43  # of how it was trained
CHARSMAP, DUMMY, SPACES, ESCAPE = 2, 3, 4, 5  # of the normaliser
CONTROLS = (2, 3)  # kinds of pieces that stand for no text: the unknown, and marks
UNIGRAM = 1


def read(path: Path, extra: int) -> dict[str, Any]:
    """The description in a file, with so many `extra` ids. Raises UserError for one that is damaged or not built."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE} bytes")
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == PIECES]
        trainer, normaliser = (dict(_fields(b"".join(v for n, v in fields if n == k))) for k in (TRAINER, NORMALISER))
        return _described(pieces, trainer, normaliser, extra)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is no model of SentencePiece: {type(error).__name__}: {str(error)[:100]}") from None


def _described(pieces: list, trainer: dict, normaliser: dict, extra: int) -> dict[str, Any]:
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise UserError(f"SentencePiece's model type {trainer[MODEL_TYPE]} is not built, only Unigram ({UNIGRAM})")
    if not all(normaliser.get(field, 1) for field in (DUMMY, SPACES, ESCAPE)):
        raise UserError("a SentencePiece model that keeps spaces or begins without one is not built")
    if any(kind == 4 for _, _, kind in pieces):  # of the user, which nothing divides
        raise UserError("SentencePiece's pieces of the user's own are not built")
    names = [name for name, _, _ in pieces]
    end = trainer.get(END, 2)
    marks = [i for i, (_, _, kind) in enumerate(pieces) if kind in CONTROLS]
    vocab = [[name, score] for name, score, _ in pieces]
    vocab += [[f"<extra_id_{i}>", 0.0] for i in range(extra - 1, -1, -1)]
    added = [(i, names[i]) for i in marks] + [(i, vocab[i][0]) for i in range(len(names), len(vocab))]
    words = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "prepend_scheme": "always", "split": True}]
    table = base64.b64encode(normaliser[CHARSMAP]).decode() if normaliser.get(CHARSMAP) else ""
    pad = trainer.get(PAD, 2**64 - 1)
    around = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "end"}}]
    return {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table} if table else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "model": {
            "type": "Unigram",
            "unk_id": trainer.get(UNKNOWN, 0),
            "vocab": vocab,
            "byte_fallback": bool(trainer.get(BYTES, 0)),
        },
        "added_tokens": [{"id": i, "content": name, "special": True, "normalized": False} for i, name in added],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "special_tokens": {"end": {"id": "end", "ids": [end], "tokens": [names[end]]}},
        },
        "padding": {"pad_id": pad if pad < len(names) else 0},
    }


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, kind) of a piece."""
    fields = dict(_fields(data))
    return fields[1].decode(), fields.get(2, 0.0), fields.get(3, 1)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: whole numbers, bytes, and numbers of 32 bits as floats."""
    at = 0
    while at < len(data):
        key, at = _whole(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _whole(data, at)
        elif kind == 2:
            size, at = _whole(data, at)
            if at + size > len(data):
                raise ValueError("it is cut off")
            value, at = data[at : at + size], at + size
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        else:
            raise ValueError(f"a field of kind {kind}")
        yield number, value


def _whole(data: bytes, at: int) -> tuple[int, int]:
    """(a number of seven bits a byte, the lowest first; where it ends)."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
