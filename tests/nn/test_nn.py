"""Properties of the shared layers: cached = uncached, scan = loop, masks and gradients equal plain implementations.

Letters: b batch, t query positions, s key positions, d width, h key heads, g queries per key head, k head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridgen.core import trees
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask, attend
from hybridgen.nn.blocks import AdaLNBlock, LlamaBlock
from hybridgen.nn.linear import Embed, Linear, cast_for_inference
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import GroupNorm, Norm
from hybridgen.nn.position import grid_positions, rotary, rotate
from hybridgen.nn.stack import Stack, unstack_layers


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(got, want, tolerance):
    """Largest difference relative to the largest value, over all leaves."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), got, want)


def pullback(function, arguments, cotangent):
    """`function(*arguments)`, and the gradients of its product with the cotangent."""
    value, pull = jax.vjp(function, *arguments)
    return value, pull(cotangent)


# -- attention ---------------------------------------------------------------------------------------------------------


def plain(q, k, v, seen):
    """Textbook attention with dense booleans `seen [b, t, s]`; every row must see a key."""
    scores = jnp.einsum("bthgk,bshk->bhgts", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), -1)
    return jnp.einsum("bhgts,bshk->bthgk", weights, v)


def dense(kind, prefix, t, s, offset):
    seen = np.ones((t, s), bool)
    for i in range(t):
        for j in range(s):
            causal = j <= i + offset
            both = j < prefix and i + offset < prefix
            seen[i, j] = kind == "full" or causal or (kind == "prefix" and both)
    return seen


@pytest.mark.parametrize(
    ("kind", "prefix", "t", "s", "offset"),
    [
        ("full", 0, 5, 7, 0),
        ("causal", 0, 6, 6, 0),
        ("causal", 0, 2, 8, 3),
        ("prefix", 3, 6, 6, 0),
        ("prefix", 4, 4, 9, 0),
    ],
)
def test_attention_and_its_gradients_equal_the_plain_form(x64, kind, prefix, t, s, offset):
    b, h, g, width = 3, 2, 2, 4
    q = draw(0, b, t, h, g, width, dtype=np.float64)
    k, v = draw(1, 2, b, s, h, width, dtype=np.float64)
    cotangent = draw(3, *q.shape, dtype=np.float64)
    valid = np.random.default_rng(2).random((b, s)) < 0.6
    valid[:, 0] = True

    @jax.jit
    def both(valid):
        seen = dense(kind, prefix, t, s, offset) & valid[:, None, :]
        ours = pullback(lambda *a: attend(*a, Mask(kind, prefix, valid, offset)), (q, k, v), cotangent)
        return ours, pullback(lambda *a: plain(*a, seen), (q, k, v), cotangent)

    (got, grads), (want, grads_plain) = both(valid)
    assert got.dtype == jnp.float64
    close(got, want, 1e-12)
    close(grads, grads_plain, 1e-9)
    everything = attend(q, k, v, Mask(kind, prefix, None, offset))
    close(everything, both(np.ones_like(valid))[0][0], 1e-12)


def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients():
    q, k, v = draw(0, 2, 3, 1, 1, 4), draw(1, 2, 3, 1, 4), draw(2, 2, 3, 1, 4)
    mask = Mask("causal", valid=jnp.array([[False, True, True], [False, False, False]]))
    out, grads = jax.jit(lambda *a: pullback(lambda *a: attend(*a, mask), a, jnp.full(q.shape, 1e6)))(q, k, v)
    assert (out[0, 0] == 0).all() and (out[1] == 0).all() and (out[0, 1:] != 0).all()
    assert all(np.isfinite(grad).all() for grad in grads)
    assert (grads[2][1] == 0).all()


def test_scores_of_any_size_are_safe():
    q, k, v = 1e4 * draw(0, 1, 4, 1, 1, 8), 1e4 * draw(1, 1, 4, 1, 8), draw(2, 1, 4, 1, 8)
    run = jax.jit(lambda *a: pullback(lambda *a: attend(*a, Mask("causal")), a, jnp.ones(q.shape)))
    out, grads = run(q, k, v)
    assert np.isfinite(out).all() and all(np.isfinite(grad).all() for grad in grads)


