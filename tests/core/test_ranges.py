"""Values of which nothing can be made are refused by name, before anything is built, and what "auto" would not give."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_ratchets import families

from hybridgen.core import config as config_lib
from hybridgen.core import entries, numbers
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, Range, check, count, number, one_of, share
from hybridgen.models import contract
from hybridgen.runs import agreement

VQ = f"{tiny.ROOT}/configs/tokenizers/vq.py:tiny"


@pytest.mark.parametrize(
    "word",
    [
        *("optim.lr=-1", "optim.lr=1e400", "optim.b1=2", "optim.b1=-0.1", "optim.b2=1", "optim.eps=0"),
        *("optim.clip=-1", "optim.decay=-5", "optim.final=-3", "optim.final=1.5", "optim.warmup=-1"),
        *("optim.groups.slow.lr=-1", "optim.groups.slow.b2=1", "ema.decay=1.5", "ema.decay=-0.1"),
        *("eval.batches=4294967295", "eval.batches=0", "sample.count=4294967295", "health.hang=-1"),
        *("log.every=-5", "data.workers=4294967295", "data.threads=-1", "data.resolution=0", "data.resolution=9999999"),
        *("data.text.length=0", "data.text.length=-4", "batch=4294967295", "seed=-1", "steps=-1", "accumulate=0"),
    ],
)
def test_an_entry_out_of_its_range_is_refused(word):
    name = word.partition("=")[0]
    with pytest.raises(UserError, match=rf"config key '{name}' \S+ is not within "):
        config_lib.load(VQ, [word])


def test_the_ends_of_the_ranges_are_allowed():
    words = ("optim.lr=0", "optim.b1=0", "optim.b2=0.9999", "optim.clip=0", "ema.decay=0", "ema.decay=0.99999")
    assert config_lib.load(VQ, [*words, "optim.groups.slow.match=kernel", "optim.final=1", "health.hang=0"])


def test_every_number_of_a_stage_has_a_range():
    stage = config_lib.flatten(tiny.common.stage("x", {}, tiny.common.shapes()))
    numeric = {name for name, value in stage.items() if isinstance(value, int | float | bool)}
    assert numeric <= set(entries.STAGE), numeric - set(entries.STAGE)


CHECKED_ELSEWHERE = {
    "quantizer",
    "scaling",
    "adversarial",
    "residual",
    "process",
    "network",
    "mode",
    "prior",
    "decoder",
}
DERIVED = {"draft_residual", "null_class", "time_scale", "outputs"}  # set by `build`
# modules within a family's own
WITHIN = {"GPTBlock", "Captions", "DiTBlock"}


@pytest.mark.parametrize("family", families())
def test_every_option_of_a_trained_family_has_a_range(family):
    module = contract.find(family)
    if not any(contract.ROLES[role].trained for role in contract.roles(module)):
        return
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    own = [kind for kind in own if dataclasses.is_dataclass(kind) and kind.__name__ not in WITHIN]
    names = {field.name for kind in own for field in dataclasses.fields(kind)} - {"parent", "name"}
    assert own and names - CHECKED_ELSEWHERE - DERIVED <= set(module.RANGES)
    modules = [kind for kind in own if issubclass(kind, nn.Module)]
    for kind in modules:  # the defaults are within their ranges
        given = {f.name: f.default for f in dataclasses.fields(kind) if f.name in module.RANGES}
        check("", module.RANGES, {name: x for name, x in given.items() if x is not dataclasses.MISSING})


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("ar.raster", {"vocab": 0}, "model.vocab 0 is not within 1 and"),
        ("ar.raster", {"vocab": "bfloat16"}, "model.vocab 'bfloat16' is not within"),
        ("ar.raster", {"grid": 4}, r"model.grid 4 is not a tuple of 2 numbers|model.grid 4 is not within"),
        ("ar.raster", {"grid": (True,)}, r"model.grid \(True,\) is not a tuple of 2 numbers"),
        ("ar.raster", {"grid": (0, 0)}, "model.grid 0 is not within 1 and"),
        ("ar.raster", {"grid": (2, 2.5)}, "model.grid 2.5 is not a whole number within"),
        ("ar.raster", {"classes": None}, "model.classes None is not within"),
        ("ar.raster", {"classes": "fsq"}, "model.classes 'fsq' is not within"),
        ("ar.raster", {"text_length": {}}, "model.text_length {} is not within"),
        ("ar.raster", {"text_vocab": True}, "model.text_vocab True is not within"),
        ("ar.raster", {"text_vocab": 9, "text_length": 0}, "text_vocab is 9, but model.text_length is 0"),
        ("ar.raster", {"cond_drop_prob": 1.5}, "model.cond_drop_prob 1.5 is not within 0.0 and 1.0"),
        ("ar.raster", {"unroll": -2}, "model.unroll -2 is not within -1 and"),
        ("ar.raster", {"qk_norm": 2}, "model.qk_norm 2 is not true or false"),
        ("ar.raster", {"remat": "some"}, "model.remat 'some' is not one of none, full, dots"),
        ("ar.raster", {"vocab": 9, "grid": (2, 2)}, "needs captions or classes"),
        ("ar.taming", {"vocab": 9, "grid": (2, 2), "classes": 10}, "classes 10 exceed vocab 9"),
        ("diffusion.dit", {"plan_width": None}, "model.plan_width None is not within 0 and"),
        ("diffusion.dit", {"process": {"steps": 0}}, "model.process.steps 0 is not within 1 and 1000"),
        ("diffusion.dit", {"process": 3}, "model.process 3 is not a group of options"),
        ("diffusion.dit", {"process": {"time_std": -1.0}}, "model.process.time_std -1.0 is not within"),
        ("diffusion.dit", {"token_corruption": -0.1}, "model.token_corruption -0.1 is not within"),
        ("tokenizers.vq", {"resolution": "../x"}, r"model.resolution '../x' is not within 1 and"),
        ("tokenizers.vq", {"channels": 16}, "model.channels 16 is not a tuple of 1 to 16 numbers"),
        ("tokenizers.vq", {"mse": -1.0}, "model.mse -1.0 is not within"),
        ("tokenizers.llamagen_vq", {"entropy": -1.0}, "model.entropy -1.0 is not within"),
        ("tokenizers.kl", {"adversarial": {"start": -1}}, "model.adversarial.start -1 is not within"),
        ("tokenizers.kl", {"scale": 0.0}, "model.scale 0.0 is not within"),
        ("hybrid.cascade", {"own": 2.0}, "model.own 2.0 is not within 0.0 and 1.0"),
        ("hybrid.cascade", {"prior": 3}, "3 does not describe a model"),
        (
            "hybrid.cascade",
            {"prior": {"family": "ar.raster", "model": {"vocab": 0}}},
            "model.vocab 0 is not within 1 and",
        ),
    ],
)
def test_an_option_of_a_model_out_of_its_range_is_refused(family, options, says):
    with pytest.raises(UserError, match=says):
        contract.model_of(contract.find(family), options)


# ---------------------------------------------------------------- what "auto" would be

KNOWN = {"vocab": 12, "grid": (4, 4), "plan_width": 2, "text_vocab": 9, "text_length": 5, "resolution": 16}
GOOD = {"vocab": 12, "grid": [4, 4], "text_vocab": 9, "text_length": 5}


class Source:
    """One picture."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        return {"image": np.zeros((16, 16, 3), np.uint8), "text": "", "label": 0}


