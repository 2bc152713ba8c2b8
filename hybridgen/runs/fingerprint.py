"""What must be the same when a run goes on: nested dicts of plain values, and trees of arrays, compared by name."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError


def check_fingerprint(old: Mapping, new: Mapping, allow: Collection[str] = ()) -> None:
    """Raises UserError naming every dotted key in which two nested dicts differ; `allow`: keys or branches."""
    if differ := _differences(old, new, allow):
        says, keys = "; ".join(differ.values()), ",".join(differ)
        raise UserError(f"another run than the checkpoint's: {says} (--allow {keys})")


def check_model(what: str, saved: Mapping, config: Mapping) -> None:
    """Raises UserError naming the keys in which family and model of a config are not those that were saved."""
    old, new = ({name: one[name] for name in ("family", "model") if name in one} for one in (saved, config))
    if differ := _differences(old, new):
        raise UserError(f"{what} is of another config: {'; '.join(differ.values())}")


def _differences(old: Mapping, new: Mapping, allow: Collection[str] = ()) -> dict[str, str]:
    """{dotted key: how it differs}."""
    was, now = _dotted(old), _dotted(json.loads(json.dumps(new)))  # as JSON gives it back: tuples are lists
    missing, differ = object(), {}
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key, missing), now.get(key, missing)
        if a != b and not any(key == name or key.startswith(f"{name}.") for name in allow):
            a, b = ("nothing" if value is missing else json.dumps(value)[:80] for value in (a, b))
            differ[key] = f"{key} was {a} and is {b}"
    return differ


def _dotted(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def compare(what: str, saved: Mapping, abstract: Mapping) -> None:
    """Raises UserError naming the paths in which a checkpoint's tree is not the one asked for."""

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
        ("has besides", [key for key in has if key not in wants]),
        ("differs in", [f"{k} {has[k]} instead of {wants[k]}" for k in wants if k in has and has[k] != wants[k]]),
    ]
    if any(lines for _, lines in faults):
        raise UserError(f"{what} is of another config: it " + "; it ".join(f"{w} {some(k)}" for w, k in faults if k))
