"""Adversarial loss terms: which network learns from which term, from which step, with which weight; no cost before.

Toy sizes: tokenizers of pictures at 16 and a discriminator of depth 2. The gradient of the loss is compared with
automatic differentiation of the published formulas.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen.core import config as config_lib
from hybridgen.core import rng, trees
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.models import losses
from hybridgen.models.contract import find
from hybridgen.models.tokenizers import gan_loss, kl
from hybridgen.nn.discriminator import PatchGAN
from hybridgen.runs import reading

GAN = {"weight": 0.8, "start": 3, "adaptive": True, "width": 4, "depth": 2, "groups": 2}
VQ = tiny.FSQ | {"l1": 1.0, "mse": 0.0, "adversarial": GAN}
KL = {"resolution": 16, "channels": (8,), "blocks": 1, "width": 2, "residual": {"groups": 4}, "adversarial": GAN}
FAMILIES = {"tokenizers.vq": VQ, "tokenizers.kl": KL}
KEY = jax.random.key(0)


@functools.cache
def part(name):
    return tiny.part(name, FAMILIES[name])


def with_gan(part, **changes):
    return dataclasses.replace(part, model=part.model.clone(adversarial=GAN | changes if changes else {}))


def loss_of(part, batch, step, train=True, parts=None):
    """parameters -> (loss, auxiliary outputs)."""

    def loss(params):
        options = {"parts": parts or {}, "extra": part.extra, "step": step, "train": train}
        return find(part.family).loss(part.model, params, batch, KEY, **options)

    return loss


def by_formula(part, batch, params):
    """(gradients, weight) that are published, by automatic differentiation of every term as it is written."""
    model, options, image = part.model, gan_loss.adversarial(GAN), batch["image"]
    score = functools.partial(PatchGAN(options.width, options.depth, options.groups).apply)
    of_vq = part.family == "tokenizers.vq"

    def moments(params):
        return model.apply({"params": params}, image, method="moments")

    def picture(params):
        if of_vq:
            z = model.apply({"params": params}, image, method="features")
            codes = model.quantizer.encode(params, part.extra, z)[0]
        else:
            mean, log_variance = moments(params)
            noise = rng.normal(rng.sample_keys(KEY, batch["id"]), mean.shape[1:], mean.dtype)
            codes = kl.draw_latent(mean, log_variance, noise)
        return model.apply({"params": params}, codes, method="picture")

    values = 1 if of_vq else image[0].size  # latent diffusion sums over a picture

    def near(params):
        return values * jnp.abs(picture(params) - image).mean()

    def generator(params):
        return -score({"params": part.params["disc"]}, picture(params)).mean()

    def discriminator(disc):
        real, fake = score({"params": disc}, image), score({"params": disc}, picture(part.params))
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    def rest(params):
        return 0.0 if of_vq else model.divergence * kl.divergence(*moments(params)).mean()

    slopes = [trees.flatten(jax.grad(term)(params)) for term in (near, generator, rest)]
    path = model.picture_loss.last
    sizes = [jnp.sqrt(jnp.square(slope[path]).sum()) for slope in slopes]
    weight = options.weight * jnp.clip(sizes[0] / (sizes[1] + 1e-4), 0, 1e4)
    total = {name: sum(s[name] * w for s, w in zip(slopes, (1, weight, 1), strict=True)) / values for name in slopes[0]}
    return total | trees.flatten({"disc": jax.grad(discriminator)(params["disc"])}), weight / values


@pytest.mark.parametrize("name", ["tokenizers.vq", pytest.param("tokenizers.kl", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_published_terms(name):
    subject = part(name)
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (subject.params, subject.extra))
        subject = dataclasses.replace(subject, params=arrays[0], extra=arrays[1])
        batch = jax.tree.map(jnp.asarray, tiny.wide(tiny.batch(4), "float64"))
        want, weight = jax.jit(functools.partial(by_formula, subject, batch))(subject.params)
        got, aux = jax.jit(jax.grad(loss_of(subject, batch, 3), has_aux=True))(subject.params)
    got, metrics = trees.flatten(got), aux["metrics"]
    assert set(got) == set(want)
    assert float(metrics["adversarial_weight"]) == pytest.approx(float(weight), rel=1e-9)
    for path in want:
        scale = np.abs(want[path]).max()
        assert np.abs(got[path] - want[path]).max() <= 1e-8 * max(scale, 1e-6), path
    assert np.abs(want["disc/conv_0/kernel"]).max() > 0


def convolutions(jaxpr):
    """How many convolutions of a jaxpr are outside of any branch."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "conv_general_dilated"
        if eqn.primitive.name != "cond":
            bodies = (getattr(value, "jaxpr", value) for value in eqn.params.values())
            count += sum(convolutions(body) for body in bodies if hasattr(body, "eqns"))
    return count


