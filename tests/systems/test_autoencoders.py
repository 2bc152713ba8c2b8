"""The residual autoencoder with options of the official classes, imported by the tables, equals tests/reference.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.models.tokenizers import kl, llamagen_vq, vq, vqgan
from hybridgen.nn.autoencoder import Autoencoder
from hybridgen.nn.quantizers import gumbel
from hybridgen.runs import importing
from hybridgen.weights import rules, safetensors, tables
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
DD = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16, "z_channels": 5}
DD |= {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
SD = {"block_out_channels": [8, 12], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 12}
SD |= {"latent_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
ATTEND = {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}
ATTEND |= {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
LLAMAGEN = {"codebook_size": 9, "codebook_embed_dim": 4, "z_channels": 6, "ch": 32, "num_res_blocks": 1}
LLAMAGEN |= {"encoder_ch_mult": [1, 1], "decoder_ch_mult": [2, 1]}
MAR = {"embed_dim": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": 8}


def vqgan_config(**changes):
    return {"ddconfig": DD | changes, "n_embed": 11, "embed_dim": 7}


CASES = {
    "vqgan": ("taming_vqgan", vqgan_config(), {}),
    "vqgan, three levels of odd sizes": ("taming_vqgan", vqgan_config(ch_mult=[1, 1, 2], resolution=18), {}),
    "vqgan, attention nowhere, means and copies": (
        "taming_vqgan",
        vqgan_config(attn_resolutions=[], resamp_with_conv=False),
        {"resample": False},
    ),
    "vqgan, attention everywhere, other colours": (
        "taming_vqgan",
        vqgan_config(attn_resolutions=[16, 8], in_channels=2, out_ch=4, num_res_blocks=2),
        {"blocks": 2},
    ),
    "gumbel": ("taming_gumbel", vqgan_config(z_channels=7) | {"kl_weight": 0.01}, {}),
    "llamagen": ("llamagen_vq", LLAMAGEN, {"names": reference.LLAMAGEN, "from_lowest": True}),
    "mar": ("mar_kl16", MAR | {"encoder_attn_resolutions": [4, 8]}, {}),
    "mar, attention on the way up, means only": (
        "mar_kl16",
        MAR | {"decoder_attn_resolutions": [8], "encoder_attn_resolutions": [], "use_variational": False},
        {},
    ),
    "sd": ("sd_kl_vae", SD, {"names": reference.DIFFUSERS, "from_lowest": True, "groups": 4}),
    "sd, no maps, no attention in the middle, mish": (
        "sd_kl_vae",
        SD | BARE | {"act_fn": "mish"},
        {"names": reference.DIFFUSERS, "from_lowest": True, "groups": 4, "act": "mish"},
    ),
    "sd, one map, attention on levels, relu": (
        "sd_kl_vae",
        SD | ATTEND | {"use_quant_conv": False, "act_fn": "relu", "shift_factor": 0.1, "scaling_factor": 2.0},
        {"names": reference.DIFFUSERS, "from_lowest": True, "groups": 4, "act": "relu"},
    ),
}


def drawn(source, config, seed=0):
    """(model with its plan, {official name: random tensor}) of a config."""
    goal = importing.target(tables.find(source).plan(config, {}))
    draw = np.random.RandomState(seed)
    arrays = {}
    for path, spec in goal.official.items():
        noise = draw.randn(*spec.shape)
        scale = 1.0 if "codebook" in path else 0.3 if path.endswith("bias") else 1.5 / np.sqrt(noise[..., 0].size)
        arrays[path] = (noise * scale + path.endswith("scale")).astype(np.float32)
    return goal, {name: np.asarray(lazy) for name, lazy in rules.export(arrays, goal.plan.rules).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_option_computes_what_the_official_code_does(case):
    name, config, options = CASES[case]
    options = {"blocks": 1} | options
    names, groups = options.pop("names", reference.TAMING), options.pop("groups", 32)
    act = options.pop("act", "silu")
    lowest = options.pop("from_lowest", False)
    goal, state = drawn(name, config)
    it = reference.Reference(state, names, groups=groups, act=act)
    levels = len(goal.model.channels)
    side, colours = min(goal.plan.inputs["image"][0], 18), goal.plan.inputs["image"][2]
    image = np.random.RandomState(1).randn(2, colours, side, side + 2 * (case == "sd")).astype(np.float32)

    _, arrays = importing.load(tables.find(name), config, state)
    params = arrays["params"]
    apply = jax.jit(lambda x, method: goal.model.apply({"params": params}, x, method=method), static_argnums=1)
    encoded, want = np.asarray(apply(image.transpose(0, 2, 3, 1), "raw")), it.encode(image, levels, **options)
    if config.get("use_variational") is False:
        want = np.concatenate([want, np.ones_like(want)], 1)
    close(encoded.transpose(0, 3, 1, 2), want)
    z = np.random.RandomState(2).randn(2, goal.model.code_width, 4, 3).astype(np.float32)
    picture = np.asarray(apply(z.transpose(0, 2, 3, 1), "picture")).transpose(0, 3, 1, 2)
    close(picture, it.decode(z, levels, **options, from_lowest=lowest))
    # every official tensor mattered, and comes back as it was
    rest = set(state) - it.used
    assert all(other.startswith("quantize.") for other in rest), rest
    back = rules.export({path: trees.flatten(arrays)[path] for path in goal.official}, goal.plan.rules)
    assert set(back) == set(state)
    assert all(np.asarray(back[other]).tobytes() == state[other].tobytes() for other in state)


def close(ours, want):
    assert ours.shape == want.shape
    assert np.abs(ours - want).max() <= 2e-5 * max(1, np.abs(want).max())


@pytest.mark.parametrize("system", ["taming_gumbel", "llamagen_vq", "sd_kl_vae"])
def test_the_reference_is_the_official_code(system):
    """So that what it says of options that were not recorded counts."""
    weights, io = open_weights(GOLDEN / system / "weights.safetensors"), np.load(GOLDEN / system / "io.npz")
    state = {name: tensor.read() for name, tensor in weights.items()}
    if system == "sd_kl_vae":
        it = reference.Reference(state, reference.DIFFUSERS, groups=8)
        close(it.encode(io["in_image"], 2, 1), io["out_moments"])
        close(it.decode(io["in_latent"], 2, 1, from_lowest=True), io["out_decoded"])
        return
    llamagen = system == "llamagen_vq"
    it = reference.Reference(state, reference.LLAMAGEN if llamagen else reference.TAMING)
    close(it.hidden(io["image"], 2, 2), io["enc_prenorm"])
    if llamagen:
        close(it.encode(io["image"], 2, 2), io["pre_quant"])
    close(it.decode(io["quant"], 2, 2, from_lowest=llamagen), io["recon"])


def test_older_names_of_attention_are_read_and_kept(tmp_path):
    goal, state = drawn("sd_kl_vae", SD)
    new = dict(zip(reference.DIFFUSERS["qkvo"], reference.OLD["qkvo"], strict=True))
    old = {".".join(_renamed(name, new)): value for name, value in state.items()}
    assert sum("proj_attn" in name for name in old) == 4
    safetensors.write(tmp_path / "w.safetensors", old)
    found, arrays = importing.load(tables.find("sd_kl_vae"), SD, open_weights(tmp_path / "w.safetensors"))
    same = importing.load(tables.find("sd_kl_vae"), SD, state)[1]
    assert all((trees.flatten(arrays)[path] == leaf).all() for path, leaf in trees.flatten(same).items())
    assert set(rules.export({p: trees.flatten(arrays)[p] for p in found.official}, found.plan.rules)) == set(old)


def _renamed(name, new):
    for before, after in new.items():
        name = name.replace(f".{before}.", f".{after}.")
    return name.split(".")


# ---------------------------------------------------------------- quantisers


def test_a_remap_numbers_the_rows_that_it_lists():
    """VQGAN's `remap`: tokens are places in a list of codes; the picture is that of the codes themselves."""
    config = vqgan_config() | {"remap": "used.npy"}
    _, state = drawn("taming_vqgan", vqgan_config())
    used = np.asarray([7, 2, 9, 0])
    state["quantize.used"] = used
    goal, arrays = importing.load(tables.find("taming_vqgan"), config, state)
    part = importing.part(goal, arrays)
    assert part.model.vocab == 4 and (arrays["extra"]["used"] == used).all()
    image = jnp.asarray(np.random.RandomState(1).randn(2, 16, 16, 3), jnp.float32)
    tokens = part.call("encode", image)
    codebook = state["quantize.embedding.weight"]
    z = np.asarray(part.model.apply({"params": part.params}, image, method="raw")).reshape(-1, 7)
    distance = np.square(z[:, None] - codebook[used][None]).sum(-1)
    np.testing.assert_array_equal(np.ravel(tokens), distance.argmin(-1))
    codes = np.asarray(part.call("embed", tokens)).reshape(-1, 7)
    np.testing.assert_array_equal(codes, codebook[used][np.ravel(tokens)])
    arrays["extra"]["use"] += 1  # what training counts, beside which the list stays
    merged = vqgan.merge(goal.model, arrays["extra"], {"count": jnp.ones(4)}, None, 0)
    assert (merged["used"] == used).all() and merged["use"].shape == (4,)


