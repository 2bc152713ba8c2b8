"""The training step and sampling program of a config, and their inputs, without a run on disk: for bench and preflight.

A part may be a run folder; a config, such as "configs/tokenizers/vq.py:f16", for an untrained part; or, in a recipe,
another stage. Untrained parts are built for the data of the config that names them. Inputs are abstract (shapes, dtypes
and shardings); `make` creates real ones.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridgen.core import config as config_lib
from hybridgen.core import meshes, placement, rng, trees
from hybridgen.core.arguments import WHAT
from hybridgen.core.errors import UserError
from hybridgen.cost import flops, steps
from hybridgen.data import pipeline, sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources.buckets import largest
from hybridgen.models import contract
from hybridgen.models.contract import Part, find
from hybridgen.runs import drawing, folder
from hybridgen.runs.experiment import Experiment, context, part_shardings, read_by
from hybridgen.runs.reading import Run, find_run, inference_params
from hybridgen.runs.reading import load as load_run
from hybridgen.sampling import guidance
from hybridgen.train import Rule, program
from hybridgen.training.batches import specs_of

# part: the batch entry that may replace its encoding
CACHED = {"tokenizer": "tokens", "autoencoder": "latent", "text": "text_features"}


class Programs(NamedTuple):
    """`step(state, batch, parts)` and `draw(params, extra, parts, cond, keys)`, jitted, and their arguments."""

    experiment: Experiment  # its parts are abstract
    rule: Rule
    step: Any
    draw: Any
    state: Any
    batch: dict
    cond: dict
    keys: Any
    make: Callable  # () -> (state, batch, parts, cond, keys) as arrays
    stream: Callable | None  # () -> iterator over training batches on the mesh; None: with cached entries

    def decoding(self) -> "Decoding | None":
        """The cached decoding of a prior alone, or None if there is no prior."""
        family, model, config = self.experiment.family, self.experiment.model, self.experiment.config
        within = contract.members(family, model)
        if "prior" not in (*contract.roles(family), *within, *self.experiment.parts):
            return None
        known = drawing.known_options(family, model, self.experiment.parts)
        options = drawing.scheduled(drawing.checked(config.sample.options, known)).get("prior", {})

        def prior(params: Any, extra: Any, parts: Any) -> Part:
            if "prior" in contract.roles(family):
                return Part(params, extra, config.family, model)
            return Part(params["prior"], {}, *within["prior"]) if "prior" in within else parts["prior"]

        def plan(params: Any, extra: Any, parts: Any, cond: dict, keys: Any) -> Any:
            part = prior(params, extra, parts)
            return part.call("generate", find(part.family).conditioning(part.model, cond, parts), keys, options)[0]

        params, extra, parts, cond, _ = self.sample_arguments()
        part = jax.eval_shape(prior, params, extra, parts)
        cache = jax.eval_shape(
            lambda part, cond, parts: part.call("prefill", find(part.family).conditioning(part.model, cond, parts))[1],
            part,
            cond,
            parts,
        )
        guided = 2 if guidance.is_on(options.get("guidance", 1.0)) else 1
        size = _bytes_of_step(part, cache, guided, self.experiment.mesh)
        return Decoding(jax.jit(plan), part.model.length - 1, size, options)

    def train_arguments(self) -> tuple:
        return self.state, self.batch, self.experiment.parts

    def sample_arguments(self) -> tuple:
        params = inference_params(self.state["params"], self.state["ema"])
        return params, self.state["extra"], self.experiment.parts, self.cond, self.keys

    def objective(self) -> tuple[Callable, tuple]:
        """(the loss as a function of the trainable parameters and other arguments, these arguments, abstract)."""
        return steps.objective(self.rule, *self.train_arguments())

    def train_flops(self) -> tuple[dict[str, float], float]:
        """(FLOPs of a training step over all devices, by kind; FLOPs that remat computes again)."""
        loss, arguments = self.objective()
        count, again = flops.training(loss, *arguments)
        return dict(count), again

    def sample_flops(self) -> dict[str, float]:
        """FLOPs of one call of `draw` over all devices, by kind."""
        return dict(flops.forward(self.draw, *self.sample_arguments()))

    @property
    def dtype(self) -> str:
        """The compute dtype of the model."""
        return steps.dtype_of(self.experiment.config.model)

    @property
    def trains(self) -> bool:
        return self.experiment.config.steps > 0

    def names(self, requested: tuple[str, ...] | None) -> tuple[str, ...]:
        """The requested programs, by default all that the config has. Raises UserError if it cannot train."""
        if requested and "train" in requested and not self.trains:
            raise UserError(f"this {self.experiment.config.family} config has no training steps: give --what sample")
        return requested or (WHAT if self.trains else WHAT[1:])

    def tokens(self) -> int:
        """Number of tokens or patches per image; 0 if the model has neither."""
        model, parts = self.rule.fitted(self.batch, self.experiment.parts)
        length = getattr(model, "length", 0)
        return length or (parts["tokenizer"].model.length if "tokenizer" in parts else 0)


class Decoding(NamedTuple):
    """`plan(params, extra, parts, cond, keys)`, which runs the prior `steps` times, and the bytes that a step reads."""

    plan: Any
    steps: int
    bytes: float  # per device: parameters in their compute dtype, and the filled part of the cache on average
    options: dict  # sampling options of the prior


def _bytes_of_step(part: Part, cache: Any, guided: int, mesh: jax.sharding.Mesh) -> float:
    """Bytes per device, without embedding tables, which are looked up, and the text encoder, which runs before."""
    flat = trees.flatten(part.params)
    used = [leaf.size for path, leaf in flat.items() if not path.endswith("table") and not path.startswith("text")]
    width = 2 if getattr(part.model, "dtype", "float32") == "bfloat16" else 4
    stored, filled = cache, 1.0  # a state of a fixed size
    if isinstance(cache, dict) and {"k", "v", "valid"} <= cache.keys():  # a KV cache
        length = cache["valid"].shape[1]
        stored, filled = (cache["k"], cache["v"]), 1 - (part.model.length - 1) / 2 / length  # filled share, on average
    cached_bytes = guided * filled * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    return sum(used) * width / mesh.shape["tensor"] + cached_bytes / mesh.devices.size


def choose(config: Any, stage: str | None) -> tuple[Any, Mapping]:
    """(the config itself or a stage of a recipe, all stages). Raises UserError for a missing or unknown stage."""
    stages = config.get("stages", {})
    if not stages:
        if stage:
            raise UserError(f"--stage {stage} is for recipes, but this config is a single model: omit it")
        return config, {}
    known = [name for name in config.order if "family" in stages[name]]
    if stage not in known:
        given = f"it has no {stage!r}{config_lib.hint(stage, known)}" if stage else "choose one with --stage"
        raise UserError(f"--stage: this config is a recipe with the stages {', '.join(known)}: {given}")
    return stages[stage], stages


def bytes_each(tree: Any) -> int:
    """Bytes of abstract arrays per device, by their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def build(
    config: Any, stages: Mapping, *, devices: Any = None, count: int | None = None, cached: bool = False
) -> Programs:
    """Programs of a stage on `devices` (default: this machine's); `draw` makes `count` images (default: the config's).

    cached: batches hold image tokens, latents or text features, as from a cache, and encoders do not run. Raises
    UserError for a config that does not fit the devices, and for missing parts.
    """
    try:
        mesh = meshes.make_mesh(config.mesh, devices)
    except NotImplementedError as error:  # from JAX: an axis that no axes of the torus can form
        raise UserError(f"mesh {dict(config.mesh)} cannot be laid out on these devices: {error}") from None
    meshes.check_batch(mesh, config.batch, config.accumulate)
    source = largest(sources.build(config.data, "train"), max(config.batch, count or config.sample.count))
    runs = {name: _run(name, path) for name, path in config.parts.items() if _is_run(path, stages)}
    text = read_by(runs, config.data)
    if text is None and config.data.get("text"):
        text = text_lib.build(config.data, source)
    read = functools.partial(pipeline.batches, source, text, seed=config.seed, threads=0)
    specs = specs_of(next(read(batch=config.batch, rows=[0])), config.batch)
    unmade = {name: _part(name, path, config.data, text, specs, stages, runs) for name, path in config.parts.items()}
    parts = {name: part for name, (part, _) in unmade.items()}
    family = find(config.family)
    options = config_lib.resolve(config.model, context(config.data, parts, text, source))
    model = contract.model_of(family, options)
    by_row = placement.batch_sharding(mesh)
    places = {name: part_shardings(part, mesh) for name, part in parts.items()}
    experiment = Experiment(config, family, options, model, _placed(parts, places), {}, text, mesh)
    encoders = [name for name in CACHED if cached and name in parts]
    batch = dict(specs)
    for name in encoders:
        batch |= jax.eval_shape(functools.partial(_encoded, name), parts[name], specs)
    rule, step, state, make_state = program(experiment, batch)
    count = meshes.padded(mesh, count or config.sample.count)
    requested = [name for name in ("text", "text_mask", "label", "image") if name in specs]
    cond = {name: jax.ShapeDtypeStruct((count, *specs[name].shape[1:]), specs[name].dtype) for name in requested}
    keys = jax.eval_shape(lambda: drawing.keys_for(config.seed, np.arange(count)))

    def make() -> tuple:
        rows = next(read(batch=max(config.batch, count)))
        pipeline.take_broken(rows)
        real = {name: jax.device_put(made(), places[name]) for name, (_, made) in unmade.items()}
        batch = placement.to_global({name: x[: config.batch] for name, x in rows.items()}, mesh)
        for name in encoders:
            batch |= jax.jit(functools.partial(_encoded, name))(real[name], batch)
        conditions = placement.to_global({name: rows[name][:count] for name in cond}, mesh)
        drawn = jax.device_put(drawing.keys_for(config.seed, np.arange(count)), by_row)
        with jax.set_mesh(mesh):
            return make_state(real), batch, real, conditions, drawn

    def stream() -> pipeline.Prefetch:
        rows = placement.local_rows(mesh, config.batch)
        options = {"batch": config.batch, "seed": config.seed, "rows": rows, "flip": config.data.get("flip", False)}
        host = pipeline.batches(source, text, workers=config.data.workers, **options)
        return pipeline.prefetch(map(_unbroken, host), functools.partial(placement.to_global, mesh=mesh))

    draw = drawing.sampler(family, model, config.sample.options, parts, rule.shape(batch))
    inputs = (_placed(x, jax.tree.map(lambda _: by_row, x)) for x in (batch, cond, keys))
    return Programs(experiment, rule, step, draw, state, *inputs, make, None if encoders else stream)


