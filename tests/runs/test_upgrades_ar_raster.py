"""Runs of the former `ar.raster`, one family for three systems, are read as the current families."""

import dataclasses
import json

import pytest
import tiny

from hybridgen.core.errors import UserError
from hybridgen.models.contract import find
from hybridgen.runs.upgrades.ar_raster import upgrade

SIZE = {"vocab": 16384, "grid": [16, 16], "width": 768, "depth": 12, "heads": 12, "remat": "full", "unroll": 1}
OURS = SIZE | {"classes": 0, "drop": 0.1, "text_vocab": 64, "text_length": 14, "text_depth": 1, "qk_norm": True}
IMAGE = SIZE | {"hidden": 2048, "norm_eps": 1e-5, "positions": "image", "prefix_mask": False, "drop": 0.2}
IMPORTED = IMAGE | {"prefixed": "class", "classes": 1000, "rope_base": 10000.0, "kv_heads": None}
TRAINED = IMAGE | {"prefixed": "class", "classes": 10, "dropout": 0.1, "token_dropout": 0.3, "std": 0.02}
CAPTION = IMAGE | {"prefixed": "caption", "text_length": 120, "text_width": 2048, "null_length": 120, "own_seen": True}
CODES = SIZE | {"hidden": 3072, "prefixed": "codes", "positions": "learned", "prefix_mask": False, "drop": 0.0}
CODES |= {"norm_kind": "layer", "norm_eps": 1e-5, "mlp": "gelu_exact", "bias": True, "keep": 0.9, "cond_length": 2}
LLAMAGEN = {"hidden": 2048, "norm_eps": 1e-5, "cond_drop_prob": 0.2}
CASES = {
    "ours": (OURS, "ar.raster", {"cond_drop_prob": 0.1, "text_vocab": 64, "text_length": 14, "qk_norm": True}),
    "LlamaGen, imported": (IMPORTED, "ar.llamagen", LLAMAGEN | {"classes": 1000}),
    "LlamaGen, trained": (TRAINED, "ar.llamagen", LLAMAGEN | {"classes": 10, "dropout": 0.1, "token_dropout": 0.3}),
    "LlamaGen, from a text": (
        CAPTION,
        "ar.llamagen",
        LLAMAGEN | {"text_length": 120, "text_width": 2048, "null_length": 120, "padding_sees_itself": True},
    ),
    "VQGAN, imported": (CODES | {"places": 300}, "ar.taming", {"block_size": 300, "pkeep": 0.9, "cond_length": 2}),
    "VQGAN, of classes": (CODES | {"classes": 10, "cond_length": 1}, "ar.taming", {"classes": 10, "pkeep": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_each_system(case):
    """All options that the family has are as they were, the others at its defaults; and once is enough."""
    old, family, wanted = CASES[case]
    found, options = upgrade(old)
    assert found == family
    model, expected = (find(family).build(given) for given in (options, SIZE | wanted))
    assert dataclasses.asdict(model) == dataclasses.asdict(expected)
    assert family != "ar.raster" or upgrade(options) is None


def test_the_prior_that_comes_with_the_clone_is_read():
    old = json.loads((tiny.ROOT / "examples" / "shapes" / "parts" / "prior" / "config.json").read_text())
    family, options = upgrade(old["model"]) or (old["family"], old["model"])
    assert family == "ar.raster" and find(family).build(options).cond_drop_prob == 0.1


def test_what_no_system_is_like_is_refused_with_the_command():
    for old in (
        OURS | {"mlp": "gelu"},
        IMPORTED | {"qk_norm": True},
        CAPTION | {"prefix_mask": True},
        CODES | {"hidden": 5},
    ):
        with pytest.raises(UserError, match="no longer supported; import official weights again: hybridgen convert"):
            upgrade(old)
    assert upgrade(OURS | {"a_new_one": 1}) is None  # refused where it is built
