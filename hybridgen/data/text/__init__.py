"""Text tokenizers: prompts to token ids of a fixed length with a mask.

    tokenizer = build({"text": {"kind": "words", "length": 24}}, source)
    ids, mask = tokenizer.encode("a red circle")                  # L int32, L bool
    tokenizer.encode(prompt, strict=True)                         # for prompts: raises UserError for unknown words, ...
    same = from_json(tokenizer.to_json())                         # plain JSON, stored with a run

`data.text` of a config: {"kind": "words" | "bytes" | "bpe" | "published", "length": L} with "max_words", the largest
vocabulary (words), or "path", the file of data.prepare.bpe (bpe) or the folder of a published tokenizer (published).

`words`: text is NFKC-normalized and lower-cased, then split into words of letters (any alphabet), single digits, single
Chinese, Japanese or Korean characters, and single punctuation marks. Ids: 0 padding, 1 unknown, then the vocabulary. A
prompt may end with punctuation that no caption has.
`bytes`: id 0 padding, id 1 + b for byte b. Both are lossless up to that normalization: encode(decode(ids)) == ids.

Letters: L the fixed length.
"""

import collections
import hashlib
import itertools
import json
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hybridgen.core.errors import UserError
from hybridgen.data.sources.captions import vocabulary
from hybridgen.data.sources.protocol import Source
from hybridgen.data.sources.reading import read
from hybridgen.data.text.bpe import Bpe
from hybridgen.data.text.prompts import MAX_PROMPT_BYTES, PAD, check_prompt, checked_length, fit, nearest
from hybridgen.data.text.published import Published

__all__ = [
    "MAX_PROMPT_BYTES",
    "PAD",
    "UNKNOWN",
    "Bytes",
    "Words",
    "build",
    "captioned",
    "count_words",
    "digest",
    "from_json",
    "resized",
    "split",
    "words_of",
]

UNKNOWN = 1
MAX_WORDS = 16_384
LISTED = 80  # largest number of words that a message lists
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_IDEOGRAPH}]|(?:(?![{_IDEOGRAPH}])[^\W\d_])+|\S")
_CLOSING, _OPENING = set(".,;:!?)]}%'。、"), set("([{'")


def split(text: str) -> list[str]:
    """The word-level tokens of a text, in order; empty for an empty text."""
    return _TOKEN.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


def _join(tokens: list[str]) -> str:
    """A readable text whose `split` gives the same tokens, with spaces only where they are needed."""
    out, last = "", ""
    for token in tokens:
        tight = re.match(f"[{_IDEOGRAPH}]", token) and re.match(f"[{_IDEOGRAPH}]", last)
        digits = token.isdigit() and last.isdigit()
        out += token if not last or tight or digits or token in _CLOSING or last in _OPENING else " " + token
        last = token
    return out


class Words:
    """Word-level tokenizer with a closed vocabulary `words` (without the two special ids), the most frequent first."""

    kind = "words"

    def __init__(self, words: Iterable[str], length: int):
        self.words, self.length = tuple(words), checked_length(length)
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise UserError(f"the vocabulary has {len(self.words)} words, but only {len(self._ids)} different ones")
        self.vocab_size = len(self.words) + 2

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool). Not strict: unknown words become id 1, and tokens after L are cut off.

        strict: punctuation at the ends that no caption had is left out; raises UserError for an empty or too long
        prompt, and for an unknown word, with the nearest known one.
        """
        if strict:
            check_prompt(text)
        tokens = split(text)
        if strict:
            tokens = self._without_marks(tokens)
            if unknown := [token for token in tokens if token not in self._ids]:
                near = nearest(unknown[0], self.words)
                few = f": {', '.join(sorted(self.words))}" if len(self.words) <= LISTED else ""
                hint = f"; the nearest known word is {near!r}" if near else ""
                hint += f" (it knows {len(self.words)} words{few})" if few or not near else ""
                raise UserError(f"this model does not know the word {unknown[0][:40]!r}{hint}")
        return fit([self._ids.get(token, UNKNOWN) for token in tokens], self.length, "tokens", strict)

    def _without_marks(self, tokens: list[str]) -> list[str]:
        """Tokens without the unknown punctuation at both ends. Raises UserError if nothing else is left."""
        words = [at for at, token in enumerate(tokens) if token in self._ids or any(map(str.isalnum, token))]
        if not words:
            raise UserError("the prompt is empty: it has no words")
        return tokens[words[0] : words[-1] + 1]

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text, without padding; an unknown word becomes `<unk>`."""
        return _join(["<unk>" if i == UNKNOWN else self.words[i - 2] for i in np.asarray(ids).tolist() if i != PAD])

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length, "words": list(self.words)}