def _unbroken(batch: dict) -> dict:
    pipeline.take_broken(batch)
    return batch


def _encoded(name: str, part: Part, batch: dict) -> dict:
    """The batch entries that hold a part's encoding."""
    if name != "text":
        return {CACHED[name]: part.call("encode", batch["image"])}
    features, mask = part.call("encode", batch["text"], batch["text_mask"])
    return {CACHED[name]: features, f"{CACHED[name]}_mask": mask}


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _is_run(path: str, stages: Mapping) -> bool:
    return Path(path).name not in stages and ".py" not in path


def _run(name: str, path: str) -> Run:
    """The run of a part. Raises UserError, which says how to use an untrained part instead."""
    try:
        return load_run(find_run(path, None))
    except UserError as error:
        hint = f"for an untrained part, name a config: --config.parts.{name}=configs/FILE.py:VARIANT"
        raise UserError(f"part {name!r}: {error}; {hint}") from None


def _part(
    name: str, path: str, data: Any, text: Any, specs: dict, stages: Mapping, runs: Mapping[str, Run]
) -> tuple[Part, Callable]:
    """(the abstract part, function that creates it) of a run (from `runs`, if already read), a config or a stage."""
    if _is_run(path, stages):
        part = (runs.get(name) or _run(name, path)).part
        return jax.eval_shape(lambda: part), lambda: part
    config = stages.get(Path(path).name) or config_lib.load(path)
    inner = {other: _part(other, where, data, text, specs, stages, {})[0] for other, where in config.parts.items()}
    family = find(config.family)
    model = contract.model_of(family, config_lib.resolve(config.model, context(data, inner, text)))

    def fresh() -> Part:
        key = rng.step_key(jax.random.key(config.seed), 0, "init")
        arrays = contract.returned(family, "init", family.init(model, key, specs, inner))
        return Part(arrays["params"], arrays["extra"], config.family, model)

    return jax.eval_shape(fresh), jax.jit(fresh)


