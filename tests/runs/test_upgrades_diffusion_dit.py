"""Runs of the former `diffusion.dit` are read with the options of the current families."""

import json
from types import SimpleNamespace

import jax
import pytest
from test_verify import GOLDEN

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part, find
from hybridgen.runs import importing
from hybridgen.runs.upgrades import diffusion_dit
from hybridgen.weights import tables
from hybridgen.weights.files import open_weights

OURS = {"classes": 0, "corrupt": 0.05, "cross": False, "depth": 3, "draft": True, "drop_plan": 0.05, "drop_text": 0.1}
OURS |= {"dtype": "float32", "heads": 3, "kind": "x", "loss_kind": "x", "patch": 4, "plan_width": 4, "relative": True}
OURS |= {"remat": "none", "resolution": 32, "schedule": "flow", "text_length": 0, "text_vocab": 0, "time_mean": 0.0}
OURS |= {"time_min": 0.05, "time_std": 1.0, "unroll": -1, "width": 192}

# as tables made them of the recordings
PUBLISHED = {"plan_width": 0, "draft": False, "rotary": False, "kind": "eps", "loss_kind": "eps", "timesteps": 1000}
PUBLISHED |= {"schedule": "linear"}
LAYER = {"norm": "layer", "norm_eps": 1e-6, "bias": True}


def recorded(system):
    """(official config, plan of today)."""
    folder = GOLDEN / system
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: tuple(x.shape) for name, x in open_weights(folder / "weights.safetensors").items()}
    return config, tables.find(system).plan(config, shapes)


def official():
    config, plan = recorded("dit_official")
    sizes = ("resolution", "channels", "patch", "width", "heads", "depth", "hidden", "classes")
    old = PUBLISHED | {name: plan.model[name] for name in sizes}
    old |= {"drop_text": plan.model["cond_drop_prob"], "outputs": 2 * config["in_channels"], "position": "stored"}
    return old | {"block": LAYER | {"mlp": "gelu"}, "variance": plan.model["process"]["variance"]}, plan


def diffusers():
    _, plan = recorded("dit")
    sizes = ("resolution", "channels", "patch", "width", "heads", "depth", "hidden", "classes", "outputs")
    block = {name: plan.model[name] for name in ("mlp", "qkv_bias", "mlp_norm_affine", "mlp_norm_eps")}
    old = PUBLISHED | {name: plan.model[name] for name in sizes} | {"block": LAYER | block, "position": "columns"}
    return old | {"time_shift": 1.0, "own_embedders": True, "variance": "small"}, plan


@pytest.mark.parametrize("case", [official, diffusers])
def test_imported_runs_are_what_is_imported_today(case):
    old, plan = case()
    family, options = diffusion_dit.upgrade(old)
    goal = importing.target(plan)
    assert family == plan.family and find(family).build(options) == goal.model
    again = json.loads(json.dumps(old))  # as a run folder has it
    assert diffusion_dit.upgrade(again) == (family, options) and diffusion_dit.upgrade(options) is None


def test_our_decoder_keeps_its_name_and_its_arrays():
    family, options = diffusion_dit.upgrade(OURS)
    model = find(family).build(options)
    assert family == "diffusion.dit" and diffusion_dit.upgrade(options) is None
    assert (model.plan_drop_prob, model.cond_drop_prob, model.token_corruption) == (0.05, 0.1, 0.05)
    assert model.process.relative and model.process.prediction_type == model.process.loss_type == "x"
    tokenizer = Part({}, {}, "tokenizers.vq", SimpleNamespace(grid=(8, 8)))
    init = lambda key: find(family).init(model, key, {}, {"tokenizer": tokenizer})  # noqa: E731
    flat = trees.flatten(jax.eval_shape(init, jax.random.key(0))["params"])
    assert flat["plan_position"].shape == (64, 192) and flat["patches/kernel"].shape == (96, 192)
    assert diffusion_dit.upgrade({}) is None  # nothing of it has another name


def test_the_published_config_with_what_was_left_out():
    """As configs/diffusion/dit_official.py had it."""
    old = {"channels": 3, "patch": 4, "width": 64, "depth": 2, "heads": 2, "hidden": 256, "resolution": 16}
    old |= {"outputs": 6, "classes": 1, "plan_width": 0, "draft": False, "position": "stored", "rotary": False}
    old |= {"block": {"norm": "layer", "mlp": "gelu", "bias": True}, "timesteps": 1000, "schedule": "linear"}
    old |= {"kind": "eps", "loss_kind": "eps", "drop_text": 0.1, "posterior": "sample", "dtype": "float32"}
    family, options = diffusion_dit.upgrade(old)
    model = find(family).build(options)
    assert family == "diffusion.dit_official" and model.posterior == "sample" and model.network.outputs == 6
    assert model.process == find(family).PROCESS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "columns"}, "position 'columns', .*convert dit IN OUT"),
        ({"position": "stored"}, "rotary True, .*convert dit_official IN OUT"),
        ({"block": {"mlp": "gelu"}}, "mlp 'gelu'"),
        ({"outputs": 6, "timesteps": 100}, "outputs 6"),
        (official()[0] | {"timesteps": 0}, "timesteps 0, .*convert dit_official IN OUT"),
        (official()[0] | {"block": LAYER}, "mlp 'swiglu'"),
        (diffusers()[0] | {"time_shift": 0.0}, "time_shift 0.0, .*convert dit IN OUT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_family_has_is_refused(change, message):
    with pytest.raises(UserError, match=f"^diffusion.dit with {message}"):
        diffusion_dit.upgrade(OURS | change if len(change) < 4 else change)


def test_discrete_timesteps_keep_their_solver():
    family, options = diffusion_dit.upgrade(OURS | {"timesteps": 50, "kind": "v", "schedule": "squaredcos"})
    process = find(family).build(options).process
    assert (process.loss_type, process.solver, process.steps) == ("v", "ddpm", 250)