def test_grouped_queries_equal_repeated_keys():
    b, t, h, g, width = 2, 5, 2, 3, 4
    q, k, v = draw(0, b, t, h, g, width), draw(1, b, t, h, width), draw(2, b, t, h, width)
    grouped = attend(q, k, v, Mask("causal")).reshape(b, t, h * g, width)
    repeated = attend(
        q.reshape(b, t, h * g, 1, width), jnp.repeat(k, g, 2), jnp.repeat(v, g, 2), Mask("causal")
    ).reshape(b, t, h * g, width)
    close(grouped, repeated, 1e-6)


def test_unknown_kinds_are_refused():
    q = jnp.zeros((1, 2, 1, 1, 4))
    with pytest.raises(ValueError, match="diagonal"):
        attend(q, q[:, :, :, 0], q[:, :, :, 0], Mask("diagonal"))
    with pytest.raises(ValueError, match="magic"):
        attend(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), kernel="magic")


# -- positions ---------------------------------------------------------------------------------------------------------


def test_rotary_scores_depend_on_relative_positions_only(x64):
    q, k = draw(0, 2, 1, 1, 1, 16, dtype=np.float64)
    base = np.array([[2, 5], [7, 3]])

    def score(positions):
        cos, sin = rotary(positions, 16)
        table = cos.astype(jnp.float64), sin.astype(jnp.float64)
        turned = rotate(jnp.concatenate([q, k], 1), table)  # 1 2 1 k
        return (turned[0, 0, 0] * turned[0, 1, 0]).sum()

    np.testing.assert_allclose(score(base), score(base + np.array([11, 4])), rtol=1e-5)
    assert abs(score(base) - score(base + np.array([[0, 0], [1, 0]]))) > 1e-3
    assert abs(score(base) - score(base + np.array([[0, 0], [0, 1]]))) > 1e-3


def test_rotation_keeps_lengths_and_position_zero_is_the_identity():
    x = draw(0, 2, 3, 2, 8)
    turned = rotate(x, rotary(np.arange(3), 8))
    close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), 1e-6)
    close(turned[:, 0], x[:, 0], 1e-7)


def test_grid_positions_are_distinct():
    positions = grid_positions(3, 4, prefix=5)
    assert positions.shape == (17, 2) and len({tuple(p) for p in positions.tolist()}) == 17


# -- the stack ---------------------------------------------------------------------------------------------------------

WIDTH, DEPTH, LENGTH = 32, 3, 12
DIT = {"norm": "layer", "mlp": "gelu", "bias": True}


def stack(*, remat="none", unroll=1, block=None, **options):
    """Llama's blocks, or with a norm of adaLN's choice its blocks."""
    block = block or (AdaLNBlock if "norm" in options else LlamaBlock)
    sizes = {"heads": 4, "head_width": 8, "hidden": 48} | ({"kv_heads": 2} if block is LlamaBlock else {})
    return Stack(DEPTH, block, sizes | options, remat=remat, unroll=unroll)


