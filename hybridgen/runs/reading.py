"""Reads a run folder or a bundle: its config, arrays and text tokenizer.

A run folder has `config.json` (with all "auto" resolved), `text.json` (the text tokenizer), `checkpoints/` and logs. A
bundle (runs/bundle.py) can be used in place of a run folder.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core import config as config_lib
from hybridgen.core import importing, trees
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.models import contract
from hybridgen.models.contract import Part, file_of, find
from hybridgen.runs import bundle, checkpoint, fingerprint, upgrades
from hybridgen.runs.folder import read_json


class Run(NamedTuple):
    """A run as read for inference."""

    config: Any
    part: Part
    text: Any
    digest: str
    part_digests: dict[str, str]
    step: int
    bundled: bool  # read from a bundle, which may be untrusted
    folder: Path
    fault: str = ""  # an array with numbers that are not finite

    def check_finite(self) -> None:
        """Raises UserError if an array has numbers that are not finite: nothing can be trained on or made of it."""
        if self.fault:
            raise UserError(self.fault)


def find_run(path: str, folder: Path | None) -> Path:
    """The folder of a run: `path` relative to `folder`, or to the current folder. Raises UserError if it is no run."""
    places = [Path(os.path.normpath(place)) for place in ([folder / path] if folder else []) + [Path(path)]]
    for place in places:
        if (place / "config.json").is_file():
            return place.resolve()
    stages = sorted(file.parent.name for place in places[:1] for file in place.glob("*/config.json"))
    if stages:  # the folder of a recipe
        last = [name for name in stages if name == "cascade"] or stages[-1:]
        shown = Path(path) / last[0]
        raise UserError(f"no run in {path!r}; it has the runs {', '.join(stages)}: give one of them, such as {shown}")
    raise UserError(f"no run in {path!r} (looked for config.json in {', '.join(str(p) for p in places)})")


def load(folder: Path, step: int | None = None, report: Any = print) -> Run:
    """A run at its newest valid checkpoint (or at `step`), with EMA parameters if there are any. Raises UserError."""
    bundled = bundle.at(folder)
    made = bundle.read(folder) if bundled else None  # first: this verifies the files of the bundle
    config = read_config(folder)
    model = model_of(config, folder)
    if made and step not in (None, made.step):
        raise UserError(f"--checkpoint {step}: the bundle {folder} has step {made.step} only")
    saved = None if made else saved_arrays(folder, step, config, report)
    arrays, part_digests, found = made or saved[:3]
    part = Part(arrays["params"], arrays["extra"], config.family, model)
    text = text_of(folder, saved.text if saved else None)
    options = config.data.get("options")
    if hasattr(options, "items") and sources.BUCKETS in options:
        config = config.copy_and_resolve_references()  # evaluation and caching use square images
        with config.unlocked():
            del config.data.options[sources.BUCKETS]
    fault = not_finite(folder, arrays)
    if fault:
        report(f"warning: {fault}")
    return Run(config, part, text, checkpoint.digest(arrays), part_digests, found, bundled, folder, fault)


def text_of(folder: Path, digest: str | None = None) -> Any:
    """The text tokenizer of a run, or None. digest: that of the checkpoint, None if it is not known or has none (as in
    a bundle, whose manifest has all files).

    Raises UserError if the file is missing or another one: captions would be read as other ids than in training.
    """
    file = folder / "text.json"
    if not file.is_file():
        if digest:
            raise UserError(f"{file} is missing: the run was saved with a text tokenizer (digest {digest})")
        return None
    text = text_lib.from_json(read_json(file))
    if digest and (found := text_lib.digest(text)) != digest:
        raise UserError(f"{file} is not the text tokenizer that the run was saved with: digest {found}, not {digest}")
    return text


def not_finite(folder: Path, arrays: Mapping[str, Any]) -> str:
    """The first of a run's arrays with numbers that are not finite, in words; "" if there is none."""
    for path, leaf in trees.flatten(arrays).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (bad := int(leaf.size - np.isfinite(leaf).sum())):
            return f"the run {folder} is damaged: {bad} of the {leaf.size} numbers of {path} are NaN or infinite"
    return ""


def reads_text(folder: Path) -> bool:
    """Whether a run has a text tokenizer and its model reads text: that of a tokenizer of images has no use for it."""
    config = read_config(folder)
    reads = contract.inputs(find(config.family), model_of(config, folder)).text
    return reads and (folder / "text.json").is_file()


class Saved(NamedTuple):
    """A checkpoint: arrays {"params", "extra"}, digests of the parts, step, and digest of the text tokenizer."""

    arrays: dict
    parts: dict[str, str]
    step: int
    text: str | None


def saved_arrays(folder: Path, step: int | None = None, config: Any = None, report: Any = print) -> Saved:
    """The checkpoint of a run folder. Raises UserError if it was saved with another model than `config`'s, and if no
    checkpoint is valid."""
    saved = checkpoint.Checkpointer(folder / "checkpoints", read_only=True)
    found = saved.newest_good(report) if step is None else step
    if found is None:
        raise UserError(f"no usable checkpoint in {folder / 'checkpoints'}: nothing was saved, or all are damaged")
    if config is not None:
        saved.check_model(found, config_lib.plain(config))
    state = saved.restore_params(found)
    about = saved.about(found)
    part_digests, text = about["meta"].get("parts", {}), fingerprint.text_digest(about)
    saved.close()
    params = inference_params(state.get("params", {}), state.get("ema", {}))
    return Saved({"params": params, "extra": state.get("extra", {})}, part_digests, found, text)


