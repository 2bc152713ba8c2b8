"""DiT as published and that of diffusers: every option against tests/reference_dit.py, sizes, samples by commands."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_dit
from test_autoencoders import drawn
from test_verify import GOLDEN

from hybridgen import convert, sample, verify
from hybridgen.core import config as config_lib
from hybridgen.core import rng, trees
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.models.diffusion import dit_diffusers, dit_official, variance
from hybridgen.models.diffusion.process import Process
from hybridgen.models.roles import denoiser
from hybridgen.runs import importing, reading
from hybridgen.sampling import guidance, official, schedules
from hybridgen.weights import rules, safetensors, tables

SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
SMALL |= {"num_classes": 5, "learn_sigma": True, "class_dropout_prob": 0.1}
LIBRARY = {"sample_size": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 3}
LIBRARY |= {"out_channels": 6, "num_embeds_ada_norm": 5}
ROOT = Path(__file__).parents[2]


def linear(steps):
    return np.linspace(0.1 / steps, 20 / steps, steps)


def squaredcos(steps):
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


# ---------------------------------------------------------------- the published class


def published(learned=True, respacing="5", steps=1000, schedule="linear", **changes):
    """(config, betas) of a small DiT and its process."""
    diffusion = {"learn_sigma": learned, "timestep_respacing": respacing, "diffusion_steps": steps}
    betas = {"linear": linear, "squaredcos_cap_v2": squaredcos}[schedule](steps)
    config = SMALL | {"learn_sigma": learned} | changes | {"diffusion": diffusion | {"noise_schedule": schedule}}
    return config, betas


CASES = {
    "patches of 4, sections": (published(patch_size=4, input_size=8, respacing="3,2"), [0, 250, 499, 500, 999]),
    "no variance, a stride": (published(learned=False, respacing="ddim4"), [0, 250, 500, 750]),
    "no null class, cosine": (
        published(class_dropout_prob=0.0, schedule="squaredcos_cap_v2", steps=50, respacing="3", mlp_ratio=2.5),
        [0, 24, 49],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fixture_of_another_size(case, tmp_path):
    (config, betas), kept = CASES[case]
    _, state = drawn("dit_official", config)
    state["final_layer.linear.weight"] *= np.float32(0.1)  # so that the likelihood's tails, all rounding, are not met
    it = reference_dit.Reference(state, config["num_heads"])
    draw, side, learned = np.random.RandomState(0), config["input_size"], config["learn_sigma"]
    x, noise = draw.randn(2, 3, side, side), draw.randn(len(kept), 2, 3, side, side)
    t, y, null = np.array([3.0, min(400, len(betas) - 1)]), np.array([1, 4]), np.array([5, 5])
    chain = reference_dit.Process(betas, np.array(kept), learned)
    whole = reference_dit.Process(betas, np.arange(len(betas)), learned)
    reported = lambda x, k: it(x, np.full(2, float(k)), y)  # noqa: E731
    io = {"in_x": x, "in_t": t, "in_y": y.astype(np.int32), "in_step_noise": noise, "in_q_noise": noise[0]}
    io |= {"out_cond": it(x, t, y), "out_t_freq": reference_dit.features(t, 128, 128)}
    io |= {"out_timesteps_kept": np.array(kept, np.int32), "in_q_t": np.array([0, len(betas) // 2], np.int32)}
    io |= {"out_p_traj": chain.ancestral(reported, x, noise), "out_ddim_traj": chain.ddim(reported, x)}
    bar = np.cumprod(1 - betas)[io["in_q_t"]][:, None, None, None]
    io["out_q_sample"] = np.sqrt(bar) * x + np.sqrt(1 - bar) * noise[0]
    out = it(io["out_q_sample"], io["in_q_t"].astype(float), y)
    terms = [whole.losses(out[[i]], x[[i]], noise[0][[i]], k) for i, k in enumerate(io["in_q_t"])]
    io |= {"out_loss_mse": np.array([squared for squared, _ in terms])}
    io |= {"out_loss_vb": np.array([bits for _, bits in terms])} if learned else {}
    if config["class_dropout_prob"]:
        un, cond = it(x, t, null), io["out_cond"]
        first = un[:, :3] + 4.0 * (cond - un)[:, :3]
        halves = [np.concatenate([first, one[:, 3:]], 1) for one in (cond, un)]
        io |= {"out_uncond": un, "out_cfg": np.concatenate(halves), "in_cfg_scale": np.array(4.0)}
    assert it.used == set(state)
    replayed("dit_official", tmp_path, config, state, io)


def replayed(system, folder, config, state, io):
    """Verifies a fixture, and that its weights come back bit for bit."""
    safetensors.write(folder / "weights.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    io = {name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in io.items()}
    np.savez(folder / "io.npz", **io)
    lines = []
    assert verify.verify(f"{system}_small", folder, lines.append), "\n".join(lines)
    assert len(lines) == sum(name.startswith("out_") for name in io)
    goal, arrays = importing.load(tables.find(system), config, state)
    back = rules.export({path: trees.flatten(arrays)[path] for path in goal.official}, goal.plan.rules)
    assert set(back) == set(state) and all(np.asarray(back[name]).tobytes() == state[name].tobytes() for name in state)


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_fn": "geglu", "attention_bias": False, "norm_elementwise_affine": True, "patch_size": 1},
        {"activation_fn": "gelu", "norm_eps": 0.01, "out_channels": None, "sample_size": 8, "patch_size": 4},
        {"activation_fn": "geglu-approximate", "num_layers": 1, "attention_bias": False},
        {"activation_fn": "swiglu", "num_attention_heads": 1},
        {"activation_fn": "linear-silu", "norm_elementwise_affine": True, "out_channels": 4},
    ],
    ids=lambda changes: changes["activation_fn"],
)
def test_every_option_of_the_library(changes, tmp_path):
    config = LIBRARY | changes
    _, state = drawn("dit", config)
    it = reference_dit.Reference(
        state, config["num_attention_heads"], config["activation_fn"], config.get("norm_eps", 1e-5)
    )
    side = config["sample_size"]
    x, t, y = np.random.RandomState(0).randn(2, 3, side, side), np.array([3, 999], np.int32), np.array([1, 4], np.int32)
    cond, un = it(x, t, y), it(x, t, np.array([5, 5]))
    guided = un + 3.0 * (cond - un)
    io = {"in_x": x, "in_t": t, "in_y": y, "in_cfg_scale": np.array(3.0), "out_cond": cond, "out_uncond": un}
    io |= {"out_cfg_eps": guided[:, :3], "out_cfg_official": np.concatenate([guided[:, :3], cond[:, 3:]], 1)}
    assert it.used == set(state)
    replayed("dit", tmp_path, config, state, io)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("dit_official", SMALL | {"qk_norm": True}, "config has the key 'qk_norm', which is not supported"),
        (
            "dit_official",
            SMALL | {"num_heads": 3},
            "hidden_size 16 must divide by 4 and num_heads 3, input_size 4 by 2",
        ),
        ("dit_official", SMALL | {"diffusion": {"use_kl": True}}, "diffusion: use_kl True is not supported"),
        ("dit_official", SMALL | {"diffusion": {"learn_sigma": False}}, "learn_sigma must be that of the model, True"),
        ("dit_official", SMALL | {"diffusion": {"noise_schedule": "sqrt"}}, "noise_schedule 'sqrt' is not supported"),
        ("dit", LIBRARY | {"norm_type": "layer_norm"}, "norm_type 'layer_norm' is not supported"),
        ("dit", LIBRARY | {"activation_fn": "tanh"}, "activation_fn 'tanh' is not supported"),
        ("dit", LIBRARY | {"sample_size": 5}, "sample_size 5 by patch_size 2"),
    ],
)
def test_configs_that_are_not_built_are_named(source, config, message):
    with pytest.raises(UserError, match=message):
        tables.find(source).plan(config, {})


# ---------------------------------------------------------------- sizes

# by the architecture: embedders, positions, 18 d^2 + 15 d a block, the last layer
PAPER = {"S-2": 32_963_360, "B-2": 130_512_416, "L-2": 458_102_816, "XL-2": 675_129_632, "XL-8": 675_683_072}
MILLIONS = {"S-2": 33, "B-2": 130, "L-2": 458, "XL-2": 675}


def count(source, config):
    shapes = importing.target(tables.find(source).plan(config, {})).shapes
    return sum(int(np.prod(spec.shape)) for spec in shapes.values())


def test_parameters_are_as_many_as_in_the_paper():
    presets = tables.find("dit_official").about.presets
    counted = {name: count("dit_official", presets[f"DiT-{name}"]) for name in PAPER}
    assert counted == PAPER
    assert all(round(counted[name] / 1e6) in (size, size + 1) for name, size in MILLIONS.items())
    # 27 more of the embedders, and no table of positions
    copies = 256 * 1152 + 1152 + 1152**2 + 1152 + 1001 * 1152
    library = tables.find("dit").about.presets["DiT-XL-2-256"]
    assert count("dit", library) == PAPER["XL-2"] + 27 * copies - 256 * 1152


def test_the_configs_are_the_presets():
    """A trained run has the shapes of the published file: it can be exported."""
    for variant, name in (("s", "S-4"), ("xl_512", "XL-2-512")):
        patch = [f"model.patch={name[name.index('-') + 1]}"]
        config = config_lib.load(f"{ROOT}/configs/diffusion/dit_official.py:{variant}", patch)
        model = dit_official.build(config_lib.resolve(config.model, {}))
        ours = trees.flatten(jax.eval_shape(lambda key, m=model: dit_official.init(m, key, {}, {}), jax.random.key(0)))
        known = tables.find("dit_official")
        goal = importing.target(known.plan(known.about.presets[f"DiT-{name}"], {}))
        assert ours == goal.shapes
        assert model.process == goal.model.process and model.cond_drop_prob == goal.model.cond_drop_prob
        assert model.network.clone(remat="none", unroll=1, dtype="float32") == goal.model.network


def test_the_config_of_diffusers_is_its_preset():
    config = config_lib.load(f"{ROOT}/configs/diffusion/dit_diffusers.py")
    model = dit_diffusers.build(config_lib.resolve(config.model, {}))
    known = tables.find("dit")
    goal = importing.target(known.plan(known.about.presets["DiT-XL-2-256"], {}))
    assert model.process == goal.model.process and model.cond_drop_prob == goal.model.cond_drop_prob
    assert model.network.clone(dtype="float32") == goal.model.network


# ---------------------------------------------------------------- the process


def test_respacing():
    assert official.respaced("1000", 1000).tolist() == list(range(1000))
    assert official.respaced("10,10", 1000).tolist() == [
        0, 55, 111, 166, 222, 277, 333, 388, 444, 499, 500, 555, 611, 666, 722, 777, 833, 888, 944, 999
    ]  # fmt: skip
    assert official.respaced("ddim25", 1000).tolist() == list(range(0, 1000, 40))
    assert official.respaced("1", 7).tolist() == [6] and official.respaced("2,1", 5).tolist() == [0, 2, 4]
    assert official.respaced("1,2", 6).tolist() == [0, 3, 5]
    wrong = {
        "ddim3,3": "not of the form",
        "x": "not of the form",
        "0": "keeps no",
        "9": "a section of 7 timesteps cannot give 9",
    }
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            official.respaced(text, 7)
    with pytest.raises(UserError, match="no integer stride gives 6 of 7"):
        official.respaced("ddim6", 7)


def small(**changes):
    options = {"resolution": 4, "channels": 3, "patch": 2, "width": 16, "depth": 1, "heads": 2, "hidden": 32}
    return dit_official.build(options | {"classes": 5, "process": {"timesteps": 20}} | changes)


def test_the_bound_does_not_move_the_mean():
    """Its gradient reaches the share of variance and not the prediction, at the first timestep and elsewhere."""
    process = small().process
    x, out = (jax.random.normal(jax.random.key(i), (2, 4, 4, c)) for i, c in ((0, 3), (1, 6)))
    k = jnp.array([0, 11])

    def bits(out):
        return variance.terms(process, lambda *_: out, x, k, jnp.ones_like(x), {})[1].sum()

    slope = np.asarray(jax.jit(jax.grad(bits))(out))
    assert (slope[..., :3] == 0).all() and (np.abs(slope[..., 3:]).max((1, 2, 3)) > 1e-6).all()


def test_the_bound_is_least_at_the_variance_of_the_errors():
    """Of a prediction that is wrong by much, the bound wants the larger variance; of a right one, the smaller."""
    process = small().process
    x, eps = (jax.random.normal(jax.random.key(i), (1, 4, 4, 3)) for i in (0, 1))

    @jax.jit
    def bits(wrong, share):
        out = jnp.concatenate([eps + wrong, jnp.full_like(eps, 2 * share - 1)], -1)
        return variance.terms(process, lambda *_: out, x, jnp.array([9]), eps, {})[1][0]

    assert abs(bits(0.0, 0.0)) < 1e-6 < 1e-4 < bits(0.0, 1.0)
    assert bits(3.0, 1.0) < bits(3.0, 0.0)


def test_guided_in_some_channels():
    rows = np.random.default_rng(0).normal(size=(4, 2, 2, 6)).astype(np.float32)
    call = guidance.guided(lambda x, t: jnp.asarray(rows), 3.0, 2)
    out = np.asarray(call(jnp.zeros((2, 2, 2, 3)), jnp.zeros(2)))
    full, none = rows[::2], rows[1::2]
    np.testing.assert_allclose(out[..., :2], none[..., :2] + 3 * (full - none)[..., :2], rtol=1e-5)
    assert (out[..., 2:] == full[..., 2:]).all()


def test_a_render_is_guided_by_the_branches_of_its_own_picture():
    """Three pictures and three branches: as a network that asks for each branch apart and combines them itself."""

    def network(x, t, cond):
        b = len(x)
        plan, label = (
            jnp.where(cond.get(f"drop_{name}", jnp.zeros(b, bool)), none, cond[name])
            for name, none in (("plan", 0.7), ("label", -0.3))
        )
        return jnp.cos(3 * plan + t)[:, None, None, None] * x + jnp.sin(label + 2 * plan)[:, None, None, None]

    def by_hand(x, t, cond):
        full, no_plan, neither = (
            network(x, t, cond | {f"drop_{name}": jnp.ones(len(x), bool) for name in names})
            for names in ((), ("plan",), ("plan", "label"))
        )
        return full + 1.5 * (full - no_plan) + 0.5 * (no_plan - neither)

    render = functools.partial(denoiser.integrate, Process(schedule="linear", prediction_type="eps", loss_type="eps"))
    options = {"steps": 4, "guidance": {"plan": 2.5, "plan+label|plan": 1.5}}
    with jax.enable_x64(True):  # pixels of some hundreds: float32 leaves 1e-5 to chance
        keys = rng.sample_keys(jax.random.key(0), jnp.arange(3))
        given = {"plan": jnp.array([0.2, 1.1, 2.9]), "label": jnp.array([1, 3, 2])}
        drawn = render(network, given, keys, (4, 4, 3), options)
        expected = render(by_hand, given, keys, (4, 4, 3), {"steps": 4})
    assert np.abs(drawn - expected).max() < 1e-5 < 0.1 < np.abs(expected - expected[::-1]).max()


def test_renders_keep_timesteps_and_leave_the_variance_alone():
    """The network takes whole timesteps; the variance that counts is that of the conditional branch."""
    seen, process = [], small().process

    def network(x, t, cond):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), variance.timestep(process, t))
        drop = cond.get("drop_label", jnp.zeros(len(x), bool))[:, None, None, None]
        return jnp.concatenate([0.1 * x, jnp.where(drop, 100.0, 0.0) + 0 * x], -1)  # the dropped branch's would explode

    keys = rng.sample_keys(jax.random.key(0), jnp.arange(2))
    given = {"label": jnp.array([1, 2])}
    for options, kept in (({"respacing": "2,2"}, [0, 9, 10, 19]), ({"steps": 3}, [0, 10, 19]), ({}, None)):
        seen.clear()
        if kept is None:
            with pytest.raises(UserError, match="a section of 20 timesteps cannot give 250"):
                denoiser.integrate(process, network, given, keys, (4, 4, 3), options)
            continue
        out = denoiser.integrate(process, network, given, keys, (4, 4, 3), options | {"guidance": 2.0})
        jax.effects_barrier()
        assert [row[0] for row in seen] == kept[::-1] and np.abs(out).max() < 50
    with pytest.raises(UserError, match="shift and spacing need continuous times"):
        denoiser.integrate(process, network, given, keys, (4, 4, 3), {"shift": 3.0, "steps": 2})


def test_networks_that_are_not_built_are_named():
    classes = {dit_official: "the published DiT needs labels", dit_diffusers: "this network needs labels"}
    for family, message in classes.items():
        with pytest.raises(UserError, match="process.timesteps is 0, but .* needs discrete timesteps"):
            family.build({"process": {"timesteps": 0, "learned_variance": False}})
        with pytest.raises(UserError, match=f"model.classes is 0, but {message}"):
            family.build({"classes": 0})


def test_outputs_are_the_channels_or_twice_as_many():
    assert small().network.outputs == 6 and small(process={"learned_variance": False}).network.outputs == 3
    model = dit_diffusers.build({"resolution": 4, "channels": 3, "outputs": 4, "width": 16, "depth": 1, "heads": 2})
    params = jax.eval_shape(lambda key: dit_diffusers.init(model, key, {}, {}), jax.random.key(0))["params"]
    keys = rng.sample_keys(jax.random.key(0), jnp.arange(1))
    with pytest.raises(
        UserError, match="the network has 4 outputs, but 3 channels with process.learned_variance True need 6"
    ):
        jax.eval_shape(
            lambda p: dit_diffusers.render(model, p, {}, {"label": jnp.zeros(1, jnp.int32)}, keys, {}, {}), params
        )


def test_labels_that_are_never_dropped_have_no_null():
    model = small(cond_drop_prob=0.0)
    params = jax.eval_shape(lambda key: dit_official.init(model, key, {}, {}), jax.random.key(0))["params"]
    assert params["labels"]["table"].shape == (5, 16) and small().cond_drop_prob > 0
    cond = {"label": jnp.zeros(1, jnp.int32), "drop_label": jnp.ones(1, bool)}
    with pytest.raises(UserError, match="guidance for 'label' needs a null class"):
        jax.eval_shape(lambda p: dit_official.predict(model, p, {}, jnp.zeros((1, 4, 4, 3)), jnp.ones(1), cond), params)


# ---------------------------------------------------------------- commands


def test_official_weights_to_pictures(tmp_path, capsys):
    """`convert` and `sample`: with an autoencoder pictures; latents without one are refused."""
    for system in ("dit_official", "sd_kl_vae"):
        assert convert.main([system, str(GOLDEN / system), str(tmp_path / system)]) == 0
    folder = tmp_path / "dit_official"
    config, sizes = json.loads((folder / "config.json").read_text()), {}
    words = ["--run", str(folder), "--label", "3", "--label", "7", "--steps", "3"]
    config["sample"]["options"] = {"decoder": {"guidance": 4.0, "guidance_channels": 3}}
    ddim = ["--solver", "ddim", "--decoder-guidance", "2"]
    with pytest.raises(UserError, match="a decoder of latents of 4 channels needs the part 'autoencoder'; this config"):
        sample.main([*words, "--out", str(tmp_path / "latents")])
    for name, more in (("ancestral", []), ("ddim", ddim)):
        config["parts"] = {"autoencoder": "../sd_kl_vae"}
        (folder / "config.json").write_text(json.dumps(config))
        assert sample.main([*words, "--out", str(tmp_path / name), *more]) == 0
        pictures = [np.asarray(sample.Image.open(tmp_path / name / f"0000{i}.png")) for i in range(2)]
        assert pictures[0].std() > 0 and (pictures[0] != pictures[1]).any()
        sizes[name] = pictures[0].shape
    reduction = 2 ** (len(reading.load(tmp_path / "sd_kl_vae").part.model.channels) - 1)
    picture = (8 * reduction, 8 * reduction, 3)
    assert sizes == {"ancestral": picture, "ddim": picture}
    assert convert.main(["dit_official", str(folder), str(tmp_path / "back.safetensors"), "--export"]) == 0
    source = (GOLDEN / "dit_official" / "weights.safetensors").read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes()[-4096:] == source[-4096:]


@pytest.mark.slow
def test_tiny_beats_the_mean_picture(tiny_run):
    """Its error of the noise is at most 0.8 of what a Gaussian with each value's mean and variance leaves."""
    run = reading.load(tiny_run("configs/diffusion/dit_official.py").folder)
    model, source = run.part.model, sources.build(run.config.data, "validation")
    batch = next(pipeline.batches(source, None, batch=256, seed=0))
    batch = {name: jnp.asarray(batch[name]) for name in ("id", "image", "label")}

    @jax.jit
    def error(params, key):
        options = {"parts": {}, "extra": {}, "step": 0, "train": False}
        return dit_official.loss(model, params, batch, key, **options)[1]["metrics"]["mse"]

    errors = [float(error(run.part.params, jax.random.key(i))) for i in range(4)]
    at = schedules.schedule("linear")(np.arange(1, 1001)[:, None] / 1000)
    known = at.alpha**2 * np.asarray(batch["image"]).var(0).reshape(1, -1)
    assert np.mean(errors) < 0.8 * (known / (known + at.sigma**2)).mean()
