"""Converts T5's `spiece.model` (SentencePiece; Kudo & Richardson 2018) to the format of tokenizer.json.

The file is a protocol buffer with pieces and their scores, the training options, and a compiled table of replacements.
Only Unigram models are supported. Extra ids follow the pieces, the last one first, as in checkpoints of T5.
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
CONTROLS = (2, 3)  # kinds of pieces without text: unknown and control tokens
UNIGRAM = 1


def read(path: Path, extra: int) -> dict[str, Any]:
    """The description of a file, with `extra` extra ids. Raises UserError if the file is damaged or not supported."""
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
        raise UserError(f"{path} is not a SentencePiece model: {type(error).__name__}: {str(error)[:100]}") from None


def _described(pieces: list, trainer: dict, normaliser: dict, extra: int) -> dict[str, Any]:
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise UserError(f"SentencePiece's model type {trainer[MODEL_TYPE]} is not supported, only Unigram ({UNIGRAM})")
    if not all(normaliser.get(field, 1) for field in (DUMMY, SPACES, ESCAPE)):
        raise UserError("a SentencePiece model that keeps extra spaces or adds no dummy prefix is not supported")
    if any(kind == 4 for _, _, kind in pieces):  # user-defined symbols, which are never split
        raise UserError("SentencePiece's user-defined symbols are not supported")
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
    """Yields (number, value) of a message's fields: integers, bytes, and floats of 32 or 64 bits."""
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
    """(a varint, of seven bits per byte with the lowest first; the offset after it)."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
