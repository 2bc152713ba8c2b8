"""Former options of tokenizers are converted to those of the current families and quantizers."""

import pytest
import tiny

from hybridgen.core import config as config_lib
from hybridgen.models.contract import find
from hybridgen.runs.upgrades import tokenizers_kl, tokenizers_vq
from hybridgen.weights import tables

SIDE = {"resolution": 32}
LIGHT = {"patch": 4, "channels": (64, 128), "blocks": 1, "attention": True, "quantizer": "fsq", "entropy": 0.0}
LIGHT |= SIDE | {"levels": (8, 5, 5, 5), "l1": 0.0}
FAIR = {"codes": 1024, "width": 8}
GUMBEL = {"quantizer": "gumbel", "sharpness": 30.0, "divergence": 0.0, "entropy": 0.02, "softness": 1.0}
GAN = {"weight": 0.8, "start": 250_001, "adaptive": True, "width": 64, "depth": 3, "groups": 32}
VQGAN = SIDE | {"patch": 1, "blocks": 2, "attention": True, "moving": False, "exact": True, "perceptual": 1.0}
VQGAN |= {"channels": (128, 128, 256, 256, 512), "residual": {"stem": 128, "z": 256, "attend": (4,), "groups": 32}}
VQGAN |= {"adversarial": GAN, "dtype": "bfloat16", "revive_below": 0.03, "quantizer": "vq"}
F8 = {"channels": (128, 128, 256, 512), "residual": {"stem": 128, "z": 256, "attend": (3,), "groups": 32}}
LLAMAGEN = {"adversarial": GAN | {"weight": 0.5, "start": 20_000, "adaptive": False}, "mse": 1.0, "l1": 0.0}
OLD = {
    "vq.py": LIGHT,
    "vq.py:fsq": LIGHT | {"entropy": 0.02, "fill": 0.72},
    "vq.py:lfq": LIGHT | {"quantizer": "lfq", "bits": 10, "entropy": 0.05, "softness": 0.5, "diversity": 2.0},
    "vq.py:vq": LIGHT | FAIR | {"quantizer": "vq"},
    "vq.py:vq_gradient": LIGHT | FAIR | {"quantizer": "vq", "moving": False, "entropy": 0.02, "softness": 0.01},
    "vq.py:gumbel": LIGHT | FAIR | GUMBEL,
    "vq.py:autoencoder": LIGHT | {"quantizer": "none", "width": 8},
    "vqgan.py:f16": VQGAN | {"codes": 1024, "width": 256, "l2": False, "legacy": True, "mse": 0.0, "l1": 1.0},
    "vqgan.py:f8_gumbel": VQGAN
    | F8
    | {"quantizer": "gumbel", "codes": 8192, "width": 256, "divergence": 1e-8, "cooling": 100_000, "legacy": False}
    | {"mse": 0.0, "l1": 1.0},
    "llamagen_vq.py:f16": VQGAN | LLAMAGEN | {"codes": 16_384, "width": 8, "legacy": False},
}


def of_config(name):
    """(family, model) of a config there is now."""
    config = config_lib.load(f"{tiny.ROOT}/configs/tokenizers/{name}")
    return config.family, find(config.family).build(config_lib.resolve(config.model, SIDE))


@pytest.mark.parametrize("name", OLD)
def test_options_of_a_run_become_those_of_its_config(name):
    family, options = tokenizers_vq.upgrade(OLD[name])
    assert (family, find(family).build(options)) == of_config(name)
    assert family != "tokenizers.vq" or tokenizers_vq.upgrade(options) is None  # nothing is left to do
    listed = config_lib.from_plain(config_lib.plain(OLD[name]))  # as a file has them
    assert find(family).build(config_lib.resolve(dict(tokenizers_vq.upgrade(listed)[1]), {})) == of_config(name)[1]


def test_imported_tokenizers():
    residual = {"stem": 128, "z": 256, "attend": (4,), "decoder_channels": (128, 128, 256, 256, 512)}
    old = {"resolution": 256, "patch": 1, "attention": True, "channels": (128, 128, 256, 256, 512), "blocks": 2}
    old |= {"residual": residual, "quantizer": "vq", "l2": True, "codes": 16_384, "width": 8, "commitment": 0.25}
    family, options = tokenizers_vq.upgrade(old | {"moving": False, "exact": True, "revive_below": 0.0})
    source = tables.find("llamagen_vq")
    plan = source.plan(source.about.presets["VQ-16"], {})
    assert family == plan.family and find(family).build(options) == find(family).build(plan.model)


def test_what_a_system_does_not_have_stays_with_the_one_that_does():
    old = OLD["llamagen_vq.py:f16"]
    for changes in ({"used": 100}, {"decay": 0.9}, {"entropy": 0.1}, {"attention": False}, {"exact": False}):
        family, options = tokenizers_vq.upgrade(old | changes)
        model = find(family).build(options)
        assert family == "tokenizers.vqgan" and model.quantizer.codebook_size == 16_384
    assert model.residual["attend"] == (4,) and "middle" not in model.residual
    # the two weights swapped: the encoder's was 1
    moving = tokenizers_vq.upgrade(OLD["vqgan.py:f16"] | {"moving": True})[1]["quantizer"]
    assert moving["kind"] == "vq_ema" and moving["commitment"] == 1.0


def test_new_options_are_left_alone():
    assert tokenizers_vq.upgrade({"patch": 4, "quantizer": {"kind": "fsq"}}) is None
    assert tokenizers_vq.upgrade({"patch": 4}) is None
    assert tokenizers_kl.upgrade({"width": 4, "mse": 1.0}) is None


def test_kl_autoencoders():
    old = {"resolution": 32, "width": 4, "l1": 0.0, "l2": 1.0, "residual": {"groups": 4}}
    family, options = tokenizers_kl.upgrade(old)
    assert find(family).build(options).mse == 1.0 and "l2" not in options
