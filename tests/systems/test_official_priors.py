"""Transformers of LlamaGen and taming-transformers: their published sizes, the files they come in, from a file to
pictures by ordinary commands, and how they train. That they compute the same, test_verify.py says."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torchfile

from hybridgen import cli, convert, sample
from hybridgen.core import rng, trees
from hybridgen.core.errors import UserError
from hybridgen.data import text as text_lib
from hybridgen.models.ar import llamagen, taming
from hybridgen.models.contract import find
from hybridgen.models.roles import next_token
from hybridgen.runs import importing
from hybridgen.sampling import guidance
from hybridgen.weights import rules, tables
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
PRIORS = ("llamagen_gpt", "llamagen_gpt_t2i", "llamagen_gpt_grouped", "taming_gpt", "taming_gpt_codes")


def golden(name):
    """(source, official config, official tensors)."""
    folder = GOLDEN / name
    state = {key: tensor.read() for key, tensor in open_weights(folder / "weights.safetensors").items()}
    return tables.find(name), json.loads((folder / "config.json").read_text()), state


# ---------------------------------------------------------------- sizes


@functools.cache
def size_of(source, preset):
    """Parameters of a published model."""
    about = tables.find(source)
    goal = importing.target(about.plan(about.about.presets[preset], {}))
    return sum(np.prod(spec.shape, dtype=np.int64) for path, spec in goal.shapes.items() if path.startswith("params/"))


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("c2i-B-256", 110.9), ("c2i-L-256", 342.9), ("c2i-XL-384", 774.7), ("c2i-XXL-384", 1411.0)],
)
def test_sizes_of_llamagen(preset, millions):
    assert round(size_of("llamagen_gpt", preset) / 1e6, 1) == millions


def test_sizes_that_are_published_roughly():
    assert 3.0e9 < size_of("llamagen_gpt", "c2i-3B-384") < 3.2e9
    assert 1.3e9 < size_of("taming_gpt", "imagenet-class") < 1.5e9
    text = size_of("llamagen_gpt", "t2i-XL-256") - size_of("llamagen_gpt", "c2i-XL-256")
    assert text == 120 * 2048 + 2048 * 1280 + 1280**2 - 1001 * 1280


@pytest.mark.parametrize(
    ("source", "preset", "variant"),
    [
        *(("llamagen_gpt", f"c2i-{size}-256", f"llamagen.py:{size.lower()}") for size in ("B", "L", "XL", "XXL", "3B")),
        ("llamagen_gpt", "t2i-XL-256", "llamagen.py:t2i_xl"),
        ("taming_gpt", "imagenet-class", "taming.py:imagenet"),
    ],
)
def test_imported_weights_fit_the_configs(source, preset, variant):
    from hybridgen.core import config as config_lib

    about = tables.find(source)
    goal = importing.target(about.plan(about.about.presets[preset], {}))
    config = config_lib.load(f"{tiny.ROOT}/configs/ar/{variant}")
    family = find(config.family)
    assert family is goal.family
    model = family.build(config_lib.resolve(config.model, {"vocab": 16384, "grid": (16, 16)}))
    shapes = jax.eval_shape(lambda key: family.init(model, key, {}, {}), jax.random.key(0))
    assert {path: spec.shape for path, spec in trees.flatten(shapes).items()} == {
        path: spec.shape for path, spec in goal.shapes.items()
    }
    # and compute the same: what differs says how to train, and where padding that nobody reads looks
    differ = {name for name in model.__dataclass_fields__ if getattr(model, name) != getattr(goal.model, name)}
    assert differ - {"padding_sees_itself"} <= {"dropout", "token_dropout", "remat", "dtype", "block_size"}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", PRIORS)
def test_in_and_out_again(name):
    source, config, state = golden(name)
    goal, arrays = importing.load(source, config, state)
    back = rules.export({path: trees.flatten(arrays)[path] for path in goal.official}, goal.plan.rules)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].shape == value.shape and np.asarray(back[key]).tobytes() == value.tobytes(), key


def same_arrays(name, tensors):
    source, config, state = golden(name)
    wanted, got = (trees.flatten(importing.load(source, config, given)[1]) for given in (state, tensors))
    return all((wanted[path] == got[path]).all() for path in wanted)


def test_wrapped_files():
    """Roots of the trainers that wrote them, and buffers that say nothing."""
    _, _, state = golden("llamagen_gpt")
    one, name = np.zeros(1, np.float32), "layers.0.attention.kv_cache.k_cache"
    for root in ("model", "module", "state_dict"):
        assert same_arrays("llamagen_gpt", {f"{root}.{key}": value for key, value in state.items()} | {"steps": one})
    assert same_arrays("llamagen_gpt", state | {name: one, "freqs_cis": one})
    _, _, state = golden("taming_gpt")
    mask = {"blocks.0.attn.mask": np.ones((1, 1, 20, 20), np.float32)}
    assert same_arrays("taming_gpt", state | mask)
    lightning = {f"state_dict.transformer.{key}": value for key, value in (state | mask).items()}
    assert same_arrays("taming_gpt", lightning | {"state_dict.first_stage_model.quant_conv.bias": one})
    assert same_arrays("taming_gpt", {f"transformer.{key}": value for key, value in state.items()})


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("llamagen_gpt", {"block_size": 12}, "block_size 12 is not a square number of tokens"),
        ("llamagen_gpt", {"rope_scale": 2}, "has the key 'rope_scale', which is not supported"),
        ("llamagen_gpt", {"model_type": "i2i"}, "model_type 'i2i' is not supported, only 'c2i', 't2i'"),
        ("llamagen_gpt", {"n_head": 5}, "dim 64 does not divide into n_head 5 heads"),
        ("llamagen_gpt", {"n_kv_head": 3}, "heads 4 (queries) do not divide by kv_heads 3"),
        ("llamagen_gpt", {"cls_token_num": 2}, "cls_token_num 2 is not supported, only 1"),
        ("taming_gpt", {"n_head": 5}, "n_embd 48 does not divide by n_head 5"),
        ("taming_gpt", {"n_past": 5}, "has the key 'n_past', which is not supported"),
    ],
)
def test_configs_that_are_refused(source, changes, message):
    about, config, state = golden(source)
    with pytest.raises(UserError) as error:
        importing.load(about, config | changes, state)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_the_published_yaml_says_of_the_condition():
    def model(block, **net):
        gpt = {"vocab_size": 30, "block_size": block, "n_layer": 1, "n_head": 2, "n_embd": 8}
        config = {"transformer_config": {"target": "mingpt.GPT", "params": gpt}, "pkeep": 1.0}
        made = tables.find("taming_gpt").plan(config | net, {}).model
        return made["classes"], made["cond_length"], made["grid"]

    classes = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    assert model(16, cond_stage_config=classes) == (10, 1, (4, 4))
    assert model(32, cond_stage_config={"target": "taming.models.vqgan.VQModel", "params": {}}) == (0, 16, (4, 4))
    assert model(16, cond_stage_config={"target": "taming.modules.util.SOSProvider"}) == (0, 1, (4, 4))
    for net, message in [
        (
            {"permuter_config": {"target": "taming.modules.transformer.permuter.ZCurve"}},
            "permuter_config is not supported",
        ),
        ({"sos_token": 3}, "sos_token 3 is not supported, only 0"),
        ({"downsample": 3}, "has the key 'downsample', which is not supported"),
        ({"cond_stage_config": classes | {"params": {"n_classes": 31}}}, "n_classes 31 must not exceed vocab_size"),
    ]:
        with pytest.raises(UserError, match=message):
            model(16, **{"cond_stage_config": classes} | net)


# ---------------------------------------------------------------- from files to pictures


def run_convert(*args):
    with pytest.raises(SystemExit) as end:
        cli.command(lambda: convert.main([str(arg) for arg in args]))
    return end.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an imported tokenizer of 8 x 8 tokens, and its vocabulary."""
    folder = tmp_path_factory.mktemp("official")
    config = json.loads((GOLDEN / "llamagen_vq" / "config.json").read_text()) | {"resolution": 16}
    (folder / "vq.json").write_text(json.dumps(config))
    weights = GOLDEN / "llamagen_vq" / "weights.safetensors"
    assert run_convert("llamagen_vq", weights, folder / "vq", "--config", folder / "vq.json") == 0
    return folder, config["codebook_size"]


