"""Text models of official classes: sizes, export, refused input, and the functions of their roles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_autoencoders import drawn
from test_sharding import misplaced

from hybridgen import cache, convert, sample
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part, find
from hybridgen.models.text import clip
from hybridgen.nn.position import relative_buckets, rotary, stretched
from hybridgen.runs import importing, reading
from hybridgen.runs.folder import read_json
from hybridgen.weights import rules, tables
from hybridgen.weights.files import open_weights
from hybridgen.weights.options import Options
from hybridgen.weights.tables import _rotary

GOLDEN = Path(__file__).parents[1] / "golden"
HERE = sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith(("clip_text", "t5_encoder", "llama_lm")))
CLIP = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20}
CLIP |= {"max_position_embeddings": 6, "eos_token_id": 19, "projection_dim": 5}
T5 = {"d_model": 8, "d_kv": 3, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 20}
LLAMA = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20}


def test_a_text_model_draws_no_pictures(tmp_path):
    assert convert.main(["llama_lm", str(GOLDEN / "llama_lm"), str(tmp_path / "run")]) == 0
    with pytest.raises(UserError, match="a text.lm run generates no images"):
        sample.main(["--run", str(tmp_path / "run"), "--prompt", "a circle", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "more"), [("clip_text", {"text_pooled"}), ("t5_encoder", set())])
def test_what_a_cache_has_of_a_tower(name, more):
    """Features, mask and, where the tower pools, its vector."""
    part = imported(name)
    ids, seen = np.load(GOLDEN / name / "io.npz")["in_ids"], np.ones((2, 1), bool)
    made = cache._features(part, ids, seen & (ids >= 0))
    assert made.keys() == {"text_features", "text_features_mask"} | more
    for entry in more:
        np.testing.assert_array_equal(made[entry], part.call("pooled", ids, seen & (ids >= 0)))


# ---------------------------------------------------------------- sizes

# all parameters, counted by the official classes
OFFICIAL = {
    ("clip_text", "CLIP-L"): 123_650_304,  # with its projection; 123,060,480 without
    ("clip_text", "CLIP-bigG"): 694_659_840,
    ("t5_encoder", "T5-XXL"): 4_762_310_656,
    ("t5_encoder", "Flan-T5-XL"): 1_223_527_424,
    ("llama_lm", "Llama-2-7B"): 6_738_415_616,
    ("llama_lm", "Llama-3.1-8B"): 8_030_261_248,
    ("llama_lm", "Llama-3.2-1B"): 1_235_814_400,
}


@pytest.mark.parametrize("source, preset", OFFICIAL)
def test_published_sizes(source, preset):
    known = tables.find(source)
    shapes = importing.target(known.plan(known.about.presets[preset], {})).shapes
    assert sum(int(np.prod(spec.shape)) for spec in shapes.values()) == OFFICIAL[source, preset]
    assert not misplaced(trees.unflatten(shapes)["params"])


# ---------------------------------------------------------------- the way back


def returned(source, config, state):
    """(the part, the exported tensors) of a state dict."""
    goal, arrays = importing.load(tables.find(source), config, state)
    return importing.part(goal, arrays), rules.export(trees.flatten(arrays), goal.plan.rules)


@pytest.mark.parametrize("name", ("clip_text", "t5_encoder", "llama_lm"))
def test_by_command_to_a_run_and_back(name, tmp_path):
    """The run is read as a part is, and its export is the file that it came from."""
    assert convert.main([name, str(GOLDEN / name), str(tmp_path / "run")]) == 0
    assert reading.load(tmp_path / "run").part.family.startswith("text.")
    assert convert.main([name, str(tmp_path / "run"), str(tmp_path / "back.safetensors"), "--export"]) == 0
    there, back = (open_weights(path) for path in (GOLDEN / name, tmp_path / "back.safetensors"))
    assert set(there) == set(back) and all(np.array_equal(there[key], back[key]) for key in there)


def test_the_tokenizer_beside_the_weights_or_in_a_folder_of_its_own(tmp_path, capsys):
    """An unreadable tokenizer is reported, and refused if it was requested by --text."""
    folders = {name: str(GOLDEN / "tokenizers" / name) for name in ("t5", "gpt2")}
    run = [str(GOLDEN / "t5_encoder"), str(tmp_path / "run")]
    assert convert.main(["t5_encoder", *run]) == 0 and not (tmp_path / "run" / "text.json").exists()
    assert "this run reads token ids only, no prompts: no tokenizer in" in capsys.readouterr().out
    run[1] = str(tmp_path / "new")
    for folder, message in ((str(tmp_path), "no tokenizer in"), (folders["gpt2"], "ids, but the model has 99")):
        with pytest.raises(UserError, match=message):
            convert.main(["t5_encoder", *run, "--text", folder])
        assert not (tmp_path / "new").exists()
    assert convert.main(["t5_encoder", *run, "--text", folders["t5"]]) == 0
    text = reading.load(tmp_path / "new").text
    assert text.kind == "published" and text.length == importing.PROMPT


@pytest.mark.parametrize("name", HERE)
def test_recorded_weights_come_back_bit_equal(name):
    weights = open_weights(GOLDEN / name / "weights.safetensors")
    _, back = returned(name, read_json(GOLDEN / name / "config.json"), weights)
    assert set(back) == set(weights)
    for key, tensor in weights.items():
        assert np.asarray(back[key]).tobytes() == tensor.read().tobytes(), key


OPTIONS = {
    "clip": ("clip_text", CLIP, "text_projection.weight"),
    "clip, a half of both": ("clip_text", {"text_config": CLIP, "projection_dim": 5}, "text_model.final"),
    "t5": ("t5_encoder", T5, "encoder.block.1.layer.1.DenseReluDense.wi.weight"),
    "t5, gated": ("t5_encoder", T5 | {"feed_forward_proj": "gated-silu"}, "wi_1.weight"),
    "llama": ("llama_lm", LLAMA | {"num_key_value_heads": None, "head_dim": None}, "lm_head.weight"),
    "llama, biases": ("llama_lm", LLAMA | {"attention_bias": True, "mlp_bias": True}, "mlp.gate_proj.bias"),
    "llama, tied": ("llama_lm", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}, "model.norm.weight"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_comes_back_bit_equal(case):
    source, config, has = OPTIONS[case]
    _, state = drawn(source, config)
    assert any(has in name for name in state)
    _, back = returned(source, config, state)
    assert {name: np.asarray(back[name]).tobytes() for name in back} == {k: v.tobytes() for k, v in state.items()}


def test_copies_of_one_table():
    shared, copy = "shared.weight", "encoder.embed_tokens.weight"
    _, state = drawn("t5_encoder", T5)
    both = state | {copy: state[shared]}
    alone = {name: value for name, value in both.items() if name != shared}
    rest = {"decoder.block.0.x": np.ones(2), "lm_head.weight": np.ones((20, 8))}  # the other half of a whole T5
    for given in (alone, both, both | rest):
        part, back = returned("t5_encoder", T5, given)
        np.testing.assert_array_equal(part.params["words"]["table"], state[shared])
        assert set(back) == set(given) - set(rest)
        assert all(np.asarray(back[name]).tobytes() == given[name].tobytes() for name in back)
    with pytest.raises(UserError, match=f"'{shared}' and '{copy}' are tied in this model, but have different values"):
        returned("t5_encoder", T5, both | {copy: state[shared] + 1})

    config = LLAMA | {"tie_word_embeddings": True}
    _, state = drawn("llama_lm", config)
    both = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    assert set(both) > set(state)
    _, back = returned("llama_lm", config, both)
    assert {name: np.asarray(back[name]).tobytes() for name in back} == {k: v.tobytes() for k, v in both.items()}
    with pytest.raises(UserError, match="are tied in this model, but have different values"):
        returned("llama_lm", config, both | {"lm_head.weight": np.ones((2, 2))})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("clip_text", CLIP | {"odd": 1}, "config has the key 'odd', which is not supported"),
        ("clip_text", CLIP | {"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported"),
        ("clip_text", CLIP | {"num_attention_heads": 3}, "hidden_size 8 does not divide over 3 num_attention_heads"),
        ("clip_text", CLIP | {"eos_token_id": [1, 2]}, "eos_token_id .* is not an integer"),
        ("clip_text", CLIP | {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ("clip_text", {"text_config": CLIP | {"odd": 1}}, "text_config has the key 'odd'"),
        ("clip_text", {"text_config": CLIP, "odd": 1}, "config has the key 'odd'"),
        ("clip_text", {"text_config": 3}, "text_config is not a mapping"),
        ("t5_encoder", T5 | {"feed_forward_proj": "gated-relu6"}, "feed_forward_proj 'gated-relu6' is not supported"),
        (
            "t5_encoder",
            T5 | {"feed_forward_proj": "relu", "dense_act_fn": "gelu"},
            "dense_act_fn 'gelu' is not supported",
        ),
        ("t5_encoder", T5 | {"relative_attention_num_buckets": 3}, "num_buckets 3 is not an integer within 4 and"),
        (
            "t5_encoder",
            T5 | {"relative_attention_max_distance": 8},
            "max_distance 8 must be above a quarter of relative_attention_num_buckets 32",
        ),
        ("t5_encoder", T5 | {"is_decoder": True}, "is_decoder True is not supported"),
        ("t5_encoder", T5 | {"model_type": "umt5"}, "model_type 'umt5' is not supported, only 't5'"),
        ("llama_lm", LLAMA | {"hidden_act": "laplace"}, "hidden_act 'laplace' is not supported"),
        ("llama_lm", LLAMA | {"sliding_window": 5}, "config has the key 'sliding_window'"),
        ("llama_lm", LLAMA | {"rope_scaling": {"type": "ntk"}}, "rope_scaling: type 'ntk' is not supported"),
        ("llama_lm", LLAMA | {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters: rope_type 'axial'"),
        ("llama_lm", LLAMA | {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks the key 'factor'"),
        ("llama_lm", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor 0.0 is not positive"),
        ("llama_lm", LLAMA | {"rope_parameters": {"rope_theta": 1e4, "beta": 1}}, "rope_parameters has the key 'beta'"),
        ("llama_lm", LLAMA | {"num_key_value_heads": 3}, "heads 2 .queries. do not divide by kv_heads 3"),
        ("llama_lm", LLAMA | {"head_dim": 3}, "head width 3 does not divide by 2"),
    ],
)
def test_configs_that_are_not_built(source, changes, message):
    with pytest.raises(UserError, match=message) as error:
        importing.target(tables.find(source).plan(changes, {}))
    assert "\n" not in str(error.value)


def test_a_text_that_is_too_long_and_a_skip_of_too_many():
    model = clip.CLIPText(vocab=9, length=4, width=8, depth=1, heads=2, hidden=8)
    with pytest.raises(UserError, match="the text has 5 positions, but this text tower takes at most 4"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))
    with pytest.raises(UserError, match="skip 2 is not within 0 and depth 1"):
        jax.eval_shape(lambda: clip.init(model.clone(skip=2), jax.random.key(0), {}, {}))


# ---------------------------------------------------------------- roles


def imported(name, **changes):
    weights = open_weights(GOLDEN / name / "weights.safetensors")
    part, _ = returned(name, read_json(GOLDEN / name / "config.json"), weights)
    return Part(part.params, part.extra, part.family, part.model.clone(**changes))


def test_towers_as_parts_give_what_was_recorded():
    io = np.load(GOLDEN / "clip_text" / "io.npz")
    for skip, name in ((0, "out_last"), (1, "out_penultimate")):
        part = imported("clip_text", skip=skip)
        both = jax.jit(lambda part, text: (part.call("encode", text, None), part.call("pooled", text, None)))
        (features, mask), pooled = both(part, io["in_ids"])
        np.testing.assert_allclose(features, io[name], atol=1e-5)
        np.testing.assert_allclose(pooled, io["out_text_embeds"], atol=1e-5)
        assert mask.shape == features.shape[:2] and mask.all()
    io, part = np.load(GOLDEN / "t5_encoder" / "io.npz"), imported("t5_encoder")
    features, mask = part.call("encode", io["in_ids"], io["in_mask"].astype(bool))
    np.testing.assert_allclose(features, io["out_last"], atol=1e-5)
    assert (mask == io["in_mask"]).all() and not hasattr(find(part.family), "pooled")


def test_what_a_mask_hides_changes_nothing():
    """Ids at hidden positions do not matter; without a mask they do."""
    for name in ("clip_text", "t5_encoder"):
        part = imported(name)
        text = np.array([[5, 6, 7, 98, 1, 2]], np.int32)
        other, mask = text * (np.arange(6) < 4), np.arange(6)[None] < 4
        run = jax.jit(lambda text, mask, part=part: part.call("encode", text, mask)[0])
        np.testing.assert_array_equal(run(text, mask)[:, :4], run(other, mask)[:, :4])
        assert np.abs(run(text, None) - run(other, None))[:, 4:].max() > 1e-2


def test_halves_in_bfloat16_stay_close():
    for name in ("clip_text", "t5_encoder"):
        text = np.load(GOLDEN / name / "io.npz")["in_ids"]
        half, whole = imported(name, dtype="bfloat16"), np.load(GOLDEN / name / "io.npz")
        got = jax.jit(lambda part, text: part.call("encode", text)[0])(half, text)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got, whole["out_last_nomask" if name == "t5_encoder" else "out_last"], atol=0.15)


# ---------------------------------------------------------------- positions


def test_buckets_are_exact_near_and_geometric_far():
    near = relative_buckets(np.arange(-7, 8), 32, 128)
    assert near.tolist() == [*range(7, -1, -1), *range(17, 24)]
    far = relative_buckets(np.array([8, 11, 12, 15, 16, 22, 23, 127, 128, 10_000]), 32, 128) - 16
    assert far.tolist() == [8, 8, 9, 9, 10, 10, 11, 15, 15, 15]
    with pytest.raises(
        UserError, match="32 buckets, farthest 8: need at least 4 buckets, and farthest above buckets / 4"
    ):
        relative_buckets(np.arange(3), 32, 8)


STRETCHED = [  # options of a config, and frequencies of 8-wide heads and the gain of transformers 5.23
    (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5},
        100,
        (1, 0.1, 0.00625, 0.00025),
        1.03889,
    ),
    ({"rope_type": "longrope", "factor": 4.0}, 100, (1, 1 / 15, 0.005, 0.00025), 1.087115),
    ({"rope_type": "longrope", "factor": 4.0}, 5000, (1, 0.05, 1 / 300, 0.000125), 1.087115),
    ({"rope_type": "proportional", "factor": 4.0, "partial_rotary_factor": 0.5}, 100, (0.25, 0.025, 0, 0), 1),
    ({"rope_type": "dynamic", "factor": 4.0}, 100, (1, 0.1, 0.01, 0.001), 1),
    ({"rope_type": "dynamic", "factor": 4.0}, 5000, (1, 0.0528726, 0.00279551, 0.000147806), 1),
]


@pytest.mark.parametrize(("options", "length", "frequencies", "gain"), STRETCHED)
def test_rotations_of_every_kind_of_config(options, length, frequencies, gain):
    if options["rope_type"] == "longrope":
        options = options | {"short_factor": [1, 1.5, 2, 4], "long_factor": [1, 2, 3, 8]}
    if options["rope_type"] in ("yarn", "longrope"):
        options = options | {"original_max_position_embeddings": 2048}
    longest = 2048 if options["rope_type"] == "dynamic" else 8192
    _, scaling = _rotary.scaling(Options({"rope_parameters": options}), longest, 8)
    cos, sin = rotary(np.array([0, 1, length - 1]), 8, scaling=scaling)
    np.testing.assert_allclose(cos[1], gain * np.cos(np.asarray(frequencies)), rtol=2e-5)
    np.testing.assert_allclose(sin[1], gain * np.sin(np.asarray(frequencies)), rtol=2e-5, atol=1e-9)


def test_stretched_rotations():
    """Linear: a position is read as an earlier one. Llama 3: quick rotations stay, slow ones are divided."""
    plain, slow = rotary(np.arange(5) / 4, 8), rotary(np.arange(5), 8, scaling={"kind": "linear", "factor": 4.0})
    np.testing.assert_allclose(slow[0], plain[0], atol=1e-6)
    frequency = np.geomspace(1, 1e-5, 40)
    got = stretched(frequency, "llama3", factor=8.0, low=1.0, high=4.0, trained=8192)
    turns = 8192 * frequency / (2 * np.pi)
    np.testing.assert_array_equal(got[turns > 4], frequency[turns > 4])
    np.testing.assert_allclose(got[turns < 1], frequency[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any() and (np.diff(got) < 0).all() and (got[between] < frequency[between]).all()
    with pytest.raises(UserError, match="rotary scaling 'yarn' is not one of 'linear', 'llama3', 'each', 'dynamic'"):
        stretched(frequency, "yarn", factor=2.0)
