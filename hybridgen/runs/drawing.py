"""Drawing pictures from a model: one jitted program of one shape, any number of pictures, each from its own key.

Picture i of a seed has the key fold_in(step_key(seed, 0, "sample"), i): it is the same whatever the batch it is drawn
in. Batches are padded to the compiled shape. Options are those of `config.sample.options`, checked here.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hybridgen.core import config as config_lib
from hybridgen.core import meshes, placement, rng
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.evals.sheet import sheet
from hybridgen.models.contract import Shape, for_shape
from hybridgen.sampling import guidance
from hybridgen.sampling.solvers import SOLVERS

# option: (lowest, highest, type)
RANGES = {
    "gather": (0, 1, int),
    "guidance": (0.0, 100.0, float),
    "guidance_channels": (0, 1_000_000, int),
    "guidance_until": (0.0, 1.0, float),
    "temperature": (0.0, 100.0, float),
    "top_k": (0, 1_000_000, int),
    "top_p": (1e-6, 1.0, float),
    "steps": (1, 1000, int),
    "shift": (0.01, 100.0, float),
}
CHOICES = {"solver": tuple(SOLVERS), "guidance_schedule": tuple(guidance.RAMPS), "spacing": ("uniform", "cosine")}
# what a user calls an option -> where it is in `config.sample.options`
GIVEN = {
    "guidance": "prior.guidance",
    "guidance_schedule": "prior.guidance_schedule",
    "guidance_until": "prior.guidance_until",
    "temperature": "prior.temperature",
    "top_k": "prior.top_k",
    "top_p": "prior.top_p",
    "decoder_guidance": "decoder.guidance",
    "steps": "decoder.steps",
    "solver": "decoder.solver",
}


def checked(options: Mapping, path: str = "") -> dict[str, Any]:
    """Options as plain data, ranges checked; `guidance` with its `guidance_schedule` becomes a schedule,
    which ends at the share `guidance_until` of the way.

    `guidance` is a scale, or a scale by the condition that it is against: {"plan": 1.5, "text": 3.0}.
    """
    out: dict[str, Any] = {}
    for name, value in options.items():
        where = f"{path}{name}"
        if name == "guidance" and hasattr(value, "items"):
            out[name] = {level: _in_range(name, f"{where}.{level}", scale) for level, scale in value.items()}
        elif name in RANGES:
            out[name] = _in_range(name, where, value)
        elif name in CHOICES:
            if value not in CHOICES[name]:
                raise UserError(f"{where} {value!r} is not one of {', '.join(CHOICES[name])}")
            out[name] = value
        elif name == "respacing" and isinstance(value, str):  # how many timesteps there are, the model knows
            out[name] = value
        elif hasattr(value, "items"):
            out[name] = checked(value, f"{where}.")
        else:
            raise UserError(f"unknown option {where!r}; known are {', '.join((*RANGES, *CHOICES, 'respacing'))}")
    interval = (0.0, out.pop("guidance_until", 1.0))
    ramp = functools.partial(guidance.schedule, out.pop("guidance_schedule", "constant"), interval=interval)
    scale = out.get("guidance", 1.0)
    if "guidance" in out:
        out["guidance"] = {name: ramp(s) for name, s in scale.items()} if hasattr(scale, "items") else ramp(scale)
    return out


def _in_range(name: str, where: str, value: Any) -> Any:
    low, high, kind = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{where} {value!r} is not within {low} and {high}")
    return kind(value)


def sampler(family: Any, model: Any, options: Mapping, shape: Shape | None = None) -> Callable:
    """The jitted program: (params, extra, parts, cond, keys) -> {"image", ...}; `shape`: another than the model's."""
    ready = checked(options)

    @jax.jit
    def draw(params: Any, extra: Any, parts: Any, cond: dict, keys: jax.Array) -> dict[str, jax.Array]:
        fitted, parts = for_shape(family, model, parts, shape) if shape else (model, parts)
        return family.sample(fitted, params, cond, keys, parts=parts, extra=extra, options=ready)

    return draw


def keys_for(seed: int, ids: np.ndarray) -> jax.Array:
    """Keys of pictures number `ids [b]` of a seed."""
    return rng.sample_keys(rng.step_key(jax.random.key(seed), 0, "sample"), ids)