def test_until_their_start_there_are_no_terms_and_no_cost():
    subject, batch = part("tokenizers.vq"), jax.tree.map(jnp.asarray, tiny.batch(4))

    def program(params, step):
        (value, aux), slopes = jax.value_and_grad(loss_of(subject, batch, step), has_aux=True)(params)
        return value, aux["metrics"], slopes

    def without(params):
        (value, _), slopes = jax.value_and_grad(loss_of(with_gan(subject), batch, 2), has_aux=True)(params)
        seen, aux = loss_of(subject, batch, 9, train=False)(subject.params)
        return value, slopes, seen, aux["metrics"]

    compiled, alone = jax.jit(program), {name: leaf for name, leaf in subject.params.items() if name != "disc"}
    value, metrics, early = compiled(subject.params, 2)
    plain, want, seen, evaluated = jax.jit(without)(alone)
    assert all(float(metrics[key]) == 0 for key in ("generator", "discriminator", "adversarial_weight"))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(early.pop("disc")))
    assert tiny.gap(early, want) < 1e-5
    later, metrics, late = compiled(subject.params, 3)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(late.pop("disc"))) > 0 and tiny.gap(late, want) > 1e-3
    assert float(metrics["discriminator"]) > 0.5
    # training and evaluation report the reconstruction, before and after
    np.testing.assert_allclose([plain, later, seen], [value] * 3, rtol=1e-6)
    assert "generator" not in evaluated and "psnr" in evaluated
    plainly = jax.make_jaxpr(jax.grad(lambda params: loss_of(with_gan(subject), batch, 2)(params)[0]))(alone)
    assert convolutions(jax.make_jaxpr(program)(subject.params, 2).jaxpr) == convolutions(plainly.jaxpr) > 0


def run_of(**changes):
    gan = GAN | {"adaptive": False} | changes.pop("gan", {})
    options = {"optim__groups": {"disc": {"match": "^disc/", "lr": 0.01}}, "ema__decay": 0.9, "optim__clip": 0.0}
    return tiny.Run(tiny.experiment("tokenizers.vq", VQ | {"adversarial": gan}, **options, **changes), tiny.batch(8))


@pytest.mark.slow
def test_the_trainer_starts_it_late_and_outside_of_the_average():
    run = run_of(optim__lr=1e-3)
    assert "disc" in run.state["params"] and set(run.state["ema"]) == {"encoder", "decoder"}
    before = jax.device_get(run.state["params"])
    for _ in range(3):
        assert run.step(tiny.batch(8))["discriminator"] == 0
    early = jax.device_get(run.state["params"])
    assert tiny.same(early["disc"], before["disc"]) and not tiny.same(early["decoder"], before["decoder"])
    first = run.step(tiny.batch(8))
    assert first["adversarial_weight"] == pytest.approx(0.8)
    trained = jax.device_get(run.state["params"]["disc"])
    assert not tiny.same(trained, before["disc"])
    moved = np.abs(trained["conv_0"]["kernel"] - before["disc"]["conv_0"]["kernel"]).max()
    assert moved > 2e-3  # by the group's own rate
    for _ in range(12):  # on pictures that hardly change, the discriminator finds out which are decoded
        last = run.step(tiny.batch(8))
    assert last["discriminator"] < 0.7 * first["discriminator"]


@pytest.mark.slow
def test_accumulated_is_a_large_batch():
    """All terms are means over pictures; the adaptive weight alone is that of a microbatch."""
    batch, slopes = tiny.batch(8), {}
    with jax.enable_x64(True):
        for accumulate in (1, 2):
            # so large an epsilon makes the update the gradient, up to a factor
            options = {"optim__b1": 0.0, "optim__clip": 0.0, "optim__eps": 1e3, "accumulate": accumulate}
            gan = GAN | {"adaptive": False, "start": 0}
            run = tiny.Run(tiny.experiment("tokenizers.vq", VQ | {"adversarial": gan}, **options), batch, "float64")
            before = jax.device_get(run.state["params"])
            report = run.step(batch)
            after = jax.device_get(run.state["params"])
            slopes[accumulate] = (jax.tree.map(np.subtract, after, before), report)
    whole, by_parts = slopes[1], slopes[2]
    assert tiny.gap(whole[0], by_parts[0]) < 1e-7
    for name in ("loss", "mse", "generator", "discriminator", "adversarial_weight"):
        assert whole[1][name] == pytest.approx(by_parts[1][name], rel=1e-9), name


# ---------------------------------------------------------------- the terms