def test_gumbel_draws_codes_by_their_probability():
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.7]))
    u = np.random.RandomState(0).uniform(1e-9, 1, (20_000, 3))
    one_hot, ids = gumbel.draw(jnp.broadcast_to(logits, (20_000, 3)), jnp.asarray(-np.log(-np.log(u))), 0.5)
    np.testing.assert_allclose(np.bincount(ids) / 20_000, [0.1, 0.2, 0.7], atol=0.012)
    np.testing.assert_allclose(one_hot, np.eye(3)[ids], atol=1e-6)
    slope = jax.grad(lambda x: (gumbel.draw(x, jnp.zeros(3), 1.0)[0] * jnp.arange(3.0)).sum())(logits)
    want = jax.grad(lambda x: (jax.nn.softmax(x) * jnp.arange(3.0)).sum())(logits)  # that of the soft code
    np.testing.assert_allclose(slope, want, atol=1e-6)
    assert float(gumbel.prior_divergence(jnp.zeros(5), 5)) == pytest.approx(0, abs=1e-6)
    far = gumbel.prior_divergence(jnp.asarray([60.0, 0, 0, 0]), 4)
    assert float(far) == pytest.approx(np.log(4), rel=1e-5)


@pytest.mark.slow
def test_the_legacy_loss_swaps_the_two_weights():
    options = {"residual": {"stem": 8, "z": 4, "groups": 4}, "channels": (8,), "resolution": 8, "blocks": 1}
    quantizer = {"kind": "vq_gradient", "codebook_size": 5, "width": 3, "l2": False, "exact": True, "revive_below": 0.0}
    specs = {"image": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)}
    batch = {"id": jnp.arange(2), "image": jnp.asarray(np.random.RandomState(0).randn(2, 8, 8, 3), jnp.float32)}
    slopes = {}
    for legacy in (False, True):
        model = vqgan.build(options | {"quantizer": quantizer | {"legacy": legacy}})
        arrays = vqgan.init(model, jax.random.key(0), specs, {})

        def loss(params, model=model, extra=arrays["extra"]):
            given = {"parts": {}, "extra": extra, "step": 0, "train": True}
            return vqgan.loss(model, params, batch, jax.random.key(0), **given)[0]

        slopes[legacy] = jax.grad(loss)(arrays["params"])
    # the codebook learns from its pull alone, which is weighted 1 or 0.25
    np.testing.assert_allclose(slopes[True]["codebook"], 0.25 * slopes[False]["codebook"], rtol=1e-5, atol=1e-9)
    assert np.abs(slopes[False]["codebook"]).max() > 0
    ours, theirs = (slopes[legacy]["net"]["quant_map"]["bias"] for legacy in (False, True))
    assert np.abs(ours - theirs).max() > 1e-4


