"""Imports official weights into a run folder, and exports a run folder as official weights, by the tables of weights/.

An imported run folder is like a trained one at step 0: it can be used as a part of another config or in `init_from`,
sampled and evaluated. For the export, its `official.json` records the source, the official config, and the shapes and
dtypes of the tensors; `official.safetensors` has the tensors that cannot be made of the run's arrays: float64 with
numbers that float32 does not have, and buffers that only official code reads.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.data import text as text_lib
from hybridgen.data.text.published import Published
from hybridgen.models import contract
from hybridgen.models.contract import Part
from hybridgen.runs import fitting, manifest, reading
from hybridgen.runs import folder as run_folder
from hybridgen.runs.targets import Target, advice, fitted, target
from hybridgen.weights import nesting, rules, safetensors, tables
from hybridgen.weights.tensors import DTYPES

ORIGINALS = "official.safetensors"
PROMPT = 512  # positions of a prompt, unless the model has fewer


def load(source: tables.Source, config: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[Target, dict]:
    """(the model, its arrays {"params", "extra"}) from official tensors.

    Raises the UserErrors of `rules.load`, with the preset or source that the weights look like if they do not fit.
    """
    tensors = nesting.model_tensors(weights, source.about.roots)
    try:
        goal = fitted(source, config, tensors)
    except UserError as error:
        raise UserError(f"{error}{advice(source, weights)}") from None
    arrays = rules.load(tensors, goal.plan.rules, goal.official, goal.plan.dropped)
    rest = {path: np.zeros(spec.shape, spec.dtype) for path, spec in goal.shapes.items() if path not in arrays}
    return goal, {"params": {}, "extra": {}} | trees.unflatten(arrays | rest)


def part(goal: Target, arrays: Mapping[str, Any]) -> Part:
    """The part of a model with imported arrays."""
    return Part(arrays["params"], arrays["extra"], goal.plan.family, goal.model)


# ---------------------------------------------------------------- run folders


def read_config(about: tables.About, given: str | None, where: Path) -> dict[str, Any]:
    """The official config: of a preset, a file, or config.json in the folder of the weights. Raises UserError."""
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
        presets = ", ".join(about.presets) or "none"
        raise UserError(f"--config: no config {given!r}: it is neither a file nor a preset (presets: {presets})")
    config = run_folder.read_json(Path(given))
    if not isinstance(config, dict):
        raise UserError(f"{given} is not a config: it is not a JSON object")
    return config


def run_config(plan: tables.Plan, parts: Mapping[str, reading.Run], places: Mapping[str, str]) -> dict[str, Any]:
    """The config of a run folder, with the entries that reading it needs. `places`: relative paths of the parts."""
    data = {"source": "shapes", "options": {}, "flip": False, "workers": 0, "threads": 1}
    sizes = plan.inputs.get("image", (32,))  # a text model has no image size
    data["resolution"] = sizes[0]
    if "tokenizer" in parts:
        data["resolution"] = parts["tokenizer"].config.data.resolution
    elif "autoencoder" in parts:
        auto = parts["autoencoder"]
        data["resolution"] = sizes[0] * auto.config.data.resolution // auto.part.model.grid[0]
    sample = {"every": 0, "count": 16, "options": dict(plan.sample)}
    rest = {"parts": dict(places), "init_from": {}, "mesh": {"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1}}
    return {"family": plan.family, "model": plan.model, "data": data, "seed": 0, "batch": 1, "sample": sample} | rest


def read_parts(goal: Target, given: Mapping[str, Path]) -> dict[str, reading.Run]:
    """The runs given as parts. Raises UserError for a part that does not fit the model."""
    places = {name: reading.find_run(str(path), None) for name, path in given.items()}
    where = {name: f"--part {name}={path}" for name, path in given.items()}
    fitting.check_names(
        [goal.plan.family, *(n for place in places.values() for n in reading.families_of(place))], where
    )
    parts = {name: reading.load(place) for name, place in places.items()}
    fitting.check_roles(parts, where)
    fitting.check_sizes(goal.family, goal.model, {name: run.part for name, run in parts.items()}, where)
    model = goal.model
    if "text" in parts:
        text, tower, where = parts["text"].text, parts["text"].part.model, given["text"]
        length, width = getattr(model, "text_length", 0), getattr(model, "text_width", 0)
        if text is None:
            raise UserError(f"--part text={where} has no text tokenizer (text.json): convert it with --text FOLDER")
        if length and text.length != length and hasattr(tower, "length"):
            raise UserError(f"--part text={where} has {text.length} text positions, but the model reads {length}")
        if width and tower.width != width:
            raise UserError(f"--part text={where} has features of width {tower.width}, not {width} as the model reads")
    return parts


def read_text(goal: Target, parts: Mapping[str, reading.Run], folder: Path | None, required: bool) -> Any:
    """The text tokenizer of a run, or None: of a text model that in `folder`, otherwise that of its text encoder.

    Raises UserError if it is `required` and cannot be read; if it is not required, this prints the reason.
    """
    if "text" not in contract.roles(goal.family):
        if required:
            raise UserError(f"--text is for text models, not for {goal.plan.family}: use --part text=RUN")
        length = getattr(goal.model, "text_length", 0)
        return text_lib.resized(parts["text"].text, length) if "text" in parts and length else None
    try:
        return _fitting(goal.model, folder, min(goal.plan.inputs["text"][0], PROMPT)) if folder else None
    except UserError as error:
        if required:
            raise
        print(f"warning: without a text tokenizer this run reads token ids only, no prompts: {error}")
        return None


def _fitting(model: Any, folder: Path, length: int) -> Published:
    """The text tokenizer in a folder. Raises UserError if it has more ids than the model's vocabulary."""
    text, vocab = Published.read(str(folder), length), getattr(model, "text_vocab", 0) or model.vocab
    if text.vocab_size > vocab:
        raise UserError(f"the text tokenizer in {folder} has {text.vocab_size} ids, but the model has {vocab}")
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
    """Imports into a new run folder, with the runs `given` as parts; returns the number of parameters.

    text: folder of the text tokenizer of a text model; `required`: fail if there is none. Raises UserError, and then
    leaves no files behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists: give a new folder")
    goal, arrays = load(source, config, weights)
    parts = read_parts(goal, given or {})
    reader = read_text(goal, parts, text, required)
    places = {name: os.path.relpath(path.resolve(), folder.resolve()) for name, path in (given or {}).items()}
    there = folder.exists()
    run_folder.make(folder)
    try:
        meta = {"parts": {name: run.digest for name, run in parts.items()}}
        meta |= {"text": text_lib.digest(reader)} if reader is not None else {}
        count = _save(folder / "checkpoints" / "0", arrays, meta)
        write_record(folder, source, config, goal.plan, nesting.model_tensors(weights, source.about.roots))
        if reader is not None:
            run_folder.write_json(folder / "text.json", reader.to_json())
        run_folder.write_json(folder / "config.json", run_config(goal.plan, parts, places))
    except BaseException:
        for name in ("checkpoints", "official.json", ORIGINALS, "text.json", "config.json"):
            shutil.rmtree(folder / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return count


def write_record(
    folder: Path, source: tables.Source, config: Mapping[str, Any], plan: tables.Plan, tensors: Mapping[str, Any]
) -> None:
    """Writes what the export needs besides the arrays: official.json, and official.safetensors if there is a need."""
    kinds = {name: safetensors.NAMES[np.dtype(tensor.dtype)] for name, tensor in tensors.items()}
    about = {"source": source.name, "config": dict(config), "dtypes": kinds}
    about["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    run_folder.write_json(folder / "official.json", about)
    kept, dropped = (rules.dropped_names(tensors, names) for names in (plan.kept, plan.dropped))
    wide = {name for name in tensors if kinds[name] == "F64"} - dropped
    kept |= {name for name in wide if not _is_float32(tensors[name])}
    if kept:
        safetensors.write(folder / ORIGINALS, {name: tensors[name] for name in kept}, {"format": "pt"})


def _is_float32(tensor: Any) -> bool:
    """Whether float32 has all numbers of a tensor."""
    values = np.asarray(tensor)
    return np.array_equal(values, values.astype(np.float32))


def _save(folder: Path, arrays: dict, meta: Mapping[str, Any]) -> int:
    """Writes step 0 in the layout of checkpoint.py and empties `arrays`; returns the number of parameters.

    meta: digests of the parts and of the text tokenizer. Unlike checkpoint.py, which copies all arrays before it writes
    so that training can continue, this writes one array after the other, so the weights are in memory only once.
    """
    flat = {"params": trees.flatten(arrays.pop("params")), "extra": trees.flatten(arrays.pop("extra"))}
    count = sum(leaf.size for leaf in flat["params"].values())
    cpu = jax.devices("cpu")[0]
    for branch in flat.values():
        for path in branch:
            branch[path] = jax.device_put(branch[path], cpu)  # Orbax limits its copies for JAX arrays only
    tree = {name: trees.unflatten(branch) for name, branch in flat.items()}
    about = ocp.args.JsonSave({"fingerprint": {}, "meta": dict(meta), "sound": True})
    handlers = {"model": ocp.PyTreeCheckpointHandler(save_concurrent_gb=1), "about": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as saver:
        saver.save(folder.absolute(), args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree), about=about))
    manifest.write(folder, 0)
    return count


def write_official(source: tables.Source, folder: Path, given: str | None, out: Path) -> int:
    """Exports a run's parameters (EMA parameters, if any) as safetensors; returns the number of tensors."""
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"{out} {'already exists' if out.exists() else 'is not the name of a .safetensors file'}")
    official, shapes, kinds = _official(source, folder, given)
    goal = target(source.plan(official, shapes))
    run = read_run(folder)
    if fault := reading.not_finite(folder, run):
        raise UserError(fault)
    for path, spec in goal.official.items():
        if path not in run or run[path].shape != spec.shape:
            shape = f"of shape {list(run[path].shape)}" if path in run else "missing"
            raise UserError(f"{folder} does not fit the config: {path!r} is {shape}, expected is {list(spec.shape)}")
    if odd := sorted(path for path in run if path.startswith("params/") and path not in goal.official):
        raise UserError(f"{folder} does not fit the config: {odd[0]!r} is not a parameter of its model")
    tensors = rules.export({path: run[path] for path in goal.official}, goal.plan.rules)
    tensors = as_they_were(folder, tensors, kinds) if kinds else tensors
    safetensors.write(out, tensors, {"format": "pt"})
    return len(tensors)