def test_hinge_and_attached_gradients():
    real, fake = jnp.asarray([[2.0, 0.5], [-1.0, 0.0]]), jnp.asarray([[-3.0, 1.0], [0.0, -0.5]])
    np.testing.assert_allclose(losses.hinge(real, fake), [0.5 * (0.25 + 1.0), 0.5 * (1.5 + 0.75)])
    leaves, slopes = {"a": jnp.ones(3), "b": jnp.zeros(2)}, {"a": jnp.arange(3.0), "b": jnp.asarray([5.0, -1.0])}
    value, slope = jax.value_and_grad(lambda leaves: losses.attached(7.0, slopes, leaves))(leaves)
    assert float(value) == 7 and tiny.same(slope, slopes)


def test_the_discriminator_is_the_published_one_but_for_its_norm():
    net = PatchGAN()
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros((1, 256, 256, 3)))
    assert trees.count(shapes) == 2_765_633  # of torch's modules with BatchNorm
    patches = jax.eval_shape(net.apply, shapes, jnp.zeros((2, 256, 256, 3)))
    assert patches.shape == (2, 30, 30) and patches.dtype == jnp.float32
    image = jnp.asarray(tiny.batch(3)["image"])
    together, params = jax.jit(PatchGAN(4, 2, 2).init_with_output)(KEY, image)
    alone = jax.jit(PatchGAN(4, 2, 2).apply)(params, image[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)  # its logits do not depend on the others
    with pytest.raises(UserError, match="pictures of 16 x 16: the discriminator needs 24 x 24"):
        PatchGAN().init(KEY, image)


@pytest.mark.slow
def test_a_perceptual_distance_comes_as_a_part():
    batch, seeing = jax.tree.map(jnp.asarray, tiny.batch(4)), tiny.part("features.perceptual", {"width": 2})
    plain = with_gan(part("tokenizers.vq"))
    subject = dataclasses.replace(plain, model=plain.model.clone(perceptual=0.5))

    @jax.jit
    def both(params, seeing):
        total, aux = loss_of(subject, batch, 0, parts={"perceptual": seeing})(params)
        return loss_of(plain, batch, 0)(params)[0], total, aux["metrics"]["perceptual"]

    base, total, far = both(plain.params, seeing)
    assert float(total) == pytest.approx(float(base + 0.5 * far), rel=1e-5) and abs(float(far)) > 1e-4
    with pytest.raises(UserError, match=r"perceptual 0\.5 .* needs the part 'perceptual'"):
        loss_of(subject, batch, 0)(plain.params)


def test_options_are_known_ones():
    assert gan_loss.adversarial({}) is None
    with pytest.raises(UserError, match="model.adversarial has no option 'begin', only weight, start, adaptive"):
        gan_loss.adversarial({"begin": 3})


# ---------------------------------------------------------------- configs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqgan", "llamagen_vq", "kl"])
def test_tiny_pictures_beat_the_mean_picture_by_the_margin_of_the_config(name, tiny_run):
    """With the discriminator on for half of the steps."""
    run = reading.load(tiny_run(f"configs/tokenizers/{name}.py").folder)
    options = run.config.model.adversarial
    assert 0 < options.start <= run.config.steps // 2 and {"disc"} <= set(run.part.params)

    def pictures(split, count):
        source = sources.build(run.config.data, split)
        return next(pipeline.batches(source, run.text, batch=count, seed=0))["image"]

    mean, shown = pictures("train", 256).mean(0), pictures("validation", 64)
    options = {"parts": {}, "extra": run.part.extra, "options": {}}
    drawn = find(run.config.family).sample(run.part.model, run.part.params, {"image": shown}, None, **options)["image"]
    ours, baseline = (10 * np.log10(4 / np.square(np.asarray(out) - shown).mean()) for out in (drawn, mean))
    margin = importlib.import_module(f"configs.tokenizers.{name}").MARGIN
    assert ours > baseline + margin, (ours, baseline)


SIZES = {  # encoder and decoder of VQGAN; everything of the others
    "vqgan.py:f16": 71_747_971,
    "llamagen_vq.py:f16": 71_883_403,
    "llamagen_vq.py:f8": 70_109_835,
    "kl.py:f8": 83_653_863,
    "kl.py:f8_wide": 83_819_683,
    "kl.py:f16": 66_456_019,
}


@pytest.mark.parametrize("name", SIZES)
def test_official_sizes_are_the_published_ones_beside_their_discriminator(name):
    setup = config_lib.load(f"{tiny.ROOT}/configs/tokenizers/{name}")
    family, specs = find(setup.family), {"image": jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)}
    model = family.build(config_lib.resolve(setup.model, {"resolution": 256}))
    params = jax.eval_shape(lambda key: family.init(model, key, specs, {}), KEY)["params"]
    assert trees.count(params.pop("disc")) == 2_765_633
    counted = {side: params["net"][side] for side in ("encoder", "decoder")} if name == "vqgan.py:f16" else params
    assert trees.count(counted) == SIZES[name]
    assert setup.model.perceptual == 1 and setup.optim.groups.disc.match == "^disc/" and setup.ema.decay == 0
