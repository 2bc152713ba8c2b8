"""Steps of published tokenizers before their model: normalizers and pre-tokenizers, which split a text into words.

`normaliser` and `cutter` convert the descriptions in a `tokenizer.json` into functions, and raise UserError for an
unsupported step. `spaces` returns the function that joins pieces to a text.
"""

import base64
import functools
import re
import struct
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from hybridgen.core.errors import UserError

SPACE = "\u2581"  # SentencePiece's character for a space
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space; Python's \s has more
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"
MAX_PATTERN = 2000
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Cut = Callable[[str, bool], list[str]]  # (text, whether it starts the prompt) -> words


@functools.cache
def category(name: str) -> str:
    """The content of a regular expression's character class with all code points of a Unicode category ("L", "Lu")."""
    ranges, first = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(name)
        if inside and first is None:
            first = code
        elif not inside and first is not None:
            ranges.append(f"\\U{first:08x}-\\U{code - 1:08x}")
            first = None
    if not ranges:
        raise UserError(f"a pattern of the tokenizer has the category {name!r}, which Unicode does not define")
    return "".join(ranges)


@functools.cache
def pattern(text: str) -> re.Pattern:
    r"""A pattern with classes such as `\p{L}` for Python. Refuses repeated groups, whose matching may never end."""
    if len(text) > MAX_PATTERN or re.search(r"\)[*+{]", text):
        raise UserError(f"a pattern of the tokenizer is too long, or repeats a group: {text[:60]!r}")
    out, inside, at = "", False, 0
    while at < len(text):
        step = re.match(r"\\p\{(\w+)\}|\\P\{(\w+)\}|\\.|.", text[at:], re.DOTALL)
        piece, (name, no) = step[0], step.groups()
        at += len(piece)
        if name or no or piece in ("\\s", "\\S"):
            negative = bool(no) or piece == "\\S"
            if negative and inside:
                raise UserError(f"a pattern of the tokenizer has {piece!r} in a class: {text[:60]!r}")
            body = category(name or no) if name or no else WHITE
            out += body if inside else f"[{'^' if negative else ''}{body}]"
            continue
        if piece == "[" and inside:
            piece = "\\["
        inside = (inside or piece == "[") and piece != "]"
        out += piece
    return re.compile(out)


def _pattern_of(spec: Mapping) -> re.Pattern:
    """The pattern of {"String": text} or {"Regex": text}."""
    ((kind, text),) = spec.items()
    return re.compile(re.escape(text)) if kind == "String" else pattern(text)


# ---- normalisers


def normaliser(spec: Any) -> Callable[[str], str]:
    """The function of a normalizer's description (or None). Raises UserError for an unsupported one."""
    if spec is None:
        return str
    kind = spec.get("type")
    if kind == "Sequence":
        steps = [normaliser(one) for one in spec["normalizers"]]
        return lambda text: functools.reduce(lambda text, step: step(text), steps, text)
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return functools.partial(unicodedata.normalize, kind)
    if kind == "Lowercase":  # letter by letter, so that a final sigma is not treated specially
        return lambda text: "".join(letter.lower() for letter in text)
    if kind == "Replace":
        search, content = _pattern_of(spec["pattern"]), spec["content"]
        return lambda text: search.sub(lambda _: content, text)
    if kind == "Prepend":
        prefix = spec["prepend"]
        return lambda text: prefix + text if text else text
    if kind == "Strip":
        left, right = spec["strip_left"], spec["strip_right"]
        return lambda text: _stripped(text, left, right)
    if kind == "StripAccents":
        return lambda text: "".join(letter for letter in text if unicodedata.category(letter) != "Mn")
    if kind == "BertNormalizer":
        return functools.partial(_bert, spec)
    if kind == "Precompiled":
        return _charsmap(base64.b64decode(spec["precompiled_charsmap"] or "", validate=True))
    raise UserError(f"the tokenizer's normalizer {kind!r} is not supported")


