"""Parts that do not fit are refused with both values: names, roles, channels, grids, vocabularies."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import saved_runs
import tiny

from configs import common
from hybridgen import convert, evaluate
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.models import contract
from hybridgen.models.contract import find
from hybridgen.runs import agreement, experiment, fitting, reading
from hybridgen.training import resume

GOLDEN = Path(__file__).parents[1] / "golden"
OFFICIAL = {name: name for name in ("dit_official", "sd_kl_vae", "taming_gumbel", "t5_encoder", "llamagen_gpt")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Imported runs by name, and a tokenizer of another grid, `quarter`."""
    place = tmp_path_factory.mktemp("official")
    for name, system in OFFICIAL.items():
        assert convert.main([system, str(GOLDEN / system), str(place / name)]) == 0
    return place


@pytest.mark.parametrize(
    ("system", "name", "part", "says"),
    [
        ("dit_official", "autoencodr", "sd_kl_vae", "uses no part 'autoencodr'; did you mean 'autoencoder'?"),
        ("dit_official", "vae", "sd_kl_vae", "uses no part 'vae'; its parts are autoencoder"),
        ("dit_official", "tokenizer", "sd_kl_vae", "uses no part 'tokenizer'"),
        ("dit_official", "Autoencoder", "sd_kl_vae", "did you mean 'autoencoder'?"),
        ("dit_official", "autoencoder", "t5_encoder", "is a run of text.t5, but the part 'autoencoder' must be a tok"),
        ("dit_official", "autoencoder", "dit_official", "is a run of diffusion.dit_official, but the part"),
        ("dit_official", "autoencoder", "taming_gumbel", "with a codebook, but the part 'autoencoder' must be a tok"),
        ("llamagen_gpt", "tokenizer", "sd_kl_vae", "with no codebook, but the part 'tokenizer' must be a tokenizer"),
        ("llamagen_gpt", "tokenizer", "taming_gumbel", "has the vocab 44, but the model has 48"),
        ("llamagen_gpt", "text", "sd_kl_vae", "but the part 'text' must be a text encoder"),
        ("sd_kl_vae", "autoencoder", "sd_kl_vae", "uses no part 'autoencoder'; its parts are perceptual"),
        ("sd_kl_vae", "perceptual", "taming_gumbel", "must be a network with a perceptual distance"),
        ("t5_encoder", "text", "t5_encoder", "uses no part 'text'; it has no parts"),
    ],
)
def test_convert_refuses_a_part(runs, tmp_path, system, name, part, says):
    with pytest.raises(UserError) as error:
        convert.main([system, str(GOLDEN / system), str(tmp_path / "out"), "--part", f"{name}={runs / part}"])
    assert says in str(error.value) and f"--part {name}={runs / part}" in str(error.value), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_autoencoder_of_other_channels(runs, tmp_path):
    """16 channels for a model of 4."""
    model = find("diffusion.dit_official").build(
        {"resolution": 8, "channels": 16, "width": 16, "depth": 1, "heads": 1, "classes": 3}
    )
    part = reading.load(runs / "sd_kl_vae").part
    with pytest.raises(UserError, match="^it has the channels 4, but the model has 16$"):
        fitting.check_sizes(find("diffusion.dit_official"), model, {"autoencoder": part}, {"autoencoder": "it"})


def test_an_imported_model_knows_the_size_of_its_images(runs, tmp_path):
    """A latent of 8 x 8 of an autoencoder that divides by 2: images of 16."""
    part = f"autoencoder={runs / 'sd_kl_vae'}"
    assert convert.main(["dit_official", str(GOLDEN / "dit_official"), str(tmp_path / "dit"), "--part", part]) == 0
    auto = reading.load(runs / "sd_kl_vae").part.model
    stride = auto.resolution // auto.grid[0]
    assert stride > 1 and json.loads((tmp_path / "dit/config.json").read_text())["data"]["resolution"] == 8 * stride


# ---------------------------------------------------------------- training

