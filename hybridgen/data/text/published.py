"""Tokenizers of published checkpoints, from their folders: `tokenizer.json`, or the files of CLIP (`vocab.json` and
`merges.txt`) or T5 (`spiece.model`).

    tokenizer = Published.read("FOLDER", length=77)          # data.text = {"kind": "published", "path": "FOLDER", ...}

Supported are byte-pair encodings (on bytes, as in GPT-2 and Llama 3; with CLIP's word ends; with Llama's byte
fallback), Unigram (Kudo 2018, as in T5) and WordPiece (BERT), with the normalizers and pre-tokenizers of steps.py.
Unsupported features of a file raise UserError with their name. The whole description is stored with a run as plain JSON
(`to_json`).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hybridgen.core.errors import UserError
from hybridgen.data.files import read_json, read_text
from hybridgen.data.text import spiece
from hybridgen.data.text import steps as text_steps
from hybridgen.data.text.bpe import KEPT, KEPT_LENGTH, merge
from hybridgen.data.text.prompts import check_prompt, checked_length, fit

UNKNOWN_COST = 10.0  # SentencePiece: log-probability of an unknown letter below that of the rarest piece
PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens", "post_processor")
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Published:
    """A tokenizer as described by `about`, the content of a `tokenizer.json`; `pad`: the padding id.

    Raises UserError for a description that is invalid or has an unsupported feature.
    """

    kind = "published"

    def __init__(self, about: Mapping[str, Any], pad: int, length: int):
        self.about, self.pad, self.length = {name: about.get(name) for name in PARTS}, pad, checked_length(length)
        try:
            self._build()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, re.error) as error:
            raise UserError(f"cannot read the text tokenizer: {type(error).__name__}: {str(error)[:200]}") from None
        self.vocab_size = 1 + max(self._pieces)
        if type(pad) is not int or not 0 <= pad < self.vocab_size:
            raise UserError(f"the padding id {pad!r} is not within 0 and {self.vocab_size - 1}")
        if len(self._begin) + len(self._end) >= self.length:
            marks = len(self._begin) + len(self._end)
            raise UserError(f"text.length {self.length} must be more than the {marks} special tokens of a prompt")

    def _build(self) -> None:
        about = self.about
        self._normalise = text_steps.normaliser(about["normalizer"])
        self._cut = text_steps.cutter(about["pre_tokenizer"])
        self._model, vocab = MODELS[_kind(about["model"], MODELS, "model")](about["model"])
        added = about["added_tokens"] or []
        if wrong := next((one["content"] for one in added if one.get("single_word")), None):
            raise UserError(f"the added token {wrong!r} has single_word, which is not supported")
        self._pieces = {i: piece for piece, i in vocab.items()} | {one["id"]: one["content"] for one in added}
        if not all(type(i) is int and 0 <= i < 2**24 for i in self._pieces):
            raise ValueError("an id of the vocabulary is not an integer of at least 0")
        self._special = {one["id"] for one in added if one.get("special")}
        self._added = [
            _finder(
                [one for one in added if bool(one.get("normalized", not one.get("special"))) == late],
                self._normalise if late else str,
            )
            for late in (False, True)
        ]
        self._begin, self._end = _marks(about["post_processor"], vocab | {one["content"]: one["id"] for one in added})
        self._spaces = text_steps.spaces(about)
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without the special tokens around it."""
        out: list[int] = []
        text, start = text.encode("utf-8", "replace").decode(), True
        for part, token in self._added[0](text):
            if token is not None:
                out.append(token)
            for piece, inner in self._added[1](self._normalise(part)) if token is None else ():
                words = [piece] if inner is not None else self._cut(piece, start)
                out += [inner] if inner is not None else [i for word in words for i in self._word(word)]
                start = False
            start = start and not part
        return out

    def _word(self, word: str) -> list[int]:
        if len(word) > KEPT_LENGTH:
            return self._model(word)
        if word not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[word] = self._model(word)
        return self._known[word]

    def encode(self, text: str, *, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids L int32, mask L bool), with special tokens around the text. Not strict: the text is cut to fit L."""
        if strict:
            check_prompt(text)
        marks = {"begin": self._begin, "end": self._end}
        return fit(self.ids(text), self.length, "tokens", strict, pad=self.pad, **marks)

    def decode(self, ids: ArrayLike) -> str:
        """ids: any number of ints -> text, without special tokens and padding."""
        left_out = {*self._begin, *self._end, *self._special, self.pad}
        return self._spaces([self._pieces[i] for i in np.asarray(ids).tolist() if i not in left_out])

    def to_json(self) -> dict:
        return {"kind": self.kind, "length": self.length, "pad": self.pad, "tokenizer": self.about}

    @classmethod
    def from_json(cls, data: Mapping) -> "Published":
        """The tokenizer of a `to_json` description. Raises UserError for anything else."""
        if not isinstance(data.get("tokenizer"), dict):
            raise UserError("not a published tokenizer: it has no 'tokenizer'")
        return cls(data["tokenizer"], data.get("pad"), data.get("length"))

    @classmethod
    def read(cls, path: str, length: int) -> "Published":
        """The tokenizer in a checkpoint's folder, for prompts of `length`. Raises UserError if it cannot be read."""
        folder = Path(path)
        if (folder / "tokenizer.json").is_file():
            about = read_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            about = _clip(read_json(folder / "vocab.json"), folder / "merges.txt")
        elif (folder / "spiece.model").is_file():
            about = spiece.read(folder / "spiece.model", _extra(folder / "tokenizer_config.json"))
        else:
            files = "neither tokenizer.json nor vocab.json and merges.txt nor spiece.model"
            raise UserError(f"no tokenizer in {path}: it has {files}")
        if not isinstance(about, dict):
            raise UserError(f"{folder} has no tokenizer: its file is a JSON {type(about).__name__}, not an object")
        try:
            pad = _pad(folder, about)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read the text tokenizer: {type(error).__name__}: {str(error)[:200]}") from None
        return cls(about, pad, length)


