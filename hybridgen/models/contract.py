"""The family contract: what a family must define, its roles, its sampling options, and parts.

A family is a module with the functions of `FAMILY`, and those of the roles that it declares as `ROLE`: one name of
`ROLES`, or several. It may also define the functions of `OPTIONAL`. It declares its sampling options as `OPTIONS`,
{group: {name: Option}}, as in `config.sample.options`, and the names of the parts that it uses as `PARTS`, a tuple:
other names are refused, unless it declares none. It may declare the ranges of its model's options as `RANGES`,
{option: Range} (core/ranges.py), which are checked before `build`. A family is found by its dotted name: under
`hybridgen.models`, such as "ar.raster", or anywhere that Python imports from, such as "my_package.my_prior".

A part is a family's model with its arrays: a pytree whose leaves are `params` and `extra` and whose static fields are
the family's name and the model, so jit receives its arrays as traced arguments. `parts` are those of the whole config,
by name. A part has no parts of its own: a part that a prior needs (a text tower) must be a part, by the same name, of
the config that uses the prior, and have the digest of the one that the prior was trained with.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from hybridgen.core import importing, numbers, ranges
from hybridgen.core.errors import UserError
from hybridgen.models import checks

PACKAGE = "hybridgen.models"

# function -> its parameters; a family may add parameters with defaults
FAMILY = {
    "build": "config",  # -> model: hyper-parameters only, hashable
    "init": "model key specs parts",  # -> {"params", "extra"}; specs: ShapeDtypeStructs of a batch
}
TRAINED = {
    "loss": "model params batch key parts extra step train",  # -> scalar, {"metrics", "weight", "extra"}
    "sample": "model params cond keys parts extra options",  # -> {"image", "tokens", ...}
}
OPTIONAL = {
    "merge": "model extra sums key step",  # -> extra after a step, from the sums that `loss` returned as aux["extra"]
    "for_shape": "model shape parts",  # -> the model for pictures (height, width), with the same arrays
    "for_plan": "model width",  # decoder: -> the model for plans of that width
    "members": "model",  # -> {name: Member} of the models that are trained inside this one
    "inputs": "model",  # -> Inputs: the entries of a batch that it is conditioned on
    "embed": "model params extra tokens",  # tokenizer with a codebook: b n -> codes b h w d
    "pooled": "model params extra text mask",  # text tower: -> one vector per text, b p
    "distance": "model params extra image other",  # features: the perceptual distance of two images, b
    "moments": "model params extra image",  # tokenizer with a Gaussian latent: -> mean, log-variance, b h w c
}


class Role(NamedTuple):
    """The interface of a role: functions of the family, and attributes of its model."""

    functions: Mapping[str, str]
    attributes: tuple[str, ...] = ()
    trained: bool = True  # has the functions of TRAINED


ROLES = {
    "tokenizer": Role(
        {
            "encode": "model params extra image",  # b H W 3 -> tokens b n, or latent b h w c
            "decode": "model params extra codes",  # codes or latent b h w d -> image b H W 3
        },
        ("grid", "length", "vocab", "code_width"),  # vocab 0: a continuous latent
    ),
    "text": Role({"encode": "model params extra text mask"}, trained=False),  # -> features b l d, mask b l
    "prior": Role(
        {
            "conditioning": "model batch parts",  # -> cond
            "prefill": "model params extra cond",  # -> logits of the first token b v, cache
            "step": "model params extra cache chunk",  # b t -> logits b t v, cache
            "score": "model params extra tokens cond",  # b n -> logits b n v: row i predicts token i
            "features": "model params extra tokens cond",  # b n -> hidden states b n d
            "generate": "model params extra cond keys options",  # -> tokens b n, log-probabilities b n
        },
        ("width", "length"),
    ),
    "decoder": Role(
        {
            "conditioning": "model batch parts",  # -> cond
            "plan_conditioning": "model codes parts",  # codes b h w d -> the entries of cond that depend on a plan
            "corrupt_tokens": "tokens keys vocab most",  # b n -> b n
            "decoder_loss": "model params batch cond keys parts train",  # -> scalar, aux, as `loss`
            "predict": "model params extra x t cond",  # -> prediction b H W c
            "render": "model params extra cond keys parts options",  # -> image b H W 3
        },
        ("shape", "channels"),
    ),
    "features": Role({}, trained=False),  # networks for metrics: encode(image) -> b d, or distance(a, b) -> b
    "generator": Role({}),  # generates pictures by itself and is not a part of another model
}


class Kind(NamedTuple):
    """What a part must be: its role; whether it has a codebook; a function that its family defines."""

    role: str
    what: str
    codes: bool | None = None
    function: str = ""


PARTS = {  # the names of parts that mean the same in every family
    "tokenizer": Kind("tokenizer", "a tokenizer with a codebook", codes=True),
    "autoencoder": Kind("tokenizer", "a tokenizer with a continuous latent", codes=False),
    "text": Kind("text", "a text encoder"),
    "prior": Kind("prior", "a prior"),
    "decoder": Kind("decoder", "a decoder"),
    "perceptual": Kind("features", "a network with a perceptual distance", function="distance"),
}

CONDITIONED = {"prior", "decoder", "generator"}  # roles that may read captions or classes


class Option(NamedTuple):
    """A sampling option of a family, an entry of its `OPTIONS`.

    A number must be within `low` and `high`, and is an integer if the default is one; a string must be in `choices`, or
    may be any if there are none. With `by_condition` a mapping may give one number per condition. flag: the name on the
    command line and in the Python API, if it differs from the option's. off: the value that switches off what the
    option does; with it, all other values are traced numbers of one program, so that a new one compiles nothing.
    """

    default: Any
    meaning: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    by_condition: bool = False
    flag: str = ""
    off: float | None = None

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if isinstance(self.default, str):
            return f"one of {', '.join(self.choices)}" if self.choices else "a text"
        return f"{self.low} to {self.high}"

    def checked(self, where: str, value: Any) -> Any:
        """`value`, converted to the option's type. Raises UserError, which begins with `where`, if it is invalid."""
        if self.by_condition and hasattr(value, "items"):
            return {name: self.checked(f"{where}.{name}", scale) for name, scale in value.items()}
        if isinstance(self.default, str):
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                raise UserError(f"{where} {value!r} is not {self.range}")
            return value
        whole = isinstance(self.default, int)
        return type(self.default)(numbers.checked(where, value, self.low, self.high, whole))


