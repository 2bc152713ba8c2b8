"""Bundles generate the same images as their run; narrow dtypes are within rounding; untrusted files are refused."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import saved_runs
import tiny

import hybridgen
from hybridgen import export, sample
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.data import sources
from hybridgen.runs import bundle, checkpoint, experiment, manifest, reading, restore
from hybridgen.weights import safetensors

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "shapes"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return saved_runs.cascade(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """A bundle of the cascade; tests must not change it."""
    out = tmp_path_factory.mktemp("bundles") / "whole"
    assert export.main([str(run), str(out)]) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refused(function, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    part = reading.load(folder).part
    return trees.flatten({"params": part.params, "extra": part.extra})


# ---------------------------------------------------------------- what it is


def test_a_bundle_draws_what_its_run_draws(run, copy, tmp_path, monkeypatch):
    """The images are equal bit for bit, from another folder, through the command."""
    monkeypatch.chdir(tmp_path)  # nothing stands where the runs' relative paths lead
    for name, folder in (("one", run), ("two", copy)):
        words = ["--run", str(folder), "--prompt", saved_runs.PROMPT, "--out", str(tmp_path / name)]
        assert sample.main([*words, "--count", "2", "--seed", "3", "--draft"]) == 0
    for name in ("00000.png", "00001.png", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    parts = {name: f"parts/{name}" for name in ("tokenizer", "prior", "decoder")}
    assert json.loads((copy / "config.json").read_text())["parts"] == parts
    assert json.loads((copy / "parts/prior/config.json").read_text())["parts"] == {"tokenizer": "../tokenizer"}
    # three runs share the tokenizer: it is there once; and no text in it says where the run was
    assert sorted(path.parent.name for path in copy.rglob("*.safetensors")) == ["copy", "decoder", "prior", "tokenizer"]
    assert not [path for path in copy.rglob("*.json") if str(run.parent) in path.read_text()]


def test_a_bundle_stands_where_a_run_does(run, whole):
    """It can be a part, with the same digest as the run, the start of another run, and the source of a bundle."""
    for name in ("tokenizer", "prior", "decoder"):
        one, two = reading.load(run.parent / name), reading.load(whole / "parts" / name)
        assert two.digest == one.digest and two.part_digests == one.part_digests and two.step == saved_runs.STEP
        assert two.text is None if one.text is None else two.text.to_json() == one.text.to_json()
    config = config_lib.read(run.parent / "decoder" / "config.json").copy_and_resolve_references()
    with config.unlocked():
        config.parts.tokenizer = str(whole / "parts/tokenizer")
    source = sources.build(config.data, "train")
    assert experiment.build(config, source=source).digests == reading.load(run.parent / "decoder").part_digests
    with config.unlocked():
        config.init_from.all = str(whole / "parts/decoder")
    params, _ = reading.earlier(config, whole)
    assert tiny.same(params[""], reading.load(run.parent / "decoder").part.params)


def test_a_bundle_of_a_bundle_is_the_same(whole, tmp_path):
    export.export(whole, tmp_path / "again")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert all((whole / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


# ---------------------------------------------------------------- in fewer bytes


def stored(folder: Path, values: np.ndarray, dtype: str, **more) -> np.ndarray:
    made = bundle.Bundle({"params": {"a": {"kernel": values}} | more, "extra": {"codebook": values}}, {}, 0)
    bundle.write(folder, made, {}, None, dtype)
    back = bundle.read(folder).arrays
    assert tiny.same(back["extra"]["codebook"], values)  # what was learned without gradients is as it was
    assert back["params"]["a"]["kernel"].dtype == np.float32
    return back["params"]["a"]["kernel"]


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_the_bytes_are_the_nearest_halves(dtype, digits, tmp_path):
    draw = np.random.default_rng(0)
    values = (draw.normal(size=(64, 130)) * 10.0 ** draw.uniform(-3, 2, (64, 130))).astype(np.float32)
    found = stored(tmp_path / "x", values, dtype)
    small = 2.0**-25 if dtype == "float16" else 0.0  # half a step of float16 below its smallest normal number
    assert (np.abs(found - values) <= np.maximum(np.abs(values) * 2.0**-digits, small)).all()
    assert (found != values).any()


def test_int8_is_within_half_a_step_of_its_block(tmp_path):
    """Blocks of 64 in the order of memory, the last one shorter, one of zeros; small arrays stay as they are."""
    draw = np.random.default_rng(0)
    values = (draw.normal(size=(3, 43, 37)) * 10.0 ** draw.uniform(-6, 4, (3, 1, 37))).astype(np.float32)
    values.reshape(-1)[640:704] = 0
    scale = draw.normal(size=(64,)).astype(np.float32)
    found = stored(tmp_path / "x", values, "int8", norm={"scale": scale})
    flat = np.pad(values.reshape(-1), (0, -values.size % 64)).reshape(-1, 64)
    step = np.abs(flat).max(1, keepdims=True) / 127
    error = np.abs(np.pad(found.reshape(-1), (0, -values.size % 64)).reshape(-1, 64) - flat)
    assert (error <= step * 0.5001).all() and (error > step * 0.4).any()
    assert tiny.same(bundle.read(tmp_path / "x").arrays["params"]["norm"]["scale"], scale)
    assert (tmp_path / "x" / "weights.safetensors").stat().st_size < 4 * values.size + 1.1 * values.size + 1000


def test_what_a_dtype_does_not_hold_is_refused(tmp_path):
    big = np.full((64, 64), 70_000, np.float32)
    assert "--dtype float16 overflows: params/a/kernel reaches 7e+04" in refused(stored, tmp_path, big, "float16")
    assert "not finite" in refused(stored, tmp_path, big * np.inf, "int8")


def test_a_narrow_bundle_knows_its_parts(run, tmp_path):
    """Parts are identified by the digests of their arrays as read back, not of the original ones."""
    export.export(run, tmp_path / "small", "bfloat16")
    loaded = restore.restore(tmp_path / "small", {})
    assert loaded.step == saved_runs.STEP
    was, now = arrays(run.parent / "prior"), arrays(tmp_path / "small/parts/prior")
    assert all(np.array_equal(now[path], was[path].astype(ml_dtypes.bfloat16).astype(np.float32)) for path in was)
    assert checkpoint.digest(now) != checkpoint.digest(was)


def test_a_small_cascade_is_small_in_int8(tmp_path):
    """The README's cascade with a narrower prior and random numbers, with text and configs, takes less than 5 MB."""
    config, draw = config_lib.load(f"{ROOT}/configs/recipes/shapes.py:cpu"), np.random.default_rng(0)
    config.stages.prior.model.update(width=128, heads=2)
    for stage in ("tokenizer", "prior", "decoder"):
        built = programs.build(*programs.choose(config, stage))
        made = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), built.state["params"])
        extra = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.state["extra"])
        plain = config_lib.plain(built.experiment.config)
        text = built.experiment.text.to_json() if built.experiment.text else None
        bundle.write(tmp_path / stage, bundle.Bundle({"params": made, "extra": extra}, {}, 0), plain, text, "int8")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    assert 3e6 < size < 5e6


