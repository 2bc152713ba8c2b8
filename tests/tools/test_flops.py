"""FLOPs from the trace against counts by hand, and against XLA's own where XLA is right (no loops)."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridgen.cost import flops, steps
from hybridgen.models.ar import raster
from hybridgen.models.contract import Part
from hybridgen.models.diffusion import dit
from hybridgen.models.tokenizers import vq
from hybridgen.nn.attention import Mask, attend
from hybridgen.nn.conv import Conv
from hybridgen.training.rates import Work

B, L, GRID, VOCAB = 3, 5, (4, 4), 30
N = GRID[0] * GRID[1]
PRIOR = dict(vocab=VOCAB, grid=GRID, width=64, depth=3, heads=2, hidden=96)
PRIOR |= dict(text_vocab=11, text_length=L, cond_drop_prob=0.0)


def total(count):
    return sum(count.values())


def training(*args):
    """The count without what remat adds."""
    return flops.training(*args)[0]


def prior(**changes):
    """(model, abstract params, abstract batch)"""
    model = raster.build(PRIOR | changes)
    params = jax.eval_shape(lambda: raster.init(model, jax.random.key(0), {}, {})["params"])
    batch = {
        "id": jax.ShapeDtypeStruct((B,), jnp.uint32),
        "tokens": jax.ShapeDtypeStruct((B, N), jnp.int32),
        "text": jax.ShapeDtypeStruct((B, L), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((B, L), bool),
    }
    return model, params, batch


def prior_loss(model):
    def loss(params, batch):
        options = {"parts": {}, "extra": {}, "step": 0, "train": True}
        return raster.loss(model, params, batch, jax.random.key(0), **options)[0]

    return loss


def prior_by_hand(d=64, f=96, depth=3, tower=192):
    """Forward multiply-adds of a picture: (matmul, attention)."""
    block = 3 * d * d + d * d + 3 * d * f  # qkv, out, gate and value and down
    text = L * (4 * d * d + 3 * d * tower + d * d)  # one layer, and the projection
    matmul = text + depth * (L + N) * block + N * d * VOCAB
    pairs = L * L + sum(range(L + 1, L + N + 1))  # the text sees itself, then each position sees those before it
    return matmul, 2 * d * L * L + depth * 2 * d * pairs


@pytest.mark.parametrize("unroll", [1, -1])
def test_a_prior_counts_as_by_hand(unroll):
    model, params, batch = prior(unroll=unroll)
    count = training(prior_loss(model), params, batch)
    matmul, attention = prior_by_hand()
    assert count == {"matmul": 3 * 2 * B * matmul, "attention": 3 * 2 * B * attention}


def test_remat_is_counted_apart():
    model, params, batch = prior()
    plain, again = flops.training(prior_loss(model), params, batch)
    assert again == 0
    tower = 2 * B * L * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 * L)  # the text's one layer is not under remat
    head = 2 * B * (L * 64 * 64 + N * 64 * VOCAB)
    own = 2 * B * 2 * 64 * L * L  # attention of the text's layer
    for policy, expected in (("full", total(plain) / 3 - tower - head), ("dots", plain["attention"] / 3 - own)):
        model, params, batch = prior(remat=policy)
        count, again = flops.training(prior_loss(model), params, batch)
        assert count == plain
        assert again == expected


def test_xla_agrees_where_there_is_no_loop():
    """XLA adds norms, softmax, rotary and the loss (a few per cent at width 256) and counts masked pairs too."""
    model, params, batch = prior(width=256, hidden=512, heads=4, depth=2, text_depth=0, unroll=-1)
    gradient = jax.grad(prior_loss(model))
    xla = jax.jit(gradient).lower(params, batch).cost_analysis()["flops"]
    ours = total(training(prior_loss(model), params, batch))
    assert 0.85 < ours / xla <= 1.0


def test_sampling_counts_each_token_at_its_place_in_the_cache():
    model, params, batch = prior()
    cond = {name: batch[name] for name in ("text", "text_mask")}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))

    def draw(params, cond, keys, scale):
        return raster.generate(model, params, {}, cond, keys, {"guidance": scale})

    # prefill runs the text, the start and the first logits; the loop every token but the last
    matmul, attention = prior_by_hand()
    plain = flops.forward(lambda *args: draw(*args, 1.0), params, cond, keys)
    assert plain == {"matmul": 2 * B * matmul, "attention": 2 * B * attention}
    guided = flops.forward(lambda *args: draw(*args, 3.0), params, cond, keys)
    assert guided == {"matmul": 4 * B * matmul, "attention": 4 * B * attention}


def test_frozen_parameters_cost_no_weight_gradient():
    model, params, batch = prior()
    trains = {"head": params["head"]}
    rest = {name: value for name, value in params.items() if name != "head"}
    count = training(lambda t, r, batch: prior_loss(model)(t | r, batch), trains, rest, batch)
    matmul, attention = prior_by_hand()
    # forward of everything, and of the gradient only the head's kernel
    assert count == {"matmul": 2 * B * (matmul + N * 64 * VOCAB), "attention": 2 * B * attention}


def test_a_decoder_counts_as_by_hand():
    d, f, depth, side, codes = 64, 96, 2, 4, 4
    tokenizer = vq.build(
        {"resolution": 16, "patch": 2, "channels": (32, 32), "quantizer": {"kind": "fsq", "levels": (4,) * 4}}
    )
    model = dit.build(
        {"resolution": 16, "patch": 4, "width": d, "depth": depth, "heads": 2, "hidden": f, "plan_width": codes}
    )
    specs = {"image": jax.ShapeDtypeStruct((B, 16, 16, 3), jnp.float32)}
    arrays = jax.eval_shape(lambda: vq.init(tokenizer, jax.random.key(0), specs, {}))
    parts = {"tokenizer": Part(arrays["params"], arrays["extra"], "tokenizers.vq", tokenizer)}
    params = jax.eval_shape(lambda: dit.init(model, jax.random.key(0), specs, parts)["params"])
    batch = specs | {"id": jax.ShapeDtypeStruct((B,), jnp.uint32)}

    def loss(params, batch, parts):
        options = {"parts": parts, "extra": {}, "step": 0, "train": True}
        return dit.loss(model, params, batch, jax.random.key(0), **options)[0]

    n = side * side
    raw = n * (4 * 4 * 3) * d + 256 * d + n * codes * d  # patches, time features and codes need no gradient
    rest = d * d + d * d + depth * (6 * d * d + n * (4 * d * d + 3 * d * f)) + 2 * d * d + n * d * 48
    attention = depth * 2 * d * n * n
    encoder = flops.forward(lambda part, image: part.call("encode", image), parts["tokenizer"], specs["image"])
    count = training(loss, params, batch, parts)
    assert count["attention"] - encoder["attention"] == 3 * 2 * B * attention
    assert count["convolution"] == encoder["convolution"]
    assert count["matmul"] - encoder["matmul"] == 2 * B * (2 * raw + 3 * rest)


def test_a_convolution_counts_its_output_times_its_kernel():
    conv = Conv(8, size=3)
    x = jax.ShapeDtypeStruct((B, 6, 5, 4), jnp.float32)
    shapes = {"kernel": (3, 3, 4, 8), "bias": (8,)}
    params = {"params": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}
    forward = 2 * B * 6 * 5 * 8 * (3 * 3 * 4)
    assert flops.forward(conv.apply, params, x) == {"convolution": forward}
    count = training(lambda params, x: conv.apply(params, x).sum(), params, x)
    assert count == {"convolution": 2 * forward}  # the picture needs no gradient


def test_loops_branches_and_stopped_gradients():
    w = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    one = 2 * 4**3

    def loss(w, x):
        y = jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]
        y = jax.lax.cond(y.sum() > 0, lambda: y @ w @ w, lambda: y)
        return (jax.lax.stop_gradient(y) @ w).sum()

    assert flops.forward(loss, w, w) == {"matmul": (5 + 2 + 1) * one}
    assert training(loss, w, w) == {"matmul": (3 * (5 + 2) + 2) * one}


MASKS = [Mask(), Mask("causal"), Mask("causal", offset=3), Mask("prefix", 4), Mask("prefix", 9)]


@pytest.mark.parametrize("mask", MASKS)
def test_the_scope_of_an_attention_tells_the_pairs_of_its_mask(mask):
    t, s = 7, 7 + (mask.offset or 0)
    dense = mask.dense(t, s)
    pairs = t * s if dense is None else int(np.broadcast_to(dense, (1, 1, 1, t, s)).sum())
    assert mask.scope(t, s) == f"attend.{t}x{s}.{pairs}"


def test_attention_alone_is_two_products_over_the_visible_pairs():
    q = jax.ShapeDtypeStruct((B, 6, 2, 1, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((B, 6, 2, 8), jnp.float32)

    def causal(q, k, v):
        mask = Mask("causal")
        with jax.named_scope(mask.scope(6, 6)):
            return attend(q, k, v, mask)

    assert flops.forward(causal, q, k, k) == {"attention": 2 * 2 * B * 2 * 8 * 21}


def test_the_tpu_kernel_counts_as_the_plain_one():
    q = jax.ShapeDtypeStruct((B, 150, 2, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((B, 150, 2, 8), jnp.float32)

    def count(kernel):
        def causal(q, k, v):
            mask = Mask("causal")
            with jax.named_scope(mask.scope(150, 150)):
                return attend(q, k, v, mask, kernel)

        return flops.forward(causal, q, k, k), training(lambda q, k: causal(q, k, k).sum(), q, k)

    assert count("splash") == count("xla")


ALONE = types.SimpleNamespace(parts={}, mesh=jax.make_mesh((1,), ("data",)))


def stepping(loss, role="decoder", model=None):
    """A rule of hybridgen.train for a family of this loss, all parameters trained."""
    family = types.SimpleNamespace(loss=loss, ROLE=role)
    split = types.SimpleNamespace(split=lambda params: (params, {}))
    return types.SimpleNamespace(family=family, which=split, fitted=lambda batch, parts: (model, parts))


def images(height, width):
    return {"image": jax.ShapeDtypeStruct((B, height, width, 3), jnp.float32)}


def test_what_a_step_does():
    """One product of raw inputs with a trained matrix: forward, and the gradient of the matrix."""

    def loss(model, params, batch, key, **_):
        return (batch["image"] @ params["w"]).sum(), {}

    state = {"params": {"w": jax.ShapeDtypeStruct((3, 7), jnp.float32)}, "extra": {}, "step": jnp.int32(0)}
    rule, each = stepping(loss), 2 * 2 * B * 3 * 7
    assert steps.counted(rule, state, images(4, 5), ALONE, None, True) == {None: Work(1, B, 0, each * 20)}
    assert steps.counted(rule, state, images(4, 5), ALONE, None, False) == {None: Work(1, B, 0, 0.0)}
    shaped = steps.counted(rule, state, images(4, 4), ALONE, [(8, 2), (2, 6)], True)
    assert shaped == {(8, 2): Work(1, B, 0, each * 16), (2, 6): Work(1, B, 0, each * 12)}
    prior = stepping(loss, ("prior", "text"), types.SimpleNamespace(length=9))
    assert steps.counted(prior, state, images(1, 1), ALONE, None, False) == {None: Work(1, B, B * 9, 0.0)}


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("NVIDIA H200", "bfloat16", 989e12), ("NVIDIA H200", "float32", 495e12), ("TPU v5 lite", None, 197e12)],
)
def test_the_peak_of_all_devices(kind, dtype, expected):
    devices = np.array([[types.SimpleNamespace(device_kind=kind)] * 4] * 2)
    members = {"prior": {"model": {"dtype": dtype}}} if dtype else {}
    assert steps.peak(members, devices) == 8 * expected
    assert steps.peak(members, np.array([types.SimpleNamespace(device_kind="cpu")])) == 0.0
