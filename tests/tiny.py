"""Small systems for tests: batches, families, experiments, and a toy family with a masked loss.

Letters: b pictures, n tokens, l text positions.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen import train
from hybridgen.core import meshes, placement, rng, trees
from hybridgen.core.param_rules import Rule, add_rules
from hybridgen.models.contract import Part, find
from hybridgen.models.losses import weighted
from hybridgen.runs.experiment import Experiment
from hybridgen.training import state

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # configs are read from the clone

from configs import common  # noqa: E402

SIDE, WORDS, LENGTH, CLASSES = 16, 12, 5, 3
VQ = {"resolution": SIDE, "patch": 4, "channels": (16,), "attention": False}  # a grid of 4 x 4
FSQ = VQ | {"quantizer": {"kind": "fsq", "levels": (4, 3)}}
MOVING = VQ | {"quantizer": {"kind": "vq_ema", "codebook_size": 16, "width": 4}}
GRADIENT = VQ | {"quantizer": {"kind": "vq_gradient", "codebook_size": 16, "width": 4}}
CONTINUOUS = VQ | {"quantizer": {"kind": "none", "width": 4}}
PRIOR = {"width": 32, "depth": 2, "heads": 2, "text_vocab": WORDS, "text_length": LENGTH, "qk_norm": True}
DECODER = {"resolution": SIDE, "patch": 4, "width": 32, "depth": 2, "heads": 2, "draft": True}


def batch(b: int, start: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Smooth random pictures with captions that mean nothing; sample `start + i` is the same in every batch."""
    rows = [_sample(start + i) for i in range(b)]
    image, text, label = (np.stack(part) for part in zip(*rows, strict=True))
    ids = np.arange(start, start + b, dtype=np.uint32)
    return {"id": ids, "image": image.astype(dtype), "text": text, "text_mask": text > 0, "label": label}


def _sample(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng([7, number])
    coarse = draw.uniform(-1, 1, (4, 4, 3))
    text = draw.integers(1, WORDS, LENGTH) * (np.arange(LENGTH) < draw.integers(2, LENGTH + 1))
    return coarse.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1), text.astype(np.int32), np.int32(draw.integers(CLASSES))


def filled(module, model, specs: dict, parts: dict, seed: int = 0) -> dict:
    """Arrays of the shapes that `init` gives, all of them random (also what starts at zero), made without compiling."""
    shapes = jax.eval_shape(lambda key: module.init(model, key, specs, parts), jax.random.key(0))
    draw = np.random.default_rng([3, seed])

    def fill(path: str, shape) -> np.ndarray:
        noise = draw.normal(size=shape.shape)
        if path.startswith("extra/") and not path.endswith(("count", "square")):
            return np.zeros(shape.shape)
        if path.endswith("kernel") and len(shape.shape) > 1:
            return noise * 0.5 / np.sqrt(shape.shape[-2] if "layers" not in path else noise[0].size ** 0.5)
        if path.endswith(("count", "scale", "square")):
            return 1 + 0.1 * noise if path.endswith("scale") else np.ones(shape.shape)
        return noise * 0.2

    flat = {path: fill(path, shape).astype(shape.dtype) for path, shape in trees.flatten(shapes).items()}
    if "extra/codebook" in flat:
        codes = draw.normal(size=flat["extra/codebook"].shape)
        codes = (codes / np.linalg.norm(codes, axis=-1, keepdims=True)).astype(np.float32)
        flat |= {"extra/codebook": codes, "extra/total": codes}
    return {"extra": {}} | trees.unflatten(flat)


def part(family: str, options: dict, seed: int = 0, parts: dict | None = None) -> Part:
    """A component with random arrays: constants also where a traced function asks for it first."""
    model = find(family).build(options)
    given = filled(find(family), model, state.spec_of(batch(1)), parts or {}, seed)
    with jax.ensure_compile_time_eval():
        arrays = jax.tree.map(jnp.asarray, given)
    return Part(arrays["params"], arrays["extra"], family, model)


def tokenizer(options: dict = FSQ, seed: int = 0) -> Part:
    return part("tokenizers.vq", options, seed)


def quantised(options: dict, **changes) -> dict:
    """Options of a tokenizer with other ones of its quantiser."""
    return options | {"quantizer": options["quantizer"] | changes}


def prior_options(tokenizer: Part, **changes) -> dict:
    return PRIOR | {"vocab": tokenizer.model.vocab, "grid": tokenizer.model.grid} | changes


def decoder_options(tokenizer: Part, **changes) -> dict:
    return DECODER | {"plan_width": tokenizer.model.code_width} | changes


def cascade_options(tokenizer: Part, prior: dict | None = None, decoder: dict | None = None, **changes) -> dict:
    """A joint cascade: both members are trained in it."""
    members = {
        "prior": {"family": "ar.raster", "model": prior_options(tokenizer, **(prior or {}))},
        "decoder": {"family": "diffusion.dit", "model": decoder_options(tokenizer, **(decoder or {}))},
    }
    return members | changes


