"""What a config means on this machine: family, model, parts, text tokenizer and mesh; and how to read a run back.

A run folder holds `config.json` (resolved: no "auto" left), `text.json` (the text tokenizer), `checkpoints/` and logs.
Parts are runs too: `config.parts = {"tokenizer": "../tokenizer"}`, relative to the run folder or to where one stands.
A bundle (hybridgen.runs.bundle) is read wherever a run is.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hybridgen.core import config as config_lib
from hybridgen.core import meshes, placement, sharding, trees
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources.buckets import LARGEST
from hybridgen.models.contract import Part, Shape, find, for_shape
from hybridgen.runs import bundle, checkpoint, drawing
from hybridgen.runs.folder import read_json


class Experiment(NamedTuple):
    """What a config means here: `parts` by name with their `digests`, `text` the text tokenizer or None."""

    config: Any
    family: ModuleType
    model: Any  # the family's Flax module
    parts: dict[str, Part]
    digests: dict[str, str]
    text: Any  # the text tokenizer, or None
    mesh: Mesh


def build(config: Any, folder: Path | None = None, source: Any = None, text: Any = None) -> Experiment:
    """Everything of a config but its state and data. `text`: the run's own text tokenizer, if it is known already.

    Otherwise it is that of the parts that read text, and if none does it is made from `source` as the config says.
    """
    mesh = meshes.make_mesh(config.mesh)
    parts, digests, runs, bundled = {}, {}, {}, []
    seen: dict[str, str] = {}
    for name, path in config.parts.items():
        place = find_run(path, folder)
        run = runs[name] = load(place)
        parts[name], digests[name] = run.part, run.digest
        bundled += [(place, run.part)] if run.bundled else []
        for other, digest in run.part_digests.items():
            if seen.setdefault(other, digest) != digest:
                raise UserError(f"the parts were trained with different {other}s: {place} does not fit the others")
    if source is not None:
        sources.fits(source, digests)
    for name, digest in seen.items():
        if digests.get(name, digest) != digest:
            raise UserError(
                f"part {name!r} ({config.parts[name]}) is not the one that the other parts were trained with"
            )
    known = read_by(runs, config.data)
    text = text or known
    if text is None and config.data.get("text"):
        text = text_lib.build(config.data, source)
    for place, part in bundled:
        check_arrays(place, part, parts, config.data.resolution)
    family = find(config.family)
    model = family.build(config_lib.resolve(config.model, context(config.data, parts, text, source)))
    for shape in getattr(source, "shapes", ()):
        for_shape(family, model, parts, shape)  # refused before anything is compiled
    parts = {name: placement.put(part, part_shardings(part, mesh)) for name, part in parts.items()}
    return Experiment(config, family, model, parts, digests, text, mesh)


def read_by(runs: Mapping[str, "Run"], data: Any) -> Any:
    """The text tokenizer of the parts that read text, or None. Raises UserError where they read it differently.

    A tower that has no longest text reads as much as the other parts do, or as `data.text.length` says.
    """
    texts = {name: run.text for name, run in runs.items() if run.text and _reads(name, run)}
    if "text" in texts and not hasattr(runs["text"].part.model, "length"):
        lengths = [getattr(run.part.model, "text_length", 0) for run in runs.values()]
        lengths += [data["text"].get("length", 0)] if data.get("text") else []
        texts["text"] = text_lib.resized(texts["text"], next(filter(None, lengths), texts["text"].length))
    if len({text_lib.digest(text) for text in texts.values()}) > 1:
        raise UserError(f"the parts {' and '.join(texts)} read text differently: they were trained on other captions")
    return next(iter(texts.values()), None)


def _reads(name: str, run: "Run") -> bool:
    """Whether a part reads text: it is a tower, has one of its own, or was trained with one."""
    return name == "text" or bool(getattr(run.part.model, "text_vocab", 0)) or "text" in run.part_digests


def part_shardings(part: Part, mesh: Mesh) -> Part:
    """Where a part's arrays lie: parameters by the table, everything else on every device."""
    everywhere = jax.tree.map(lambda _: placement.replicated(mesh), part.extra)
    return dataclasses.replace(part, params=sharding.param_shardings(part.params, mesh), extra=everywhere)


def context(data: Any, parts: Mapping[str, Part], text: Any, source: Any = None) -> dict[str, Any]:
    """What "auto" may stand for in a model's options."""
    known: dict[str, Any] = {"resolution": data.resolution, "classes": len(getattr(source, "class_names", ()))}
    if text is not None:
        known |= {"text_vocab": text.vocab_size, "text_length": text.length}
    if "tokenizer" in parts:
        tokenizer = parts["tokenizer"].model
        known |= {"vocab": tokenizer.vocab, "grid": tokenizer.grid, "plan_width": tokenizer.code_width}
    return known