def checkpoint_of(folder, vocab, **changes):
    """A random LlamaGen checkpoint as its trainer writes it, and the config; the number of its parameters is small."""
    config = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 32, "vocab_size": vocab, "block_size": 64}
    config |= {"num_classes": 5, "model_type": "c2i"} | changes
    goal = importing.target(tables.find("llamagen_gpt").plan(config, {}))
    draw = np.random.default_rng(0)
    arrays = {path: draw.normal(size=spec.shape).astype(np.float32) * 0.3 for path, spec in goal.official.items()}
    state = {name: np.asarray(tensor) for name, tensor in rules.export(arrays, goal.plan.rules).items()}
    whole = {"model": torchfile.ordered(state), "optimizer": {"state": {}}, "steps": 7}
    torchfile.save(folder / f"{config['model_type']}.pt", whole)
    (folder / f"{config['model_type']}.json").write_text(json.dumps(config))
    return folder / f"{config['model_type']}.pt", folder / f"{config['model_type']}.json"


def test_from_a_class_to_pictures(place, capsys):
    folder, vocab = place
    weights, config = checkpoint_of(folder, vocab)
    assert run_convert("llamagen_gpt", weights, folder / "no", "--config", config, "--part", "tokenizer") == 2
    assert "is not NAME=RUN, each name once" in capsys.readouterr().err
    part = f"tokenizer={folder / 'vq'}"
    assert run_convert("llamagen_gpt", weights, folder / "gpt", "--config", config, "--part", part) == 0
    draw = ["--run", str(folder / "gpt"), "--label", "3", "--label", "1", "--count", "2", "--out", str(folder / "out")]
    options = ["--guidance", "3", "--guidance-until", "0.5", "--top-k", "9", "--temperature", "0.9"]
    assert sample.main([*draw, *options]) == 0
    assert len(list((folder / "out").glob("0*.png"))) == 4

    with pytest.raises(UserError, match="takes a class: --label 0 to 4"):
        sample.main([*draw, "--label", "5"])
    other = checkpoint_of(folder, vocab + 1)
    assert run_convert("llamagen_gpt", other[0], folder / "odd", "--config", other[1], "--part", part) == 2
    assert f"has the vocab {vocab}, but the model has {vocab + 1}" in capsys.readouterr().err
    assert not (folder / "odd").exists()


