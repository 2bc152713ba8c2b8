"""Every config: at `tiny` it trains, its loss falls and it samples the right shape; every parameter of it has a place.

New files in configs/ are found automatically. Parts come from one tiny tokenizer, trained once (conftest.py).
"""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_sharding import misplaced

from hybridgen import recipe
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.data import pipeline, sources
from hybridgen.models.contract import find
from hybridgen.reports import points as points_lib
from hybridgen.runs import drawing, experiment, importing, reading
from hybridgen.runs.restore import restore
from hybridgen.weights import nesting, tables
from hybridgen.weights.files import open_weights

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/recipes/*.py"))
FILES = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*/*.py") if path.parent.name != "recipes")


def variants(path: Path) -> list[str]:
    """The names of a config's variants, from the error that an unknown one gets; the default is ""."""
    with pytest.raises(UserError) as error:
        config_lib.load(f"{ROOT / path}:no_such_variant")
    names = re.search(r"one of (.*), or none", str(error.value))
    return ["", *names[1].split(", ")]


# a discriminator compiles for long; diffusers' DiT is the published one but for its embedders
LONG = ("kl", "llamagen_vq", "vqgan", "dit_diffusers")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path for path in FILES],
    ids=str,
)
def test_tiny_trains_and_samples(path, tiny_run):
    folder, losses = tiny_run(str(path))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.97 * np.mean(losses[:4]), losses

    loaded = restore(folder, {})
    count, side = 3, loaded.config.data.resolution
    batch = next(pipeline.batches(sources.build(loaded.config.data, "validation"), loaded.text, batch=count, seed=0))
    cond = {name: batch[name] for name in ("image", "text", "text_mask", "label")}
    with jax.set_mesh(loaded.mesh):
        pieces = list(drawing.draw_all(loaded.draw, cond, seed=0, batch=2, put=loaded.put))
    if loaded.config.family.startswith("text."):  # draws no pictures
        text = np.concatenate([piece["text"] for piece in pieces])  # b n
        assert text.shape[0] == count and (0 <= text).all() and (text < loaded.text.vocab_size).all()
        return
    images = np.concatenate([piece["image"] for piece in pieces])  # b H W 3
    assert images.shape == (count, side, side, 3) and np.isfinite(images).all() and np.abs(images).max() <= 1
    assert images.std() > 0
    for piece in pieces:
        if "tokens" in piece:
            assert (0 <= piece["tokens"]).all() and (piece["tokens"] < loaded.tokenizer.model.vocab).all()


TRACED: dict[tuple, dict] = {}  # what `init` makes, by family and model


@pytest.fixture
def parts_once(monkeypatch):
    """`init` of a part is traced once for all configs that have the same model."""

    def find_cached(name: str) -> SimpleNamespace:
        family = find(name)

        def init(model, key, specs, parts):
            which = name, repr(model)
            if which not in TRACED:
                TRACED[which] = jax.eval_shape(lambda: family.init(model, jax.random.key(0), specs, parts))
            return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), TRACED[which])

        return SimpleNamespace(**vars(family) | {"init": init})

    monkeypatch.setattr(programs, "find", find_cached)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_parameter_has_a_place(path, parts_once):
    """Also on a pod: large arrays are divided there, and matrices of blocks over `tensor` too, of the parts as well."""
    neighbours = {"tokenizer": "tokenizers/vq.py", "prior": "ar/raster.py", "decoder": "diffusion/dit.py"}
    stages = {name: config_lib.load(f"{ROOT}/configs/{file}:tiny") for name, file in neighbours.items()}
    tower = {"vocab": 64, "length": 120, "width": 2048, "depth": 0}  # in the place of Flan-T5-XL
    stages["text"] = tiny.common.stage("text.transformer", tower, {})
    configs = {variant: config_lib.load(f"{ROOT / path}:{variant}") for variant in variants(path)}
    configs = {config.to_json(): (variant, config) for variant, config in configs.items()}  # the default has a name too
    for variant, config in configs.values():
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.mesh = {"data": -1}
            for name, part in config.parts.items():
                config.parts[name] = str(ROOT / part) if part.startswith("configs/") else part
        built = programs.build(config, stages, devices=jax.devices()[:1])
        parts = {name: part.params for name, part in built.experiment.parts.items()}
        for name, params in {"": built.state["params"], **parts}.items():
            assert not misplaced(params), f"{path}:{variant} {name}"