class Run(NamedTuple):
    """A run as read back for inference."""

    config: Any
    part: Part
    text: Any
    digest: str
    part_digests: dict[str, str]
    step: int
    bundled: bool  # not from a run folder, but from a bundle, which may be anybody's


def load(folder: Path, step: int | None = None, report: Any = print) -> Run:
    """The newest good checkpoint of a run (or the one at `step`), averaged parameters where there are some."""
    bundled = bundle.at(folder)
    made = bundle.read(folder) if bundled else None  # verifies its files before anything else is made of them
    config = config_lib.read(folder / "config.json")
    model = _model(config, folder)
    if made:
        bundle.check_parts(folder, config.parts)
        if step not in (None, made.step):
            raise UserError(f"the bundle {folder} is of step {made.step}, there is no {step} in it")
    arrays, part_digests, found = made or saved_arrays(folder, step, config, report)
    part = Part(arrays["params"], arrays["extra"], config.family, model)
    text_file = folder / "text.json"
    text = text_lib.from_json(read_json(text_file)) if text_file.is_file() else None
    options = config.data.get("options")
    if hasattr(options, "items") and sources.BUCKETS in options:
        config = config.copy_and_resolve_references()  # what it is compared with, or cached, is square
        with config.unlocked():
            del config.data.options[sources.BUCKETS]
    return Run(config, part, text, checkpoint.digest(arrays), part_digests, found, bundled)


def saved_arrays(
    folder: Path, step: int | None = None, config: Any = None, report: Any = print
) -> tuple[dict, dict[str, str], int]:
    """(arrays {"params", "extra"}, digests of the parts, step) of a run folder, which must be those of `config`."""
    saved = checkpoint.Checkpointer(folder / "checkpoints", read_only=True)
    found = saved.newest_good(report) if step is None else step
    if found is None:
        raise UserError(f"no usable checkpoint in {folder / 'checkpoints'}")
    if config is not None:
        saved.check_model(found, config_lib.plain(config))
    state = saved.restore_params(found)
    part_digests = saved.meta(found).get("parts", {})
    saved.close()
    params = inference_params(state.get("params", {}), state.get("ema", {}))
    return {"params": params, "extra": state.get("extra", {})}, part_digests, found


def inference_params(params: Any, ema: Any) -> dict:
    """Parameters to sample with: the average where there is one, and what has none as it is."""
    flat = trees.flatten(params) | trees.flatten(ema)
    return trees.unflatten(flat)


def check_arrays(folder: Path, part: Part, parts: Mapping[str, Part], resolution: int) -> None:
    """Raises UserError naming an array of a bundle that the model of its config does not have, or in another shape."""
    specs = {"image": jax.ShapeDtypeStruct((1, resolution, resolution, 3), np.float32)}
    try:
        wanted = jax.eval_shape(lambda key: find(part.family).init(part.model, key, specs, parts), jax.random.key(0))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"{folder / 'config.json'} does not describe a model: {text}") from error
    has, wants = trees.flatten({"params": part.params, "extra": part.extra}), trees.flatten(wanted)
    for path in sorted(has.keys() | wants.keys()):
        found, right = (tree[path].shape if path in tree else "nothing" for tree in (has, wants))
        if found != right:
            raise UserError(f"the weights of {folder} do not fit its config: {path} is {found} and is to be {right}")


def _model(config: Any, folder: Path) -> Any:
    """The model of a run that is read back. Raises UserError for a config that does not make one."""
    for name in ("model", "data", "mesh", "parts", "sample"):
        if not hasattr(config.get(name), "items"):
            raise UserError(f"{folder / 'config.json'} is not the config of a run: it has no group {name!r}")
    try:
        return find(config.family).build(config_lib.resolve(config.model, {}))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the file may be anybody's
        text = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{folder / 'config.json'} does not describe a model: {text}") from error


def find_run(path: str, folder: Path | None) -> Path:
    """The run that a config or a command line names. Raises UserError if there is none."""
    places = [Path(os.path.normpath(place)) for place in ([folder / path] if folder else []) + [Path(path)]]
    for place in places:
        if (place / "config.json").is_file():
            return place.resolve()
    raise UserError(f"no run in {path!r} (looked for config.json in {', '.join(str(p) for p in places)})")


