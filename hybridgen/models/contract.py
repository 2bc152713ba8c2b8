"""Families by name, and parts: pretrained components that a family is given.

A family is a module under `hybridgen.models` with the functions `build, init, loss, sample` and those of its role
(DESIGN: the family contract). A part is a family's model with its arrays: a small pytree whose leaves are `params` and
`extra` and whose static half names the family and holds the module, so that it travels into jit as traced arguments.

Roles, the functions by which hybrids use any family; each takes (model, params, extra, ...) unless it says otherwise:

    tokenizer   encode(image) -> tokens or latent (of a model with `moments`, with keys=: a draw); embed(tokens) ->
                codes b h w d; decode(codes or latent) -> image; model: grid, length, vocab, code_width
    text        encode(text, mask) -> features b l d, mask b l; and, where the tower has such a vector, pooled(text,
                mask) -> b p. Published towers take no mask too (None): every position is seen
    prior       condition(model, batch, parts) -> cond; prefill(cond) -> (logits, cache); step(cache, chunk) ->
                (logits, cache); score(tokens, cond) -> logits; features(tokens, cond) -> hidden states;
                plan(cond, keys, options) -> (tokens, log-probabilities); model: width, length, drop
    decoder     conditioning(model, batch, parts, tokens) -> cond; plan_conditioning(model, codes, parts) -> its entries
                that follow from a plan; corrupt_tokens(tokens, keys, vocab, most) -> tokens; decoder_loss(model,
                params, batch, cond, keys, parts, train) -> (loss, aux); predict(x, t, cond) -> prediction; render(cond,
                keys, parts, options) -> image; model: roles.denoiser.Denoiser (a network with its process)

Families whose pictures may have several shapes also offer sized(model, (height, width), parts) -> the model for
pictures of that shape, on the same arrays; its parts are sized already.

`parts` are those of the whole config, by name. A part has none of its own: what a prior needs (a text tower) is the
part of that name of whoever uses the prior, and must be the one that the prior was trained with, by its digest.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax

from hybridgen.core.errors import UserError


def find(family: str) -> ModuleType:
    """The module of a family by its dotted name under `hybridgen.models`, such as "ar.raster"."""
    try:
        return importlib.import_module(f"hybridgen.models.{family}")
    except ModuleNotFoundError as error:
        if f"hybridgen.models.{family}".startswith(error.name or "?"):
            file = f"hybridgen/models/{family.replace('.', '/')}.py"
            raise UserError(f"no family {family!r}: there is no {file if file.isprintable() else 'such'}") from None
        raise


class Option(NamedTuple):
    """A sampling option of a family, an entry of its `OPTIONS`: {group: {name: Option}}, as in `config.sample.options`.

    A number is within `low` and `high`, whole if the default is; a text is one of `choices`, or any if there are none.
    `flag`: the name on the command line and in the Python API, if it is not that of the option.
    """

    default: Any
    meaning: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    flag: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """A component: `part.call("encode", image)` runs a role function of its family on its arrays."""

    params: Any
    extra: Any
    family: str = dataclasses.field(metadata={"static": True})
    model: Any = dataclasses.field(metadata={"static": True})  # what the family builds: a module, or one and more

    def call(self, role: str, *args: Any, **options: Any) -> Any:
        return getattr(find(self.family), role)(self.model, self.params, self.extra, *args, **options)


Parts = Mapping[str, Part]
Shape = tuple[int, int]  # height, width


def for_shape(family: ModuleType, model: Any, parts: Mapping[str, Part], shape: Shape) -> tuple[Any, dict]:
    """A model and its parts for pictures of `shape`. UserError naming a family that has one shape only."""
    ready: dict[str, Part] = {}
    for name in sorted(parts, key=lambda name: (name not in ("tokenizer", "autoencoder"), name)):  # others need these
        part, module = parts[name], find(parts[name].family)
        draws = hasattr(module, "for_shape") or hasattr(part.model, "grid")  # towers and feature networks have no shape
        ready[name] = dataclasses.replace(part, model=_for_shape(module, part.model, ready, shape)) if draws else part
    return _for_shape(family, model, ready, shape), ready


def _for_shape(family: ModuleType, model: Any, parts: Mapping[str, Part], shape: Shape) -> Any:
    name, size = family.__name__.removeprefix("hybridgen.models."), "{} x {}".format(*shape)
    if not hasattr(family, "for_shape"):
        raise UserError(f"{name} takes pictures of one shape, and these are of several, such as {size}")
    try:
        return family.for_shape(model, tuple(shape), parts)
    except UserError as error:
        raise UserError(f"{name} cannot take pictures of {size}: {error}") from None


def sides(resolution: int | Shape) -> Shape:
    """(height, width) of a model's pictures: an option that is a square's side, or both."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def divided(shape: Shape, by: int) -> Shape:
    """The grid of a picture whose sides are reduced by a factor. UserError where they do not divide."""
    if any(side % by for side in shape):
        raise UserError(f"its sides do not divide by {by}")
    return shape[0] // by, shape[1] // by


def need(parts: Parts, name: str, why: str) -> Part:
    """The part `name`; raises UserError naming what needs it."""
    if name not in parts:
        raise UserError(f"{why} needs the part {name!r}; this config has {sorted(parts) or 'none'}")
    return parts[name]
