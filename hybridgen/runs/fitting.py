"""Whether the parts of a config fit it and each other: their names, their roles, and their sizes.

`where` says what a part is called in a message, {name: "config.parts.tokenizer=runs/vq"}.
"""

from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

from hybridgen.core.config import hint
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.models.contract import Part, Shape, find, fit

RGB = 3


def check_names(families: Iterable[str], where: Mapping[str, str], partial: bool = False) -> None:
    """Raises UserError for a part that none of `families` (of a config and its parts) uses; names the nearest one.

    partial: some parts do not exist yet; a prior or decoder among them may use further parts.
    """
    names = list(dict.fromkeys(families))
    known = contract.parts_of(map(find, names))
    if partial and known and {"prior", "decoder"} & known:
        known |= set(contract.PARTS)
    for name, text in where.items():
        if known is not None and name not in known:
            listed = f"its parts are {', '.join(sorted(known))}" if known else "it has no parts"
            raise UserError(f"{text}: {names[0]!r} uses no part {name!r}{hint(name, known) or f'; {listed}'}")


def check_roles(runs: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Raises UserError for a run that cannot be the part that it is given as, such as a text encoder as tokenizer."""
    for name, run in runs.items():
        kind, family = contract.PARTS.get(name), find(run.part.family)
        if kind is None:  # a part of a family of one's own
            continue
        is_it = f"{where[name]} is a run of {run.part.family}"
        if kind.role not in contract.roles(family):
            raise UserError(f"{is_it}, but the part {name!r} must be {kind.what}")
        if kind.function and contract.optional(family, kind.function) is None:
            raise UserError(f"{is_it}, which has no {kind.function}(), but the part {name!r} must be {kind.what}")
        if kind.codes is not None and bool(run.part.model.vocab) != kind.codes:
            has, other = ("no codebook", "autoencoder") if kind.codes else ("a codebook", "tokenizer")
            raise UserError(f"{is_it} with {has}, but the part {name!r} must be {kind.what}: is it the {other}?")


def check_sizes(family: ModuleType, model: Any, parts: Mapping[str, Part], where: Mapping[str, str]) -> None:
    """Raises UserError if the model, or a prior or decoder among its parts, has other sizes than its parts."""
    consumers = {"the model": (family, model)}
    consumers |= {
        f"the part {name!r}": (find(part.family), part.model) for name, part in parts.items() if name != "tokenizer"
    }
    for called, (module, other) in consumers.items():
        for name, size, theirs, ours in _sizes(contract.roles(module), other, parts):
            if theirs != ours:
                raise UserError(f"{where[name]} has the {size} {theirs}, but {called} has {ours}")


def _sizes(roles: Collection[str], model: Any, parts: Mapping[str, Part]) -> list[tuple[str, str, Any, Any]]:
    """(part, what, its size, that of the model) of all sizes that must be equal."""
    found = []
    if "tokenizer" in parts:
        tokenizer = parts["tokenizer"].model
        if "prior" in roles and "text" not in roles:
            found += [("tokenizer", name, getattr(tokenizer, name), getattr(model, name, None)) for name in TOKENS]
        if "decoder" in roles and getattr(model, "plan_width", 0):
            found.append(("tokenizer", "code_width", tokenizer.code_width, model.plan_width))
    if "autoencoder" in parts and "decoder" in roles:
        auto = parts["autoencoder"]
        found.append(("autoencoder", "channels", auto.model.code_width, model.channels))
        if contract.optional(find(auto.family), "for_shape") is None:  # it encodes images of one shape only
            found.append(("autoencoder", "grid", tuple(auto.model.grid), tuple(model.shape)))
    return [one for one in found if one[3] is not None]


TOKENS = ("vocab", "grid")


def latents(auto: Part, shape: Shape) -> Shape:
    """The grid of an autoencoder's latents of images of `shape`; its own grid if it takes images of one shape only.

    Raises UserError for a shape that it cannot divide.
    """
    family = find(auto.family)
    if contract.optional(family, "for_shape") is None:
        return tuple(auto.model.grid)
    return tuple(fit(family, auto.model, {}, shape).grid)


def check_drawable(family: ModuleType, model: Any, parts: Mapping[str, Part]) -> None:
    """Raises UserError if no image can be made: tokens without tokenizer, latents without autoencoder."""
    within = contract.members(family, model).values()
    every = [(family, model), *((find(one.family), one.model) for one in (*within, *parts.values()))]
    for module, one in every:
        roles = contract.roles(module)
        if "prior" in roles and "text" not in roles and "tokenizer" not in parts:
            kind = contract.named(module)
            raise UserError(f"{kind} generates tokens, but has no part 'tokenizer', which makes images of them")
        if "decoder" in roles and one.channels != RGB and "autoencoder" not in parts:
            kind = f"{contract.named(module)} generates latents of {one.channels} channels"
            raise UserError(f"{kind}, but has no part 'autoencoder', which makes images of them")
