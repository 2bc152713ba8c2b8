"""Byte-pair encoding over UTF-8 bytes (Sennrich et al. 2016; on bytes, Radford et al. 2019), trained on captions.

`python -m hybridgen.data.prepare.bpe` writes the file for `data.text = {"kind": "bpe", "path": "bpe.json", "length":
L}`. Id 0 is padding, 1 + b is byte b, and each id from 257 on merges two earlier ids. There is no normalization, so any
text is restored exactly. Merges never cross the end of a word (letters, up to three digits, or punctuation marks, with
the space before them).
"""

import collections
import heapq
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hybridgen.core.errors import UserError
from hybridgen.data.files import read_json
from hybridgen.data.text.prompts import PAD, check_prompt, checked_length, fit

FIRST = 257  # the first id of a merge
MAX_MERGES, MAX_PIECE, MAX_BYTES = 2**20, 2**12, 2**27
KEPT, KEPT_LENGTH = 2**16, 64  # number of words whose ids are cached, and their largest length in characters
WORD = re.compile(r" ?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_)+|\s+")


def merge(symbols: list, ranks: Mapping[tuple, tuple[int, Any]]) -> list:
    """Merges neighbours, the leftmost pair of the lowest rank first, until no pair has a rank.

    ranks: {(left, right): (rank, merged)}. O(n log n), since some published tokenizers treat a prompt as one word.
    """
    symbols = list(symbols)
    after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
    heap: list[tuple[int, int, Any, Any]] = []

    def offer(left: int) -> None:
        right = after[left]
        if right < len(symbols) and (found := ranks.get((symbols[left], symbols[right]))) is not None:
            heapq.heappush(heap, (found[0], left, symbols[left], symbols[right]))

    for place in range(len(symbols) - 1):
        offer(place)
    while heap:
        _, left, one, two = heapq.heappop(heap)
        right = after[left]
        if symbols[left] != one or right >= len(symbols) or symbols[right] != two:
            continue  # one of them has been merged with another symbol meanwhile
        symbols[left], symbols[right] = ranks[one, two][1], None
        after[left] = after[right]
        if after[right] < len(symbols):
            before[after[right]] = left
        offer(left)
        if before[left] >= 0:
            offer(before[left])
    return [symbol for symbol in symbols if symbol is not None]


def train(captions: Iterable[str], size: int) -> list[tuple[int, int]]:
    """The merges of a vocabulary of `size` ids: the most frequent pair first, of equally frequent ones the lowest ids.

    There are fewer if no pair is left that occurs twice. The order of the captions does not matter.
    """
    counts = collections.Counter(word for caption in captions for word in WORD.findall(caption))
    words = [([byte + 1 for byte in word.encode("utf-8", "replace")], count) for word, count in sorted(counts.items())]
    total: collections.Counter = collections.Counter()
    where = collections.defaultdict(set)  # pair: words that have it, or had it
    for number, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:], strict=False):
            total[pair] += count
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in total.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and FIRST + len(merges) < size:
        count, pair = heapq.heappop(heap)
        if -count != total[pair]:
            continue  # an outdated count
        if -count < 2:
            break
        changed = set()
        for number in where.pop(pair):
            changed |= _join(words[number], pair, FIRST + len(merges), number, total, where)
        merges.append(pair)
        for other in changed - {pair}:
            if total[other] > 0:
                heapq.heappush(heap, (-total[other], other))
    return merges


def _join(word: tuple[list[int], int], pair: tuple[int, int], joined: int, number: int, total: Any, where: Any) -> set:
    """Merges a pair in one word and updates the counts; returns the pairs whose count changed."""
    ids, count = word
    old, place = list(ids), 0
    while place < len(ids) - 1:
        if (ids[place], ids[place + 1]) == pair:
            ids[place : place + 2] = [joined]
        place += 1
    for gone in zip(old, old[1:], strict=False):
        total[gone] -= count
    for new in zip(ids, ids[1:], strict=False):
        total[new] += count
        where[new].add(number)
    return {*zip(old, old[1:], strict=False), *zip(ids, ids[1:], strict=False)}


class Bpe:
    """The tokenizer of a list of merges, in order."""

    kind = "bpe"

    def __init__(self, merges: Iterable[tuple[int, int]], length: int):
        self.merges, self.length = [tuple(pair) for pair in merges], checked_length(length)
        self.vocab_size = FIRST + len(self.merges)
        self._ranks = {pair: (rank, FIRST + rank) for rank, pair in enumerate(self.merges)}
        self._bytes = [b"", *(bytes([byte]) for byte in range(256))]  # of each id
        for left, right in self.merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool). Not strict: ids after L are cut off."""
        if strict:
            check_prompt(text)
        ids = [i for word in WORD.findall(text) for i in self._word(word)]
        return fit(ids, self.length, "tokens", strict)

    def _word(self, word: str) -> list[int]:
        ids = self._known.get(word)
        if ids is None:
            ids = merge([byte + 1 for byte in word.encode("utf-8", "replace")], self._ranks)
            if len(self._known) >= KEPT:
                self._known.clear()
            if len(word) <= KEPT_LENGTH:
                self._known[word] = ids
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text, without padding; invalid UTF-8 becomes the replacement character."""
        return b"".join(self._bytes[i] for i in np.asarray(ids).tolist() if i != PAD).decode("utf-8", "replace")

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length, "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_json(cls, data: Mapping) -> "Bpe":
        """The tokenizer of a `to_json` description. Raises UserError for anything else."""
        merges = data.get("merges")
        if not isinstance(merges, list) or len(merges) > MAX_MERGES:
            raise UserError("not a byte-pair tokenizer: it has no list of merges")
        long = [1] * FIRST  # bytes of each id, limited because merges could double them without end
        for rank, pair in enumerate(merges):
            fine = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
            if not fine or not all(PAD < i < FIRST + rank for i in pair) or long[pair[0]] + long[pair[1]] > MAX_PIECE:
                raise UserError(f"not a byte-pair tokenizer: its merge {rank} is {str(pair)[:60]}")
            long.append(long[pair[0]] + long[pair[1]])
        if sum(long) > MAX_BYTES:
            raise UserError(f"not a byte-pair tokenizer: its pieces have {sum(long)} bytes; the limit is {MAX_BYTES}")
        if len({tuple(pair) for pair in merges}) < len(merges):
            raise UserError("not a byte-pair tokenizer: it has the same merge twice")
        return cls(merges, data.get("length"))

    @classmethod
    def read(cls, path: str, length: int) -> "Bpe":
        """The tokenizer in a file of data.prepare.bpe, for prompts of `length`. Raises UserError for another file."""
        data = read_json(Path(path))
        if not isinstance(data, dict) or data.get("kind") != cls.kind:
            raise UserError(f"data.text.path: {path} is not a file of hybridgen.data.prepare.bpe")
        return cls.from_json(data | {"length": length})