# ---------------------------------------------------------------- damage, and strangers


def test_every_damaged_file_is_named(copy):
    """A flipped bit, a truncated, missing or added file is detected before any array is read."""
    for folder in (copy, copy / "parts/prior"):
        names = [name for name in (*bundle.OWN, "manifest.json") if (folder / name).exists()]
        assert len(names) == 5
        for name in names:
            path = folder / name
            good = path.read_bytes()
            for bad in (good[:-2], good[:40] + bytes([good[40] ^ 1]) + good[41:]):
                path.write_bytes(bad)
                assert name in refused(restore.restore, copy, {})
            path.unlink()
            assert str(folder) in refused(restore.restore, copy, {})
            path.write_bytes(good)
    text = (copy / "text.json").read_text()
    (copy / "text.json").unlink()
    sealed(copy)
    (copy / "text.json").write_text(text)
    assert "text.json: not in the manifest" in refused(restore.restore, copy, {})


def test_a_part_of_another_bundle_is_refused(copy, run, tmp_path):
    """Its files are valid, but not those that prior and decoder were trained with."""
    other = saved_runs.save(tmp_path / "tokenizer", "tokenizers.vq", tiny.FSQ, {}, 50)
    shutil.rmtree(copy / "parts/tokenizer")
    export.export(other, copy / "parts/tokenizer")
    assert "'tokenizer'" in refused(restore.restore, copy, {})
    shutil.rmtree(copy / "parts/tokenizer")
    assert "no run in 'parts/tokenizer'" in refused(restore.restore, copy, {})