@pytest.mark.slow
def test_from_a_text_to_pictures(place, capsys):
    """T5 with the tokenizer beside its weights, which reads as many positions as the prior does."""
    folder, vocab = place
    for file in (*(GOLDEN / "t5_encoder").iterdir(), *(GOLDEN / "tokenizers" / "t5").iterdir()):
        (folder / "flan").mkdir(exist_ok=True)
        shutil.copy(file, folder / "flan")
    assert run_convert("t5_encoder", folder / "flan", folder / "tower") == 0
    changes = {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 32}
    weights, config = checkpoint_of(folder, vocab, **changes)
    parts = ["--part", f"tokenizer={folder / 'vq'}", "--part", f"text={folder / 'tower'}"]
    assert run_convert("llamagen_gpt", weights, folder / "t2i", "--config", config, *parts) == 0
    draw = ["--run", str(folder / "t2i"), "--prompt", "a red circle", "--prompt", "a blue square"]
    assert sample.main([*draw, "--out", str(folder / "texts")]) == 0
    assert len(list((folder / "texts").glob("0*.png"))) == 2
    with pytest.raises(UserError, match="this model reads at most 5"):  # and the end mark
        sample.main([*draw, "--prompt", "a red circle of a green picture"])
    capsys.readouterr()
    weights, config = checkpoint_of(folder, vocab, **changes | {"caption_dim": 16})
    assert run_convert("llamagen_gpt", weights, folder / "narrow", "--config", config, *parts) == 2
    assert ", not 16 as the model reads" in capsys.readouterr().err
    assert run_convert("llamagen_gpt", weights, folder / "no", "--config", config, "--text", folder / "flan") == 2
    assert "--text is for text models, not for ar.llamagen" in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_a_tower_of_one_length_is_read_at_that(place, capsys):
    """A stand-in of one layer in the place of T5: any family with the role will do."""
    folder, vocab = place
    tower = {"vocab": 7, "length": 6, "width": 16, "depth": 1, "heads": 1}
    part = tiny.part("text.transformer", tower)
    importing._save(folder / "small" / "checkpoints" / "0", {"params": part.params, "extra": {}}, {})
    sections = {"family": "text.transformer", "model": tower, "data": {"resolution": 16}, "mesh": {"data": -1}}
    (folder / "small" / "config.json").write_text(json.dumps(sections | {"parts": {}, "sample": {"options": {}}}))
    changes = {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 16}
    weights, config = checkpoint_of(folder, vocab, **changes)
    parts = ["--part", f"tokenizer={folder / 'vq'}", "--part", f"text={folder / 'small'}"]
    assert run_convert("llamagen_gpt", weights, folder / "words", "--config", config, *parts) == 2
    assert "has no text tokenizer (text.json): convert it with --text" in capsys.readouterr().err
    words = text_lib.Words(["a", "red", "circle", "blue", "square"], 6)
    (folder / "small" / "text.json").write_text(json.dumps(words.to_json()))
    assert run_convert("llamagen_gpt", weights, folder / "words", "--config", config, *parts) == 0
    with pytest.raises(UserError, match="does not know the word 'green'"):
        sample.main(["--run", str(folder / "words"), "--prompt", "a green circle"])
    capsys.readouterr()
    weights, config = checkpoint_of(folder, vocab, **changes | {"cls_token_num": 5})
    assert run_convert("llamagen_gpt", weights, folder / "short", "--config", config, *parts) == 2
    assert "text positions, but the model reads 5" in capsys.readouterr().err


