"""Prompts as token ids: a word-level vocabulary for small runs, or UTF-8 bytes; fixed length, with a mask.

    tokenizer = build({"text": {"kind": "words", "length": 24}}, source)
    ids, mask = tokenizer.encode("a red circle")                  # L int32, L bool
    tokenizer.encode(prompt, strict=True)                         # for prompts: what does not fit is an error
    same = from_json(tokenizer.to_json())                         # plain JSON: it travels with a checkpoint

`data.text` of a config: {"kind": "words" | "bytes" | "bpe" | "published", "length": L} with "max_words", the most words
kept (words), or "path", the file of data.prepare.bpe (bpe) or a folder with a published tokenizer (published).

`words`: text is NFKC-normalised and lower-cased, then cut into words of letters (any alphabet), single digits, single
Chinese / Japanese / Korean characters and single punctuation marks. Ids: 0 padding, 1 unknown, then the vocabulary.
`bytes`: id 0 padding, id 1 + b for byte b. Both are lossless up to that normalisation: encode(decode(ids)) == ids.

Letters: L the fixed length.
"""

import collections
import difflib
import hashlib
import itertools
import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hybridgen.core.errors import UserError
from hybridgen.data.sources.captions import vocabulary
from hybridgen.data.sources.protocol import Source
from hybridgen.data.text.bpe import Bpe
from hybridgen.data.text.prompts import MAX_PROMPT_BYTES, PAD, check_prompt, checked_length, fit
from hybridgen.data.text.published import Published

__all__ = [
    "MAX_PROMPT_BYTES",
    "PAD",
    "UNKNOWN",
    "Bytes",
    "Words",
    "build",
    "count_words",
    "digest",
    "from_json",
    "resized",
    "split",
    "words_of",
]

UNKNOWN = 1
MAX_WORDS = 16_384
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_IDEOGRAPH}]|(?:(?![{_IDEOGRAPH}])[^\W\d_])+|\S")
_CLOSING, _OPENING = set(".,;:!?)]}%'。、"), set("([{'")


def split(text: str) -> list[str]:
    """The word-level tokens of a text, in order; empty for an empty text."""
    return _TOKEN.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


def _join(tokens: list[str]) -> str:
    """A readable text whose `split` gives the same tokens: a space only where two tokens would run together."""
    out, last = "", ""
    for token in tokens:
        tight = re.match(f"[{_IDEOGRAPH}]", token) and re.match(f"[{_IDEOGRAPH}]", last)
        digits = token.isdigit() and last.isdigit()
        out += token if not last or tight or digits or token in _CLOSING or last in _OPENING else " " + token
        last = token
    return out


class Words:
    """Word-level tokenizer over a closed list of words (without the two special ids), most useful first."""

    kind = "words"

    def __init__(self, words: Iterable[str], length: int):
        self.words, self.length = tuple(words), checked_length(length)
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise UserError(f"the vocabulary has {len(self.words)} words, only {len(self._ids)} of them different")
        self.vocab_size = len(self.words) + 2

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool). Not strict: unknown words become id 1 and what is over L is cut.

        strict raises UserError for an empty or over-long prompt and for an unknown word, naming the nearest known one.
        """
        if strict:
            check_prompt(text)
        tokens = split(text)
        if strict:
            unknown = [token for token in tokens if token not in self._ids]
            if unknown:
                near = difflib.get_close_matches(unknown[0][:40], self.words, 1, 0.5)
                hint = f"; the nearest known word is {near[0]!r}" if near else f" (it knows {len(self.words)} words)"
                raise UserError(f"this model does not know the word {unknown[0][:40]!r}{hint}")
        return fit([self._ids.get(token, UNKNOWN) for token in tokens], self.length, "tokens", strict)

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text; padding is left out, an unknown word reads `<unk>`."""
        return _join(["<unk>" if i == UNKNOWN else self.words[i - 2] for i in np.asarray(ids).tolist() if i != PAD])

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length, "words": list(self.words)}


