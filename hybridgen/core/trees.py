"""Nested dicts of arrays by path: flatten, split by pattern, count.

A path is "blocks/attention/qkv/kernel". Patterns are regular expressions that are searched in the path; of an ordered
list of (pattern, value), the first match decides.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {path: leaf}; empty dicts are dropped."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{path: leaf} -> nested dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def split(tree: Mapping, keep: Callable[[str], bool]) -> tuple[dict, dict]:
    """(leaves whose path `keep` accepts, the others), both nested."""
    flat = flatten(tree)
    yes = {path: leaf for path, leaf in flat.items() if keep(path)}
    return unflatten(yes), unflatten({path: leaf for path, leaf in flat.items() if path not in yes})


def join(*trees: Mapping) -> dict:
    """Merges nested dicts that have no leaf in common."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def first_match(path: str, rules: Iterable[tuple[str, Any]], default: Any) -> Any:
    """Value of the first (pattern, value) whose pattern is found in `path`."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    return default


def count(tree: Any) -> int:
    """Number of array elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