def as_they_were(folder: Path, tensors: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The tensors of an imported run with the names and dtypes of its weights; in float64 what float32 does not have.

    Raises UserError for an official.json with other dtypes than those of safetensors.
    """
    if wrong := [kind for kind in kinds.values() if kind not in DTYPES]:
        raise UserError(f"{folder / 'official.json'} has the dtype {str(wrong[0])[:40]!r}, which does not exist")
    originals = safetensors.read(folder / ORIGINALS)[0] if (folder / ORIGINALS).is_file() else {}
    out: dict[str, Any] = {}
    for name in filter(kinds.__contains__, {**tensors, **originals}):
        out[name] = originals.get(name)
        if name in tensors:
            ours = dataclasses.replace(tensors[name], dtype=DTYPES[kinds[name]])
            pair = [np.asarray(one, np.float32) for one in (originals.get(name, ours), ours)]
            out[name] = originals[name] if name in originals and np.array_equal(*pair) else ours
    return out


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """The newest valid arrays of a run, {"params/..": array, "extra/..": array}. Raises UserError if there are none."""
    flat = trees.flatten(reading.saved_arrays(folder).arrays)
    return {path: leaf for path, leaf in flat.items() if not path.startswith("params/disc/")}  # the discriminator


def _official(source: tables.Source, folder: Path, given: str | None) -> tuple[Mapping, Mapping, Mapping]:
    """(official config, shapes and dtypes of the official tensors) of a run; {} for a run that was not imported."""
    kept = run_folder.read_json(folder / "official.json") if (folder / "official.json").is_file() else {}
    shapes, kinds = (kept.get(key, {}) if isinstance(kept, dict) else {} for key in ("shapes", "dtypes"))
    if given is not None:
        return read_config(source.about, given, folder), shapes, kinds
    if not kept:
        raise UserError(f"{folder} was not imported: give the official config with --config")
    if kept.get("source") != source.name:
        raise UserError(f"{folder} was imported from {kept.get('source')}, not from {source.name}")
    return kept["config"], shapes, kinds
