"""Functions that all text tokenizers share: checking a prompt, and padding ids to a fixed length with a mask."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError

PAD = 0
MAX_PROMPT_BYTES = 16_384  # largest size of a prompt, checked before it is processed


def check_prompt(text: str) -> None:
    """Raises UserError for a prompt that is not a string, empty or far too long."""
    if not isinstance(text, str):
        raise UserError(f"the prompt must be a string, not {type(text).__name__}")
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_PROMPT_BYTES:
        raise UserError(f"the prompt has {size} bytes; the limit is {MAX_PROMPT_BYTES}")
    if not text.strip():
        raise UserError("the prompt is empty")


def without_mark(text: Any) -> Any:
    """A prompt without the byte-order mark at the start of a file that it was read from."""
    return text.removeprefix("\ufeff") if isinstance(text, str) else text


def fit(
    ids: list[int],
    length: int,
    unit: str,
    strict: bool,
    *,
    pad: int = PAD,
    begin: tuple[int, ...] = (),
    end: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Pads ids between `begin` and `end` to `length` -> (L int32, L bool). Too many ids are cut off, or, if strict,
    raise UserError."""
    room = length - len(begin) - len(end)
    if strict and len(ids) > room:
        raise UserError(f"the prompt has {len(ids)} {unit}, but this model reads at most {room}")
    ids = [*begin, *ids[:room], *end]
    padded = np.full(length, pad, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)


def checked_length(value: Any) -> int:
    """A prompt length from a config or a file. Raises UserError for an invalid one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65_536:
        raise UserError(f"text.length is {value!r}, but must be an integer from 1 to 65536")
    return value


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of, or None: few letters inserted, left out, replaced or
    swapped, for the length of the word; a short word also keeps its first letter ("at" is not meant by "cat")."""
    size = len(word)
    most = 0 if size < 3 else 1 if size < 6 else 2 if size < 10 else 3
    near = [(_edits(word, one, most), one) for one in known if abs(len(one) - size) <= most]
    near = [(edits, one) for edits, one in near if edits <= most and (size > 4 or one[0] == word[0])]
    return min(near, key=lambda pair: pair[0])[1] if near else None


def _edits(word: str, other: str, most: int) -> int:
    """Letters inserted, left out, replaced or swapped with the next from one word to the other, or above `most`."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, 1):
        earlier, before, row = before, row, [i]
        for j, target in enumerate(other, 1):
            least = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == target:
                least = min(least, earlier[j - 2] + 1)
            row.append(least)
        if min(row) > most:
            return most + 1
    return row[-1]
