"""Checkpoints as they are found: wrapped names, nested weights, empty branches; exports have the names and dtypes."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torchfile

from hybridgen import convert
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.runs import importing, reading
from hybridgen.weights import nesting, rules, tables
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = "llamagen_vq"
ROOTS = tables.find(SOURCE).about.roots
NAMES = ("a.weight", "b.0.c", "module_list.0")


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module.{}",
        "_fsdp_wrapped_module.{}",
        "_forward_module.module.{}",
        "ema.{}",
        "ema.module.{}",
        "module.ema._orig_mod.{}",
        "model.module._orig_mod.{}",
        "state_dict._orig_mod.{}",
    ],
)
def test_prefixes_are_removed(wrapped):
    given = {wrapped.format(name): number for number, name in enumerate(NAMES)}
    others = {"optimizer.state.0": 9} if wrapped.startswith(("ema.", "model.", "state_dict.")) else {}
    assert nesting.model_tensors(given | others, ROOTS) == {name: number for number, name in enumerate(NAMES)}


def test_wrappers_inside_names_are_removed():
    """A compiled or checkpointed layer of a model."""
    given = {"layers.0._orig_mod.w": 1, "layers.1._checkpoint_wrapped_module.w": 2, "norm": 3}
    assert nesting.model_tensors(given, ()) == {"layers.0.w": 1, "layers.1.w": 2, "norm": 3}
    averaged = {"n_averaged": 0, "module.a": 1, "module._orig_mod.b": 2}
    assert nesting.model_tensors(averaged, ()) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "given",
    [
        {"a": 1, "module.b": 2},  # not all names
        {"a": 1, "_orig_mod.a": 2},  # would be equal
        {"module": 1, "modules.a": 2},
        {"n_averaged": 1},
        {},
    ],
)
def test_what_is_no_wrapper_remains(given):
    assert nesting.model_tensors(given, ()) == ({"b": 2} if "module.b" in given else given)


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def state():
    return {name: tensor.read() for name, tensor in open_weights(GOLDEN / SOURCE / "weights.safetensors").items()}


def imported(folder, value, *more):
    """`convert` of a PyTorch file with this value."""
    torchfile.save(folder / "w.pt", value)
    config = str(GOLDEN / SOURCE / "config.json")
    return convert.main([SOURCE, str(folder / "w.pt"), str(folder / "run"), "--config", config, *more])


def exported(folder):
    assert convert.main([SOURCE, str(folder / "run"), str(folder / "back.safetensors"), "--export"]) == 0
    return {name: tensor.read() for name, tensor in open_weights(folder / "back.safetensors").items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in b
    )


def test_a_wrapped_average_comes_back_bit_for_bit(tmp_path, state, capsys):
    """Averages before weights, as official code reads them."""
    other = {f"module.{name}": x + 1 for name, x in state.items()}
    ema = {f"module._orig_mod.{name}": x for name, x in state.items()}
    assert imported(tmp_path, {"model": other, "ema": ema, "optimizer": {"0": np.ones(3, np.float32)}}) == 0
    assert "warning" not in capsys.readouterr().err
    assert equal(exported(tmp_path), state)


@pytest.mark.parametrize("ema", [None, {}, {"decay": 0.999}, {"num_updates": 3, "shadow": {}}])
def test_an_empty_average_is_reported(tmp_path, state, ema, capsys):
    assert imported(tmp_path, {"ema": ema, "model": state}) == 0
    assert "has no tensors in 'ema': others are converted" in capsys.readouterr().err
    capsys.readouterr()
    torchfile.save(tmp_path / "none.pt", {"ema": ema, "step": 3})
    with pytest.raises(UserError, match="none.pt holds no tensors"):
        convert.main([SOURCE, str(tmp_path / "none.pt"), str(tmp_path / "none"), "--config", "VQ-16"])


KINDS = {
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "float64": lambda x: x.astype(np.float64) + 1e-12,
    "float64 of float32": lambda x: x.astype(np.float64),
    "several": lambda x: x.astype((np.float64, np.float16, np.float32, ml_dtypes.bfloat16)[x.size % 4]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_come_back(tmp_path, state, kind):
    """Also a buffer that only official code reads."""
    used = np.arange(7, dtype=np.float32)
    given = {name: KINDS[kind](x) for name, x in state.items()} | {"quantize.codebook_used": used}
    assert imported(tmp_path, {"model": given}) == 0
    assert equal(exported(tmp_path), given)
    loaded = reading.load(tmp_path / "run").part.params
    arrays = importing.load(tables.find(SOURCE), json.loads((GOLDEN / SOURCE / "config.json").read_text()), given)[1]
    for path, leaf in trees.flatten(arrays["params"]).items():
        assert leaf.dtype == np.float32 and (trees.flatten(loaded)[path] == leaf).all()


def test_an_import_of_an_earlier_version_is_exported(tmp_path, state):
    """official.json without dtypes: in float32."""
    assert imported(tmp_path, {"model": {name: x.astype(np.float16) for name, x in state.items()}}) == 0
    file = tmp_path / "run" / "official.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in about.items() if key != "dtypes"}))
    assert {x.dtype.name for x in exported(tmp_path).values()} == {"float32"}
    (tmp_path / "back.safetensors").unlink()
    file.write_text(json.dumps(about | {"dtypes": {"a": "F99"}}))
    with pytest.raises(UserError, match="official.json has the dtype 'F99', which does not exist"):
        exported(tmp_path)


# ---------------------------------------------------------------- what weights look like

SYSTEMS = ("llamagen_vq", "taming_gumbel", "sd_kl_vae", "dit", "dit_official", "llamagen_gpt", "taming_gpt", "llama_lm")
SYSTEMS += ("t5_encoder", "clip_text")


@pytest.mark.parametrize("system", SYSTEMS)
def test_weights_of_another_source_are_named(system):
    weights = open_weights(GOLDEN / system / "weights.safetensors")
    for name in (system, SYSTEMS[SYSTEMS.index(system) - 1]):
        source = tables.find(name)
        config = next(iter(source.about.presets.values()))
        with pytest.raises(UserError) as error:
            importing.load(source, config, weights)
        says = f"; the weights look like those of the source {system}"
        assert str(error.value).endswith(says) == (name != system), (name, error.value)


class Shape:
    """A tensor without numbers."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape):
        self.shape = tuple(shape)


