"""Sampling images from a model: one jitted program per shape, any number of images, each from its own key.

Image number i of a seed has the key fold_in(step_key(seed, 0, "sample"), i), so it does not depend on the batch size.
Batches are padded to the compiled shape. The options are those of `config.sample.options`, which are checked here.
"""

import argparse
import difflib
import functools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from hybridgen.core import config as config_lib
from hybridgen.core import importing, meshes, numbers, placement, rng
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.data.text.prompts import without_mark
from hybridgen.evals.sheet import sheet
from hybridgen.models import contract
from hybridgen.models.contract import Option, Part, Shape, find, for_shape
from hybridgen.runs import reading
from hybridgen.sampling import guidance

Known = Mapping[str, Mapping[str, Option]]  # group -> name -> option


def known_options(family: ModuleType, model: Any, parts: Mapping[str, Part]) -> Known:
    """The sampling options of a model: those of its family, of the models within it and of its parts."""
    within = [find(member.family) for member in contract.members(family, model).values()]
    return contract.options_of([family, *within, *(find(part.family) for part in parts.values())])


def checked(options: Mapping, known: Known, partial: bool = False) -> dict[str, dict[str, Any]]:
    """Options {group: {name: value}} as plain data, checked and converted. Raises UserError for an unknown option or a
    value out of range, with the option's name on the command line.

    partial: not all families are known yet, so unknown groups pass.
    """
    out: dict[str, dict[str, Any]] = {}
    names = {path: flag for flag, path in flags(known).items()}
    for group, values in options.items():
        if group not in known or not hasattr(values, "items"):
            if partial and hasattr(values, "items"):
                continue
            raise UserError(f"unknown option {group!r}; known options: {', '.join(_paths(known)) or 'none'}")
        for name in values:
            if name not in known[group]:
                raise UserError(f"unknown option {f'{group}.{name}'!r}{unknown(name, known[group], _paths(known))}")
        ready = {}
        for name, value in values.items():
            try:
                ready[name] = known[group][name].checked(f"{group}.{name}", value)
            except UserError as error:
                raise UserError(f"{error} ({as_flag(names[f'{group}.{name}'])})") from None
        out[group] = ready
    return out