CODES = tiny.part("tokenizers.vq", tiny.FSQ)  # a grid of 4 x 4, 12 codes of width 2
LATENT = tiny.part("tokenizers.vq", tiny.CONTINUOUS)  # a grid of 4 x 4, 4 channels
DECODER = {"resolution": 4, "patch": 2, "channels": 4, "width": 16, "depth": 1, "heads": 1}


def sizes(family, options, **parts):
    module = find(family)
    fitting.check_sizes(module, module.build(options), parts, {name: f"config.parts.{name}=x" for name in parts})


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("ar.raster", {"vocab": 11}, "config.parts.tokenizer=x has the vocab 12, but the model has 11"),
        ("ar.raster", {"grid": (2, 2)}, r"has the grid \(4, 4\), but the model has \(2, 2\)"),
        ("diffusion.dit", {"plan_width": 3}, "has the code_width 2, but the model has 3"),
    ],
)
def test_sizes_of_a_tokenizer(family, changes, says):
    prior = tiny.prior_options(CODES) if family == "ar.raster" else tiny.decoder_options(CODES)
    sizes(family, prior, tokenizer=CODES)
    with pytest.raises(UserError, match=says):
        sizes(family, prior | changes, tokenizer=CODES)


def test_sizes_of_a_part_of_a_cascade():
    prior = tiny.part("ar.raster", tiny.prior_options(CODES, grid=(2, 2)))
    options = tiny.cascade_options(CODES)
    options.pop("prior")
    with pytest.raises(UserError, match=r"has the grid \(4, 4\), but the part 'prior' has \(2, 2\)"):
        sizes("hybrid.cascade", options, tokenizer=CODES, prior=prior)


@pytest.mark.parametrize(
    ("changes", "resolution", "says"),
    [
        ({}, 16, ""),
        ({}, (16, 16), ""),
        ({}, 32, "model.resolution is 4, but latents of the part 'autoencoder' have 8: set it to 8"),
        ({"resolution": 8}, 32, ""),
        ({"resolution": (4, 8)}, (16, 32), ""),
        ({"resolution": 16}, 16, "model.resolution is 16, but latents of the part 'autoencoder' have 4: set it to 4"),
        ({"channels": 5}, 16, "model.channels is 5, but latents of the part 'autoencoder' have 4: set it to 4"),
    ],
)
def test_sizes_of_an_autoencoder(changes, resolution, says):
    """Also of images of other sizes than those of its own training."""
    family, source = find("diffusion.dit"), sources.build(saved_runs.DATA, "train")
    arguments = family, DECODER | changes, {"resolution": resolution}, {"autoencoder": LATENT}, source
    if not says:
        sizes("diffusion.dit", DECODER | changes, autoencoder=LATENT)
        return agreement.check(*arguments)
    with pytest.raises(UserError, match=says):
        agreement.check(*arguments)


def test_an_autoencoder_of_one_shape(monkeypatch):
    monkeypatch.delattr(find("tokenizers.vq"), "for_shape")
    sizes("diffusion.dit", DECODER, autoencoder=LATENT)
    with pytest.raises(UserError, match=r"has the grid \(4, 4\), but the model has \(8, 8\)"):
        sizes("diffusion.dit", DECODER | {"resolution": 8}, autoencoder=LATENT)


@pytest.mark.parametrize(
    ("family", "options", "parts", "says"),
    [
        ("diffusion.dit", DECODER, {}, "diffusion.dit generates latents of 4 channels, but has no part 'autoencoder'"),
        ("diffusion.dit", DECODER | {"channels": 3}, {}, ""),
        ("diffusion.dit", DECODER, {"autoencoder": LATENT}, ""),
        ("ar.raster", tiny.prior_options(CODES), {}, "ar.raster generates tokens, but has no part 'tokenizer'"),
        ("ar.raster", tiny.prior_options(CODES), {"tokenizer": CODES}, ""),
        ("hybrid.cascade", tiny.cascade_options(CODES, decoder={"channels": 4}), {"tokenizer": CODES}, "4 channels"),
        ("tokenizers.vq", tiny.FSQ, {}, ""),
    ],
)
def test_what_has_no_images_is_refused_before_training(family, options, parts, says):
    module = find(family)
    if not says:
        return fitting.check_drawable(module, module.build(options), parts)
    with pytest.raises(UserError, match=says):
        fitting.check_drawable(module, module.build(options), parts)


