"""The rule engine: names, views, stacks; every error is one line that names the tensor; no tensor is copied twice."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.weights import rules, safetensors
from hybridgen.weights.files import open_weights
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Part, Rule

LAYERS, WIDTH, HEADS, GROUP, HEAD = 3, 8, 2, 2, 4
NAMES = tuple(f"layers.{{i}}.attn.{part}.weight" for part in "qkv")
TABLE = (
    Rule("tok.weight", "params/embed/table"),
    Rule(NAMES, "params/blocks/attention/qkv/kernel", rules.qkv, stack="i"),
    Rule("layers.{i}.attn.o.weight", "params/blocks/attention/out/kernel", rules.heads, stack="i"),
    Rule("layers.{i}.norm{n:1|2}.weight", "params/blocks/norm_{n:1|2}/scale", stack="i"),
    Rule("up.{l}.conv.weight", "params/up_{l}/conv/kernel", rules.conv, flip={"l": 2}),
    Rule("up.{l}.{kind:in|out}.weight", "params/up_{l}/{kind:in|out}/kernel", rules.matrix, flip={"l": 2}),
    Rule("steps", "extra/steps", dtype="int64"),
)
SHAPES = {
    "params/embed/table": (5, WIDTH),
    "params/blocks/attention/qkv/kernel": (LAYERS, WIDTH, HEADS, GROUP + 2, HEAD),
    "params/blocks/attention/out/kernel": (LAYERS, HEADS, GROUP, HEAD, WIDTH),
    "params/blocks/norm_1/scale": (LAYERS, WIDTH),
    "params/blocks/norm_2/scale": (LAYERS, WIDTH),
    "params/up_0/conv/kernel": (3, 3, 2, 6),
    "params/up_1/conv/kernel": (3, 3, 4, 2),
    "params/up_0/in/kernel": (2, 3),
    "params/up_1/out/kernel": (3, 4),
    "extra/steps": (2,),
}
KINDS = {"extra/steps": np.int32}
SPECS = {path: jax.ShapeDtypeStruct(shape, KINDS.get(path, np.float32)) for path, shape in SHAPES.items()}


def official():
    """A state dict that the table fits."""
    draw = np.random.RandomState(0)
    state = {"tok.weight": draw.randn(5, WIDTH), "steps": np.asarray([3, 2**30])}
    for i in range(LAYERS):
        state[f"layers.{i}.attn.q.weight"] = draw.randn(HEADS * GROUP * HEAD, WIDTH)
        state |= {f"layers.{i}.attn.{part}.weight": draw.randn(HEADS * HEAD, WIDTH) for part in "kv"}
        state[f"layers.{i}.attn.o.weight"] = draw.randn(WIDTH, HEADS * GROUP * HEAD)
        state |= {f"layers.{i}.norm{n}.weight": draw.randn(WIDTH) for n in (1, 2)}
    state |= {"up.1.conv.weight": draw.randn(6, 2, 3, 3), "up.0.conv.weight": draw.randn(2, 4, 3, 3)}
    state |= {"up.1.in.weight": draw.randn(3, 2), "up.0.out.weight": draw.randn(4, 3)}
    return {name: value if name == "steps" else value.astype(np.float32) for name, value in state.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e5m2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(dtype, value):
    state = official()
    state["layers.1.attn.k.weight"].flat[:2] = value
    state["layers.1.attn.k.weight"] = state["layers.1.attn.k.weight"].astype(ml_dtypes.finfo(dtype).dtype)
    with pytest.raises(UserError, match=r"^2 of the 64 numbers of the tensor 'layers.1.attn.k.weight' are NaN or inf"):
        rules.load(state, TABLE, SPECS)


def test_a_number_that_float32_does_not_have_is_named():
    state = official()
    state["tok.weight"] = state["tok.weight"].astype(np.float64)
    state["tok.weight"][4, 1] = 1e39
    with pytest.raises(UserError, match=r"^1 of the 40 .* 'tok.weight' are NaN or infinite as float32, the dtype"):
        rules.load(state, TABLE, SPECS)


def test_tensors_go_where_the_table_says():
    state = official()
    arrays = rules.load(state, TABLE, SPECS)
    assert {path: array.shape for path, array in arrays.items()} == SHAPES
    assert arrays["extra/steps"].dtype == np.int32
    x = np.random.RandomState(1).randn(WIDTH).astype(np.float32)
    for i in range(LAYERS):
        # the same numbers as the official product, head by head
        got = np.einsum("d,dhgk->hgk", x, arrays["params/blocks/attention/qkv/kernel"][i])
        q = (state[f"layers.{i}.attn.q.weight"] @ x).reshape(HEADS, GROUP, HEAD)
        k, v = ((state[f"layers.{i}.attn.{part}.weight"] @ x).reshape(HEADS, HEAD) for part in "kv")
        np.testing.assert_allclose(got, np.concatenate([q, k[:, None], v[:, None]], 1), atol=1e-5)
        y = np.random.RandomState(i).randn(HEADS, GROUP, HEAD)
        out = np.einsum("hgk,hgkd->d", y, arrays["params/blocks/attention/out/kernel"][i])
        np.testing.assert_allclose(out, state[f"layers.{i}.attn.o.weight"] @ y.ravel(), atol=1e-5)
        np.testing.assert_array_equal(arrays["params/blocks/norm_2/scale"][i], state[f"layers.{i}.norm2.weight"])
    np.testing.assert_array_equal(arrays["params/up_0/conv/kernel"], state["up.1.conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(arrays["params/up_1/out/kernel"], state["up.0.out.weight"].T)


def test_the_way_back_is_bit_equal(tmp_path):
    state = official()
    tensors = rules.export(rules.load(state, TABLE, SPECS), TABLE)
    safetensors.write(tmp_path / "w.safetensors", tensors)
    back = open_weights(tmp_path / "w.safetensors")
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype and back[name].read().tobytes() == value.tobytes(), name


def test_smaller_floats_become_ours_with_their_values():
    state = {
        name: value.astype(ml_dtypes.bfloat16 if value.dtype.kind == "f" else value.dtype)
        for name, value in official().items()
    }
    arrays = rules.load(state, TABLE, SPECS)
    np.testing.assert_array_equal(arrays["params/embed/table"], state["tok.weight"].astype(np.float32))


def without(name):
    return {key: value for key, value in official().items() if key != name}


FAULTS = {
    "extra": (official() | {"layers.0.bias": np.ones(3)}, "the tensor 'layers.0.bias' is matched by no rule"),
    "missing": (without("tok.weight"), "the tensor 'tok.weight' is missing"),
    "missing in a stack": (without("layers.1.attn.k.weight"), "the tensor 'layers.1.attn.k.weight' is missing"),
    "missing last": (without("layers.2.norm1.weight"), "the tensor 'layers.2.norm1.weight' is missing"),
    "missing under a turned number": (without("up.1.conv.weight"), "the tensor 'up.1.conv.weight' is missing"),
    "one layer too many": (
        official() | {"layers.3.norm1.weight": np.ones(WIDTH, np.float32)},
        "the tensor 'layers.3.norm1.weight' is beyond the 3 layers of 'params/blocks/norm_1/scale'",
    ),
    "no such place": (
        official() | {"up.5.conv.weight": np.ones((1, 1, 3, 3), np.float32)},
        "the tensor 'up.5.conv.weight' maps to 'params/up_-4/conv/kernel', which a model of this config does not have",
    ),
    "shape": (
        official() | {"up.1.in.weight": np.ones((2, 3), np.float32)},
        "the tensor 'up.1.in.weight' has the shape 2x3, 3x2 is expected",
    ),
    "shape in a stack": (
        official() | {"layers.2.attn.q.weight": np.ones((HEADS * HEAD, WIDTH), np.float32)},
        "the tensor 'layers.2.attn.q.weight' has the shape 8x8, 16x8 is expected",
    ),
    "kind": (
        official() | {"tok.weight": np.ones((5, WIDTH), np.int32)},
        "the tensor 'tok.weight' has the dtype int32, float32 is expected",
    ),
    "not a number of a layer": (
        official() | {"layers.01.norm1.weight": np.ones(WIDTH, np.float32)},
        "the tensor 'layers.01.norm1.weight' is matched by no rule",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_tensor(fault):
    state, message = FAULTS[fault]

    class Unread:
        def __init__(self, array):
            self.shape, self.dtype = array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read before everything was checked")

    with pytest.raises(UserError) as error:
        rules.load({name: Unread(value) for name, value in state.items()}, TABLE, SPECS)
    assert str(error.value) == message and "\n" not in message


def test_a_tensor_that_two_rules_match_is_refused():
    with pytest.raises(UserError, match="'tok.weight' is matched by 2 rules"):
        rules.load(official(), (*TABLE, Rule("{a:tok}.weight", "params/{a:tok}")), SPECS)
    twice = (Rule("a", "params/x"), Rule("b", "params/x"))
    with pytest.raises(UserError, match="the tensors 'b' and 'a' both map to 'params/x'"):
        rules.load({"a": np.ones(1), "b": np.ones(1)}, twice, {"params/x": jax.ShapeDtypeStruct((1,), float)})


def test_what_a_model_has_no_use_for_is_left_out():
    state = official() | {"loss.vgg.weight": np.ones(3)}
    assert set(rules.load(state, TABLE, SPECS, (r"loss\..+",))) == set(SHAPES)


def test_an_array_without_a_rule_is_not_exported():
    with pytest.raises(UserError, match="'params/other' of shape 3 has no official name"):
        rules.export({"params/other": np.ones(3)}, TABLE)


def test_views_that_are_not_all_of_an_array_are_the_tables_fault():
    half = (Rule("a", "params/x", lambda x: (Part(x[:1], (1,)),)),)
    with pytest.raises(ValueError, match="do not cover the array"):
        rules.export({"params/x": np.ones(2)}, half)


def test_one_tensor_is_in_memory_beside_the_arrays(tmp_path):
    count, size = 24, 2**19
    table = (Rule("l.{i}.weight", "params/stack", rules.matrix, stack="i"),)
    specs = {"params/stack": jax.ShapeDtypeStruct((count, 2**9, size // 2**9), np.float32)}  # 48 MiB
    one = np.arange(size, dtype=np.float32).reshape(-1, 2**9)
    safetensors.write(tmp_path / "a.safetensors", {f"l.{i}.weight": one for i in range(count)})
    tracemalloc.start()
    arrays = rules.load(open_weights(tmp_path / "a.safetensors"), table, specs)
    peak = tracemalloc.get_traced_memory()[1]
    assert peak < (count + 2.5) * 4 * size
    tracemalloc.reset_peak()
    safetensors.write(tmp_path / "b.safetensors", rules.export(arrays, table))
    assert tracemalloc.get_traced_memory()[1] < (count + 3.5) * 4 * size
    tracemalloc.stop()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# ---------------------------------------------------------------- official configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": 1, "odd": 2}, "config has the key 'odd', which is not supported"),
        ({"a": 0}, "config: a 0 is not an integer within 1 and 16777216"),
        ({"a": True}, "config: a True is not an integer"),
        ({"a": 10**9}, "config: a 1000000000 is not an integer"),
        ({}, "config lacks the key 'a'"),
        ({"a": 1, "b": "x"}, "config: b 'x' is not supported, only False"),
        ({"a": 1, "b": 0}, "config: b 0 is not supported, only False"),
        ({"a": 1, "c": []}, r"config: c \[\] is not a list of integers"),
        ({"a": 1, "c": "12"}, "config: c '12' is not a list of integers"),
        ({"a": 1, "d": float("nan")}, "config: d nan is not a number"),
        ({"a": 1, "e": 1}, "config: e 1 is neither true nor false"),
        ([], "config is not a mapping"),
    ],
)
def test_configs_are_read_key_by_key(config, message):
    with pytest.raises(UserError, match=message), Options(config) as options:
        options.count("a")
        options.only("b", False)
        options.counts("c", (1,))
        options.number("d", 0.0)
        options.flag("e", True)
