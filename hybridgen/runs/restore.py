"""Loads a run for sampling: its model and parts on this machine's devices, and its sampling program."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hybridgen.core import config as config_lib
from hybridgen.core import meshes, placement
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing
from hybridgen.data.sources.buckets import LARGEST
from hybridgen.models import contract
from hybridgen.models.contract import Part, Shape, find
from hybridgen.models.losses import cross_entropy, per_sample
from hybridgen.runs import drawing
from hybridgen.runs.experiment import build, part_shardings
from hybridgen.runs.reading import check_arrays, load


class Loaded(NamedTuple):
    """A run loaded for sampling: `draw(cond, keys)` is one jitted program, `put` places host arrays on the mesh."""

    config: Any
    text: Any
    mesh: Mesh
    step: int
    draw: Callable
    drawer: Any  # (changes to the sampling options, shape of the images or None) -> another `draw`
    put: Any
    tokenizer: Part | None
    encode: Any  # images -> tokens, compiled
    draws: bool  # generates images: text encoders and feature networks do not
    plans: bool  # generates tokens with a prior
    reads: bool  # takes text
    classes: int  # number of classes; 0: takes no label
    flags: dict[str, str]  # sampling options: name on the command line -> path in the config
    shapes: tuple[Shape, ...]  # of the images that it was trained on, if several
    faults: tuple[str, ...]  # arrays of the run and its parts with numbers that are not finite
    digest: str  # of the arrays of the run and its parts
    nll: Any  # (entries of a batch with tokens) -> nats per token of its prior `[b]`, compiled; None: it has no prior

    @property
    def generates(self) -> bool:
        """Whether it generates images from a caption or class alone, without reference images."""
        return self.plans or ((self.reads or self.classes > 0) and self.tokenizer is None)

    def about(self, seed: int, changes: Mapping[str, Any] | None = None) -> dict[str, str]:
        """What images are generated from besides prompt and class, as text of PNG files; `changes`: as in `drawer`."""
        options = self.config.sample.options.copy_and_resolve_references()
        _change(options, changes or {})
        known = {"seed": str(seed), "options": json.dumps(config_lib.plain(options), sort_keys=True)}
        return known | {"family": self.config.family, "step": str(self.step), "digest": self.digest}

    def tokens(self, images: Any, batch: int) -> np.ndarray:
        """Tokens `[b, n]` of images `[b, H, W, 3]` by the run's tokenizer, `batch` at a time."""
        run = placement.by_batches(lambda given: self.encode(given["image"]), {"image": images}, batch, self.mesh)
        return np.concatenate(list(run))


def restore(folder: Path, changes: Mapping[str, Any], step: int | None = None) -> Loaded:
    """Loads a run with its parts, at its newest valid step or at `step`.

    `changes` override sampling options ("prior.guidance": 3.0). Raises UserError for a run or option that is invalid.
    """
    with doing(f"loading the run {folder}"):
        return _restored(folder, changes, step)


