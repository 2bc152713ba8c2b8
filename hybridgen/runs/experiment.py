"""Builds a config on this machine: family, model, parts, text tokenizer and mesh.

Parts are runs: `config.parts = {"tokenizer": "../tokenizer"}`, relative to the run folder or to the current folder.
They are loaded and checked against each other and the data, the model's "auto" options are resolved from them, and
their arrays are placed on the mesh.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from hybridgen.core import config as config_lib
from hybridgen.core import meshes, placement, sharding
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources import reading as record_reading
from hybridgen.models import contract
from hybridgen.models.contract import Part, find, for_shape
from hybridgen.runs import agreement, fitting, reading
from hybridgen.runs.reading import Run

TEXT = ("text_vocab", "text_length")  # model options that are taken from the text tokenizer


class Experiment(NamedTuple):
    """A config with everything that is built from it, except data and state."""

    config: Any
    family: ModuleType
    options: dict[str, Any]  # of the model: `config.model` with all "auto" resolved
    model: Any  # built by the family from these options
    parts: dict[str, Part]
    digests: dict[str, str]  # of the parts
    text: Any  # the text tokenizer, or None
    mesh: Mesh
    faults: tuple[str, ...] = ()  # arrays of the parts with numbers that are not finite


def build(config: Any, folder: Path | None = None, source: Any = None, text: Any = None) -> Experiment:
    """Builds everything of a config except its data and state. `text`: the run's own text tokenizer, if there is one.

    Otherwise the text tokenizer is that of the parts that read text, or that of the run whose weights are the start
    (`init_from`), or a new one for `source` by the config. Raises UserError for parts that are missing or do not fit.
    """
    mesh = meshes.make_mesh(config.mesh)
    runs, where = load(config, folder), called(config)
    fitting.check_roles(runs, where)
    verify(config, runs, source)
    faults = tuple(run.fault for run in runs.values() if run.fault)
    known = read_by(runs, config.data)
    text = text or known or starting_text(config, folder)
    if text is None and config.data.get("text"):
        text = text_lib.build(config.data, source)
    parts = {name: run.part for name, run in runs.items()}
    family, model, options = resolve(config, parts, text, source)
    fitting.check_sizes(family, model, parts, where)
    if source is not None:
        if config.sample.every:
            fitting.check_drawable(family, model, parts)
        fits_classes(config.data, source, classes_of(family, model, parts))
        trained_alike(config, runs)
    digests = {name: run.digest for name, run in runs.items()}
    return Experiment(config, family, options, model, place(parts, mesh), digests, text, mesh, faults)


def load(config: Any, folder: Path | None) -> dict[str, Run]:
    """The runs of a config's parts, by name."""
    return {name: reading.load(reading.find_run(path, folder)) for name, path in config.parts.items()}


def called(config: Any) -> dict[str, str]:
    """What each part of a config is called in a message."""
    return {name: f"config.parts.{name}={path}" for name, path in config.parts.items()}


def verify(config: Any, runs: Mapping[str, Run], source: Any = None) -> None:
    """Raises UserError if parts do not fit each other or the data, or arrays of a bundle do not fit its model."""
    seen: dict[str, str] = {}
    for name, run in runs.items():
        for other, digest in run.part_digests.items():
            if seen.setdefault(other, digest) != digest:
                path = config.parts[name]
                raise UserError(f"part {name!r} ({path}) was trained with another {other} than the other parts")
    digests = {name: run.digest for name, run in runs.items()}
    if source is not None:
        sources.fits(source, digests)
        for run in runs.values():
            run.check_finite()
    for name, digest in seen.items():
        if digests.get(name, digest) != digest:
            path = config.parts[name]
            raise UserError(f"part {name!r} ({path}) is not the one that the other parts were trained with")
    parts = {name: run.part for name, run in runs.items()}
    for run in runs.values():
        if run.bundled:
            reading.check_arrays(run.folder, run.part, parts, config.data.resolution)


def resolve(
    config: Any, parts: Mapping[str, Part], text: Any, source: Any = None
) -> tuple[ModuleType, Any, dict[str, Any]]:
    """(family, model, its options) of a config, with "auto" options resolved from the data and the parts."""
    family = find(config.family)
    known = context(config.data, parts, text, source)
    options = config_lib.resolve(config.model, known)
    model = contract.model_of(family, options)
    agreement.check(family, options, known, parts, source)
    for shape in getattr(source, "shapes", ()):
        for_shape(family, model, parts, shape)  # raises UserError before anything is compiled
    return family, model, options


def fits_classes(data: Any, source: Any, takes: Mapping[str, int]) -> None:
    """Raises UserError if the data has more classes than a model `takes`, by name, or none.

    A label beyond a model's classes would be read as the last row of its table, which is that of no class.
    """
    kind, found = data.source, len(getattr(source, "class_names", ()))
    for name, classes in takes.items():
        where = f"model.classes is {classes}" if name == "model" else f"the part {name!r} takes {classes} classes"
        if classes and found > classes:
            hint = f"set model.classes={found}, or auto" if name == "model" else "train it on this data"
            raise UserError(f"{where}, but data.source {kind!r} has {found} classes: {hint}")
        if not classes or found or "label" in record_reading.read(source, 0)[0]:
            continue
        if kind != "shapes":
            hint = "give each record a label (of a folder: data.options.label_key), or set model.classes=0"
            raise UserError(f"{where}, but data.source {kind!r} has no classes: {hint}")
        print(f"warning: {where}, but data.source 'shapes' has one class: only class 0 is trained", file=sys.stderr)