def _bert(spec: Mapping, text: str) -> str:
    """BERT's normalizer: no control characters, spaces around Chinese characters, no accents, lower case."""
    if spec.get("clean_text", True):
        kept = (
            " " if re.match(f"[{WHITE}]", letter) else letter
            for letter in text
            if letter in "\t\n\r" or not (letter == "\ufffd" or unicodedata.category(letter).startswith("C"))
        )
        text = "".join(kept)
    if spec.get("handle_chinese_chars", True):
        text = re.sub(f"([{CHINESE}])", r" \1 ", text)
    lower = spec.get("lowercase", True)
    if lower if spec.get("strip_accents") is None else spec["strip_accents"]:
        text = "".join(letter for letter in unicodedata.normalize("NFD", text) if unicodedata.category(letter) != "Mn")
    return "".join(letter.lower() for letter in text) if lower else text


def _stripped(text: str, left: bool, right: bool) -> str:
    text = re.sub(f"^[{WHITE}]+", "", text) if left else text
    return re.sub(f"[{WHITE}]+\\Z", "", text) if right else text


def _charsmap(data: bytes) -> Callable[[str], str]:
    """The function of SentencePiece's table of replacements, which replaces the longest match at each position.

    The data is a double-array trie (Aoe 1989; a unit is a label, a leaf flag and an offset), followed by the
    replacements, each terminated by a zero byte.
    """
    if not data:
        return str
    (size,) = struct.unpack_from("<I", data)
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    strings = data[4 + size :]
    if len(units) < 1 or size % 4 or not strings.endswith(b"\0"):
        raise ValueError(f"its table of replacements has a trie of {size} bytes and {len(strings)} bytes after it")

    def offset(unit: int) -> int:
        return (unit >> 10) << ((unit & (1 << 9)) >> 6)

    def longest(text: bytes, at: int) -> tuple[int, int | None]:
        """(number of bytes matched, offset of the replacement or None)."""
        place, found, length = offset(units[0]), None, 0
        for count, byte in enumerate(text[at:], 1):
            place ^= byte
            unit = units[place] if place < len(units) else 0
            if byte == 0 or unit & (0x80000000 | 0xFF) != byte:
                break
            place ^= offset(unit)
            if unit >> 8 & 1 and place < len(units) and units[place] & 0x7FFFFFFF < len(strings):
                length, found = count, units[place] & 0x7FFFFFFF
        return length, found

    def change(text: str) -> str:
        raw, out, at = text.encode(), bytearray(), 0
        while at < len(raw):
            length, found = longest(raw, at)
            if found is None:
                length = 1 + next(
                    (i for i, byte in enumerate(raw[at + 1 : at + 4]) if byte & 0xC0 != 0x80), len(raw[at + 1 : at + 4])
                )
                out += raw[at : at + length]
            else:
                out += strings[found : strings.index(b"\0", found)]
            at += length
        return out.decode("utf-8", "replace")

    return change


# ---- cuts


def cutter(spec: Any) -> Cut:
    """The function of a pre-tokenizer's description (or None). Raises UserError for an unsupported one."""
    if spec is None:
        return lambda text, start: [text] if text else []
    kind = spec.get("type")
    if kind == "BertPreTokenizer":
        spec = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Punctuation"}]}
        return cutter(spec)
    if kind == "Sequence":
        steps = [cutter(one) for one in spec["pretokenizers"]]
        return lambda text, start: _in_turn(steps, text, start)
    if kind == "ByteLevel":
        space, words = spec.get("add_prefix_space", True), spec.get("use_regex", True)
        return lambda text, start: _bytewise(text, space, words)
    if kind == "Split":
        search, how, invert = _pattern_of(spec["pattern"]), spec["behavior"], spec.get("invert", False)
        return lambda text, start: _split(text, search, how, invert)
    if kind == "Metaspace":
        mark, scheme = spec.get("replacement", SPACE), spec.get("prepend_scheme")
        scheme = scheme or ("always" if spec.get("add_prefix_space", True) else "never")
        whole = spec.get("split", True) is False
        return lambda text, start: _metaspace(text, mark, scheme == "always" or (scheme == "first" and start), whole)
    simple = {
        "WhitespaceSplit": (rf"[^{WHITE}]+", "Removed", True),
        "Whitespace": (r"\w+|[^\w\s]+", "Removed", True),
        "Punctuation": (r"[!-/:-@\[-`{-~\p{P}]", spec.get("behavior", "Isolated"), False),
        "Digits": (r"\p{N}" if spec.get("individual_digits") else r"\p{N}+", "Isolated", False),
    }
    if kind not in simple:
        raise UserError(f"the tokenizer's pre_tokenizer {kind!r} is not supported")
    text, how, invert = simple[kind]
    search = re.compile(text) if kind == "WhitespaceSplit" else pattern(text)
    return lambda text, start: _split(text, search, how, invert)


