"""Builds a config on this machine: family, model, parts, text tokenizer and mesh.

Parts are runs: `config.parts = {"tokenizer": "../tokenizer"}`, relative to the run folder or to the current folder.
They are loaded and checked against each other and the data, the model's "auto" options are resolved from them, and
their arrays are placed on the mesh.
"""

import dataclasses
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
from hybridgen.models import contract
from hybridgen.models.contract import Part, find, for_shape
from hybridgen.runs import reading
from hybridgen.runs.reading import Run


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


def build(config: Any, folder: Path | None = None, source: Any = None, text: Any = None) -> Experiment:
    """Builds everything of a config except its data and state. `text`: the run's own text tokenizer, if there is one.

    Otherwise the text tokenizer is that of the parts that read text, or a new one for `source` by the config. Raises
    UserError for parts that are missing or do not fit.
    """
    mesh = meshes.make_mesh(config.mesh)
    runs = load(config, folder)
    verify(config, runs, source)
    known = read_by(runs, config.data)
    text = text or known
    if text is None and config.data.get("text"):
        text = text_lib.build(config.data, source)
    parts = {name: run.part for name, run in runs.items()}
    family, model, options = resolve(config, parts, text, source)
    digests = {name: run.digest for name, run in runs.items()}
    return Experiment(config, family, options, model, place(parts, mesh), digests, text, mesh)


def load(config: Any, folder: Path | None) -> dict[str, Run]:
    """The runs of a config's parts, by name."""
    return {name: reading.load(reading.find_run(path, folder)) for name, path in config.parts.items()}


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
    options = config_lib.resolve(config.model, context(config.data, parts, text, source))
    model = contract.model_of(family, options)
    for shape in getattr(source, "shapes", ()):
        for_shape(family, model, parts, shape)  # raises UserError before anything is compiled
    return family, model, options


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
    if text is not None:
        known |= {"text_vocab": text.vocab_size, "text_length": text.length}
    if "tokenizer" in parts:
        tokenizer = parts["tokenizer"].model
        known |= {"vocab": tokenizer.vocab, "grid": tokenizer.grid, "plan_width": tokenizer.code_width}
    return known