def inference_params(params: Any, ema: Any) -> dict:
    """Parameters for sampling: the EMA where there is one, otherwise the parameters themselves."""
    flat = trees.flatten(params) | trees.flatten(ema)
    return trees.unflatten(flat)


def read_config(folder: Path) -> Any:
    """The config of a run or bundle, converted to current options. Raises UserError if it is invalid or unsafe."""
    config = upgrades.upgraded(config_lib.read(folder / "config.json"))
    for name in ("model", "data", "mesh", "parts", "sample"):
        if not hasattr(config.get(name), "items"):
            raise UserError(f"{folder / 'config.json'} is not the config of a run: it has no {name!r}")
    if bundle.at(folder):
        check_families(config, folder)
        bundle.check_parts(folder, config.parts)
    return config


def families(config: Mapping) -> Iterator[str]:
    """The families that a config names: its own, and those of the members of its model."""
    if isinstance(config.get("family"), str):
        yield config["family"]
    yield from _members(config.get("model", {}))


def _members(model: Mapping) -> Iterator[str]:
    for value in model.values():
        if hasattr(value, "items"):
            yield from [value["family"]] if isinstance(value.get("family"), str) else []
            yield from _members(value)


def families_of(folder: Path) -> list[str]:
    """The families of a run and of its parts, from their configs alone."""
    config = read_config(folder)
    parts = [read_config(find_run(path, folder)) for path in config.parts.values()]
    return [family for one in (config, *parts) for family in families(one)]


def families_with_parts(config: Any, folder: Path | None, stages: Mapping[str, Any]) -> tuple[list[str], bool]:
    """(the families of a config and of its parts, whether the run of a part does not exist yet).

    A part is a run, relative to `folder`, or a stage of a recipe.
    """
    names, partial = list(families(config)), False
    for path in config.parts.values():
        stage = stages.get(Path(path).name)
        try:
            is_stage = stage is not None and "family" in stage
            names += families(stage) if is_stage else families_of(find_run(path, folder))
        except UserError:
            partial = True
    return names, partial


def check_families(config: Any, folder: Path) -> None:
    """Raises UserError if a bundle, which may be untrusted, names code outside hybridgen: nothing of it is imported."""
    strange = [module for module in outside(config) if not importing.is_trusted(module)]
    if not strange:
        return
    names = " and ".join(ascii(module[:80]) for module in strange)
    advice = ""
    if all(part.isidentifier() for module in strange for part in module.split(".")):
        advice = f": if you trust {'it' if len(strange) == 1 else 'them'}, give {trusting(strange)}, or import first"
    raise UserError(f"the bundle {folder} uses {names}, which is not part of hybridgen{advice}")


def outside(config: Any) -> list[str]:
    """The modules outside hybridgen that a config names: of its families and of its data source."""
    found = [family for family in families(config) if not file_of(family).is_file()]
    source = str(config.get("data", {}).get("source", "")).rpartition(".")[0]
    return list(dict.fromkeys([*found, *filter(None, [source])]))


def trusting(modules: Iterable[str]) -> str:
    """The arguments of a command that trust these modules: one --trust for each package or single module."""
    return " ".join(f"--trust {name}" for name in dict.fromkeys(module.partition(".")[0] for module in modules))


def check_arrays(folder: Path, part: Part, parts: Mapping[str, Part], resolution: int) -> None:
    """Raises UserError if an array of a bundle is missing, unknown or has another shape than its model's; names it."""
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
        found, right = (tree[path].shape if path in tree else "missing" for tree in (has, wants))
        if found != right:
            raise UserError(f"the weights of {folder} do not fit its config: {path} is {found}, expected: {right}")


def model_of(config: Any, folder: Path) -> Any:
    """The model of a run. Raises UserError for a config that does not describe a model."""
    try:
        return contract.model_of(find(config.family), config_lib.resolve(config.model, {}))
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the file may be untrusted
        text = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{folder / 'config.json'} does not describe a model: {text}") from error


def earlier(config: Any, folder: Path, digests: Mapping[str, str] | None = None) -> tuple[dict[str, Any], Any]:
    """({path: parameters}, extra) of `config.init_from`, {"subtree here" or "all": "run" or "run:subtree there"}.

    `extra`: of a run that initializes all parameters (with a codebook, for instance), or None. Prints a line for each
    part, of the given `digests`, that is not the one that such a run was trained with.
    """
    found, extra = {}, None
    for prefix, where in config.init_from.items():
        path, _, inside = where.partition(":")
        run = load(find_run(path, folder))
        run.check_finite()
        for name, digest in run.part_digests.items():
            if (digests or {}).get(name, digest) != digest:
                print(f"warning: init_from: {path} was trained with another {name} than this run has", file=sys.stderr)
        part = run.part
        arrays = part.params
        for name in filter(None, inside.split("/")):
            if name not in arrays:
                raise UserError(f"init_from: {path} has no subtree {inside!r}; it has {', '.join(arrays)}")
            arrays = arrays[name]
        whole = prefix == "all"
        found["" if whole else prefix.replace(".", "/")] = arrays
        extra = part.extra if whole and not inside else extra
    return found, extra