@pytest.mark.slow
def test_the_posterior_is_drawn_from_and_pulled():
    mean, log_variance = jnp.asarray([[[[1.0, -2.0]]]]), jnp.log(jnp.asarray([[[[4.0, 0.25]]]]))
    # in closed form: sum of (mean^2 + variance - 1 - log variance) / 2
    want = 0.5 * ((1 + 4 - 1 - np.log(4)) + (4 + 0.25 - 1 - np.log(0.25)))
    np.testing.assert_allclose(kl.divergence(mean, log_variance), [want], rtol=1e-6)
    np.testing.assert_allclose(kl.draw_latent(mean, log_variance, jnp.ones((1, 1, 1, 2))), [[[[3.0, -1.5]]]], rtol=1e-6)
    model = kl.KL(scale=0.5, shift=1.0)
    np.testing.assert_allclose(kl.scaled(model, jnp.asarray([3.0])), [1.0])
    config = SD | {"scaling_factor": 0.5, "shift_factor": 1.0}
    goal, state = drawn("sd_kl_vae", config)
    part = importing.part(*importing.load(tables.find("sd_kl_vae"), config, state))
    image = jnp.asarray(np.random.RandomState(0).randn(1, 12, 12, 3), jnp.float32)
    latent = part.call("encode", image)
    straight = goal.model.apply({"params": part.params}, image)  # the mean, neither shifted nor scaled
    np.testing.assert_allclose(part.call("decode", latent), straight, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh' is not one of silu"),
        ({"groups": 3}, r"channels \(8, 8\) and 8 do not divide into 3 groups"),
        ({"attend": (2,)}, r"attention levels \(2,\) are not within 0 and 1"),
    ],
)
def test_options_that_make_no_autoencoder(options, message):
    net = Autoencoder(**({"channels": (8, 8), "stem": 8, "z": 2, "code": 2, "blocks": 1, "groups": 4} | options))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_families_say_what_cannot_be():
    """Only a codebook that learns by gradient has rows that tokens do not number; and sizes are checked."""
    for quantizer, message in (
        ({"kind": "fsq", "used": 3}, "quantizer 'fsq' has no option 'used'"),
        ({"kind": "vq_ema", "used": 3}, "quantizer 'vq_ema' has no option 'used'"),
        ({"kind": "vq_gradient", "width": 0}, "quantizer.width 0 is not within 1 and"),
    ):
        for family in (vq, vqgan):
            with pytest.raises(UserError, match=message):
                family.build({"channels": (8,), "resolution": 8, "quantizer": quantizer})
    model = llamagen_vq.build({"channels": (8,), "stem": 8, "z": 2, "groups": 4, "commitment": -1.0})
    with pytest.raises(UserError, match="quantizer.commitment -1.0 is not within"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.slow
def test_llamagen_is_vqgan_with_its_options():
    """One loss and one picture, from the same arrays."""
    options = {"resolution": 8, "channels": (8, 16), "blocks": 1, "l1": 0.5}
    own = {"stem": 8, "z": 4, "groups": 4, "codebook_size": 16, "width": 4, "entropy": 0.1, "revive_below": 0.1}
    quantizer = {"kind": "vq_gradient", "codebook_size": 16, "width": 4, "entropy": 0.1, "revive_below": 0.1}
    residual = {"stem": 8, "z": 4, "groups": 4, "attend": (1,)}
    quantizer |= {"exact": True, "softness": 0.01}
    ours = llamagen_vq.build(options | own)
    other = vqgan.build(options | {"residual": residual, "quantizer": quantizer})
    assert ours.quantizer == other.quantizer and ours.grid == other.grid == (4, 4)
    image = jnp.asarray(np.random.RandomState(0).randn(2, 8, 8, 3), jnp.float32)
    arrays = llamagen_vq.init(ours, jax.random.key(0), {"image": jax.ShapeDtypeStruct(image.shape, image.dtype)}, {})
    given = {"parts": {}, "extra": arrays["extra"], "step": 0, "train": True}
    batch, key = {"id": jnp.arange(2), "image": image}, jax.random.key(0)
    losses = [
        family.loss(model, arrays["params"], batch, key, **given)[0]
        for family, model in ((llamagen_vq, ours), (vqgan, other))
    ]
    assert losses[0] == losses[1]
