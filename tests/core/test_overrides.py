"""Overrides of any key of any config by any value: one line that says what is wrong, or a model; never a traceback."""

import functools
import random
import re

import jax
import numpy as np
import pytest
import tiny

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.models.contract import find
from hybridgen.runs import agreement, drawing
from hybridgen.training import optim, rollback
from hybridgen.training import state as state_lib

FILES = sorted(path for path in (tiny.ROOT / "configs").glob("*/*.py") if path.parent.name != "recipes")
VALUES = (
    *("-1", "0", "1", "2", "3", "5", "1.5", "-0.5", "1e400", "4294967295", "1e30", "99999999999"),
    *("none", "true", "false", "auto", "", "x", "../x", "fsq", "bfloat16", "ar.raster", "tokenizers", "tokenizers.vq"),
    *("()", "(0,0)", "(2,)", "(2,2)", "(True,)", "('a',)", "((1,2),)", "[]", "{}", "{'kind':'x'}", "(-1,4)", "nan"),
)
VALUES += ("0", "1", "2", "3", "4", "5", "6", "7", "8", "12", "16", "32", "64", "0.5", "(1,)", "(2,3)", "(8,16,32)") * 3
KNOWN = {
    "vocab": 12,
    "grid": (4, 4),
    "plan_width": 2,
    "text_vocab": 12,
    "text_length": 5,
    "resolution": 16,
    "classes": 3,
}


class Source:
    """One picture of the size of `KNOWN`."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        return {"image": np.zeros((16, 16, 3), np.uint8), "text": "a", "label": 0}


@functools.cache
def parts() -> dict:
    """A tokenizer with the grid and the codes of `KNOWN`, with abstract arrays."""
    return {"tokenizer": tiny.tokenizer(tiny.FSQ)}


def built(config) -> None:
    """All that is done with a config before arrays are made, and the shapes of the model and of its optimizer."""
    family = find(config.family)
    given = parts()
    options = config_lib.resolve(config.model, KNOWN)
    model = contract.model_of(family, options)
    agreement.check(family, options, KNOWN, given, Source())
    if is_large(options):
        return  # tracing it would take long
    known = drawing.known_options(family, model, given)
    drawing.checked(config.sample.options, known, partial=True)
    rollback.intervals(config, tiny.ROOT)
    specs = state_lib.spec_of(tiny.batch(2))
    arrays = jax.eval_shape(lambda key: family.init(model, key, specs, given), jax.random.key(0))
    which = state_lib.trainable_of(config)
    which.check(arrays["params"])
    trainable, _ = which.split(arrays["params"])

    def loss(arrays: dict, batch: dict, parts: dict, step: jax.Array) -> jax.Array:
        options = {"parts": parts, "extra": arrays["extra"], "step": step, "train": True}
        return family.loss(model, arrays["params"], batch, jax.random.key(0), **options)[0]

    jax.eval_shape(loss, arrays, specs, given, jax.ShapeDtypeStruct((), "int32"))
    jax.eval_shape(optim.build(config.optim, 9, trainable).init, trainable)


def is_large(options) -> bool:
    """Whether a model has many layers or very wide ones."""
    flat = {
        name: value if isinstance(value, tuple) else (value,) for name, value in config_lib.flatten(options).items()
    }
    layers = ("depth", "blocks", "channels", "decoder_channels")
    deep = any(
        name.endswith(layers) and (max(value) > 64 or (len(value) == 1 and max(value) > 3))
        for name, value in flat.items()
    )
    return deep or any(isinstance(one, int | float) and one > 2**12 for value in flat.values() for one in value)


def outcome(file, words: list[str]) -> str:
    """ "" if the config is built, or the message of the UserError; any other exception is the test's failure."""
    try:
        built(config_lib.load(f"{file}:tiny", words))
    except UserError as error:
        assert "\n" not in str(error) and str(error), words
        return str(error)
    except Exception as error:
        raise AssertionError(f"{file.stem}: {words}: {type(error).__name__}: {error}") from error
    return ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_any_override_is_taken_or_refused(file):
    draw = random.Random(file.stem)
    keys = sorted(config_lib.flatten(config_lib.load(f"{file}:tiny"), nodes=True))
    found = [outcome(file, [f"{draw.choice(keys)}={draw.choice(VALUES)}"]) for _ in range(12)]
    models = [key for key in keys if key.startswith("model")]
    found += [outcome(file, [f"{draw.choice(models)}={draw.choice(VALUES)}"]) for _ in range(20)]
    assert 10 < sum(map(bool, found)) < 32


@pytest.mark.parametrize(
    ("file", "word", "says"),
    [
        ("ar/raster", "model.classes=fsq", "model.classes 'fsq' is not within"),
        ("ar/raster", "model.grid=4", "model.grid 4 is not a tuple of 2 numbers"),
        ("ar/raster", "model.grid=(0,0)", "model.grid 0 is not within 1 and"),
        ("ar/raster", "model.heads=65", "model.heads 65 exceed model.width 64"),
        ("ar/raster", "model.unroll=0", "unroll is 0, but must be -1"),
        ("diffusion/dit", "model.plan_width=none", "model.plan_width None is not within"),
        ("diffusion/dit", "model.plan_width=0", "model.draft is true, but model.plan_width is 0"),
        ("tokenizers/vq", "model.resolution=../x", "model.resolution '../x' is not within"),
        ("tokenizers/vq", "family=ar.raster", "'ar.raster' has no model option"),
        ("tokenizers/vq", "family=tokenizers", "'tokenizers' is not a family|no family 'tokenizers'"),
        ("tokenizers/vq", "family=roles", "'roles' is not a family|no family 'roles'"),
        ("tokenizers/vq", "family=", "family"),
    ],
)
def test_an_override_that_cannot_be_built_is_named(file, word, says):
    assert re.search(says, outcome(tiny.ROOT / "configs" / f"{file}.py", [word]))