def classes_of(family: Any, model: Any, parts: Mapping[str, Part]) -> dict[str, int]:
    """The number of classes that the model and each part take (0: none), by name."""
    own = {"model": contract.inputs(family, model).classes}
    return own | {name: contract.inputs(find(part.family), part.model).classes for name, part in parts.items()}


def trained_alike(config: Any, runs: Mapping[str, Run]) -> None:
    """Prints a line for each prior or decoder among the parts that was trained on other data than the config's."""
    for name, run in runs.items():
        kinds = config.data.source, run.config.data.source
        if run.step and "records" not in kinds and {"prior", "decoder"} & set(contract.roles(find(run.part.family))):
            here, there = ({"data.source": data.source, **_options(data)} for data in (config.data, run.config.data))
            wrong = [key for key in {**here, **there} if here.get(key) != there.get(key)]
            if wrong:
                pair = f"{wrong[0]} is {here.get(wrong[0])!r} here and was {there.get(wrong[0])!r} there"
                print(f"warning: the part {name!r} was trained on other data: {pair}", file=sys.stderr)


def _options(data: Any) -> dict[str, Any]:
    """The options of a data source as in a file; a folder may move, and repeated values only change how often."""
    options = config_lib.flatten(config_lib.plain(data.get("options", {})))
    named = {f"data.options.{key}": value for key, value in options.items() if key.split(".")[-1] != "path"}
    return {key: list(dict.fromkeys(value)) if isinstance(value, list) else value for key, value in named.items()}


def place(parts: Mapping[str, Part], mesh: Mesh) -> dict[str, Part]:
    """The parts with their arrays placed on the mesh."""
    return {name: placement.put(part, part_shardings(part, mesh)) for name, part in parts.items()}


def read_by(runs: Mapping[str, Run], data: Any) -> Any:
    """The text tokenizer of the parts that read text, or None. Raises UserError if they have different ones.

    A text encoder without a length limit reads as many tokens as the other parts, or `data.text.length`.
    """
    texts = {name: run.text for name, run in runs.items() if run.text and _reads(name, run)}
    if "text" in texts and not hasattr(runs["text"].part.model, "length"):
        lengths = [getattr(run.part.model, "text_length", 0) for run in runs.values()]
        lengths += [data["text"].get("length", 0)] if data.get("text") else []
        texts["text"] = text_lib.resized(texts["text"], next(filter(None, lengths), texts["text"].length))
    if len({text_lib.digest(text) for text in texts.values()}) > 1:
        raise UserError(f"the parts {' and '.join(texts)} read text differently: train them on the same captions")
    return next(iter(texts.values()), None)


def starting_text(config: Any, folder: Path | None) -> Any:
    """The text tokenizer of the runs that whole models start from (`init_from`), or None if none of them reads text.

    Their word embeddings mean something with it only. Raises UserError if they have different ones.
    """
    texts = {}
    for where in config.init_from.values():
        place = reading.find_run(where, folder) if ":" not in where else None
        if place and reading.reads_text(place):
            texts[where] = reading.text_of(place)
    if len({text_lib.digest(text) for text in texts.values()}) > 1:
        raise UserError(f"init_from: {' and '.join(texts)} read text differently: a model has one text tokenizer")
    return next(iter(texts.values()), None)


def _reads(name: str, run: Run) -> bool:
    """Whether a part reads text: it is a text encoder, contains one, or was trained with one."""
    return name == "text" or contract.inputs(find(run.part.family), run.part.model).text or "text" in run.part_digests


def part_shardings(part: Part, mesh: Mesh) -> Part:
    """The shardings of a part's arrays: parameters by PARAM_RULES, `extra` replicated."""
    everywhere = jax.tree.map(lambda _: placement.replicated(mesh), part.extra)
    return dataclasses.replace(part, params=sharding.param_shardings(part.params, mesh), extra=everywhere)


def context(data: Any, parts: Mapping[str, Part], text: Any, source: Any = None) -> dict[str, Any]:
    """The values of "auto" in a model's options, by name."""
    known: dict[str, Any] = {"resolution": data.resolution, "classes": len(getattr(source, "class_names", ()))}
    if text is not None:  # without captions a model takes no text: it could never be given a prompt
        captions = source is None or text_lib.captioned(source)
        known |= {"text_vocab": text.vocab_size, "text_length": text.length} if captions else dict.fromkeys(TEXT, 0)
    if "tokenizer" in parts:
        tokenizer = parts["tokenizer"].model
        known |= {"vocab": tokenizer.vocab, "grid": tokenizer.grid, "plan_width": tokenizer.code_width}
    return known