def outline(system, preset):
    """Names and shapes of a published checkpoint, from the table itself."""
    source = tables.find(system)
    goal = importing.target(source.plan(source.about.presets[preset], {}))
    arrays = {path: np.broadcast_to(np.float32(0), spec.shape) for path, spec in goal.official.items()}
    return {name: Shape(lazy.shape) for name, lazy in rules.export(arrays, goal.plan.rules).items()}


@pytest.mark.parametrize(
    ("system", "has", "given", "says"),
    [
        ("dit_official", "DiT-B-4", "DiT-XL-2-256", "the preset DiT-B-4: give --config DiT-B-4"),
        ("dit_official", "DiT-S-8", "DiT-S-4", "the preset DiT-S-8: give --config DiT-S-8"),
        ("llamagen_gpt", "c2i-L-256", "c2i-B-256", "the preset c2i-L-256"),
        ("llamagen_vq", "VQ-8", "VQ-16", "the preset VQ-8: give --config VQ-8"),
        ("taming_vqgan", "f16-1024", "f16-16384", "the preset f16-1024: give --config f16-1024"),
        ("sd_kl_vae", "SD", "SD3", "the preset SD or SDXL: give --config SD"),
    ],
)
def test_weights_of_another_size_are_named(system, has, given, says):
    source = tables.find(system)
    with pytest.raises(UserError) as error:
        importing.load(source, source.about.presets[given], outline(system, has))
    assert f"; the weights look like {says}" in str(error.value) and "\n" not in str(error.value)