class Inputs(NamedTuple):
    """The entries of a batch that a model is conditioned on: captions (`text`) and labels (`classes` above 0)."""

    text: bool = False
    classes: int = 0


class Member(NamedTuple):
    """A model that is trained inside another one (static); its arrays are a subtree of the other's."""

    family: str
    model: Any

    @classmethod
    def build(cls, described: Mapping[str, Any], **changes: Any) -> "Member":
        """The member described by {"family", "model": its options}, as in a config; `changes` override options."""
        if not isinstance(described, Mapping) or not isinstance(described.get("model"), Mapping):
            raise UserError(
                f"{repr(described)[:80]} does not describe a model: give {{'family': NAME, 'model': OPTIONS}}"
            )
        options = {**described["model"], **changes}  # from JSON, tuples are lists
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return cls(described["family"], model_of(find(described["family"]), options))


# ---------------------------------------------------------------- families by name


@functools.cache
def find(family: str) -> ModuleType:
    """The module of a family by its dotted name. Raises UserError if there is none or it breaks the contract."""
    module = importing.module(f"{PACKAGE}.{family}", "family") or importing.module(family, "family")
    if module is None:
        file = f"hybridgen/models/{family.replace('.', '/')}.py"
        missing = f"no family {family!r}: there is no {file if file.isprintable() else 'such file'}"
        raise UserError(f"{missing}, and Python finds no module {family!r} (is its folder in PYTHONPATH?)")
    if problems := faults(module):
        raise UserError(f"{family!r} is not a family: {problems[0]}")
    return module