def _in_turn(steps: list[Cut], text: str, start: bool) -> list[str]:
    words = [text]
    for step in steps:
        words = [word for place, part in enumerate(words) for word in step(part, start and place == 0)]
    return words


def _split(text: str, search: re.Pattern, how: str, invert: bool) -> list[str]:
    parts, at = [], 0  # (text, whether it is a match)
    for match in search.finditer(text):
        if match.start() > at:
            parts.append((text[at : match.start()], invert))
        if match.end() > match.start():
            parts.append((match[0], not invert))
        at = match.end()
    if at < len(text):
        parts.append((text[at:], invert))
    if how == "Removed":
        return [part for part, cut in parts if not cut]
    if how == "Isolated":
        return [part for part, _ in parts]
    if how not in ("MergedWithPrevious", "MergedWithNext"):
        raise UserError(f"the tokenizer splits with the behavior {how!r}, which is not supported")
    out: list[str] = []
    last = how == "MergedWithNext"  # whether this part joins the previous one
    for part, cut in parts:
        joins = (cut and not last) if how == "MergedWithPrevious" else (last and not cut)
        if out and joins:
            out[-1] += part
        else:
            out.append(part)
        last = cut
    return out


def _metaspace(text: str, mark: str, prepend: bool, whole: bool) -> list[str]:
    text = text.replace(" ", mark)
    if prepend and not text.startswith(mark):
        text = mark + text
    return [text] if whole else _split(text, re.compile(re.escape(mark)), "MergedWithNext", False)


@functools.cache
def byte_letters() -> str:
    """GPT-2's printable letter for each byte: the byte itself if it is printable, else the next letter from 256 on."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return "".join(chr(byte if byte in own else next(rest)) for byte in range(256))


def _bytewise(text: str, space: bool, words: bool) -> list[str]:
    text = " " + text if space and not text.startswith(" ") else text
    letters = byte_letters()
    parts = _split(text, pattern(WORDS), "Isolated", False) if words else [text]
    return ["".join(letters[byte] for byte in part.encode()) for part in parts]


# ---- back to text


def _uses(spec: Any, kind: str) -> bool:
    """Whether a description contains a step of that kind."""
    if isinstance(spec, Mapping):
        return spec.get("type") == kind or any(_uses(one, kind) for one in spec.values())
    return isinstance(spec, list) and any(_uses(one, kind) for one in spec)


def spaces(about: Mapping) -> Callable[[list[str]], str]:
    """The function that joins pieces to a text, for byte letters, or for SentencePiece's spaces and byte names."""
    if _uses(about["pre_tokenizer"], "ByteLevel"):
        number = {letter: byte for byte, letter in enumerate(byte_letters())}
        end = about["model"].get("end_of_word_suffix") or ""

        def of_bytes(pieces: list[str]) -> str:
            words = [piece.removesuffix(end) + " " if end and piece.endswith(end) else piece for piece in pieces]
            raw = b"".join(bytes([number[c]]) if c in number else c.encode() for word in words for c in word)
            return raw.decode("utf-8", "replace").strip(" " if end else "")

        return of_bytes

    if about["model"].get("continuing_subword_prefix"):
        prefix = about["model"]["continuing_subword_prefix"]
        return lambda pieces: " ".join(pieces).replace(f" {prefix}", "")

    def of_marks(pieces: list[str]) -> str:
        raw = [bytes([int(found[1], 16)]) if (found := BYTE.fullmatch(piece)) else piece.encode() for piece in pieces]
        return b"".join(raw).decode("utf-8", "replace").replace(SPACE, " ").removeprefix(" ")

    return of_marks