# ---------------------------------------------------------------- conditions, guidance, training

SMALL = {"vocab": 12, "grid": (4, 4), "width": 32, "depth": 2, "heads": 2}
KINDS = {
    "class": ("ar.llamagen", SMALL | {"classes": 3}),
    "caption": ("ar.llamagen", SMALL | {"text_length": 5, "text_width": 8}),
    "codes": ("ar.taming", SMALL),
}
B = 4


@functools.cache
def prior(kind, **changes):
    family, options = KINDS[kind]
    return tiny.part(family, options | changes)


def batch():
    draw = np.random.default_rng(1)
    return {"id": np.arange(B), "label": np.arange(B) % 3, "tokens": draw.integers(0, 12, (B, 16)).astype(np.int32)}


def test_captions_are_padded_on_the_left():
    part = prior("caption")
    draw = np.random.default_rng(0)
    features, lengths = draw.normal(size=(B, 5, 8)).astype(np.float32), np.array([1, 5, 3, 2])
    right = np.arange(5) < lengths[:, None]
    cond = llamagen.conditioning(part.model, {"text_features": features, "text_features_mask": right}, {})
    assert (np.asarray(cond["text_features_mask"]) == right[:, ::-1]).all()
    for row, length in enumerate(lengths):
        moved = np.asarray(cond["text_features"])[row, 5 - length :]
        assert (moved == features[row, :length]).all()
    run = jax.jit(lambda tokens, cond: part.call("score", tokens, cond))
    hidden = jnp.where(cond["text_features_mask"][..., None], cond["text_features"], 7.0)
    tokens = batch()["tokens"]
    assert tiny.same(run(tokens, cond), run(tokens, cond | {"text_features": hidden}))  # padding says nothing
    with pytest.raises(UserError, match="text features are 4x8 .positions x width., but this prior needs 5x8"):
        llamagen.conditioning(part.model, {"text_features": features[:, :4], "text_features_mask": right[:, :4]}, {})


@pytest.mark.parametrize("kind", ["codes", "class"])
def test_cached_is_the_full_forward_for_any_chunks(kind):
    part = prior(kind, **({"cond_length": 3, "unmasked": 3, "block_size": 30} if kind == "codes" else {}))
    tokens = jnp.asarray(batch()["tokens"])
    cond = find(part.family).conditioning(part.model, batch() | {"cond_tokens": tokens[:, :3]}, {})
    full = jax.jit(lambda tokens, cond: part.call("score", tokens, cond))(tokens, cond)
    logits, cache = jax.jit(lambda cond: part.call("prefill", cond))(cond)
    step, out, at = jax.jit(lambda cache, chunk: part.call("step", cache, chunk)), [logits[:, None]], 0
    for length in (3, 1, 1, 7, 3):
        logits, cache = step(cache, tokens[:, at : at + length])
        out.append(logits)
        at += length
    assert tiny.gap(full, jnp.concatenate(out, 1)) < 1e-5