@pytest.mark.parametrize(
    ("family", "options", "known", "says"),
    [
        (
            "ar.raster",
            {"vocab": 13},
            {},
            r"model.vocab is 13, but the part 'tokenizer' has 12 codes: set ",
        ),
        ("ar.raster", {"vocab": 11}, {}, "model.vocab is 11, but"),
        ("ar.raster", {"vocab": 11}, {"vocab": 0}, "model.vocab is 11, but the part 'tokenizer' has no codes"),
        ("ar.raster", {"grid": (2, 2)}, {}, r"model.grid is \(2, 2\), but the part 'tokenizer' has a grid of \(4, 4\)"),
        ("ar.raster", {"text_vocab": 5}, {}, "model.text_vocab is 5, but the text tokenizer has 9 ids"),
        ("ar.raster", {"text_length": 4}, {}, "model.text_length is 4, but the text tokenizer gives 5"),
        ("ar.raster", {"text_length": 6}, {}, "model.text_length is 6, but the text tokenizer gives 5"),
        ("text.lm", {"text_length": 4}, {}, "model.text_length is 4, but"),
        ("ar.raster", {}, {"text_vocab": 0, "text_length": 0}, "model.text_vocab is 9, but the data has no captions"),
        ("diffusion.dit", {"plan_width": 3}, {}, "model.plan_width is 3, but .* has codes of the width 2"),
        ("diffusion.dit", {"resolution": 8}, {}, "model.resolution is 8, but pictures .* have 16: set it to 16"),
        ("tokenizers.vq", {"resolution": (16, 8)}, {}, r"model.resolution is \(16, 8\), but"),
    ],
)
def test_what_auto_would_be_is_checked_where_it_is_given(family, options, known, says):
    given = {**(GOOD if family == "ar.raster" else {"text_vocab": 9, "text_length": 5}), **options}
    with pytest.raises(UserError, match=says):
        agreement.check(contract.find(family), given, KNOWN | known, {}, Source())
    within = {"prior": {"family": family, "model": given}}
    with pytest.raises(UserError, match=says.replace("model.", "model.prior.model.", 1)):
        agreement.check(contract.find("hybrid.cascade"), within, KNOWN | known, {}, Source())