def _kind(spec: Any, known: Mapping, what: str) -> str:
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind is None and isinstance(spec, dict):  # files of the first version have no type
        kind = "BPE" if "merges" in spec else "Unigram" if isinstance(spec.get("vocab"), list) else None
    if kind not in known:
        raise UserError(f"the tokenizer's {what} {kind!r} is not supported; supported are {', '.join(known)}")
    return kind


def _extra(file: Path) -> int:
    """The number of extra ids after T5's pieces, from tokenizer_config.json; else 100."""
    config = read_json(file) if file.is_file() else {}
    count = config.get("extra_ids", 100) if isinstance(config, dict) else 100
    if type(count) is not int or not 0 <= count <= 10_000:
        raise UserError(f"{file}: extra_ids is {str(count)[:40]}, but must be an integer from 0 to 10000")
    return count


def _pad(folder: Path, about: Mapping) -> int:
    """The padding id, from tokenizer_config.json, special_tokens_map.json or tokenizer.json; else 0."""
    added = {one["content"]: one["id"] for one in about.get("added_tokens") or [] if isinstance(one, dict)}
    vocab = about.get("model", {}).get("vocab")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            token = config.get("pad_token") if isinstance(config, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found = added.get(token, vocab.get(token) if isinstance(vocab, dict) else None)
                if found is None:
                    raise UserError(f"the padding token {token!r} of {folder / name} is not in the vocabulary")
                return found
    padding = about.get("padding")
    if isinstance(padding, dict) and type(padding.get("pad_id")) is int:
        return padding["pad_id"]
    # CLIP was trained on prompts that are padded with its end token
    return about.get("clip_end", 0)


def _clip(vocab: Any, merges: Path) -> dict:
    """The description in the format of tokenizer.json of CLIP's two files (Radford et al. 2021)."""
    marks = ("<|startoftext|>", "<|endoftext|>")
    if not isinstance(vocab, dict) or not all(mark in vocab for mark in marks):
        raise UserError(
            f"{merges.parent} has no tokenizer of CLIP: its vocab.json lacks {marks}; for other tokenizers give a "
            f"folder with tokenizer.json"
        )
    pairs = [
        line.split(" ") for line in read_text(merges).split("\n") if line.strip() and not line.startswith("#version")
    ]
    added = [{"id": vocab[mark], "content": mark, "special": True, "normalized": False} for mark in marks]
    steps = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]
    cuts = [
        {"type": "Split", "pattern": {"Regex": CLIP_PATTERN}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": pairs, "end_of_word_suffix": "</w>", "unk_token": marks[1]}
    around = {"type": "RobertaProcessing", "cls": [marks[0], vocab[marks[0]]], "sep": [marks[1], vocab[marks[1]]]}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "model": model,
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": around,
        "clip_end": vocab[marks[1]],
    }


def _finder(added: list[Mapping], change: Callable) -> Callable[[str], list[tuple[str, int | None]]]:
    """A function: text -> [(part, None) or (added token, its id)]; the leftmost, then longest token first."""
    found = {change(one["content"]): one for one in added}
    found.pop("", None)
    pattern = "|".join(
        (r"\s*" if one.get("lstrip") else "") + re.escape(text) + (r"\s*" if one.get("rstrip") else "")
        for text, one in sorted(found.items(), key=lambda pair: -len(pair[0]))
    )
    if not found:
        return lambda text: [(text, None)] if text else []
    cut = re.compile(f"({pattern})")
    ids = {text: one["id"] for text, one in found.items()}

    def find(text: str) -> list[tuple[str, int | None]]:
        parts = cut.split(text)
        tokens = [part if part in ids else part.strip() for part in parts[1::2]]
        pairs = [(part, None) for part in parts]
        pairs[1::2] = [(token, ids[token]) for token in tokens]
        return [pair for pair in pairs if pair[0]]

    return find


def _marks(spec: Any, vocab: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids after) a text."""
    kind = spec.get("type") if spec else "ByteLevel"
    if kind == "ByteLevel":
        return (), ()
    if kind in ("RobertaProcessing", "BertProcessing"):
        return (spec["cls"][1],), (spec["sep"][1],)
    if kind == "Sequence":
        each = [_marks(one, vocab) for one in spec["processors"]]
        return (tuple(i for begin, _ in reversed(each) for i in begin), tuple(i for _, end in each for i in end))
    if kind != "TemplateProcessing":
        raise UserError(f"the tokenizer's post_processor {kind!r} is not supported")
    names = [next(iter(one.items())) for one in spec["single"]]
    place = [name for name, _ in names].index("Sequence")
    ids = [spec["special_tokens"][one["id"]]["ids"] if name == "SpecialToken" else [] for name, one in names]
    return tuple(i for part in ids[:place] for i in part), tuple(i for part in ids[place:] for i in part)


# ---- models: spec -> (word -> ids, vocabulary)


def _bpe(spec: Mapping) -> tuple[Callable[[str], list[int]], dict[str, int]]:
    if spec.get("dropout"):
        raise UserError(f"the tokenizer has a dropout of {spec['dropout']}, which is not supported")
    vocab, prefix, suffix = spec["vocab"], spec.get("continuing_subword_prefix") or "", spec.get("end_of_word_suffix")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in spec["merges"]]
    ranks = {}
    for rank, (left, right) in enumerate(pairs):
        joined = left + right.removeprefix(prefix)
        ranks[vocab[left], vocab[right]] = (rank, vocab[joined])
    unknown = vocab[spec["unk_token"]] if spec.get("unk_token") is not None else None
    whole, fuse, bytewise = spec.get("ignore_merges"), spec.get("fuse_unk"), spec.get("byte_fallback")

    def encode(word: str) -> list[int]:
        if whole and word in vocab:
            return [vocab[word]]
        ids: list[int] = []
        fused = False
        for place, letter in enumerate(word):
            last = place == len(word) - 1
            piece = (prefix if place else "") + letter + ((suffix or "") if last else "")
            parts = [vocab[piece]] if piece in vocab else _fallback(piece, vocab) if bytewise else None
            if parts is None and unknown is not None and not (fuse and fused):
                parts, fused = [unknown], True
            elif parts is not None:
                fused = False
            ids += parts or []
        return merge(ids, ranks)

    return encode, vocab


def _fallback(piece: str, vocab: Mapping[str, int]) -> list[int] | None:
    names = [f"<0x{byte:02X}>" for byte in piece.encode()]
    return [vocab[name] for name in names] if all(name in vocab for name in names) else None


def _unigram(spec: Mapping) -> tuple[Callable[[str], list[int]], dict[str, int]]:
    pieces = {piece: (float(score), i) for i, (piece, score) in enumerate(spec["vocab"])}
    vocab = {piece: i for i, (piece, _) in enumerate(spec["vocab"])}
    unknown, bytewise = spec.get("unk_id"), spec.get("byte_fallback")
    longest = max(map(len, pieces))
    lowest = min(score for score, _ in pieces.values()) - UNKNOWN_COST

    def encode(word: str) -> list[int]:
        best = [(0.0, 0, -1)] + [(-np.inf, 0, -1)] * len(word)  # by end: score, start, id (-1: unknown)
        for start in range(len(word)):
            score = best[start][0]
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                found = pieces.get(word[start:end])
                if found is not None and score + found[0] > best[end][0]:
                    best[end] = (score + found[0], start, found[1])
            if word[start] not in pieces and score + lowest > best[start + 1][0]:
                best[start + 1] = (score + lowest, start, -1)
        parts, end = [], len(word)
        while end:
            _, start, i = best[end]
            if i == -1 and parts and parts[-1][1] == -1:
                parts[-1] = (word[start:end] + parts[-1][0], -1)  # consecutive unknown letters are one token
            else:
                parts.append((word[start:end], i))
            end = start
        return [j for piece, i in reversed(parts) for j in ([i] if i >= 0 else missing(piece))]

    def missing(piece: str) -> list[int]:
        ids = _fallback(piece, vocab) if bytewise else None
        if ids is None and unknown is None:
            raise UserError(f"the tokenizer has no piece for {piece[:20]!r}, and no unknown token")
        return [unknown] if ids is None else ids

    return encode, vocab


def _wordpiece(spec: Mapping) -> tuple[Callable[[str], list[int]], dict[str, int]]:
    """The longest piece first (Wu et al. 2016, as in BERT); a word that has no split into pieces is unknown."""
    vocab, prefix, most = spec["vocab"], spec["continuing_subword_prefix"], spec["max_input_chars_per_word"]
    unknown = vocab[spec["unk_token"]]

    def encode(word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= most:
            ends = (end for end in range(len(word), start, -1) if (prefix if start else "") + word[start:end] in vocab)
            end = next(ends, None)
            if end is None:
                return [unknown]
            ids.append(vocab[(prefix if start else "") + word[start:end]])
            start = end
        return ids if len(word) <= most else [unknown]

    return encode, vocab


MODELS = {"BPE": _bpe, "Unigram": _unigram, "WordPiece": _wordpiece}
