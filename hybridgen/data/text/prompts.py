"""Functions that all text tokenizers share: checking a prompt, and padding ids to a fixed length with a mask."""

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