def earlier(config: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    """Subtrees of `config.init_from`, {"subtree here" or "all": "run" or "run:subtree there"}, and the `extra` of a
    run that is taken whole (a codebook, for instance), or None."""
    found, extra = {}, None
    for prefix, where in config.init_from.items():
        path, _, inside = where.partition(":")
        part = load(find_run(path, folder)).part
        arrays = part.params
        for name in filter(None, inside.split("/")):
            if name not in arrays:
                raise UserError(f"init_from: {path} has no subtree {inside!r}; it has {', '.join(arrays)}")
            arrays = arrays[name]
        whole = prefix == "all"
        found["" if whole else prefix.replace(".", "/")] = arrays
        extra = part.extra if whole and not inside else extra
    return found, extra


class Loaded(NamedTuple):
    """A run ready to draw: `draw(cond, keys)` is one jitted program, `put` places host arrays on the mesh."""

    config: Any
    text: Any
    mesh: Mesh
    step: int
    draw: Any
    drawer: Any  # changes to the sampling options, and the shape of pictures if it is another -> another `draw`
    put: Any
    tokenizer: Part | None
    encode: Any  # images -> tokens, compiled
    plans: bool  # draws tokens of its own
    reads: bool  # text
    classes: int  # 0: takes no label
    shapes: tuple[Shape, ...]  # of the pictures that it was trained on, where they had several

    @property
    def draws(self) -> bool:
        """Whether its family makes pictures: text models and networks of features do not."""
        return self.config.family.partition(".")[0] not in ("text", "features")

    @property
    def generates(self) -> bool:
        """Whether it draws from a caption or a class alone."""
        return self.plans or ((self.reads or self.classes > 0) and self.tokenizer is None)

    def tokens(self, images: Any, batch: int) -> np.ndarray:
        """Tokens `[b, n]` of pictures `[b, H, W, 3]` by the run's tokenizer, `batch` at a time."""
        run = placement.by_batches(lambda given: self.encode(given["image"]), {"image": images}, batch, self.mesh)
        return np.concatenate(list(run))


def restore(folder: Path, changes: Mapping[str, Any], step: int | None = None) -> Loaded:
    """A run with its parts, at its newest good step or at `step`.

    `changes` replace sampling options ("prior.guidance": 3.0).
    """
    run = load(folder, step)
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        try:
            meshes.make_mesh(config.mesh)
        except UserError:  # trained on another machine
            config.mesh = type(config.mesh)({"data": -1})
        _change(config.sample.options, changes)
    experiment = build(config, folder, text=run.text)
    if run.bundled:
        check_arrays(folder, run.part, experiment.parts, config.data.resolution)
        for name, digest in run.part_digests.items():
            if experiment.digests.get(name) != digest:
                raise UserError(f"the part {name!r} is not the one that the bundle {folder} was made with")
    own = placement.put(run.part, part_shardings(run.part, experiment.mesh))

    def drawer(changes: Mapping[str, Any], shape: Shape | None = None) -> Any:
        options = config.sample.options.copy_and_resolve_references()
        _change(options, changes)
        program = drawing.sampler(experiment.family, experiment.model, options, shape)
        return lambda cond, keys: program(own.params, own.extra, experiment.parts, cond, keys)

    members = getattr(experiment.family, "members", lambda model: ())(run.part.model)
    networks = [run.part.model, *(part.model for part in experiment.parts.values()), *members]
    part = own if hasattr(experiment.family, "embed") else experiment.parts.get("tokenizer")
    return Loaded(
        config,
        experiment.text,
        experiment.mesh,
        run.step,
        drawer({}),
        drawer,
        functools.partial(placement.shard_batch, mesh=experiment.mesh),
        part,
        functools.partial(jax.jit(lambda part, image: part.call("encode", image)), part) if part else None,
        hasattr(experiment.family, "generate")
        or "prior" in experiment.parts
        or bool(getattr(run.part.model, "prior", "")),
        "text" in experiment.parts or any(getattr(model, "text_vocab", 0) for model in networks),
        max(getattr(model, "classes", 0) for model in networks),
        _shapes(config.data.get("shapes", ()), folder),
    )


def _shapes(found: Any, folder: Path) -> tuple[Shape, ...]:
    """The shapes that a run says it was trained on. UserError for what is none: the file may be anybody's."""
    for pair in found if isinstance(found, tuple) else (found,):
        numbers = isinstance(pair, tuple) and [type(side) for side in pair] == [int, int]
        if not numbers or not 1 <= min(pair) <= max(pair) <= LARGEST:
            text = f"{str(pair)[:80]!a}, which is no height and width from 1 to {LARGEST}"
            raise UserError(f"{folder / 'config.json'} is not the config of a run: data.shapes has {text}")
    return found


def _change(options: Any, changes: Mapping[str, Any]) -> None:
    """Sets "decoder.steps" and the like; a group that the family's options do not have is refused."""
    for name, value in changes.items():
        *path, last = name.split(".")
        node = options
        for group in path:
            if group not in node:
                raise UserError(
                    f"this run has no {group!r} to set {last!r} of; its options are {', '.join(options) or 'none'}"
                )
            node = node[group]
        with node.unlocked(), node.ignore_type():
            node[last] = value
