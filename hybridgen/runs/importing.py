"""Official weights to a run folder and back: where the tables of weights/ meet the models.

A run folder made so is like one that training wrote, at step 0: it can be a part of another config, the start of one
(`init_from`), sampled and evaluated. `official.json` in it keeps source and official config for the way back.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.data import text as text_lib
from hybridgen.data.text.published import Published
from hybridgen.models import contract
from hybridgen.models.contract import Part, find
from hybridgen.runs import folder as run_folder
from hybridgen.runs import manifest, reading
from hybridgen.weights import rules, safetensors, tables

PROMPT = 512  # positions of a prompt, where a model does not say fewer


class Target(NamedTuple):
    """A plan with its model built: `shapes` {path: ShapeDtypeStruct} of all arrays, params and extra."""

    plan: tables.Plan
    family: ModuleType
    model: Any
    shapes: dict[str, Any]

    @property
    def official(self) -> dict[str, Any]:
        """The shapes of what official tensors make; the rest, such as counts of use, starts at zero."""
        made = [path for path in self.shapes if any(rule.fields(path) is not None for rule in self.plan.rules)]
        return {path: spec for path, spec in self.shapes.items() if path in made or path.startswith("params/")}


def target(plan: tables.Plan) -> Target:
    """The model of a plan, without arrays. Raises UserError for a config that makes none."""
    family = find(plan.family)
    specs = {name: jax.ShapeDtypeStruct((1, *shape), np.float32) for name, shape in plan.inputs.items()}
    model = family.build(plan.model)
    try:
        shapes = jax.eval_shape(lambda key: family.init(model, key, specs, {}), jax.random.key(0))
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the config does not describe a model: {type(error).__name__}: {str(error)[:200]}") from None
    return Target(plan, family, model, trees.flatten(shapes))


def load(source: tables.Source, config: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[Target, dict]:
    """(the model, its arrays {"params", "extra"}) of official tensors; see `rules.load` for what is refused."""
    tensors = tables.rooted(weights, source.about.roots)
    goal = target(source.plan(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    arrays = rules.load(tensors, goal.plan.rules, goal.official, goal.plan.dropped)
    rest = {path: np.zeros(spec.shape, spec.dtype) for path, spec in goal.shapes.items() if path not in arrays}
    return goal, {"params": {}, "extra": {}} | trees.unflatten(arrays | rest)


def part(goal: Target, arrays: Mapping[str, Any]) -> Part:
    """The component that imported arrays make."""
    return Part(arrays["params"], arrays["extra"], goal.plan.family, goal.model)


# ---------------------------------------------------------------- run folders


def read_config(about: tables.About, given: str | None, where: Path) -> dict[str, Any]:
    """The official config: a preset's, a file's, or of the file beside the weights. Raises UserError."""
    if given in about.presets:
        return dict(about.presets[given])
    if given is None:
        given = str((where if where.is_dir() else where.parent) / "config.json")
        if not Path(given).is_file():
            if len(about.presets) == 1:
                return dict(next(iter(about.presets.values())))
            presets = f" or one of the presets {', '.join(about.presets)}" if about.presets else ""
            raise UserError(f"no {given}: give --config FILE{presets}")
    elif not Path(given).is_file():
        raise UserError(f"no config {given!r}: neither a file nor a preset ({', '.join(about.presets) or 'none'})")
    config = run_folder.read_json(Path(given))
    if not isinstance(config, dict):
        raise UserError(f"{given} is not a config: it holds no mapping")
    return config


def run_config(plan: tables.Plan, parts: Mapping[str, reading.Run], places: Mapping[str, str]) -> dict[str, Any]:
    """The config of a run folder: what reading it back asks for. `places`: of the parts, as seen from that folder."""
    data = {"source": "shapes", "options": {}, "flip": False, "workers": 0, "threads": 1}
    sizes = plan.inputs.get("image", (32,))  # what reads text alone is asked for none
    side = parts["tokenizer"].config.data.resolution if "tokenizer" in parts else sizes[0]
    data["resolution"] = side
    sample = {"every": 0, "count": 16, "options": dict(plan.sample)}
    rest = {"parts": dict(places), "init_from": {}, "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1}}
    return {"family": plan.family, "model": plan.model, "data": data, "seed": 0, "batch": 1, "sample": sample} | rest


def read_parts(goal: Target, given: Mapping[str, Path]) -> dict[str, reading.Run]:
    """The runs that a model is to be used with. Raises UserError for one that it cannot read."""
    parts = {name: reading.load(reading.find_run(str(path), None)) for name, path in given.items()}
    model = goal.model
    if "tokenizer" in parts and hasattr(model, "vocab"):
        other = parts["tokenizer"].part.model
        for name in ("vocab", "grid"):
            ours, theirs = getattr(model, name), getattr(other, name, None)
            if (tuple(theirs or ()) if name == "grid" else theirs) != ours:
                where = given["tokenizer"]
                raise UserError(f"the model has the {name} {ours}, the tokenizer in {where} has {theirs}")
    if "text" in parts:
        text, tower, where = parts["text"].text, parts["text"].part.model, given["text"]
        length, width = getattr(model, "text_length", 0), getattr(model, "text_width", 0)
        if text is None:
            raise UserError(f"the text tower in {where} has no text tokenizer (text.json): convert it with --text")
        if length and text.length != length and hasattr(tower, "length"):
            raise UserError(f"the model reads {length} text positions, the tower in {where} gives {text.length}")
        if width and tower.width != width:
            raise UserError(f"the model reads text features of width {width}, the tower in {where} gives {tower.width}")
    return parts


def read_text(goal: Target, parts: Mapping[str, reading.Run], folder: Path | None, required: bool) -> Any:
    """The text tokenizer of a run, or None: that in `folder` of a text model, or that of the tower among its parts.

    Raises UserError for one that was `asked` for and cannot be had; otherwise it is said.
    """
    if "text" not in contract.roles(goal.family):
        if required:
            raise UserError(f"--text is for text models, and this is a {goal.plan.family}: give its tower by --part")
        length = getattr(goal.model, "text_length", 0)
        return text_lib.resized(parts["text"].text, length) if "text" in parts and length else None
    try:
        return _fitting(goal.model, folder, min(goal.plan.inputs["text"][0], PROMPT)) if folder else None
    except UserError as error:
        if required:
            raise
        print(f"this run cannot read prompts yet, only ids: {error}")
        return None


def _fitting(model: Any, folder: Path, length: int) -> Published:
    """The tokenizer in a folder. Raises UserError where its ids are more than the model's."""
    text, vocab = Published.read(str(folder), length), getattr(model, "text_vocab", 0) or model.vocab
    if text.vocab_size > vocab:
        raise UserError(f"the tokenizer in {folder} has {text.vocab_size} ids, the model {vocab}")
    return text


