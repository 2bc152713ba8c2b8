"""The PyTorch twin equals our prior in logits, cached logits and training; configs without a twin are refused."""

import json
import sys

import jax
import numpy as np
import pytest
import tiny

from hybridgen import bench
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.cost import against, programs
from hybridgen.models.ar import raster

PART = "parts.tokenizer=configs/tokenizers/vq.py:tiny"
SYSTEMS = {
    "text": {"text_depth": 2},
    "grouped": {"heads": 4, "kv_heads": 2, "qk_norm": False, "prefix_mask": False, "hidden": 48},
    "class": {"text_vocab": 0, "text_length": 0, "classes": tiny.CLASSES},
}


@pytest.fixture(params=SYSTEMS)
def pair(request):
    """(our part, its twin, a batch with tokens)."""
    pytest.importorskip("torch")
    part = tiny.part("ar.raster", tiny.prior_options(tiny.tokenizer(), **SYSTEMS[request.param], cond_drop_prob=0.0))
    batch = {name: value for name, value in tiny.batch(4).items() if name != "image"}
    batch["tokens"] = np.random.default_rng(0).integers(part.model.vocab, size=(4, part.model.length))
    return part, against.Twin(part.model, part.params), batch


def test_the_same_logits_at_once_and_over_the_cache(pair):
    """Conditions given and dropped, and both in a guided plan."""
    part, twin, batch = pair
    torch, cond = twin.torch, raster.conditioning(part.model, batch, {})
    drop = np.arange(4) % 2 == 0
    ours = jax.jit(lambda: part.call("score", batch["tokens"], cond | {"drop": drop}))()
    given = against.as_torch(torch, batch)
    theirs = twin.forward(given["tokens"], given, torch.tensor(drop)).detach().numpy()
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    one, two = (part.call("score", batch["tokens"], cond | {"drop": np.full(4, dropped)}) for dropped in (False, True))
    for scale, want in ((1.0, one), (2.5, one + 1.5 * (one - two))):
        tokens, logits = against.plan(twin, cond, 4, {"guidance": scale}, given["tokens"])
        assert np.array_equal(tokens, batch["tokens"])
        np.testing.assert_allclose(np.stack(logits, 1), want, atol=5e-5)


@pytest.mark.slow
def test_the_same_training(pair):
    """Five steps of AdamW on one batch, clipped: the same losses."""
    part, twin, batch = pair
    if not part.model.text_vocab:
        batch |= {"text": np.zeros((4, 1), np.int32)}  # not read
    model = {
        name: getattr(part.model, name) for name in part.model.__dataclass_fields__ if name not in ("parent", "name")
    }
    changes = {"optim__schedule": "constant", "optim__lr": 0.01, "optim__clip": 0.5}
    run = tiny.Run(tiny.experiment("ar.raster", model, **changes), batch)
    run.state = run.state | {"params": jax.tree.map(jax.numpy.array, part.params)}
    ours = [run.step(batch)["loss"] for _ in range(5)]
    theirs = against.train_turns(twin, batch, run.experiment.config.optim)
    np.testing.assert_allclose([next(theirs) for _ in ours], ours, rtol=1e-4)
    assert ours[-1] < ours[0] - 0.05


@pytest.mark.slow
def test_the_report(tmp_path, capsys):
    pytest.importorskip("torch")
    words = ["--config", "configs/ar/raster.py:tiny", f"--config.{PART}", "--config.model.depth=1", "--config.batch=2"]
    assert (
        bench.main([*words, "--count", "2", "--steps", "3", "--against", "torch", "--json", str(tmp_path / "x")]) == 0
    )
    report = json.loads((tmp_path / "x").read_text())["against"]
    shown = capsys.readouterr().out
    for name in ("train", "decode"):
        assert report[name]["ratio"] == pytest.approx(report[name]["theirs"] / report[name]["ours"])
        assert len(report[name]["seconds"]["theirs"]) == 3 and f", {name}: ours " in shown


def build(path, *overrides):
    return programs.build(*programs.choose(config_lib.load(path, [PART, *overrides]), None), cached=True)


def test_what_has_no_twin_is_refused(monkeypatch):
    for built, says in (
        (build("configs/diffusion/dit.py:tiny"), "supports the family ar.raster, not diffusion.dit"),
        (build("configs/ar/raster.py:tiny", "model.dtype=bfloat16"), "model.dtype is bfloat16, but must be float32"),
        (build("configs/ar/raster.py:tiny", "optim.kind=muon"), "optim.kind is muon, but must be adamw"),
    ):
        with pytest.raises(UserError, match=says):
            against.check(built)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch: pip install"):
        against.find_torch()
