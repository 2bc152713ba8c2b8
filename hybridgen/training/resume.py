"""Starts or resumes a run: its first state, and the fingerprint that must match the checkpoint's."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from hybridgen.core import config as config_lib
from hybridgen.core import meshes
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources import layouts
from hybridgen.models import contract
from hybridgen.models.contract import find
from hybridgen.runs import checkpoint, drawing, fitting, reading
from hybridgen.runs import folder as run_folder
from hybridgen.runs.experiment import TEXT, Experiment, called
from hybridgen.training import boards, logging
from hybridgen.training import state as state_lib


def checked(
    config: Any, source: Callable = sources.build, folder: Path | None = None, stages: Mapping[str, Any] | None = None
) -> Any:
    """The training data of a config, `source(config.data, split)`. stages: of its recipe, whose runs may be parts.

    Raises UserError, before any work, for a family, mesh, batch, option or data set that cannot be used.
    """
    find(config.family)
    meshes.check_batch(meshes.make_mesh(config.mesh), config.batch, config.accumulate)
    drawing.check_config(config, folder, stages or {})
    names, partial = reading.families_with_parts(config, folder, stages or {})
    fitting.check_names(names, called(config), partial)
    unshadowed(config)
    boards.checked(config)
    if config.eval.every or config.sample.every:
        source(config.data, "validation")
    data = source(config.data, "train")
    conditioned(config, data)
    return data


def unshadowed(config: Any) -> None:
    """Raises UserError for a part that the model would not use, since it trains a model of that name itself."""
    for name, member in config.model.items():
        if name in config.parts and hasattr(member, "items") and "family" in member:
            raise UserError(
                f"config.parts.{name} is given, and this {config.family} trains a {name} of its own (model.{name}): "
                f"use configs/hybrid/cascade.py without a variant to assemble parts"
            )


def conditioned(config: Any, data: Any) -> None:
    """Raises UserError for a prior that takes its captions and classes from data with neither: nothing could ask it."""
    inputs = [name for name in (*TEXT, "classes") if config.model.get(name) == config_lib.AUTO]
    if "prior" not in contract.roles(find(config.family)) or not inputs:
        return
    if not len(getattr(data, "class_names", ())) and not (config.data.get("text") and text_lib.captioned(data)):
        raise UserError(
            f"data.source {config.data.source!r} has no captions and no classes, so that this prior could not be "
            f"sampled; a folder has them in {', '.join(layouts.CAPTIONED)}; data.options.label_key names a field"
        )


def beginning(
    experiment: Experiment,
    folder: Path,
    saved: checkpoint.Checkpointer,
    which: state_lib.Trainable,
    abstract: dict,
    make: Callable,
    timer: logging.Timer,
    step: int | None,
) -> dict:
    """The state of checkpoint `step`, or for None of a new run, with the parameters that `init_from` names."""
    config = experiment.config
    with timer.time("restore" if step is not None else "init"), jax.set_mesh(experiment.mesh):
        if step is not None:
            return saved.restore(step, abstract)
        if not config.init_from:
            return make()
        params, extra = reading.earlier(config, folder, experiment.digests)
        state_lib.check_start(abstract, params, extra)  # before anything is compiled
        return state_lib.start_from(make(), params, which, extra)


def described(config: Any, experiment: Experiment, source: Any) -> tuple[dict, dict]:
    """(the config with all "auto" resolved, the fingerprint that must match when the run resumes), as plain data."""
    resolved = config_lib.plain(config) | {"model": config_lib.plain(experiment.options)}
    if names := list(getattr(source, "class_names", ())):
        resolved["data"]["class_names"] = config_lib.plain(names)  # what a class is called, for --label
    if hasattr(source, "occurring"):
        resolved["data"]["shapes"] = config_lib.plain(source.occurring(config.batch, True))  # the trained shapes
    return resolved, {
        "config": {name: resolved[name] for name in resolved if name not in NOT_FINGERPRINTED},
        "data": pipeline.fingerprint(config.data, source, experiment.text, batch=config.batch, seed=config.seed),
        "parts": experiment.digests,
    }


def allowed(words: str, runs: list[tuple[Any, Path]]) -> tuple[str, ...]:
    """The keys of `--allow KEY,...`. Raises UserError for a key that no run (config, folder) has."""
    wanted, keys = tuple(filter(None, words.split(","))), set(DATA)
    for config, folder in runs:
        keys |= {f"config.{key}" for key in config_lib.flatten(config) if key.split(".")[0] not in NOT_FINGERPRINTED}
        keys |= {f"data.source.options.{name}" for name in config_lib.flatten(config.data.get("options", {}))}
        keys |= {f"parts.{name}" for name in config.parts}
        for file in sorted(folder.glob("checkpoints/*/about/metadata")) if wanted else ():
            with contextlib.suppress(UserError, AttributeError):  # damage is reported when the checkpoint is read
                keys |= set(config_lib.flatten(run_folder.read_json(file).get("fingerprint", {})))
    groups = ("config", "data", "parts")
    for word in wanted:
        if word not in groups and not any(key == word or key.startswith(f"{word}.") for key in keys):
            near = config_lib.hint(word, [*keys, *groups])
            raise UserError(
                f"--allow {word!r} is not a key{near} (keys: {', '.join(sorted(keys))}; groups: {', '.join(groups)})"
            )
    return wanted


# keys of the data's fingerprint, besides its options
DATA = tuple(f"data.{name}" for name in ("batch", "seed", "flip", "text.kind", "text.length", "text.digest"))
DATA += tuple(f"data.source.{name}" for name in ("kind", "length", "resolution", "records", "encoders"))
# config entries that may differ when a run resumes: they change neither the samples nor the arithmetic of a step
NOT_FINGERPRINTED = ("parts", "init_from", "mesh", "log", "eval", "sample", "checkpoint", "profile", "data", "health")
