"""Quantisers: the bottleneck between a tokenizer's encoder and decoder. One file per kind, found by its name.

    quantizer = build({"kind": "fsq", "levels": (8, 5, 5, 5)})      # nn/quantizers/fsq.py

A file has one frozen, hashable dataclass `Quantizer`, whose fields are the options, all with a default. Its arrays are
stored with those of the networks: in `params` if gradients train them, otherwise in `extra`. It has

    size, width                      number of codes v, 0 for a continuous latent; channels d of a code
    decay                            decay of its moving averages
    init(key)                        -> its entries of (params, extra)
    project(z)                       encoder outputs [b, h, w, d] -> the form compared with codes (such as unit vectors)
    encode(params, extra, z)         projected outputs -> (codes [b, h, w, d] with a gradient, ids [b, h, w] or None)
    codes(params, extra, ids)        ids [...] -> codes [..., d], the values that `encode` returns
    loss(params, extra, z, ids)      -> (loss terms of each picture [b], sums over tokens, metrics)
    merge(extra, sums, key, step)    -> `extra` after a step, from the sums over microbatches and hosts

In training `encode` and `loss` have a `Training` as their last argument, for kinds that sample. In `extra` every kind
with codes has `use [v]`, the moving average of each code's tokens per step, starting at zero. A kind without codes
(none.py) has `standardise(extra, z)` and `restore(extra, latent)` instead of `codes`.

Kinds with several codes per position are possible: `z` is the whole grid, and no caller assumes ids `[b, h, w]`. A
residual quantiser returns ids `[b, h, w, r]`, each level for the residual of the levels before; a multi-scale one (VAR)
ids `[b, n]` of all its grids. `encode` returns the sum of their codes, in the shape of `z`. A family with such a
quantiser defines its own `embed` and `length`, because it has more than one id per position.

Letters: b batch, h w grid, d code width, v codes.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from hybridgen.core import rng
from hybridgen.core.errors import UserError


class Training(NamedTuple):
    """The random state of a training step: its key, the pictures' ids `ids [b]`, and the step number `step`."""

    key: jax.Array
    ids: jax.Array
    step: jax.Array

    def keys(self) -> jax.Array:
        """One key per picture `[b]`: samples are the same on every mesh and with any accumulation."""
        return rng.sample_keys(self.key, self.ids)


def kinds() -> list[str]:
    """The names of all kinds: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(options: Mapping[str, Any]) -> Any:
    """The quantiser of `{"kind": ..., option: value}`. Raises UserError for an unknown kind or option."""
    if not hasattr(options, "items"):
        raise UserError(f"quantizer {repr(options)[:80]} is not a group of options such as {{'kind': 'fsq'}}")
    kind = options.get("kind")
    if kind not in kinds():
        raise UserError(f"quantizer.kind {repr(kind)[:80]} is not one of {', '.join(kinds())}")
    quantizer = importlib.import_module(f"{__name__}.{kind}").Quantizer
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    known = ["kind", *(field.name for field in dataclasses.fields(quantizer))]
    if unknown := sorted(given.keys() - set(known)):
        raise UserError(f"quantizer {kind!r} has no option {unknown[0][:80]!r}, only {', '.join(known[1:])}")
    del given["kind"]
    return quantizer(**given)


def check_ranges(quantizer: Any, **ranges: tuple[float, float]) -> None:
    """Raises UserError for an option (or a member of a tuple) that is out of its range or has another type."""
    for field in dataclasses.fields(quantizer):
        value, default = getattr(quantizer, field.name), field.default
        if isinstance(default, tuple):
            numbers, example = value if isinstance(value, tuple) and value else (None,), default[0]
        else:
            numbers, example = (value,), default
        for number in numbers:
            if isinstance(example, bool) or isinstance(number, bool):
                right = type(number) is type(example)
                wanted = "true or false" if isinstance(example, bool) else "a number"
            else:
                low, high = ranges[field.name]
                right = isinstance(number, int if isinstance(example, int) else int | float) and low <= number <= high
                wanted = f"within {low} and {high}"
            if not right:
                raise UserError(f"quantizer.{field.name} {repr(value)[:80]} is not {wanted}")
