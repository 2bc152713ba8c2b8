"""What all text tokenizers have in common: what a prompt is, and ids of a fixed length with a mask."""

from typing import Any

import numpy as np

from hybridgen.core.errors import UserError

PAD = 0
MAX_PROMPT_BYTES = 16_384  # read before anything is done to a prompt; no vocabulary here has use for more


def check_prompt(text: str) -> None:
    """Raises UserError for a prompt that is no text, empty or far too long."""
    if not isinstance(text, str):
        raise UserError(f"a prompt is text, not {type(text).__name__}")
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_PROMPT_BYTES:
        raise UserError(f"the prompt has {size} bytes, at most {MAX_PROMPT_BYTES} are read")
    if not text.strip():
        raise UserError("the prompt is empty")


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
    """Pads with `pad` or, outside strict mode, cuts ids to `length` -> (L int32, L bool), between `begin` and `end`."""
    room = length - len(begin) - len(end)
    if strict and len(ids) > room:
        raise UserError(f"the prompt has {len(ids)} {unit}, this model reads at most {room}")
    ids = [*begin, *ids[:room], *end]
    padded = np.full(length, pad, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)


def checked_length(value: Any) -> int:
    """A length of prompts from a config or a file; UserError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65_536:
        raise UserError(f"text.length is {value!r}, it must be a whole number between 1 and 65536")
    return value