def config_of(family, model, parts, **changes):
    return common.stage(family, model, saved_runs.DATA, steps=1, batch=2, parts=parts, **changes)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokeniser", "config.parts.tokeniser=.*'ar.raster' uses no part 'tokeniser'; did you mean 'tokenizer'"),
        ("text", "'ar.raster' uses no part 'text'; its parts are tokenizer"),
        ("autoencoder", "uses no part 'autoencoder'"),
    ],
)
def test_training_refuses_a_name(name, says, tmp_path):
    with pytest.raises(UserError, match=says):
        resume.checked(config_of("ar.raster", tiny.PRIOR | {"text_vocab": 0}, {name: str(tmp_path / "none")}))


def test_a_cascade_may_have_the_parts_of_parts_that_are_not_there_yet(tmp_path):
    parts = {name: str(tmp_path / name) for name in ("tokenizer", "prior", "decoder", "autoencoder")}
    resume.checked(config_of("hybrid.cascade", {}, parts))
    with pytest.raises(UserError, match="no part 'autoencodr'; did you mean 'autoencoder'"):
        resume.checked(config_of("hybrid.cascade", {}, parts | {"autoencodr": "x"}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    saved_runs.save(place / "codes", "tokenizers.vq", tiny.FSQ, {}, 1)
    saved_runs.save(place / "latent", "tokenizers.vq", tiny.CONTINUOUS, {}, 1)
    return place


def test_training_refuses_a_run_of_another_kind(trained, runs):
    source = sources.build(saved_runs.DATA, "train")
    auto = tiny.PRIOR | {"vocab": "auto", "grid": "auto", "text_vocab": "auto", "text_length": "auto"}
    for path, says in (
        (trained / "latent", "with no codebook, but the part 'tokenizer' must be a tokenizer with a codebook"),
        (runs / "t5_encoder", "is a run of text.t5, but the part 'tokenizer' must be a tokenizer with a codebook"),
    ):
        with pytest.raises(UserError, match=f"config.parts.tokenizer={path} .*{says}"):
            experiment.build(config_of("ar.raster", auto, {"tokenizer": str(path)}), None, source)
    experiment.build(config_of("ar.raster", auto, {"tokenizer": str(trained / "codes")}), None, source)
    without = config_of("ar.raster", auto | {"vocab": 12, "grid": (4, 4)}, {}, sample__every=1)
    with pytest.raises(UserError, match="generates tokens, but has no part 'tokenizer'"):
        experiment.build(without, None, source)


def test_a_prior_without_tokenizer_is_not_evaluated(tmp_path):
    loaded = SimpleNamespace(draws=True, plans=True, tokenizer=None, config=SimpleNamespace(family="ar.raster"))
    with pytest.raises(UserError, match="this ar.raster run generates tokens, but has no part 'tokenizer'"):
        evaluate.evaluate(loaded, ("validation",), 8, 8, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_family_of_the_package_declares_its_parts():
    names = [f"{path.parent.name}.{path.stem}" for path in (contract.file_of("ar.raster").parents[1]).glob("*/*.py")]
    families = [name for name in names if "\nROLE" in contract.file_of(name).read_text(encoding="utf-8")]
    assert len(families) > 10
    for name in families:
        declared = contract.parts_of([find(name)])
        assert declared is not None and declared <= contract.PARTS.keys(), name


def test_a_family_of_one_s_own_may_have_any_parts():
    own = SimpleNamespace(PARTS=("reference",))
    assert contract.parts_of([own, find("ar.raster")]) == {"reference", "tokenizer"}
    assert contract.parts_of([SimpleNamespace(), find("ar.raster")]) is None
