"""The lowered programs of every system as text, which a refactoring must not change.

    python tests/lowered.py write FOLDER [PATTERN]     # the texts of this tree, a file a program
    python tests/lowered.py compare FOLDER OTHER       # exit code 1 and the names of what differs
    python tests/lowered.py record                     # the digests that test_lowered.py compares with

A system is a recording of official weights (`golden/NAME`) or a variant of a config (`configs/FILE.py:VARIANT`). Its
programs are the gradient of its loss, drawing, and the functions of its role; each is traced on abstract arrays and
lowered, never compiled, so that published sizes take no memory. Names of functions and modules are replaced by numbers.
Besides: the paths and shapes of its parameters.
"""

import ast
import functools
import hashlib
import json
import re
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.models.roles import denoiser
from hybridgen.runs import importing
from hybridgen.weights import nesting, tables
from hybridgen.weights.files import open_weights

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
RECORDED = GOLDEN / "lowered.json"
NAMES = re.compile(r"@[\w.$]+")
INFO = re.compile(r' *\{?jax\.result_info = "[^"]*"\}?')
TINY = ("tiny", "t2i_tiny")
NEIGHBOURS = {
    "tokenizer": "tokenizers/vq.py",
    "text": "text/lm.py",
    "prior": "ar/raster.py",
    "decoder": "diffusion/dit.py",
}


def normal(text: str) -> str:
    """A lowered program with its symbols numbered in order of appearance."""
    known: dict[str, str] = {}
    return NAMES.sub(lambda match: known.setdefault(match[0], f"@{len(known)}"), INFO.sub("", text))


def lowered(function: Callable, *arguments: Any) -> str:
    """The text of a function on abstract arguments."""
    return normal(jax.jit(function).lower(*arguments).as_text())


def spec(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def described(arrays: Any) -> str:
    """Paths, shapes and dtypes of a nested dict, a line each."""
    flat = trees.flatten(arrays)
    return "".join(f"{path} {list(leaf.shape)} {leaf.dtype}\n" for path, leaf in sorted(flat.items()))


def gradient(family: types.ModuleType, model: Any, arrays: dict, batch: dict, parts: Any) -> str:
    """Loss, aux and gradient by all parameters."""

    def loss(params: Any, extra: Any, batch: dict, parts: Any, step: Any) -> Any:
        options = {"parts": parts, "extra": extra, "step": step, "train": True}
        return family.loss(model, params, batch, jax.random.key(0), **options)

    function = jax.value_and_grad(loss, has_aux=True)
    return lowered(function, arrays["params"], arrays["extra"], batch, parts, spec((), jnp.int32))


def drawing(family: types.ModuleType, model: Any, arrays: dict, cond: dict, parts: Any, options: dict) -> str:
    """The lowered text of `sample`."""
    rows = next(iter(cond.values())).shape[0]

    def sample(params: Any, extra: Any, cond: dict, parts: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), rows)
        out = family.sample(model, params, cond, keys, parts=parts, extra=extra, options=options)
        latent = "image" in out and out["image"].shape[-1] > 3  # its first three channels were recorded
        return out | {"image": out["image"][..., :3]} if latent else out

    with unittest.mock.patch.object(denoiser, "need"):  # latents without the autoencoder that a run must have
        return lowered(sample, arrays["params"], arrays["extra"], cond, parts)


def role(family: types.ModuleType, model: Any, arrays: dict, batch: dict, parts: Any) -> Iterator[tuple[str, str]]:
    """(name, text) of the functions of a family's role."""
    params, extra = arrays["params"], arrays["extra"]

    def text(name: str, *arguments: Any) -> tuple[str, str]:
        def call(params: Any, extra: Any, *arguments: Any) -> Any:
            return getattr(family, name)(model, params, extra, *arguments)

        return name, lowered(call, params, extra, *arguments)

    rows = next(iter(batch.values())).shape[0]
    if hasattr(family, "score") and "text" in batch and family.__name__.endswith("text.lm"):
        cond = {name: batch[name] for name in ("text", "text_mask")}
        yield text("score", spec((rows, 4), jnp.int32), cond)
        yield text("encode", batch["text"], batch["text_mask"])
    elif hasattr(family, "score"):
        condition = getattr(family, "conditioning", None) or family.condition
        cond = jax.eval_shape(lambda batch, parts: condition(model, batch, parts), batch, parts)
        yield text("score", spec((rows, model.length), jnp.int32), cond)
    elif hasattr(family, "predict"):
        condition = getattr(family, "conditioning", None) or family.condition
        cond = jax.eval_shape(lambda batch, parts: condition(model, batch, parts), batch, parts)
        yield text("predict", spec((rows, *model.shape, model.channels)), spec((rows,)), cond)
    elif hasattr(family, "decode"):
        yield text("encode", batch["image"])
        if model.vocab:
            yield text("embed", spec((rows, model.length), jnp.int32))
        yield text("decode", spec((rows, *model.grid, model.code_width)))
    elif hasattr(family, "encode"):
        yield text("encode", batch["text"], batch["text_mask"])
        if hasattr(family, "pooled"):
            yield text("pooled", batch["text"], batch["text_mask"])