def _restored(folder: Path, changes: Mapping[str, Any], step: int | None) -> Loaded:
    run = load(folder, step)
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        try:
            meshes.make_mesh(config.mesh)
        except UserError:  # the mesh of another machine
            config.mesh = type(config.mesh)({"data": -1})
        _change(config.sample.options, changes)
    experiment = build(config, folder, text=run.text)
    if run.bundled:
        check_arrays(folder, run.part, experiment.parts, config.data.resolution)
        for name, digest in run.part_digests.items():
            if experiment.digests.get(name) != digest:
                raise UserError(f"part {name!r} is not the one that the bundle {folder} was made with")
    own = placement.put(run.part, part_shardings(run.part, experiment.mesh))

    sampler = drawing.Sampler(experiment.family, experiment.model, experiment.parts)

    def drawer(changes: Mapping[str, Any], shape: Shape | None = None) -> Any:
        options = config.sample.options.copy_and_resolve_references()
        _change(options, changes)
        program = sampler(options, shape)
        return lambda cond, keys: program(own.params, own.extra, experiment.parts, cond, keys)

    family, model, parts = experiment.family, experiment.model, experiment.parts
    roles = contract.roles(family)
    within = contract.members(family, model)
    known = [contract.inputs(family, model)]
    known += [contract.inputs(find(part.family), part.model) for part in parts.values()]
    tokenizer = own if "tokenizer" in roles else parts.get("tokenizer")
    encode = jax.jit(lambda part, image: part.call("encode", image))
    return Loaded(
        config,
        experiment.text,
        experiment.mesh,
        run.step,
        drawer({}),
        drawer,
        functools.partial(placement.shard_batch, mesh=experiment.mesh),
        tokenizer,
        functools.partial(encode, tokenizer) if tokenizer else None,
        not {"text", "features"} & set(roles),
        "prior" in (*roles, *within, *parts),
        "text" in parts or any(inputs.text for inputs in known),
        max(inputs.classes for inputs in known),
        drawing.flags(drawing.known_options(family, model, parts)),
        _shapes(config.data.get("shapes", ()), folder),
        tuple(filter(None, (run.fault, *experiment.faults))),
        _digest({"": run.digest} | experiment.digests),
        _nll(_prior(family, own, parts), parts),
    )


def _digest(digests: Mapping[str, str]) -> str:
    """One digest of several."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _prior(family: Any, own: Part, parts: Mapping[str, Part]) -> Part | None:
    """The prior that generates a run's tokens: itself, a part, or a model that was trained within it."""
    if "prior" in contract.roles(family):
        return own
    if "prior" in (members := contract.members(family, own.model)):
        return Part(own.params["prior"], {}, members["prior"].family, members["prior"].model)
    return parts.get("prior")


def _nll(prior: Part | None, parts: Mapping[str, Part]) -> Callable | None:
    """(entries of a batch with tokens) -> mean negative log-likelihood of the tokens of each row, in nats."""
    if prior is None or "text" in contract.roles(find(prior.family)):
        return None

    def nll(prior: Part, parts: Mapping[str, Part], given: dict) -> jax.Array:
        cond = find(prior.family).conditioning(prior.model, given, parts)
        return per_sample(cross_entropy(prior.call("score", given["tokens"], cond), given["tokens"]))

    return functools.partial(jax.jit(nll), prior, parts)


def check_draws(loaded: Loaded) -> None:
    """Raises UserError for a run that generates no images, or without the parts or files that this takes."""
    kind = loaded.config.family
    if not loaded.draws:
        raise UserError(f"a {kind} run generates no images: give the run of a prior, decoder or cascade")
    if loaded.plans and loaded.tokenizer is None:
        raise UserError(f"this {kind} run generates tokens, but has no part 'tokenizer', which makes images of them")
    if loaded.reads and loaded.text is None:
        raise UserError(f"this {kind} run reads text, but has no text tokenizer (text.json): it cannot take prompts")


def _shapes(found: Any, folder: Path) -> tuple[Shape, ...]:
    """The shapes in a run's config that it was trained on. Raises UserError for invalid ones, as in untrusted files."""
    for pair in found if isinstance(found, tuple) else (found,):
        numbers = isinstance(pair, tuple) and [type(side) for side in pair] == [int, int]
        if not numbers or not 1 <= min(pair) <= max(pair) <= LARGEST:
            text = f"{str(pair)[:80]!a}, not a height and width from 1 to {LARGEST}"
            raise UserError(f"{folder / 'config.json'} is not the config of a run: data.shapes has {text}")
    return found


def _change(options: Any, changes: Mapping[str, Any]) -> None:
    """Sets options such as "decoder.steps". Raises UserError for a group that the run does not have."""
    for name, value in changes.items():
        *path, last = name.split(".")
        node = options
        for group in path:
            if group not in node:
                raise UserError(
                    f"{name}: this run has no option group {group!r}; its groups are {', '.join(options) or 'none'}"
                )
            node = node[group]
        with node.unlocked():
            if last in node:
                del node[last]  # otherwise the value is converted to the old one's type, also a boolean
            node[last] = value
