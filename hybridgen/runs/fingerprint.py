"""Compares a run with its checkpoint before it resumes: nested dicts of plain values and trees of arrays, by key."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError


def check_fingerprint(old: Mapping, new: Mapping, allow: Collection[str] = ()) -> None:
    """Raises UserError if two nested dicts differ, naming every dotted key; `allow`: keys or branches to ignore."""
    if differ := _differences(old, new, allow):
        says, keys = "; ".join(differ.values()), ",".join(differ)
        raise UserError(f"the run differs from its checkpoint: {says} (to resume nevertheless: --allow {keys})")


def check_model(what: str, saved: Mapping, config: Mapping) -> None:
    """Raises UserError if family or model of a config differ from the saved ones, naming the keys."""
    old, new = ({name: one[name] for name in ("family", "model") if name in one} for one in (saved, config))
    if differ := _differences(old, new):
        raise UserError(f"{what} has another config: {'; '.join(differ.values())}")


def text_digest(about: Mapping) -> str | None:
    """The digest of the text tokenizer that a checkpoint was saved with; None if it had none or does not say it."""
    text = about["fingerprint"].get("data", {}).get("text")
    return text.get("digest") if text else about["meta"].get("text")


def _differences(old: Mapping, new: Mapping, allow: Collection[str] = ()) -> dict[str, str]:
    """{dotted key: a description of the difference}."""
    was, now = _dotted(old), _dotted(json.loads(json.dumps(new)))  # through JSON, which turns tuples into lists
    missing, differ = object(), {}
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key, missing), now.get(key, missing)
        if a != b and not any(key == name or key.startswith(f"{name}.") for name in allow):
            a, b = ("missing" if value is missing else json.dumps(value)[:80] for value in (a, b))
            differ[key] = f"{key} was {a} and is {b}"
    return differ


def _dotted(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def compare(what: str, saved: Mapping, abstract: Mapping) -> None:
    """Raises UserError if a checkpoint's tree differs from `abstract`, naming the paths."""

    def shapes(tree: Mapping, prefix: str = "") -> dict[str, str]:
        flat = {}
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping) and leaf:
                flat |= shapes(leaf, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" if leaf != {} else "nothing"
        return flat

    def some(lines: list[str]) -> str:
        return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")

    has, wants = shapes(saved), shapes(abstract)
    faults = [
        ("lacks", [key for key in wants if key not in has]),
        ("has the extra", [key for key in has if key not in wants]),
        ("differs in", [f"{k} {has[k]} instead of {wants[k]}" for k in wants if k in has and has[k] != wants[k]]),
    ]
    if any(lines for _, lines in faults):
        raise UserError(f"{what} has another config: it " + "; it ".join(f"{w} {some(k)}" for w, k in faults if k))