def merged(family: types.ModuleType, model: Any, arrays: dict, batch: dict, parts: Any) -> str:
    """The lowered text of `merge`, which updates `extra` after a step."""

    def loss(params: Any, extra: Any, batch: dict, parts: Any, step: Any) -> Any:
        options = {"parts": parts, "extra": extra, "step": step, "train": True}
        return family.loss(model, params, batch, jax.random.key(0), **options)[1]["extra"]

    step = spec((), jnp.int32)
    sums = jax.eval_shape(loss, arrays["params"], arrays["extra"], batch, parts, step)
    merge = lambda extra, sums, step: family.merge(model, extra, sums, jax.random.key(0), step)  # noqa: E731
    return lowered(merge, arrays["extra"], sums, step)


def of_config(path: str, changes: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(name, text) of the programs of a config's variant, on untrained parts."""
    stages = {name: config_lib.load(f"{ROOT}/configs/{file}:tiny") for name, file in NEIGHBOURS.items()}
    config = config_lib.load(f"{ROOT}/{path}").copy_and_resolve_references()
    with config.unlocked():
        config.mesh, config.batch, config.accumulate, config.sample.count = {"data": 1}, 2, 1, 2
        for path, value in (change.split("=") for change in changes):
            *nodes, last = path.split(".")
            node = functools.reduce(lambda tree, name: tree[name], nodes, config)  # also what the config does not name
            node[last] = ast.literal_eval(value) if re.fullmatch(r"[\d.]+|True|False", value) else value
        if config.model.get("perceptual", 0):
            config.model.perceptual = 0.0
        for name, part in config.parts.items():
            config.parts[name] = str(ROOT / part) if part.startswith("configs/") else part
    built = programs.build(config, stages, devices=jax.devices()[:1])
    it = built.experiment
    params, extra, parts, cond, _ = jax.tree.map(lambda x: spec(x.shape, x.dtype), built.sample_arguments())
    arrays, batch = {"params": params, "extra": extra}, jax.tree.map(lambda x: spec(x.shape, x.dtype), built.batch)
    yield "parameters", described(arrays)
    if config.steps:
        yield "gradient", gradient(it.family, it.model, arrays, batch, parts)
    yield "sample", normal(built.draw.lower(params, extra, parts, cond, jax.eval_shape(lambda: built.keys)).as_text())
    yield from role(it.family, it.model, arrays, batch, parts)
    if hasattr(it.family, "merge"):
        yield "merge", merged(it.family, it.model, arrays, batch, parts)


def of_golden(name: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the programs of a recorded system."""
    folder = GOLDEN / name
    source = tables.find(name)
    weights = nesting.model_tensors(open_weights(folder / "weights.safetensors"), source.about.roots)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    plan = source.plan(json.loads((folder / "config.json").read_text()), shapes)
    goal = importing.target(plan)
    tree = trees.unflatten(goal.shapes)
    arrays = {"params": tree.get("params", {}), "extra": tree.get("extra", {})}
    yield "parameters", described(arrays)
    family, model = goal.family, goal.model
    kind = plan.family.partition(".")[0]
    batch = {"id": spec((2,), jnp.uint32)} | {key: spec((2, *shape)) for key, shape in plan.inputs.items()}
    if kind == "text":
        batch = {"text": spec((2, 7), jnp.int32), "text_mask": spec((2, 7), bool)}
        yield from role(family, model, arrays, batch, {})
        return
    if kind == "ar":
        batch |= {"tokens": spec((2, model.length), jnp.int32), "label": spec((2,), jnp.int32)}
        if "null" in arrays["params"].get("caption", {}):
            shape = model.text_length, model.text_width
            batch |= {"text_features": spec((2, *shape)), "text_features_mask": spec((2, shape[0]), bool)}
        if "position" in arrays["params"] and not model.classes:
            batch["cond_tokens"] = spec((2, model.cond_length), jnp.int32)
        guidance = 1.0 if "position" in arrays["params"] or not model.cond_drop_prob else 2.5
        cond, options = {key: x for key, x in batch.items() if key != "tokens"}, {"prior": {"guidance": guidance}}
    elif kind == "diffusion":
        shape = (2, *model.shape, model.channels)
        batch |= {"latent": spec(shape), "label": spec((2,), jnp.int32)}
        cond, options = {"label": batch["label"]}, {"decoder": {"solver": "ddpm", "steps": 4}}
    else:
        cond, options = {"image": batch["image"]}, {}
    yield "gradient", gradient(family, model, arrays, batch, {})
    yield "sample", drawing(family, model, arrays, cond, {}, options)
    if kind == "diffusion" and model.cond_drop_prob:
        options = {"decoder": {"solver": "ddim", "steps": 4, "guidance": 2.0, "guidance_channels": 3}}
        yield "guided", drawing(family, model, arrays, cond, {}, options)
    yield from role(family, model, arrays, batch, {})
    if hasattr(family, "merge"):
        yield "merge", merged(family, model, arrays, batch, {})


def systems() -> list[str]:
    """All systems that the test covers."""
    golden = [path.parent.name for path in sorted(GOLDEN.glob("*/weights.safetensors"))]
    return [f"golden/{name}" for name in golden if not name.startswith("sched_")] + tiny_configs()


def tiny_configs() -> list[str]:
    """Every config at `tiny`; cascades in every mode."""
    files = sorted(path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "recipes")
    names = [f"{path.relative_to(ROOT)}:{variant}" for path in files for variant in TINY if _has(path, variant)]
    return names + [f"configs/hybrid/cascade.py:tiny,model.mode={mode}" for mode in ("soft", "features")]


def others() -> list[str]:
    """Variants beside `tiny`: options that no tiny config sets, and published sizes."""
    names = []
    for path in sorted(path for path in ROOT.glob("configs/*/*.py") if path.parent.name != "recipes"):
        try:
            config_lib.load(f"{path}:no_such_variant")
        except UserError as error:
            known = re.search(r"one of (.*), or none", str(error))[1].split(", ")
            names += [f"{path.relative_to(ROOT)}:{name}" for name in ["", *known] if name not in TINY]
    dit, process = "configs/diffusion/dit.py:tiny", "model.process"
    extra = [
        "configs/diffusion/dit.py:tiny,model.cross=True",
        "configs/diffusion/dit.py:tiny,model.text_vocab=62,model.text_length=16",
        "configs/diffusion/dit.py:tiny,model.cross=True,model.text_vocab=62,model.text_length=16",
        f"{dit},{process}.prediction_type=velocity,{process}.loss_type=velocity,model.draft=False,{process}.relative=False",
        f"{dit},{process}.prediction_type=v,{process}.loss_type=v,{process}.schedule=cosine,{process}.relative=False",
        "configs/ar/raster.py:tiny,model.remat=full,model.unroll=1",
        "configs/ar/raster.py:tiny,model.kv_heads=1,model.qk_norm=False",
        "configs/ar/raster.py:tiny,sample.options.prior.guidance_schedule=linear,sample.options.prior.top_k=5",
        "configs/text/lm.py:tiny,model.tied=False,model.bias=True,model.mlp_bias=True",
        "configs/tokenizers/vq.py:tiny,model.local=True,model.attention=False",
        "configs/tokenizers/vq.py:vq,model.quantizer.l2=False",
        "configs/tokenizers/vq.py:vq_gradient,model.quantizer.l2=False,model.quantizer.legacy=True,"
        "model.quantizer.exact=True,model.quantizer.used=100",
        "configs/tokenizers/vq.py:gumbel,model.quantizer.sharpness=0,model.quantizer.used=100",
        "configs/tokenizers/kl.py:tiny,model.variational=False,model.adversarial.adaptive=False",
    ]
    extra.append("configs/ar/llamagen.py:t2i_xl,model.text_width=64")
    return [name for name in names if not name.endswith((":20b", ":t2i_xl"))] + extra


def _has(path: Path, variant: str) -> bool:
    try:
        config_lib.load(f"{path}:{variant}")
    except UserError:
        return False
    return True


def texts(system: str) -> dict[str, str]:
    """{program: text} of a system."""
    if system.startswith("golden/"):
        return dict(of_golden(system.removeprefix("golden/")))
    path, *changes = system.split(",")
    return dict(of_config(path, tuple(changes)))


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(folder: Path, pattern: str = "") -> None:
    """Every program of every system whose name has the pattern, a file each."""
    for system in [*systems(), *others()]:
        if not re.search(pattern, system):
            continue
        try:
            found = texts(system)
        except Exception as error:  # noqa: BLE001  a system that cannot be built is a difference too
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(system, found["error"][:200], flush=True)
        for name, text in found.items():
            file = folder / re.sub(r"[/:,]", "~", system) / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        print(system, *found, flush=True)


def compare(folder: Path, other: Path) -> int:
    """How many programs differ or are on one side only; prints their names."""
    one, two = ({str(p.relative_to(top)): p for p in top.rglob("*.txt")} for top in (folder, other))
    bad = [name for name in sorted(one.keys() | two.keys()) if name not in one or name not in two]
    bad += [name for name in sorted(one.keys() & two.keys()) if one[name].read_bytes() != two[name].read_bytes()]
    print(*bad, f"{len(bad)} of {len(one.keys() | two.keys())} differ", sep="\n")
    return len(bad)


def record() -> None:
    """Digests of this tree's programs, for the version of JAX that runs."""
    tables = {system: {name: digest(text) for name, text in texts(system).items()} for system in systems()}
    RECORDED.write_text(json.dumps({"jax": jax.__version__, "systems": tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "write":
        write(Path(arguments[0]), *arguments[1:])
    elif command == "compare":
        sys.exit(1 if compare(*map(Path, arguments)) else 0)
    elif command == "record":
        record()
    else:
        print(__doc__)