def experiment(family, model: dict, parts: dict | None = None, mesh: dict | None = None, **changes) -> Experiment:
    """An experiment without a folder. `family`: a name or a namespace such as `toy`; `changes`: see configs.common."""
    sizes = mesh or {"data": 1}
    place = meshes.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    config = common.stage(str(family), {}, {}, **{"log__every": 1, "steps": 1000, "optim__warmup": 0} | changes)
    module = find(family) if isinstance(family, str) else family
    ready = {name: placement.put(part, placement.replicated(place)) for name, part in (parts or {}).items()}
    return Experiment(config, module, model, module.build(model), ready, {}, None, place)


class Run:
    """An experiment's compiled step with its state: `run.step(batch)` -> metrics."""

    def __init__(self, experiment: Experiment, first: dict, dtype: str = "float32"):
        self.experiment, self.dtype = experiment, dtype
        specs = state.spec_of(first)
        self.rule, self.compiled, self.abstract, self.make = train.program(experiment, specs)
        self.parts = wide(experiment.parts, dtype)
        arrays = filled(experiment.family, experiment.model, specs, experiment.parts)
        # every optimiser here starts from zeros: no need to compile its init
        zeros = SimpleNamespace(
            init=lambda params: jax.tree.map(_zeros, jax.eval_shape(self.rule.optimiser.init, params))
        )
        start = state.initial(arrays, zeros, self.rule.which, experiment.config.frozen_dtype)
        places = jax.tree.map(lambda s: s.sharding, self.abstract)
        self.state = placement.put(wide(start, dtype), places)

    def step(self, batch: dict) -> dict[str, float]:
        with jax.set_mesh(self.experiment.mesh):
            put = placement.shard_batch(wide(batch, self.dtype), self.experiment.mesh)
            self.state, report = self.compiled(self.state, put, self.parts)
        return {name: float(value) for name, value in report.items()}

    def memory(self, batch: dict):
        with jax.set_mesh(self.experiment.mesh):
            return self.compiled.lower(self.state, batch, self.parts).compile().memory_analysis()


def _zeros(spec) -> np.ndarray:
    return np.zeros(spec.shape, spec.dtype)


def wide(tree, dtype: str):
    """The tree with its floating-point leaves in `dtype`; typed keys and integers as they are."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree) if dtype != "float32" else tree


def same(a, b) -> bool:
    """Equal trees, bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs
    )


def gap(a, b) -> float:
    """The largest difference of two trees, relative to the size of its leaf."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        worst = max(worst, float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) if x.size else 0.0)
    return worst


# ---- a toy family: regression with noise and a mask, so that microbatches weigh differently


def toy_batch(b: int, start: int = 0, n: int = 6, d: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng([1, start])
    mask = draw.uniform(size=(b, n)) < np.linspace(0.1, 1, b)[:, None]  # rows keep ever more of their tokens
    x, y = draw.normal(size=(b, n, d)), draw.normal(size=(b, n))
    ids = np.arange(start, start + b, dtype=np.uint32)
    return {"id": ids, "x": x.astype(np.float32), "y": y.astype(np.float32), "mask": mask}


def _toy_init(model, key, specs, parts):
    d = specs["x"].shape[-1]
    kernels = {name: jax.random.normal(jax.random.fold_in(key, i), (d, d)) for i, name in enumerate(("a", "b"))}
    params = {name: {"kernel": kernel, "bias": jnp.zeros((d,))} for name, kernel in kernels.items()}
    return {"params": params, "extra": {"seen": jnp.zeros(()), "ids": jnp.zeros((), jnp.uint32)}}


def _toy_loss(model, params, batch, key, *, parts, extra, step, train):
    x = batch["x"]  # b n d
    noise = rng.normal(rng.sample_keys(key, batch["id"]), x.shape[1:], x.dtype)
    h = jnp.tanh((x + 0.3 * noise) @ params["a"]["kernel"] + params["a"]["bias"])
    out = (h @ params["b"]["kernel"] + params["b"]["bias"]).mean(-1)  # b n
    scalar, weight = weighted(jnp.square(out - batch["y"]), batch["mask"])
    sums = {"seen": weight, "ids": batch["id"].sum(dtype=jnp.uint32)}
    return scalar, {"metrics": {"error": scalar}, "weight": weight, "extra": sums}


def _toy_merge(model, extra, sums, key, step):
    return {"seen": 0.5 * extra["seen"] + sums["seen"], "ids": extra["ids"] + sums["ids"]}


add_rules(Rule("[ab]/kernel", "df", fsdp="df"), Rule("[ab]/bias", "f"))
toy = SimpleNamespace(build=lambda options: None, init=_toy_init, loss=_toy_loss, merge=_toy_merge)
