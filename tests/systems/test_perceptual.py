"""The perceptual distance is the official one: golden/lpips_vgg.npz holds what class `LPIPS` of the package lpips 0.1.4
computed, its VGG16 at a 32nd of the width, with random weights, and the gradient of the sum of its distances."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.runs import importing, reading
from hybridgen.weights import rules, tables

GOLDEN = Path(__file__).parents[1] / "golden" / "lpips_vgg.npz"
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
ROOTS = ("", "loss.perceptual_loss.", "state_dict.loss.perceptual_loss.")


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN) as file:
        io = {name: file[name] for name in file.files}
    state = {name.removeprefix("weights/"): value for name, value in io.items() if name.startswith("weights/")}
    return io, state


@pytest.fixture(scope="module")
def measured():
    """(parameters, image, other) -> (distances `[b]`, the gradient of their sum by the image), compiled once."""
    family = contract.find("features.perceptual")

    def total(image, params, other):
        far = family.distance(family.build({"width": 2}), params, {}, image, other)
        return far.sum(), far

    program = jax.jit(jax.grad(total, has_aux=True))
    return lambda params, image, other: program(image, params, other)[::-1]


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def test_distances_and_their_gradient_are_the_official_ones(recorded, measured, tmp_path):
    io, state = recorded
    # through a run folder, as a config's `parts.perceptual` names it
    importing.write_run(tmp_path / "run", tables.find("lpips_vgg"), {"width": 2}, state)
    part = reading.load(tmp_path / "run").part
    assert part.family == "features.perceptual" and part.model.width == 2
    far, slope = measured(part.params, nhwc(io["image"]), nhwc(io["other"]))
    np.testing.assert_allclose(far, io["distance"], rtol=1e-5)
    want = nhwc(io["slope"])
    np.testing.assert_allclose(slope, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("root", ROOTS)
def test_every_spelling_of_the_names_is_the_same_network(recorded, root):
    """torchvision's backbone with the heads, the official state, and what a checkpoint of VQGAN carries."""
    _, state = recorded
    goal, want = importing.load(tables.find("lpips_vgg"), {"width": 2}, state)
    plain = {name: value for name, value in state.items() if name.startswith("lin") and not name.startswith("lins")}
    spelled = {} if root else {"classifier.0.weight": np.zeros((3, 3), np.float32)}
    for name, value in state.items():
        slice_, _, rest = name.removeprefix("net.").partition(".")
        if slice_.startswith("slice"):
            spelled[name if root else f"features.{rest}"] = value
    spelled = {f"{root}{name}": value for name, value in (spelled | plain).items()}
    if root:  # beside it lies the model
        spelled[f"{root.partition('loss')[0]}encoder.conv_in.weight"] = np.zeros(3, np.float32)
    _, arrays = importing.load(tables.find("lpips_vgg"), {"width": 2}, spelled)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), arrays, want))
    back = rules.export(trees.flatten({"params": want["params"]}), goal.plan.rules)
    assert all((np.asarray(back[name]) == state[name]).all() for name in back) and len(back) == 2 * 13 + 5


def test_what_is_another_network_is_refused(recorded):
    _, state = recorded
    known = tables.find("lpips_vgg")
    for config, message in (
        ({"version": "0.0"}, "'0.0' is not supported"),
        ({"net": "alex"}, "'alex' is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            known.plan(config, {})
    with pytest.raises(UserError, match=r"net\.slice1\.0\.bias' has the shape 2, 64 is expected"):
        importing.load(known, {}, state)
    backbone = {name: value for name, value in state.items() if name.startswith("net.")}
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight' is missing"):  # torchvision's file alone
        importing.load(known, {"width": 2}, backbone)
    # the preset is the published size: VGG16's convolutions and a weight a channel
    shapes = importing.target(known.plan(known.about.presets["v0.1"], {})).shapes
    assert sum(int(np.prod(spec.shape)) for spec in shapes.values()) == 14_714_688 + 1_472


def test_the_distance_is_one_and_has_a_gradient_where_nothing_is_active(recorded, measured):
    io, state = recorded
    _, arrays = importing.load(tables.find("lpips_vgg"), {"width": 2}, state)
    params, image = arrays["params"], nhwc(io["image"])
    far, slope = measured(params, image, image)
    assert np.abs(far).max() == np.abs(slope).max() == 0
    there, back = measured(params, image, nhwc(io["other"]))[0], measured(params, nhwc(io["other"]), image)[0]
    np.testing.assert_allclose(there, back, rtol=1e-5)
    dead = params | {"conv_0_1": {"kernel": np.zeros((3, 3, 2, 2), np.float32), "bias": -np.ones(2, np.float32)}}
    far, slope = measured(dead, image, nhwc(io["other"]))
    assert np.isfinite(far).all() and np.isfinite(slope).all()
