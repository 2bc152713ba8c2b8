"""Model options that are given by hand must agree with the data and the parts, from which "auto" takes them."""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.data.sources.reading import read
from hybridgen.models import contract
from hybridgen.models.contract import Part, find, sides
from hybridgen.runs import fitting

OF_TOKENIZER = {"vocab": "codes", "grid": "a grid of", "plan_width": "codes of the width"}


def check(
    family: ModuleType, options: Mapping[str, Any], known: Mapping[str, Any], parts: Mapping[str, Part], source: Any
) -> None:
    """Raises UserError for an option of a model, or of a model within it, that does not agree with `known`.

    known: the values of "auto" by name. source: the training data, or None if the run is not trained.
    """
    for where, family_of, given in _models("model", family, options):
        _check_tokens(where, given, known)
        if source is not None:
            _check_text(where, family_of, given, known, source)
            _check_shape(where, family_of, given, known, parts, source)


def _models(where: str, family: ModuleType, options: Mapping) -> Iterator[tuple[str, ModuleType, Mapping]]:
    """(config key, family, options) of a model and of the models that are trained within it."""
    yield where, family, options
    for name, member in options.items():
        if hasattr(member, "items") and {"family", "model"} <= set(member):
            yield from _models(f"{where}.{name}.model", find(member["family"]), member["model"])


def _check_tokens(where: str, given: Mapping, known: Mapping) -> None:
    for name, what in OF_TOKENIZER.items():
        value, right = given.get(name), known.get(name)
        if value and right and _plain(value) != _plain(right):
            has = f"{right} codes" if name == "vocab" else f"{what} {right}"
            raise UserError(f"{where}.{name} is {value}, but the part 'tokenizer' has {has}: set {where}.{name}=auto")
        if value and name == "vocab" and right == 0:
            raise UserError(f"{where}.vocab is {value}, but the part 'tokenizer' has no codes: it makes latents")


def _check_text(where: str, family: ModuleType, given: Mapping, known: Mapping, source: Any) -> None:
    vocab, length = given.get("text_vocab"), given.get("text_length")
    if not vocab:
        return
    if not known.get("text_vocab"):
        why = "the data has no captions" if "text_vocab" in known else "data.text is none"
        raise UserError(f"{where}.text_vocab is {vocab}, but {why}: set {where}.text_vocab=0 and {where}.text_length=0")
    if vocab < known["text_vocab"]:
        needs = f"the text tokenizer has {known['text_vocab']} ids"
        raise UserError(f"{where}.text_vocab is {vocab}, but {needs}: set {where}.text_vocab=auto, or more")
    longer = "text" in contract.roles(family)  # a language model may have more positions than its prompts
    if length < known["text_length"] or (length != known["text_length"] and not longer):
        needs = f"the text tokenizer gives {known['text_length']} (data.text.length)"
        raise UserError(f"{where}.text_length is {length}, but {needs}: set {where}.text_length=auto")


def _check_shape(
    where: str, family: ModuleType, given: Mapping, known: Mapping, parts: Mapping[str, Part], source: Any
) -> None:
    roles = contract.roles(family)
    if not {"tokenizer", "decoder"} & set(roles):
        return
    shape, what, channels = sides(known["resolution"]), "pictures (data.resolution)", 3
    if "decoder" in roles and "latent" in read(source, 0)[0]:
        return  # cached latents, whose shape the batch has
    if "decoder" in roles and "autoencoder" in parts:
        auto = parts["autoencoder"].model
        shape = fitting.latents(parts["autoencoder"], shape)
        what, channels = "latents of the part 'autoencoder'", auto.code_width
    if "decoder" in roles and given.get("channels", channels) != channels:
        raise UserError(f"{where}.channels is {given['channels']}, but {what} have {channels}: set it to {channels}")
    if given.get("resolution") and _plain(sides(given["resolution"])) != _plain(shape):
        size = shape[0] if shape[0] == shape[1] else tuple(shape)
        raise UserError(f"{where}.resolution is {given['resolution']}, but {what} have {size}: set it to {size}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else value