def test_guidance_needs_a_dropped_condition():
    keys = rng.sample_keys(jax.random.key(0), jnp.arange(B))
    with pytest.raises(UserError, match="has no unconditional mode"):
        part = prior("codes")
        part.call("generate", taming.conditioning(part.model, batch(), {}), keys, {"guidance": 2.0})
    assert guidance.until(3.0, -1, 16) == guidance.until(3.0, 14, 16) == 3.0
    scale = guidance.until(3.0, 4, 16)  # runs 0 to 4 over the cache give tokens 1 to 5, prefill token 0
    assert [float(guidance.at(scale, jnp.float32(i) / 15)) for i in range(16)] == [3.0] * 6 + [1.0] * 10


def test_noise_is_of_training_alone_and_of_the_sample():
    """Dropout, and tokens that are read as random ones, change with the key in training; a row's are its own."""
    changes = {"class": {"dropout": 0.3, "cond_drop_prob": 0.0}, "codes": {"pkeep": 0.5}}
    for kind, options in changes.items():
        part = prior(kind, **options)

        @functools.partial(jax.jit, static_argnames="train")
        def loss(given, key, train, part=part):
            options = {"parts": {}, "extra": {}, "step": 0, "train": train}
            return find(part.family).loss(part.model, part.params, given, key, **options)[0]

        keys = [jax.random.key(seed) for seed in range(3)]
        assert len({float(loss(batch(), key, train=False)) for key in keys}) == 1
        assert len({float(loss(batch(), key, train=True)) for key in keys}) == 3
        turned = jax.tree.map(lambda x: x[::-1], batch())
        pair = [float(loss(given, keys[0], train=True)) for given in (batch(), turned)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def test_official_start():
    """One deviation for kernels and tables, zeros for positions, norms as they are; LlamaGen's head is zero."""
    before = prior("codes").params
    params = trees.flatten(jax.jit(functools.partial(next_token.redraw, std=0.02))(before, jax.random.key(0)))
    assert tiny.same(params["position/table"], before["position"]["table"])  # as they are
    kernels = [x for path, x in params.items() if path.endswith("kernel")]
    assert all(abs(float(x.std()) / 0.02 - 1) < 0.15 for x in [*kernels, params["tokens/table"]])
    assert tiny.same(params["norm/scale"], before["norm"]["scale"])
    for kind, zeros in {"codes": {"position/table"}, "class": {"head/kernel"}, "caption": {"head/kernel"}}.items():
        part = prior(kind)
        started = jax.jit(lambda key, part=part: find(part.family).init(part.model, key, {}, {}))(jax.random.key(1))
        flat = {path: x for path, x in trees.flatten(started["params"]).items() if not path.endswith("bias")}
        assert {path for path, x in flat.items() if not x.any()} == zeros


def test_a_dropped_caption_is_never_trained():
    part = prior("caption")
    cond = {"text_features": jnp.ones((B, 5, 8)), "text_features_mask": jnp.ones((B, 5), bool)}
    cond["drop"] = jnp.ones((B,), bool)
    loss = jax.jit(jax.grad(lambda p: llamagen.score(part.model, p, {}, batch()["tokens"], cond).sum()))
    grads = loss(part.params)
    assert not grads["caption"]["null"].any() and grads["caption"]["up"]["kernel"].any()


def test_options_that_make_no_model_are_refused():
    for changes in ({}, {"classes": 3, "text_width": 8}):
        with pytest.raises(
            UserError, match="LlamaGen takes either a class or a text, so exactly one of them must be 0"
        ):
            llamagen.build(SMALL | changes)
    with pytest.raises(UserError, match="block_size 17 is below the 18 positions"):
        taming.build(SMALL | {"cond_length": 3, "block_size": 17})
    with pytest.raises(UserError, match="'cond_tokens' is missing in the batch: this prior needs 3 condition codes"):
        taming.conditioning(taming.build(SMALL | {"cond_length": 3}), batch(), {})
