"""Training with aspect-ratio buckets: nothing compiles after the first step; evaluation, resume and sampling work."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import fault_cases
import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import hybridgen
from hybridgen import sample, train
from hybridgen.core import config, rng
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data.sources import buckets
from hybridgen.models import contract as parts_lib
from hybridgen.models.ar import raster, taming
from hybridgen.models.diffusion import dit, dit_official
from hybridgen.models.hybrid import cascade
from hybridgen.models.text import lm
from hybridgen.models.tokenizers import kl, vq
from hybridgen.nn.position import learned
from hybridgen.runs import restore
from hybridgen.runs.reading import load
from hybridgen.training import logging
from hybridgen.training.state import spec_of

STEPS, EVERY, B = 8, 4, 4
WIDE, TALL = (12, 20), (20, 12)
SMALL = ["data.resolution=16", "model.channels=(16,)", f"batch={B}", "log.every=1"]
SMALL += [f"steps={STEPS}", f"checkpoint.every={EVERY}", f"eval.every={EVERY}", "eval.batches=99", "sample.every=8"]


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Settings of a folder of 13 wide and 14 tall pictures and of its table of buckets."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for i in range(27):
        coarse = Image.fromarray(draw.integers(0, 255, (3, 3, 3), np.uint8))
        coarse.resize((50, 30) if i % 2 else (30, 50)).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": "a wide one" if i % 2 else "a tall one"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    options = {"path": str(folder), "validation": 0.4}
    (folder / "table").write_text(json.dumps(buckets.build(options, 16, 4, aspect=2, least=4)))
    words = [f"data.options.{name}={value}" for name, value in options.items()]
    return ["data.source=folder", *words, f"data.options.buckets={folder / 'table'}"]


def configured(data: list[str], path: str = "configs/tokenizers/vq.py", *more: str):
    return config.load(f"{tiny.ROOT / path}:tiny", [*data, *more])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> SimpleNamespace:
    """A tokenizer, trained."""
    return watched(configured(data, "configs/tokenizers/vq.py", *SMALL), tmp_path_factory.mktemp("runs") / "tokenizer")


def watched(settings, folder: Path) -> SimpleNamespace:
    """A run: its folder, how many programs were compiled up to each step, and what was printed."""
    compiled, seen, message = [0], {}, []

    def heard(event: str, seconds: float, **_: object) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    class Writer(logging.Writer):
        def step(self, number, report):
            super().step(number, report)
            seen[number] = compiled[0]

        def line(self, text):
            message.append(text)

    jax.monitoring.register_event_duration_secs_listener(heard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "Writer", Writer)
        assert train.run(settings, folder)
    with contextlib.suppress(Exception):
        jax.monitoring.unregister_event_duration_listener(heard)
    return SimpleNamespace(folder=folder, seen=seen, message=message)


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step(run):
    """Batches of both shapes, evaluations with partial last batches, and saves compile nothing new."""
    assert "compiled the training step for 2 shapes (20 x 12, 12 x 20) and the evaluation for 2 in" in "\n".join(
        run.message
    )
    assert run.seen[1] >= 4 and sorted(run.seen) == list(range(1, STEPS + 1))
    assert set(run.seen.values()) == {run.seen[1]}
    (image,) = (run.folder / "images").glob("samples-*.png")
    assert Image.open(image).width > 40


@pytest.mark.slow
def test_nor_in_200_steps(data, tmp_path):
    words = [*SMALL, "steps=200", *(f"{what}.every=20" for what in ("eval", "sample", "checkpoint"))]
    seen = watched(configured(data, "configs/tokenizers/vq.py", *words), tmp_path / "run").seen
    assert sorted(seen) == list(range(1, 201)) and {seen[number] for number in range(1, 21)} == {seen[1]}
    assert {seen[number] for number in range(21, 201)} == {seen[21]}  # the first sheet was drawn before


@pytest.mark.slow
def test_an_evaluation_is_the_mean_over_all_records(run, data):
    """Each record once, at its own shape, whatever batches it came in."""
    part = load(run.folder).part
    source = sources.build(configured(data, "configs/tokenizers/vq.py", *SMALL).data, "validation")
    of_shape, errors = {}, []
    assert any(np.bincount(source._of) % B), "all batches are full"

    @jax.jit
    def error(part, image):
        codes = part.call("embed", part.call("encode", image))
        return ((part.call("decode", codes) - image) ** 2).mean()

    for index in range(len(source)):
        image = source[index]["image"].astype(np.float32)[None] / 127.5 - 1
        shape = image.shape[1:3]
        if shape not in of_shape:
            of_shape[shape] = parts_lib.for_shape(vq, part.model, {"tokenizer": part}, shape)[1]["tokenizer"]
        errors.append(float(error(of_shape[shape], image)))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    (message,) = (line["eval/mse"] for line in lines if line["step"] == STEPS and "eval/mse" in line)
    assert set(of_shape) == {WIDE, TALL}
    assert message == pytest.approx(np.mean(errors), rel=1e-5)


def test_resumed_is_uninterrupted_bit_for_bit(run, data, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    more = [word for word in SMALL if not word.startswith(("eval", "sample"))]
    assert train.run(configured(data, "configs/tokenizers/vq.py", *more), folder)
    assert fault_cases.state_of(folder, STEPS)["step"] == STEPS
    whole, resumed = (fault_cases.state_of(place, STEPS) for place in (run.folder, folder))
    assert tiny.same(whole, resumed)
    losses = [
        [(line["step"], line["loss"]) for line in fault_cases.log_of(place) if "loss" in line]
        for place in (run.folder, folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


# ---- the shapes of models


def shapes_at(module, model, parts, shape) -> dict:
    """Shapes of the arrays that a model of another size is made with."""
    model, parts = parts_lib.for_shape(module, model, parts, shape)
    specs = spec_of(tiny.batch(1)) | {"image": jax.ShapeDtypeStruct((1, *shape, 3), np.float32)}
    arrays = jax.eval_shape(lambda key: module.init(model, key, specs, parts), jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, arrays)


def test_models_of_all_shapes_have_the_same_arrays():
    tokenizer = {"tokenizer": tiny.tokenizer()}
    decoder = tiny.DECODER | {"draft": False, "classes": tiny.CLASSES}
    cases = (vq, tiny.FSQ, {}), (raster, tiny.prior_options(tokenizer["tokenizer"]), tokenizer), (dit, decoder, {})
    cases += ((kl, {"channels": (8, 16), "residual": {"groups": 4}}, {}),)
    for module, options, parts in cases:
        model = module.build(options)
        assert shapes_at(module, model, parts, WIDE) == shapes_at(module, model, parts, (16, 16))


class Places(nn.Module):
    grid: tuple[int, int]

    @nn.compact
    def __call__(self):
        return learned(self, "places", 1.0, self.grid, 6)


def test_learned_positions_are_read_between_their_places():
    """At the corners of another grid they are what they were."""
    params = Places((4, 4)).init(jax.random.key(0))
    table = params["params"]["places"]
    square, double, wide = (np.asarray(Places(grid).apply(params)) for grid in ((4, 4), (8, 8), (3, 5)))
    np.testing.assert_array_equal(square.reshape(16, -1), table)
    np.testing.assert_allclose(double[::7, ::7], square[::3, ::3], rtol=1e-6)
    np.testing.assert_allclose(double[3:5].mean(0)[0], square[1:3].mean(0)[0], rtol=1e-5, atol=1e-6)
    assert wide.shape == (3, 5, 6)


@pytest.mark.parametrize("options", [{"attention": True}, {"local": True}])
def test_a_tokenizer_that_knows_its_places_takes_any_shape(options):
    part = tiny.tokenizer(tiny.FSQ | options)
    model, _ = parts_lib.for_shape(vq, part.model, {}, WIDE)
    image = np.random.default_rng(0).uniform(-1, 1, (2, *WIDE, 3)).astype(np.float32)

    @jax.jit
    def there_and_back(image):
        tokens = vq.encode(model, part.params, part.extra, image)
        return tokens, vq.decode(model, part.params, part.extra, vq.embed(model, part.params, part.extra, tokens))

    tokens, seen = there_and_back(image)
    assert tokens.shape == (2, 15) and seen.shape == image.shape and len(np.unique(tokens)) > 1


def test_a_latent_has_the_shape_that_its_autoencoder_gives_it():
    autoencoder = tiny.tokenizer(tiny.CONTINUOUS)
    model, parts = parts_lib.for_shape(dit, dit.build({"channels": 4, "patch": 1}), {"autoencoder": autoencoder}, TALL)
    assert model.shape == parts["autoencoder"].model.grid == (5, 3) and model.length == 15
    assert autoencoder.model.grid == (4, 4)  # the part itself is as it was


def test_a_prior_of_another_grid_draws_what_it_scores():
    """Cached logits are the uncached ones, and the place of a token is its row and column."""
    tokenizer = {"tokenizer": tiny.tokenizer()}
    part = tiny.part("ar.raster", tiny.prior_options(tokenizer["tokenizer"], depth=1, text_vocab=0, classes=3))
    model, _ = parts_lib.for_shape(raster, part.model, tokenizer, WIDE)
    assert model.grid == (3, 5) and model.length == 15
    tokens = np.random.default_rng(0).integers(0, 12, (2, 15)).astype(np.int32)
    cond = {"label": np.asarray([0, 2], np.int32)}

    @jax.jit
    def both(tokens, cond):
        whole = raster.score(model, part.params, {}, tokens, cond)
        first, cache = raster.prefill(model, part.params, {}, cond)
        return whole, first, raster.step(model, part.params, {}, cache, tokens[:, :-1])[0]

    whole, first, rest = jax.device_get(both(tokens, cond))
    np.testing.assert_allclose(whole, np.concatenate([first[:, None], rest], 1), atol=2e-6)
    turned = jax.jit(lambda: raster.score(model.clone(grid=(5, 3)), part.params, {}, tokens, cond))()
    np.testing.assert_allclose(whole[:, :3], turned[:, :3], atol=2e-6)  # the first row is the same
    assert np.abs(whole[:, 5:] - turned[:, 5:]).max() > 1e-3


def test_a_decoder_with_a_plan_renders_and_learns_at_any_shape():
    tokenizer = {"tokenizer": tiny.tokenizer()}
    part = tiny.part("diffusion.dit", tiny.decoder_options(tokenizer["tokenizer"], depth=1), parts=tokenizer)
    model, parts = parts_lib.for_shape(dit, part.model, tokenizer, TALL)
    batch = tiny.batch(2) | {"image": np.random.default_rng(0).uniform(-1, 1, (2, *TALL, 3)).astype(np.float32)}
    keys = rng.sample_keys(jax.random.key(0), np.arange(2))

    @jax.jit
    def run(batch):
        image = dit.sample(model, part.params, batch, keys, parts=parts, extra={}, options={"decoder": {"steps": 1}})
        requested = {"parts": parts, "extra": {}, "step": 0, "train": True}
        return image["image"], dit.loss(model, part.params, batch, jax.random.key(1), **requested)[0]

    image, loss = run(batch)
    assert image.shape == (2, *TALL, 3) and np.isfinite(loss) and np.std(image) > 0


def test_a_joint_cascade_draws_and_learns_at_any_shape():
    tokenizer = {"tokenizer": tiny.tokenizer()}
    options = tiny.cascade_options(tokenizer["tokenizer"], {"depth": 1}, {"depth": 1})
    part = tiny.part("hybrid.cascade", options, parts=tokenizer)
    model, parts = parts_lib.for_shape(cascade, part.model, tokenizer, WIDE)
    batch = tiny.batch(2) | {"image": np.random.default_rng(0).uniform(-1, 1, (2, *WIDE, 3)).astype(np.float32)}
    keys = rng.sample_keys(jax.random.key(0), np.arange(2))
    requested = {"parts": parts, "extra": {}, "step": 0, "train": True}
    loss = jax.jit(lambda batch: cascade.loss(model, part.params, batch, jax.random.key(1), **requested)[0])(batch)
    drawing = {"parts": parts, "extra": {}, "options": {"prior": {}, "decoder": {"steps": 1}}}
    out = jax.jit(lambda batch: cascade.sample(model, part.params, batch, keys, **drawing))(batch)
    assert np.isfinite(loss) and out["image"].shape == (2, *WIDE, 3) and out["tokens"].shape == (2, 15)


REFUSED = {
    "indivisible": (vq, tiny.FSQ, (10, 20), "tokenizers.vq .* 10 x 20: its sides do not divide by 4"),
    "table": (taming, {"vocab": 12, "grid": (4, 4)}, WIDE, "ar.taming supports pictures of one shape only"),
    "no tokenizer": (raster, {"vocab": 12, "grid": (4, 4), "classes": 2}, WIDE, "needs the part 'tokenizer'"),
    "stored": (dit_official, {}, WIDE, "diffusion.dit_official .* 12 x 20: its position table is for one grid only"),
    "patches": (dit, tiny.DECODER | {"draft": False}, (18, 20), "do not divide by 4"),
    "family": (lm, {"text_vocab": 16, "text_length": 8}, WIDE, "text.lm supports pictures of one shape only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_take_several_shapes_says_so(case):
    module, options, shape, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        parts_lib.for_shape(module, module.build(options), {}, shape)


def test_a_run_is_refused_before_anything_is_made(data, tmp_path):
    with pytest.raises(UserError, match="tokenizers.vq cannot take pictures of 20 x 12: its sides do not"):
        train.run(configured(data, "configs/tokenizers/vq.py", *SMALL, "model.patch=8"), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


# ---- sampling


@pytest.fixture(scope="module")
def prior(run, data) -> Path:
    """A prior on the tokenizer, as it begins."""
    words = [f"parts.tokenizer={run.folder}", "data.resolution=16", "steps=0", "model.depth=1", "model.width=32"]
    folder = run.folder.parent / "prior"
    assert train.run(configured(data, "configs/ar/raster.py", *words, f"batch={B}"), folder)
    return folder


@pytest.mark.slow
def test_sample_draws_one_of_the_shapes(prior, tmp_path, capsys):
    words = ["--run", str(prior), "--prompt", "a wide one", "--count", "2", "--out", str(tmp_path)]
    assert sample.main([*words, "--size", "20x12"]) == 0
    assert Image.open(tmp_path / "00001.png").size == (12, 20) and "older" not in capsys.readouterr().err
    assert sample.main(words) == 0  # without --size, the first of the most square ones
    assert Image.open(tmp_path / "00001.png").size == (12, 20)
    assert f"warning: {tmp_path} already has 2 images" in capsys.readouterr().err
    model = hybridgen.load(prior)
    for size in ("20x12", None):  # the same in Python
        drawn = model.sample("a wide one", count=2, size=size)
        np.testing.assert_array_equal(drawn[1], np.asarray(Image.open(tmp_path / "00001.png")))
    for size, says in (("16x16", "was trained on images of 20x12, 12x20"), ("12", "is not HEIGHTxWIDTH")):
        with pytest.raises(UserError, match=says):
            sample.main([*words, "--size", size])


def test_a_run_of_one_shape_has_that_size_only(run, prior):
    loaded = SimpleNamespace(shapes=(), config=config.load(f"{tiny.ROOT}/configs/ar/raster.py:tiny"), drawer=None)
    assert sample.shape_of(loaded, "32x32") is None is sample.shape_of(loaded, None)
    with pytest.raises(UserError, match="--size 32x48: this ar.raster run was trained on images of 32x32"):
        sample.shape_of(loaded, "32x48")


@pytest.mark.parametrize("shapes", [3, "x", [[4]], [[4, "4"]], [[0, 4]], [[4, 10**6]], [[4, 4, 4]], [[True, 4]], None])
def test_shapes_of_somebody_are_refused(shapes, tmp_path):
    with pytest.raises(UserError, match="config.json is not the config of a run: data.shapes has"):
        restore._shapes(config.from_plain({"shapes": shapes}).shapes, tmp_path)


def test_a_run_read_back_needs_no_table(prior):
    loaded = load(prior)
    assert sources.BUCKETS not in loaded.config.data.options and loaded.config.data.shapes == (TALL, WIDE)


def test_tables_are_of_the_square_whatever_the_first_batch_is(run):
    """Of 16 x 16 pictures a grid of 4 x 4, where all batches have one of 15 places."""
    assert load(run.folder).part.params["encoder"]["mix"]["position"].shape[0] == 16