def test_what_agrees_passes():
    agreement.check(contract.find("ar.raster"), GOOD | {"text_vocab": 64}, KNOWN, {}, Source())  # rows to spare
    agreement.check(contract.find("text.lm"), {"text_vocab": 9, "text_length": 50}, KNOWN, {}, Source())
    latent = contract.model_of(contract.find("tokenizers.vq"), tiny.CONTINUOUS | {"patch": 8})  # a grid of 2 x 2
    auto = {"autoencoder": SimpleNamespace(family="tokenizers.vq", model=latent)}
    agreement.check(contract.find("diffusion.dit"), {"resolution": 2}, KNOWN, auto, Source())
    with pytest.raises(UserError, match="channels is 3, but latents of the part 'autoencoder' have 4: set it to 4"):
        agreement.check(contract.find("diffusion.dit"), {"channels": 3}, KNOWN, auto, Source())
    with pytest.raises(UserError, match="latents of the part 'autoencoder' have 2: set it to 2"):
        agreement.check(contract.find("diffusion.dit"), {"resolution": 16}, KNOWN, auto, Source())


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), np.array(3), jnp.asarray(3), np.uint8(3)])
def test_a_number_may_come_from_an_array(value):
    found = numbers.checked("steps", value, 1, 9, whole=True)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [3.7, True, np.bool_(True), "3", None, [3], np.array([3]), float("nan"), 10, 0, 3j])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UserError, match="steps .* is not (a whole number )?within 1 and 9"):
        numbers.checked("steps", value, 1, 9, whole=True)


def test_a_fraction_is_one_where_fractions_are_meant():
    assert numbers.checked("guidance", np.float32(1.5), 0.0, 9.0) == 1.5
    for value in (True, "1.5", float("inf")):
        with pytest.raises(UserError, match="guidance"):
            numbers.checked("guidance", value, 0.0, 9.0)


@pytest.mark.parametrize(
    ("known", "good", "bad"),
    [
        (count(1, 9), [1, 9], [0, 10, 1.0, True, None, "1", (1,)]),
        (count(1, none=True), [None, 4], [0, ()]),
        (number(), [0, 0.5, 1e12], [-0.1, float("nan"), float("inf"), False, None]),
        (share(), [0, 1.0], [1.1, "half"]),
        (one_of("a", "b"), ["a"], ["c", 1, None, ("a",)]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (count(1, 9, least=1, most=2), [3, (3,), (3, 4)], [(), (1, 2, 3), (0,), (1, True)]),
        (count(1, 9, least=2, most=2, alone=False), [(3, 4), [3, 4]], [3, (3,), (3, 4, 5)]),
    ],
    ids=str,
)
def test_ranges(known: Range, good, bad):
    assert not [value for value in good if known.wrong(value)]
    assert not [value for value in bad if not known.wrong(value)]
