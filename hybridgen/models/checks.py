"""What is wrong with a family: its functions' parameters, its sampling options, and what its functions return.

Each check returns the fault as the end of a sentence, or "" if there is none.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import importing
from hybridgen.core.config import hint
from hybridgen.core.errors import UserError

# the flags of the commands that have a run's sampling options, and the parameters of `Model.sample`
FLAGS = (
    *("run", "trust", "checkpoint", "prompt", "prompts", "label", "labels", "count", "size", "seed", "batch", "out"),
    *("draft", "splits", "features", "reference", "reference_count", "help", "distributed", "coordinator"),
    *("num_processes", "process_id", "init_timeout", "quiet"),
)
MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)")


def parameters(function: Callable, wanted: list[str]) -> str:
    """How a function's parameters differ from `wanted` and its order; additional ones need defaults."""
    given = inspect.signature(function).parameters
    plain = [name for name, parameter in given.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if plain[: len(wanted)] != wanted:
        return f"but needs ({', '.join(wanted)})"
    more = [name for name in plain[len(wanted) :] if given[name].default is inspect.Parameter.empty]
    return f"of which {more[0]!r} needs a default" if more else ""


def options(groups: Any, kind: type) -> Iterator[str]:
    """The faults of a family's OPTIONS; `kind` is the class of an option."""
    good = isinstance(groups, Mapping) and all(isinstance(group, Mapping) for group in groups.values())
    if not good or not all(isinstance(option, kind) for group in groups.values() for option in group.values()):
        yield "its OPTIONS are not {group: {name: Option}}"
        return
    for group, members in groups.items():
        for name, option in members.items():
            path, flag = f"{group}.{name}", option.flag or name
            if flag in FLAGS:
                yield f"the flag --{flag} of its option {path!r} is one of the commands' own: give another as flag="
            if isinstance(option.default, bool) or not isinstance(option.default, int | float | str):
                yield f"the default {option.default!r} of its option {path!r} is neither a number nor a text"
            elif not isinstance(option.default, str) and not option.low < option.high:
                yield f"its option {path!r} is a number without a range: give low and high"
            else:
                try:
                    option.checked(f"the default of its option {path!r},", option.default)
                except UserError as error:
                    yield str(error)


def unknown_option(error: TypeError, family: Any, given: Mapping) -> str:
    """What is wrong with the model options `given`, from the error of the family's `build`; "" if they are not why."""
    if found := importing.unexpected(error, family, given):
        word, known = found
        return f"has no model option {word!r}{hint(word, known)}"
    if found := MISSING.search(str(error)):
        names = [name for name in re.findall(r"'(\w+)'", found[1]) if name not in given]
        return f"needs the model option {names[0]!r}" if names else ""
    return ""


def model(built: Any, attributes: Iterable[str]) -> str:
    """What is wrong with the result of `build`; `attributes`: those that its roles need."""
    if built is None:
        return "its build(config) returns None: it must return the model"
    for name in attributes:
        try:
            getattr(built, name)
        except AttributeError as error:
            return f"its model has no attribute {name!r}" + (f": {error}" if hasattr(type(built), name) else "")
        except Exception as error:
            return f"its model has no valid {name!r}: {importing.described(error)}"
    return ""


def arrays(out: Any) -> str:
    """What is wrong with the result of `init`."""
    if not isinstance(out, Mapping) or set(out) != {"params", "extra"}:
        return f"returns {_kind(out)}, but must return {{'params': ..., 'extra': ...}}"
    return ""


def loss(out: Any) -> str:
    """What is wrong with the result of `loss`."""
    pair = "(scalar, {'metrics': ..., 'weight': ..., 'extra': ...})"
    if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], Mapping):
        return f"returns {_kind(out)}, but must return {pair}"
    scalar, aux = out
    if missing := [name for name in ("metrics", "weight", "extra") if name not in aux]:
        return f"returns an aux without {missing[0]!r}, but must return {pair}"
    if not isinstance(aux["metrics"], Mapping):
        return f"returns as aux['metrics'] {_kind(aux['metrics'])}, but must return {{name: scalar}}"
    scalars = {"loss": scalar, "aux['weight']": aux["weight"]}
    scalars |= {f"aux['metrics'][{name!r}]": value for name, value in aux["metrics"].items()}
    for name, value in scalars.items():
        if isinstance(value, Mapping | list | tuple | str | None) or jnp.shape(value) != ():
            return f"returns as {name} {_kind(value)}, but must return a scalar"
    return ""


def without_merge(out: Any) -> str:
    """What is wrong with a result of `loss` in a family without `merge`."""
    if jax.tree.leaves(out[1]["extra"]):
        return "returns sums in aux['extra'], but the family has no merge(model, extra, sums, key, step) to apply them"
    return ""


def sample(out: Any) -> str:
    """What is wrong with the result of `sample`."""
    return "" if isinstance(out, Mapping) else f"returns {_kind(out)}, but must return {{'image': ..., ...}}"


def _kind(value: Any) -> str:
    """A value in a few words."""
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {'; '.join(map(_kind, value))}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


RESULTS = {"init": arrays, "loss": loss, "decoder_loss": loss, "sample": sample}