class Bytes:
    """UTF-8 bytes: every text of every script, at about one id a Latin letter and three a Chinese character."""

    kind = "bytes"
    vocab_size = 257

    def __init__(self, length: int):
        self.length = checked_length(length)

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool). Not strict: what is over L bytes is cut, never inside a character."""
        if strict:
            check_prompt(text)
        data = text.encode("utf-8", "replace")  # a lone surrogate, legal in JSON, has no bytes of its own
        if len(data) > self.length and not strict:
            data = data[: self.length].decode("utf-8", "ignore").encode("utf-8")
        return fit([byte + 1 for byte in data], self.length, "bytes", strict)

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text; padding is left out, broken UTF-8 reads as the replacement character."""
        return bytes(i - 1 for i in np.asarray(ids).tolist() if i != PAD).decode("utf-8", "replace")

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length}


Tokenizer = Words | Bytes | Bpe | Published
READ = {"bpe": Bpe, "published": Published}  # of files


def from_json(data: dict) -> Tokenizer:
    """The tokenizer that `to_json` described; UserError for anything else."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind in READ:
        return READ[kind].from_json(data)
    if kind == "bytes":
        return Bytes(data.get("length"))
    words = data.get("words") if kind == "words" else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"not a description of a text tokenizer: {reprlib.repr(data)}")
    return Words(words, data.get("length"))


def resized(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The same tokenizer for prompts of `length`."""
    return tokenizer if tokenizer.length == length else from_json(tokenizer.to_json() | {"length": length})


def digest(tokenizer: Tokenizer) -> str:
    """A short digest of everything that decides which ids a text gets."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def count_words(captions: Iterable[str], max_words: int = MAX_WORDS) -> list[str]:
    """The vocabulary of a collection of captions: most frequent first, ties alphabetical, at most `max_words`."""
    counts = collections.Counter(token for caption in captions for token in split(caption))
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]]


COUNTED = 10_000  # records whose captions are counted, of a source that does not list them


def words_of(source: Source, max_words: int = MAX_WORDS) -> list[str]:
    """The words of a source's captions: the closed vocabulary of `shapes`; those of records, which were counted when
    they were written; of a mixture, those of its sources in turn; otherwise counted now, where a source does not list
    its `captions()` in the first records.
    """
    if hasattr(source, "languages"):
        return list(dict.fromkeys(token for unit in vocabulary(source.languages) for token in split(unit)))
    if hasattr(source, "words"):
        return list(source.words[:max_words])
    if hasattr(source, "sources"):
        turns = itertools.zip_longest(*(words_of(one, max_words) for one in source.sources))
        return list(dict.fromkeys(word for turn in turns for word in turn if word is not None))[:max_words]
    if hasattr(source, "captions"):
        return count_words(source.captions(), max_words)
    return count_words((source[index].get("text", "") for index in range(min(len(source), COUNTED))), max_words)


def build(data_config: Mapping[str, Any], source: Source | None) -> Tokenizer:
    """The tokenizer of `data_config["text"]` for a source.

    The captions of `shapes` have a closed vocabulary. Those of a folder are counted (`source.captions()`: the metadata
    only, no picture is read): pass the training split.
    """
    options = dict(data_config["text"])
    kind, length = options.pop("kind", "words"), options.pop("length", 24)
    max_words, path = options.pop("max_words", MAX_WORDS), options.pop("path", None)
    if options:
        raise UserError(f"unknown key data.text.{next(iter(options))}; known: kind, length, max_words, path")
    if isinstance(kind, str) and kind in READ:
        if not path:
            raise UserError(f"data.text.path is missing: where the {kind!r} tokenizer is")
        return READ[kind].read(path, length)
    if kind == "bytes":
        return Bytes(length)
    if kind != "words":
        raise UserError(f"data.text.kind is {kind!r}, it must be 'words', 'bytes', 'bpe' or 'published'")
    return Words(words_of(source, max_words), length)