def write_run(
    folder: Path,
    source: tables.Source,
    config: Mapping[str, Any],
    weights: Mapping[str, Any],
    given: Mapping[str, Path] | None = None,
    text: Path | None = None,
    required: bool = False,
) -> int:
    """Imports into a new run folder, with the runs `given` as parts; the number of parameters.

    text: where the text tokenizer of a text model may be, and must be if it is `asked` for. Nothing is left of a run
    that could not be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder")
    goal, arrays = load(source, config, weights)
    parts = read_parts(goal, given or {})
    reader = read_text(goal, parts, text, required)
    places = {name: os.path.relpath(path.resolve(), folder.resolve()) for name, path in (given or {}).items()}
    there = folder.exists()
    run_folder.make(folder)
    try:
        count = _save(folder / "checkpoints" / "0", arrays, {name: run.digest for name, run in parts.items()})
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        run_folder.write_json(
            folder / "official.json", {"source": source.name, "config": dict(config), "shapes": shapes}
        )
        if reader is not None:
            run_folder.write_json(folder / "text.json", reader.to_json())
        run_folder.write_json(folder / "config.json", run_config(goal.plan, parts, places))
    except BaseException:
        for name in ("checkpoints", "official.json", "text.json", "config.json"):
            shutil.rmtree(folder / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return count


def _save(folder: Path, arrays: dict, parts: Mapping[str, str]) -> int:
    """Step 0 as checkpoint.py lays it out, emptying `arrays`; the number of parameters. parts: digests.

    That one copies everything before it writes, so that training may go on meanwhile. This one writes a part at a time:
    the file is in memory once.
    """
    flat = {"params": trees.flatten(arrays.pop("params")), "extra": trees.flatten(arrays.pop("extra"))}
    count = sum(leaf.size for leaf in flat["params"].values())
    cpu = jax.devices("cpu")[0]
    for branch in flat.values():
        for path in branch:
            branch[path] = jax.device_put(branch[path], cpu)  # Orbax bounds what it copies of jax's arrays only
    tree = {name: trees.unflatten(branch) for name, branch in flat.items()}
    about = ocp.args.JsonSave({"fingerprint": {}, "meta": {"parts": dict(parts)}, "sound": True})
    handlers = {"model": ocp.PyTreeCheckpointHandler(save_concurrent_gb=1), "about": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as saver:
        saver.save(folder.absolute(), args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree), about=about))
    manifest.write(folder, 0)
    return count


def write_official(source: tables.Source, folder: Path, given: str | None, out: Path) -> int:
    """Exports a run's parameters (averaged ones, if it has some) as safetensors; the number of tensors."""
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"{out} is {'there already' if out.exists() else 'not the name of a safetensors file'}")
    goal = target(source.plan(*_official(source, folder, given)))
    run = read_run(folder)
    for path, spec in goal.official.items():
        if path not in run or run[path].shape != spec.shape:
            shape = f"of shape {list(run[path].shape)}" if path in run else "missing"
            raise UserError(f"{folder} is no model of that config: {path!r} is {shape}, {list(spec.shape)} is expected")
    if odd := sorted(path for path in run if path.startswith("params/") and path not in goal.official):
        raise UserError(f"{folder} is no model of that config: {odd[0]!r} has no place in it")
    tensors = rules.export({path: run[path] for path in goal.official}, goal.plan.rules)
    safetensors.write(out, tensors, {"format": "pt"})
    return len(tensors)


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """The newest good arrays of a run, {"params/..": array, "extra/..": array}. Raises UserError if there are none."""
    flat = trees.flatten(reading.saved_arrays(folder)[0])
    return {path: leaf for path, leaf in flat.items() if not path.startswith("params/disc/")}  # a judge of training


def _official(source: tables.Source, folder: Path, given: str | None) -> tuple[Mapping, Mapping]:
    """(official config, shapes of the official tensors) of a run; of one that was not imported the shapes are {}."""
    kept = run_folder.read_json(folder / "official.json") if (folder / "official.json").is_file() else {}
    shapes = kept.get("shapes", {}) if isinstance(kept, dict) else {}
    if given is not None:
        return read_config(source.about, given, folder), shapes
    if not kept:
        raise UserError(f"{folder} was not imported: give the official config with --config")
    if kept.get("source") != source.name:
        raise UserError(f"{folder} was imported from {kept.get('source')}, not from {source.name}")
    return kept["config"], shapes