class Bytes:
    """UTF-8 bytes: any text, with one id per Latin letter and about three per Chinese character."""

    kind = "bytes"
    vocab_size = 257

    def __init__(self, length: int):
        self.length = checked_length(length)

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool). Not strict: text after L bytes is cut off, never inside a character."""
        if strict:
            check_prompt(text)
        data = text.encode("utf-8", "replace")  # a lone surrogate, which JSON allows, has no encoding
        if len(data) > self.length and not strict:
            data = data[: self.length].decode("utf-8", "ignore").encode("utf-8")
        return fit([byte + 1 for byte in data], self.length, "bytes", strict)

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text, without padding; invalid UTF-8 becomes the replacement character."""
        return bytes(i - 1 for i in np.asarray(ids).tolist() if i != PAD).decode("utf-8", "replace")

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length}


Tokenizer = Words | Bytes | Bpe | Published
READ = {"bpe": Bpe, "published": Published}  # read from files


def from_json(data: dict) -> Tokenizer:
    """The tokenizer of a `to_json` description. Raises UserError for anything else."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind in READ:
        return READ[kind].from_json(data)
    if kind == "bytes":
        return Bytes(data.get("length"))
    words = data.get("words") if kind == "words" else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"text.json does not describe a text tokenizer: {reprlib.repr(data)}")
    return Words(words, data.get("length"))


def resized(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The same tokenizer with another `length`."""
    return tokenizer if tokenizer.length == length else from_json(tokenizer.to_json() | {"length": length})


def digest(tokenizer: Tokenizer) -> str:
    """A short digest of everything that determines the ids of a text."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def count_words(captions: Iterable[str], max_words: int = MAX_WORDS) -> list[str]:
    """The vocabulary of a collection of captions: most frequent first, ties alphabetical, at most `max_words`."""
    counts = collections.Counter(token for caption in captions for token in split(caption))
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]]


COUNTED = 10_000  # records whose captions are counted if the source does not list them


def words_of(source: Source, max_words: int = MAX_WORDS) -> list[str]:
    """The vocabulary of a source's captions, at most `max_words`.

    `shapes` has a closed vocabulary; that of records was counted when they were written; a mixture interleaves those of
    its sources. Otherwise words are counted in `captions()`, or in the first records if a source has no such method.
    """
    if hasattr(source, "languages"):
        return list(dict.fromkeys(token for unit in vocabulary(source.languages) for token in split(unit)))
    if hasattr(source, "words") and len(source.words):
        return list(source.words[:max_words])
    if hasattr(source, "sources"):
        turns = itertools.zip_longest(*(words_of(one, max_words) for one in source.sources))
        return list(dict.fromkeys(word for turn in turns for word in turn if word is not None))[:max_words]
    if hasattr(source, "captions"):
        return count_words(source.captions(), max_words)
    return count_words(_first_captions(source), max_words)


def _first_captions(source: Source) -> Iterator[str]:
    for index in range(min(len(source), COUNTED)):
        item, _ = read(source, index)
        yield from item.get("texts") or (item["text"],)


def captioned(source: Source) -> bool:
    """Whether a source has captions that are not empty, as far as `words_of` looks."""
    if hasattr(source, "languages"):
        return True
    if hasattr(source, "sources"):
        return any(captioned(one) for one in source.sources)
    if hasattr(source, "words") and len(source.words):
        return True
    return any(text.strip() for text in (source.captions() if hasattr(source, "captions") else _first_captions(source)))


def build(data_config: Mapping[str, Any], source: Source | None) -> Tokenizer:
    """The text tokenizer of `data_config["text"]` for a source.

    The vocabulary of `words` is that of the source's captions: pass the training split. Raises UserError for an unknown
    key or kind, and for a file that cannot be read.
    """
    options = dict(data_config["text"])
    kind, length = options.pop("kind", "words"), options.pop("length", 24)
    max_words, path = options.pop("max_words", MAX_WORDS), options.pop("path", None)
    if options:
        raise UserError(f"unknown key data.text.{next(iter(options))}; known: kind, length, max_words, path")
    if isinstance(kind, str) and kind in READ:
        if not path:
            raise UserError(f"data.text.path is missing: give the path of the {kind!r} tokenizer")
        return READ[kind].read(path, length)
    if kind == "bytes":
        return Bytes(length)
    if kind != "words":
        raise UserError(f"data.text.kind is {kind!r}, but must be 'words', 'bytes', 'bpe' or 'published'")
    return Words(words_of(source, max_words), length)