def draw_all(draw: Callable, cond: Mapping[str, np.ndarray], seed: int, batch: int, put: Callable) -> Iterator[dict]:
    """Draws a picture for every row of `cond`, `batch` at a time: yields dicts of numpy arrays, padding cut off.

    `draw(cond, keys)` is a compiled program, `put` places host arrays on the mesh. Picture i of `seed` is row i. With
    several processes all of them draw together, and each gets all pictures.
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
    """`keys_for` as plain numbers, which can be placed as any row of a batch."""
    return np.asarray(jax.random.key_data(keys_for(seed, ids)))


def text_cond(text: Any, prompts: list[str]) -> dict[str, np.ndarray]:
    """Prompts as model input; raises UserError for one that is empty, too long or has unknown words."""
    ids, masks = zip(*(text.encode(prompt, strict=True) for prompt in prompts), strict=True)
    return {"text": np.stack(ids), "text_mask": np.stack(masks)}


def sample_grid(experiment: Any, count: int) -> Callable[[dict], np.ndarray]:
    """state -> a captioned sheet of pictures for the first validation batch, original on the left of each."""
    config = experiment.config
    source = sources.build(config.data, "validation")
    count = meshes.padded(experiment.mesh, min(count, len(source)))
    batch = next(pipeline.batches(source, experiment.text, batch=count, seed=config.seed, shuffle=False))
    pipeline.take_broken(batch)
    indices, _ = pipeline.arrange(source, np.arange(count), count, config.seed, shuffle=False)
    captions = [item["text"] for item in pipeline.examples(source, indices)]
    cond = {name: value for name, value in batch.items() if name in ("text", "text_mask", "label", "image")}
    shape = batch["image"].shape[1:3] if hasattr(source, "occurring") else None
    draw = sampler(experiment.family, experiment.model, config.sample.options, shape)
    put = functools.partial(placement.shard_batch, mesh=experiment.mesh)
    seed = config.seed

    def grid(params: Any, extra: Any) -> np.ndarray:
        def program(cond: dict, keys: jax.Array) -> dict:
            return draw(params, extra, experiment.parts, cond, keys)

        (out,) = draw_all(program, cond, seed, count, put)
        strips = [given[name] for given in (cond, out) for name in ("draft", "image") if name in given]
        return np.asarray(sheet(np.concatenate(strips, 2), captions, cell=96 * len(strips)))

    return grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampling options of a command line; what is not given stays as the run's config has it."""
    parser.add_argument("--checkpoint", type=int, metavar="N", help="step to draw from (default: the newest good one)")
    parser.add_argument("--guidance", type=float, help="guidance scale of the prior (1: none)")
    parser.add_argument("--guidance-schedule", help=f"over the tokens: one of {', '.join(guidance.RAMPS)}")
    parser.add_argument("--guidance-until", type=float, metavar="SHARE", help="of the tokens; none behind (default: 1)")
    parser.add_argument("--temperature", type=float, help="temperature of the prior (0: greedy)")
    parser.add_argument("--top-k", type=int, help="keep the k most likely tokens (0: all)")
    parser.add_argument("--top-p", type=float, help="keep the most likely tokens up to this mass (1: all)")
    parser.add_argument("--decoder-guidance", type=float, help="guidance scale of the decoder, plan against none")
    parser.add_argument("--steps", type=int, help="steps of the decoder's solver")
    parser.add_argument("--solver", help=f"one of {', '.join(SOLVERS)}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a count, a batch or a seed out of range."""
    for name in ("count", "batch", "seed"):
        check_number(name, getattr(args, name), "--")


def check_number(name: str, value: Any, sign: str = "") -> None:
    """Raises UserError for a "count", "batch" or "seed" that is out of range."""
    least = 0 if name == "seed" else 1
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= config_lib.MOST:
        raise UserError(f"{sign}{name} {value} is not within {least} and {config_lib.MOST}")


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, by the name of the option in `config.sample.options`."""
    return {name: getattr(args, given) for given, name in GIVEN.items() if getattr(args, given) is not None}