def init(model, x, **side):
    """Parameters with noise on top: those initialised with zeros would hide their branches."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, Mask(), **side))["params"]
    return jax.tree.map(lambda p: draw(5, *p.shape, dtype=p.dtype) / p.shape[-2] ** 0.5, shapes)


def apply(model, params, x, mask, **side):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, mask, **side))(params, x)[0]


TABLE = rotary(grid_positions(2, 4, prefix=4), 8)
ONES = (1,) * 8


@pytest.mark.parametrize(
    ("kind", "chunks", "unroll", "platform"),
    [
        ("causal", (12,), 1, "cpu"),
        ("causal", (5, 1, 1, 2, 3), 1, "cpu"),
        ("prefix", (5, 4, 3), 1, "cpu"),
        ("prefix", (4, *ONES), -1, "cpu"),
        ("causal", (5, 1, 1, 2, 3), -1, "tpu"),  # the layout of its cache alone
    ],
)
def test_cached_equals_uncached(monkeypatch, kind, chunks, unroll, platform):
    monkeypatch.setattr(kv, "platform", lambda: platform)
    b, prefix = 3, 4
    x = draw(0, b, LENGTH, WIDTH)
    valid = np.ones((b, LENGTH), bool)
    valid[0, 2:4] = valid[1, 0] = False  # padded text
    model = stack(qk_norm=True, unroll=unroll)
    params = init(model, x)
    full = apply(model, params, x, Mask(kind, prefix, jnp.asarray(valid)), rotary=TABLE)

    params = {"params": unstack_layers(params, unroll)}

    @jax.jit
    def chunk(cache, x, valid):
        t = x.shape[1]
        table = tuple(jax.lax.dynamic_slice_in_dim(part, cache["index"], t) for part in TABLE)
        cache = kv.admit(cache, valid)
        y, cache = model.apply(params, x, Mask(kind, prefix), rotary=table, cache=cache)
        return y, kv.advance(cache, t)

    cache, parts, start = kv.empty(DEPTH, b, LENGTH + 3, 2, 8, unstacked=unroll < 0), [], 0
    for t in chunks:
        part, cache = chunk(cache, x[:, start : start + t], jnp.asarray(valid[:, start : start + t]))
        parts.append(part)
        start += t
    assert int(cache["index"]) == LENGTH
    close(np.concatenate(parts, 1), full, 1e-5)


@pytest.mark.parametrize("options", [{"qk_norm": True}, DIT])
def test_weights_as_a_loop_holds_them_give_the_same_numbers(options):
    x, side = draw(0, 2, LENGTH, WIDTH), {"condition": draw(1, 2, WIDTH)} if options is DIT else {}
    model = stack(dtype="bfloat16", **options)
    params = init(model, x, **side)
    narrow = cast_for_inference(params, "bfloat16")
    kinds = {path.rsplit("/")[-1]: leaf.dtype for path, leaf in trees.flatten(narrow).items()}
    assert kinds.pop("kernel") == jnp.bfloat16 and set(kinds.values()) <= {jnp.dtype("float32")}
    np.testing.assert_array_equal(apply(model, narrow, x, Mask(), **side), apply(model, params, x, Mask(), **side))
    assert cast_for_inference(params, "float32") is params


@pytest.mark.parametrize(
    ("options", "unroll", "remat"), [({}, 1, "none"), ({}, -1, "dots"), (DIT, 1, "full"), (DIT, -1, "none")]
)
def test_scan_equals_loop_over_layers(x64, options, unroll, remat):
    modulated = bool(options)
    x = draw(0, 2, LENGTH, WIDTH, dtype=np.float64)
    side = {"condition": draw(1, 2, WIDTH, dtype=np.float64)} if modulated else {}
    if modulated:
        side["context"] = draw(2, 2, 5, 16, dtype=np.float64), jnp.arange(5) < jnp.array([[3], [5]])
    side["rotary"] = TABLE
    model = stack(unroll=unroll, remat=remat, **options)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), init(model, x, **side))

    def scanned(params, x):
        return model.apply({"params": params}, x, Mask("causal"), **side)[0]

    def looped(params, x):
        for layer in range(DEPTH):
            block = model.block(**dict(model.options))
            sliced = jax.tree.map(lambda p, i=layer: p[i], params["layers"])
            x, _ = block.apply({"params": sliced}, x, Mask("causal"), **side)
        return x

    cotangent = draw(3, *x.shape, dtype=np.float64)
    both = jax.jit(lambda *a: (pullback(scanned, a, cotangent), pullback(looped, a, cotangent)))
    (got, grads), (want, grads_looped) = both(params, x)
    assert got.dtype == jnp.float64
    close(got, want, 1e-12)
    close(grads, grads_looped, 1e-9)


def test_parameters_are_stacked_by_layer():
    shapes = jax.eval_shape(lambda: stack(qk_norm=True).init(jax.random.key(0), jnp.zeros((1, 4, WIDTH)), Mask()))
    layers = jax.tree.map(lambda p: p.shape, shapes["params"]["layers"])
    assert layers == {
        "attention": {
            "qkv": {"kernel": (DEPTH, WIDTH, 2, 4, 8)},
            "q_norm": {"scale": (DEPTH, 8)},
            "k_norm": {"scale": (DEPTH, 8)},
            "out": {"kernel": (DEPTH, 2, 2, 8, WIDTH)},
        },
        "attention_norm": {"scale": (DEPTH, WIDTH)},
        "mlp_norm": {"scale": (DEPTH, WIDTH)},
        "mlp": {"up": {"kernel": (DEPTH, WIDTH, 2, 48)}, "down": {"kernel": (DEPTH, 48, WIDTH)}},
    }


def test_a_fresh_modulated_stack_is_the_identity():
    x, condition = draw(0, 2, 6, WIDTH), draw(1, 2, WIDTH)
    model = stack(norm="layer")
    params = jax.jit(lambda key: model.init(key, x, Mask(), condition=condition)["params"])(jax.random.key(0))
    assert (apply(model, params, x, Mask(), condition=condition) == x).all()


def test_padded_keys_do_not_leak():
    x = draw(0, 2, 8, WIDTH)
    model = stack()
    params = init(model, x)
    valid = jnp.arange(8) < jnp.array([[5], [8]])
    run = jax.jit(lambda x: model.apply({"params": params}, x, Mask("full", valid=valid))[0])
    same = run(x)
    assert (run(x.at[0, 5:].set(100.0))[0, :5] == same[0, :5]).all()
    assert (run(x.at[0, 4].set(100.0))[0, :4] != same[0, :4]).any()


@pytest.mark.parametrize("options", [{"qk_norm": True}, DIT])
def test_bfloat16_runs_close_to_float32(options):
    side = {"condition": draw(1, 2, WIDTH)} if options is DIT else {}
    x = draw(0, 2, LENGTH, WIDTH)
    params = init(stack(**options), x, **side)
    want = apply(stack(**options), params, x, Mask("causal"), rotary=TABLE, **side)

    def run(params, x):
        return stack(dtype="bfloat16", **options).apply({"params": params}, x, Mask("causal"), rotary=TABLE, **side)[0]

    half = x.astype(jnp.bfloat16)
    got, grads = jax.jit(lambda *a: pullback(run, a, half))(params, half)
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), want, 0.05)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads[0]))


# -- small layers ------------------------------------------------------------------------------------------------------


def test_parts_of_a_linear_layer_are_the_cut_up_whole(x64):
    x = draw(0, 2, 3, 8, dtype=np.float64)
    params = {"kernel": draw(1, 8, 2, 4, 5, dtype=np.float64), "bias": draw(2, 2, 4, 5, dtype=np.float64)}
    y = Linear((2, 4, 5), bias=True).apply({"params": params}, x)
    close(y, jnp.einsum("btd,dhgk->bthgk", x, params["kernel"]) + params["bias"], 1e-12)
    parts = Linear((2, 4, 5), bias=True, parts=(3, 1)).apply({"params": params}, x)
    assert [part.shape for part in parts] == [(2, 3, 2, 3, 5), (2, 3, 2, 1, 5)]
    close(jnp.concatenate(parts, -2), y, 1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_follow_their_formula(x64, kind):
    x = 3 + 2 * draw(0, 4, 6, 16, dtype=np.float64)
    params = {"scale": draw(1, 16, dtype=np.float64)}
    if kind == "layer":
        params["bias"] = draw(2, 16, dtype=np.float64)
    centred = np.asarray(x) - (np.asarray(x).mean(-1, keepdims=True) if kind == "layer" else 0)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params.get("bias", 0)
    got = Norm(kind).apply({"params": params}, x)
    assert got.dtype == jnp.float64
    close(got, want, 1e-12)
    assert Norm(kind).apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_norm_normalises_each_group():
    x = draw(0, 2, 4, 4, 6) * 5 + 1
    y = GroupNorm(3).apply({"params": {"scale": jnp.ones(6), "bias": jnp.zeros(6)}}, x).reshape(2, 16, 3, 2)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_mlp_follows_its_formula(x64, kind):
    x = draw(0, 2, 3, 8, dtype=np.float64)
    branches = 2 if kind == "swiglu" else 1
    params = {"up": {"kernel": draw(1, 8, branches, 12, dtype=np.float64)}}
    params["down"] = {"kernel": draw(2, 12, 8, dtype=np.float64)}
    up = jnp.einsum("bnd,dcf->cbnf", x, params["up"]["kernel"])
    hidden = jax.nn.silu(up[0]) * up[1] if kind == "swiglu" else jax.nn.gelu(up[0])
    close(MLP(12, kind).apply({"params": params}, x), hidden @ params["down"]["kernel"], 1e-12)


def test_embedding_and_its_logits_share_the_table():
    model = Embed(7, 5)
    params = {"table": draw(1, 7, 5)}
    ids = jnp.array([[3, 0], [6, 3]])
    close(model.apply({"params": params}, ids), params["table"][ids], 0)
    x = draw(0, 2, 5)
    close(model.apply({"params": params}, x, method="attend"), x @ params["table"].T, 1e-6)