def edited(folder: Path, name: str, **changes) -> None:
    """Changes a JSON file of a bundle, which then fits its manifest again."""
    body = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(body))
    sealed(folder)


def sealed(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    manifest.write(folder, saved_runs.STEP)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"parts": {"tokenizer": "/etc"}}, "is outside the bundle"),
        ("config.json", {"parts": {"tokenizer": "parts/../../secret"}}, "is outside the bundle"),
        ("config.json", {"parts": {"tokenizer": "../.."}}, "is outside the bundle"),
        ("config.json", {"parts": {"tokenizer": ["x"]}}, "is outside the bundle"),
        ("config.json", {"family": "os.path"}, "'os.path' is not a family"),
        ("config.json", {"model": {"mode": "soft", "prior": "{"}}, "does not describe a model"),
        ("bundle.json", {"format": 2}, "has the format '2'; supported is 1"),
        ("bundle.json", {"format": "x" * 10_000}, "has the format"),
        ("bundle.json", {"step": "7"}, "has no valid `step` and `parts`"),
        ("bundle.json", {"parts": {"prior": 3}}, "has no valid `step` and `parts`"),
        ("bundle.json", {"parts": {"prior": "0" * 64}}, "part 'prior' is not the one that the bundle"),
    ],
)
def test_the_json_of_a_stranger(copy, name, changes, says):
    edited(copy, name, **changes)
    message = refused(restore.restore, copy, {})
    assert says in message and len(message) < 600


def test_the_weights_of_a_stranger(copy):
    """Names that are no paths, arrays that the model has not, lacks or has in another shape, scales of nothing."""
    folder = copy / "parts/decoder"
    good = {name: tensor.read() for name, tensor in safetensors.read(folder / "weights.safetensors")[0].items()}
    name, small = "params/null_plan", np.zeros((1, 2), np.float32)

    def says(tensors: dict, dtype: str = "float32") -> str:
        safetensors.write(folder / "weights.safetensors", tensors, {"dtype": dtype})
        sealed(folder)
        return refused(restore.restore, copy, {})

    assert "params/null_plan is (1, 2), expected: (1, 32)" in says(good | {name: small})
    assert "params/more is (1, 2), expected: missing" in says(good | {"params/more": small})
    assert "params/null_plan is missing" in says({key: value for key, value in good.items() if key != name})
    for bad in ("opt/mu", "params", "params//x", "params/null_plan/x", "/params/x", "../x"):
        assert "which is not an array of a run" in says(good | {bad: small})
    assert "without their tensor" in says(good | {"params/x.scale": small}, "int8")
    assert "its scales, float32[1], do not match" in says(good | {f"{name}.scale": np.zeros((1,), np.float32)}, "int8")
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")
    assert "weights.safetensors" in refused(restore.restore, copy, {})


# ---------------------------------------------------------------- making one


def test_what_cannot_be_exported(run, whole, tmp_path):
    """The export is refused and leaves no files."""
    assert "already exists" in refused(export.export, run, whole)
    assert "'half' is not one of float32, float16" in refused(export.export, run, tmp_path / "x", "half")
    assert "no checkpoint 3" in refused(export.export, run, tmp_path / "x", step=3)
    assert "has step 7 only" in refused(export.export, whole, tmp_path / "x", step=3)
    runs = Path(shutil.copytree(run.parent, tmp_path / "runs"))
    shutil.rmtree(runs / "tokenizer")
    assert "no run in '../tokenizer'" in refused(export.export, runs / "cascade", tmp_path / "x")
    saved_runs.save(runs / "tokenizer", "tokenizers.vq", tiny.FSQ, {}, 50)
    message = refused(export.export, runs / "cascade", tmp_path / "x")
    assert "part 'tokenizer': " in message and "is not the run that" in message
    config = json.loads((runs / "prior/config.json").read_text()) | {"parts": {"tokenizer": "../prior"}}
    (runs / "prior/config.json").write_text(json.dumps(config))
    assert "is a part of itself" in refused(export.export, runs / "prior", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="there is no committed bundle")
def test_the_committed_bundle_draws():
    """A picture of two things, from a clone, that is not grey."""
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) <= 5_000_000
    images = hybridgen.load(EXAMPLE).sample("a small red circle left of a large blue square", seed=0)
    assert images.array.shape == (1, 32, 32, 3) and images.array.std() > 20