def golden(folder: Path) -> dict:
    """The shapes of a recorded system's parameters."""
    source = tables.find(folder.name)
    tensors = nesting.model_tensors(open_weights(folder / "weights.safetensors"), source.about.roots)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return importing.target(source.plan(json.loads((folder / "config.json").read_text()), shapes)).shapes


def test_every_parameter_of_a_recorded_system_has_a_place():
    folders = [path.parent for path in ROOT.glob("tests/golden/*/weights.safetensors")]
    assert len(folders) > 10
    for folder in folders:
        if not folder.name.startswith("sched_"):
            assert not misplaced(trees.unflatten(golden(folder)).get("params", {})), folder.name


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.names())
def test_every_parameter_of_a_published_checkpoint_has_a_place(name):
    source = tables.find(name)
    for preset, config in source.about.presets.items():
        shapes = importing.target(source.plan(config, {})).shapes
        assert not misplaced(trees.unflatten(shapes).get("params", {})), preset


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipes_fit_together(path):
    for variant in variants(path):
        config = config_lib.load(f"{ROOT / path}:{variant}")
        recipe.check(config)
        known = list(config.order)
        for number, name in enumerate(known):
            stage = config.stages[name]
            points = stage.get("compare", {}).values()
            needs = [stage.evaluate] if "evaluate" in stage else stage.get("parts", {}).values()
            needs = [*needs, *(run for point in points for run in points_lib.runs(point))]
            assert all(need.removeprefix("../") in known[:number] for need in needs), (variant, name)


@pytest.mark.slow
def test_the_recipe_runs_at_tiny(tmp_path, capfd):
    config = config_lib.load(f"{ROOT}/configs/recipes/shapes.py:tiny")
    assert recipe.run(config, tmp_path / "run")
    assert "done in" in capfd.readouterr().out
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    for split in ("validation", "holdout"):
        assert (tmp_path / "run" / "evaluation" / f"{split}.png").stat().st_size > 10_000
        assert report["splits"][split]["from captions"]["render"]["judge"]["all"]["pictures"] == 16

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/*/checkpoints/*/manifest.json")}
    assert recipe.run(config, tmp_path / "run")  # every stage is there: nothing is trained or saved again
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.parametrize("name", ["llamagen", pytest.param("llamagen:t2i_tiny", marks=pytest.mark.slow), "taming"])
def test_official_priors_know_more_than_frequencies(name, tiny_run):
    """On pictures that were not trained on, by the margin that the config promises."""
    name, *variant = name.split(":")
    folder, _ = tiny_run(":".join([f"configs/ar/{name}.py", *variant]))
    run = reading.load(folder)
    part, parts = run.part, experiment.build(run.config, folder, text=run.text).parts
    batch = next(pipeline.batches(sources.build(run.config.data, "validation"), run.text, batch=64, seed=0))
    tokens = np.asarray(parts["tokenizer"].call("encode", batch["image"]))
    share = np.bincount(tokens.ravel(), minlength=parts["tokenizer"].model.vocab) / tokens.size
    unigram = -(share * np.log(np.maximum(share, 1e-9))).sum()  # the best that frequencies alone can do, on these
    given = {key: value for key, value in batch.items() if key != "image"} | {"tokens": tokens}
    options = {"parts": parts, "extra": {}, "step": 0, "train": False}
    loss = find(part.family).loss(part.model, part.params, given, jax.random.key(0), **options)[0]
    margin = importlib.import_module(f"configs.ar.{name}").MARGIN
    assert margin > 0.1 and float(loss) < unigram - margin, (float(loss), unigram)