def scheduled(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Checked options as families take them: `guidance` with its `guidance_schedule` becomes a schedule over the first
    share `guidance_until` of the tokens or steps."""
    return {group: guidance.scheduled(values) for group, values in options.items()}


def traced(options: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """The numbers of checked options that a program takes as arguments, nested as in `options`: those with `Option.off`
    that are not off. known: the options by group, those of a group, or one option."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        option = known if isinstance(known, Option) else known[name]
        if isinstance(value, Mapping):
            found[name] = traced(value, option)
        elif option.off is not None and value != option.off:
            found[name] = np.asarray(value, np.int32 if isinstance(option.default, int) else np.float32)
    return {name: value for name, value in found.items() if not isinstance(value, dict) or value}


def replaced(options: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Options with some values replaced, nested alike."""
    changed = {name: replaced(options[name], new) if isinstance(new, dict) else new for name, new in by.items()}
    return {**options, **changed}


def check_config(config: Any, folder: Path | None, stages: Mapping[str, Any]) -> None:
    """Raises UserError for a sampling option of a config that neither its family nor the families of its parts have.

    A part is a run, relative to `folder`, or a stage of a recipe. If a part does not exist yet, unknown groups pass.
    """
    names, partial = reading.families_with_parts(config, folder, stages)
    known = contract.options_of(map(find, names))
    if strange := [group for group in config.sample.options if group not in known and not partial]:
        others = " nor a family of its parts" if config.parts else ""
        raise UserError(
            f"config.sample.options has the group {strange[0]!r}, but {'neither ' if others else ''}{config.family!r}"
            f"{others} declares {'any' if others else 'no'} OPTIONS for it (groups: {', '.join(known) or 'none'})"
        )
    checked(config.sample.options, known, partial)


def _paths(known: Known) -> list[str]:
    return [f"{group}.{name}" for group, options in known.items() for name in options]


def as_flag(name: str) -> str:
    """ "top_k" -> "--top-k"."""
    return f"--{name.replace('_', '-')}"


def unknown(given: str, known: Collection[str], every: Collection[str] = ()) -> str:
    """What to say after an unknown name: the nearest known one; otherwise all of them, or all of `every`."""
    return config_lib.hint(given, known) or f"; known options: {', '.join(every or known) or 'none'}"


def flags(known: Known) -> dict[str, str]:
    """{name on the command line: path in `config.sample.options`}; of two options with one name the first keeps it."""
    found: dict[str, str] = {}
    for group, options in known.items():
        for name, option in options.items():
            flag = option.flag or name
            found[f"{group}_{name}" if flag in found else flag] = f"{group}.{name}"
    return found


def sampler(
    family: Any, model: Any, options: Mapping, parts: Mapping[str, Part], shape: Shape | None = None
) -> Callable:
    """The jitted sampling program: (params, extra, parts, cond, keys) -> {"image", ...}, with its options as constants.

    parts: only their families are read here; shape: (height, width) of the images, if not the model's own.
    """
    ready = checked(options, known_options(family, model, parts))
    return jax.jit(functools.partial(_drawing(family, model, parts, shape), ready))


class Sampler:
    """Sampling programs of a model by options and shape. Options that differ only in numbers share a program."""

    def __init__(self, family: ModuleType, model: Any, parts: Mapping[str, Part]):
        self._known = known_options(family, model, parts)
        self._compiled = functools.lru_cache(maxsize=8)(functools.partial(_with_numbers, family, model, parts))

    def __call__(self, options: Mapping, shape: Shape | None = None) -> Callable:
        """(params, extra, parts, cond, keys) -> {"image", ...}. Raises UserError for an option that is not taken."""
        given = checked(options, self._known)
        changing = traced(given, self._known)
        constant = replaced(given, jax.tree.map(lambda _: None, changing))
        return functools.partial(self._compiled(shape, json.dumps(constant, sort_keys=True)), changing)


def _with_numbers(family: Any, model: Any, parts: Mapping[str, Part], shape: Shape | None, constant: str) -> Callable:
    """The jitted program (traced numbers, params, extra, parts, cond, keys); constant: the other options, as JSON."""
    draw, options = _drawing(family, model, parts, shape), json.loads(constant)
    return jax.jit(lambda changing, *arguments: draw(replaced(options, changing), *arguments))


def _drawing(family: Any, model: Any, parts: Mapping[str, Part], shape: Shape | None) -> Callable:
    """The sampling function (options, params, extra, parts, cond, keys) of a model."""
    role = contract.roles(family)
    may_lack = "text" in role or ("prior" in role and "tokenizer" not in parts)  # an image

    def draw(
        options: Mapping, params: Any, extra: Any, parts: Any, cond: dict, keys: jax.Array
    ) -> dict[str, jax.Array]:
        fitted, parts = for_shape(family, model, parts, shape) if shape else (model, parts)
        out = family.sample(fitted, params, cond, keys, parts=parts, extra=extra, options=scheduled(options))
        contract.returned(family, "sample", out)
        if "image" not in out and not may_lack:
            raise UserError(
                f"{contract.named(family)!r} is not a family: sample returns {', '.join(out)} without 'image'"
            )
        return out

    return draw


def keys_for(seed: int, ids: np.ndarray) -> jax.Array:
    """Keys of the images with the numbers `ids [b]` of a seed."""
    return rng.sample_keys(rng.step_key(jax.random.key(seed), 0, "sample"), ids)


def draw_all(draw: Callable, cond: Mapping[str, np.ndarray], seed: int, batch: int, put: Callable) -> Iterator[dict]:
    """Generates an image for every row of `cond`, `batch` at a time; yields dicts of numpy arrays without padding.

    `draw(cond, keys)` is a compiled program, `put` places host arrays on the mesh. Row i gives image i of `seed`. With
    several processes all of them take part, and each gets all images.
    """
    count = len(next(iter(cond.values())))
    for start in range(0, count, batch):
        ids = np.arange(start, start + batch)
        rows = np.minimum(ids, count - 1)
        given = put({name: value[rows] for name, value in cond.items()} | {"key": key_data(seed, ids)})
        out = placement.whole(draw(given, jax.random.wrap_key_data(given.pop("key"))))
        kept = min(batch, count - start)
        yield {name: value[:kept] for name, value in out.items()}


def key_data(seed: int, ids: np.ndarray) -> np.ndarray:
    """`keys_for` as integers, which can be sharded like any entry of a batch."""
    return np.asarray(jax.random.key_data(keys_for(seed, ids)))


def text_cond(text: Any, prompts: list[str]) -> dict[str, np.ndarray]:
    """Prompts as model input. Raises UserError for a prompt that is empty or too long or has unknown words."""
    ids, masks = zip(*(text.encode(without_mark(prompt), strict=True) for prompt in prompts), strict=True)
    return {"text": np.stack(ids), "text_mask": np.stack(masks)}


def panels(drawn: Mapping[str, np.ndarray], reference: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a grid shows of each caption, by its name there: the reference, the draft and the render, as far as there
    are any; an image without a draft is just called "image"."""
    found = {} if reference is None else {"reference": reference}
    if "draft" in drawn:
        found["draft"] = drawn["draft"]
    return found | {"render" if "draft" in drawn else "image": drawn["image"]}


def sample_grid(experiment: Any, count: int) -> Callable[[dict], np.ndarray]:
    """(params, extra) -> a grid of images for the first validation batch, with their references and captions."""
    config = experiment.config
    source = sources.build(config.data, "validation")
    count = meshes.padded(experiment.mesh, min(count, len(source)))
    batch = next(pipeline.batches(source, experiment.text, batch=count, seed=config.seed, shuffle=False))
    pipeline.take_broken(batch)
    indices, _ = pipeline.arrange(source, np.arange(count), count, config.seed, shuffle=False)
    captions = [item["text"] for item in pipeline.examples(source, indices)]
    cond = {name: value for name, value in batch.items() if name in ("text", "text_mask", "label", "image")}
    shape = batch["image"].shape[1:3] if hasattr(source, "occurring") else None
    draw = sampler(experiment.family, experiment.model, config.sample.options, experiment.parts, shape)
    put = functools.partial(placement.shard_batch, mesh=experiment.mesh)
    seed = config.seed

    def grid(params: Any, extra: Any) -> np.ndarray:
        def program(cond: dict, keys: jax.Array) -> dict:
            return draw(params, extra, experiment.parts, cond, keys)

        (out,) = draw_all(program, cond, seed, count, put)
        shown = panels(out, cond.get("image"))
        return np.asarray(sheet(shown, captions, cell=96 * len(shown)))

    return grid


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(arguments, changes to the sampling options) of a command line with `--run`.

    The sampling options are those of the run's families: `--run RUN --help` lists them.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run")
    importing.add_argument(first)  # before the families of the run are imported
    first.error = parser.error
    run = first.parse_known_args(argv)[0].run
    if not run:
        return parser.parse_args(argv), {}  # raises, since --run is required
    folder, parser.epilog = reading.find_run(run, None), None
    known = contract.options_of(map(find, reading.families_of(folder)))
    paths, own = flags(known), config_lib.flatten(reading.read_config(folder).sample.options)
    group = parser.add_argument_group("sampling options of this run")
    for flag, path in paths.items():
        section, _, name = path.partition(".")
        option = known[section][name]
        text = f"{option.meaning}; {option.range}; default {own.get(path, option.default)!r}".replace("%", "%%")
        kind = type(option.default)
        group.add_argument(as_flag(flag), dest=f"option:{path}", type=kind, metavar="X", help=text)
    args, others = parser.parse_known_args(argv)
    if others:
        flagged = [name[2:] for action in parser._actions for name in action.option_strings if name[:2] == "--"]
        near = difflib.get_close_matches(others[0].partition("=")[0].lstrip("-"), flagged, 1, 0.5)
        advice = f"; did you mean --{near[0]}?" if near else ""
        names = ", ".join(map(as_flag, paths)) or "none"
        raise UserError(
            f"unrecognized arguments: {' '.join(others)}{advice}; the sampling options of this run are {names}"
        )
    given = {path: getattr(args, f"option:{path}") for path in paths.values()}
    return args, {path: value for path, value in given.items() if value is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a --count, --batch or --seed out of range."""
    for name in ("count", "batch", "seed"):
        check_number(name, getattr(args, name), "--")


def check_number(name: str, value: Any, sign: str = "") -> int:
    """A "count", "batch" or "seed" as an int. Raises UserError if it is out of range or no whole number."""
    return numbers.checked(f"{sign}{name}", value, 0 if name == "seed" else 1, config_lib.MOST, whole=True)