def model_of(family: ModuleType, options: Mapping[str, Any]) -> Any:
    """The model of a family with these options. Raises UserError for an unknown or missing option, and if the model
    does not have what the family's roles need."""
    name = repr(named(family))
    ranges.check("model.", getattr(family, "RANGES", {}), options)
    if options.get("text_vocab") and options.get("text_length", 1) == 0:
        raise UserError(
            f"model.text_vocab is {options['text_vocab']}, but model.text_length is 0: set both, or neither"
        )
    if {"width", "heads"} <= set(options) and not options.get("head_width") and options["heads"] > options["width"]:
        raise UserError(f"model.heads {options['heads']} exceed model.width {options['width']}: a head has no channels")
    try:
        model = family.build(options)
    except TypeError as error:
        if fault := checks.unknown_option(error, family, options):
            raise UserError(f"{name} {fault}") from error
        raise
    wanted = [attribute for role in roles(family) for attribute in ROLES[role].attributes]
    if fault := checks.model(model, wanted):
        raise UserError(f"{name} is not a family: {fault}")
    if CONDITIONED & set(roles(family)):
        known = inputs(family, model)
        for option, declared in (("text_vocab", known.text), ("classes", known.classes)):
            if options.get(option) and not declared:
                says = "text=True" if option == "text_vocab" else "classes=model.classes"
                raise UserError(
                    f"{name} has the option {option} {options[option]}, but does not declare that it reads "
                    f"{'captions' if option == 'text_vocab' else 'classes'}: define inputs(model) -> Inputs({says})"
                )
    return model


def returned(family: ModuleType, name: str, out: Any) -> Any:
    """`out`, which the family's function `name` returned: "init", "loss", "decoder_loss" or "sample".

    Raises UserError if it is not what the contract says. Called while a program is traced, it costs nothing.
    """
    fault = checks.RESULTS[name](out)
    if not fault and checks.RESULTS[name] is checks.loss and optional(family, "merge") is None:
        fault = checks.without_merge(out)
    if fault:
        raise UserError(f"{named(family)!r} is not a family: {name} {fault}")
    return out


def file_of(family: str) -> Path:
    """The file of a family of this package, which may not exist."""
    return Path(__file__).parent.joinpath(*family.split(".")).with_suffix(".py")


def named(module: ModuleType) -> str:
    """The dotted name of a family, for `find`."""
    return module.__name__.removeprefix(f"{PACKAGE}.")


def roles(family: ModuleType) -> tuple[str, ...]:
    """The roles that a family declares."""
    role = getattr(family, "ROLE", ())
    return (role,) if isinstance(role, str) else tuple(role)


def faults(family: ModuleType) -> list[str]:
    """The violations of the contract by a module, one line each."""
    declared = roles(family)
    out = [f"its ROLE {role!r} is not one of {', '.join(ROLES)}" for role in declared if role not in ROLES]
    if not declared:
        return [f"{family.__name__} declares no ROLE (one of {', '.join(ROLES)}, or several)"]
    wanted = dict(FAMILY)
    for role in declared:
        wanted |= {} if role not in ROLES else ROLES[role].functions
        wanted |= TRAINED if role in ROLES and ROLES[role].trained else {}
    wanted |= {name: parameters for name, parameters in OPTIONAL.items() if hasattr(family, name)}
    for name, parameters in wanted.items():
        function = getattr(family, name, None)
        if not callable(function):
            out.append(f"it has no function {name}({', '.join(parameters.split())})")
        elif fault := checks.parameters(function, parameters.split()):
            out.append(f"{name} has the parameters ({', '.join(inspect.signature(function).parameters)}), {fault}")
    names = getattr(family, "PARTS", ())
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        out.append("its PARTS is not a tuple of names")
    return [*out, *checks.options(getattr(family, "OPTIONS", {}), Option)]