def compile_timed(function: Any, arguments: tuple, options: dict | None = None) -> tuple[Any, dict[str, Any]]:
    """(compiled, {"lower_s", "compile_s", "memory": bytes per device}) of a jitted function on abstract arguments.

    options: XLA compiler options.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    plan = compiled.memory_analysis()
    memory = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,  # outputs in the memory of donated arguments
        "temporaries": plan.temp_size_in_bytes,
    }
    memory["peak"] = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    return compiled, {"lower_s": middle - start, "compile_s": time.perf_counter() - middle, "memory": memory}


def chosen(args: argparse.Namespace, overrides: Any) -> tuple[Any, Mapping]:
    """(the config or stage that a command line names, all stages)."""
    return choose(config_lib.load(args.config, overrides), args.stage)


def load(args: argparse.Namespace, overrides: Any, devices: Any = None, changes: Mapping | None = None) -> Programs:
    """The programs of the config that a command line names, with `changes` to it ("mesh.fsdp": 16)."""
    config, stages = chosen(args, overrides)
    if args.count is not None and args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    with config.unlocked():
        config.update_from_flattened_dict(dict(changes or {}))
    return build(config, stages, devices=devices, count=args.count, cached=args.cached)


def writable(path: Path | None) -> Path | None:
    """`path`, after its folder is created. Raises UserError if no file can be written there."""
    if path is not None:
        folder.make(path.resolve().parent)
        if path.is_dir():
            raise UserError(f"--json {path} is a folder: give a file name")
    return path


def human(number: float, unit: str = "") -> str:
    """A number with three digits and an SI prefix: 1.23 G."""
    scales = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"))
    size, prefix = next((scale for scale in scales if number >= scale[0]), scales[-1])
    return f"{number / size:.3g} {prefix}{unit}".strip()