def optional(family: ModuleType, name: str) -> Callable | None:
    """A function of `OPTIONAL`, or None if the family does not define it."""
    assert name in OPTIONAL, name
    return getattr(family, name, None)


def members(family: ModuleType, model: Any) -> dict[str, Member]:
    """The models that are trained inside a model, by name."""
    within = optional(family, "members")
    return within(model) if within else {}


def inputs(family: ModuleType, model: Any) -> Inputs:
    """The inputs of a model and of the models trained inside it."""
    own = optional(family, "inputs")
    found = [own(model)] if own else []
    found += [inputs(find(member.family), member.model) for member in members(family, model).values()]
    return Inputs(any(one.text for one in found), max((one.classes for one in found), default=0))


def parts_of(families: Iterable[ModuleType]) -> set[str] | None:
    """The names of the parts that several families use together; None if one of them does not declare its `PARTS`."""
    declared = [getattr(family, "PARTS", None) for family in families]
    return None if None in declared else {name for names in declared for name in names}


def options_of(families: Iterable[ModuleType]) -> dict[str, dict[str, Option]]:
    """The sampling options of several families that work together, by group."""
    found: dict[str, dict[str, Option]] = {}
    for family in families:
        for group, options in getattr(family, "OPTIONS", {}).items():
            found[group] = {**options, **found.get(group, {})}
    order = [*ROLES, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


# ---------------------------------------------------------------- parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """A component: `part.call("encode", image)` runs a role function of its family on its arrays."""

    params: Any
    extra: Any
    family: str = dataclasses.field(metadata={"static": True})
    model: Any = dataclasses.field(metadata={"static": True})  # the result of the family's `build`

    def call(self, role: str, *args: Any, **options: Any) -> Any:
        return getattr(find(self.family), role)(self.model, self.params, self.extra, *args, **options)


Parts = Mapping[str, Part]
Shape = tuple[int, int]  # height, width


def for_shape(family: ModuleType, model: Any, parts: Mapping[str, Part], shape: Shape) -> tuple[Any, dict[str, Part]]:
    """A model and its parts for pictures of `shape`. Raises UserError for a family that supports one shape only."""
    ready: dict[str, Part] = {}
    for name in sorted(parts, key=lambda name: (name not in ("tokenizer", "autoencoder"), name)):  # others need these
        part, module = parts[name], find(parts[name].family)
        shapeless = {"text", "features"} & set(roles(module))
        ready[name] = part if shapeless else dataclasses.replace(part, model=fit(module, part.model, ready, shape))
    return fit(family, model, ready, shape), ready


def fit(family: ModuleType, model: Any, parts: Mapping[str, Part], shape: Shape) -> Any:
    """A model for pictures of `shape`, with `parts` for that shape. UserError for a family with one shape only."""
    name, size, function = named(family), "{} x {}".format(*shape), optional(family, "for_shape")
    if function is None:
        raise UserError(f"{name} supports pictures of one shape only, but the data has several, such as {size}")
    try:
        return function(model, tuple(shape), parts)
    except UserError as error:
        raise UserError(f"{name} cannot take pictures of {size}: {error}") from None


def sides(resolution: int | Shape) -> Shape:
    """(height, width) of a model's pictures, from the side of a square or from both."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def divided(shape: Shape, by: int) -> Shape:
    """The grid (height, width) of a picture whose sides are divided by `by`. UserError if they do not divide."""
    if any(side % by for side in shape):
        raise UserError(f"its sides do not divide by {by}")
    return shape[0] // by, shape[1] // by


def need(parts: Parts, name: str, why: str) -> Part:
    """The part `name`. Raises UserError, which begins with `why` (what needs the part), if it is missing."""
    if name not in parts:
        raise UserError(f"{why} needs the part {name!r}; this config has {sorted(parts) or 'none'}")
    return parts[name]
