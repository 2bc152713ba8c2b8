"""A prior on features of a text encoder (as text-conditional LlamaGen) in a cascade: T5, tokenizer, prior, decoder.

The tower is an imported T5 with a published tokenizer, so that nothing here reads text in any other way.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import saved_runs
import tiny
from PIL import Image

import hybridgen
from hybridgen import convert, export, sample
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.data import text as text_lib
from hybridgen.models.ar import llamagen
from hybridgen.models.hybrid import cascade
from hybridgen.runs import experiment, importing, reading
from hybridgen.runs.folder import read_json
from hybridgen.weights import safetensors
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTH, WIDTH = 8, 32  # positions that the prior reads, and the tower's width
PRIOR = {"width": 32, "depth": 1, "heads": 2, "vocab": "auto", "grid": "auto"}
PRIOR |= {"text_length": LENGTH, "text_width": WIDTH, "padding_sees_itself": True}
PARTS = ("tokenizer", "text", "prior", "decoder")


def tower_run(folder: Path) -> Path:
    """An imported T5 with its tokenizer, which lay beside the weights."""
    shutil.copytree(GOLDEN / "t5_encoder", folder / "t5")
    for file in (GOLDEN / "tokenizers" / "t5").iterdir():
        shutil.copy(file, folder / "t5")
    assert convert.main(["t5_encoder", str(folder / "t5"), str(folder / "text")]) == 0
    return folder / "text"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of the runs `PARTS` and the cascade of them."""
    folder = tmp_path_factory.mktemp("runs")
    tower_run(folder)
    saved_runs.save(folder / "tokenizer", "tokenizers.vq", tiny.FSQ, {}, 1)
    parts = {name: f"../{name}" for name in PARTS}
    own = {name: parts[name] for name in ("tokenizer", "text")}
    saved_runs.save(folder / "prior", "ar.llamagen", PRIOR, own, 2, {"prior": {"guidance": 1.0}})
    decoder = tiny.DECODER | {"plan_width": "auto", "depth": 1}
    saved_runs.save(folder / "decoder", "diffusion.dit", decoder, {"tokenizer": parts["tokenizer"]}, 3)
    draw = {"prior": {"guidance": 20.0, "top_k": 0}, "decoder": {"steps": 2, "solver": "euler"}}
    saved_runs.save(folder / "cascade", "hybrid.cascade", {"mode": "tokens"}, parts, 4, draw)
    return folder


def test_prompts_are_read_as_the_tower_reads_them(runs):
    """Its tokenizer, at the length of whoever reads the features: a T5 has no longest text."""
    tower = text_lib.from_json(read_json(runs / "text" / "text.json"))
    assert tower.kind == "published" and tower.length == importing.PROMPT
    for name in ("prior", "cascade"):
        assert read_json(runs / name / "text.json") == text_lib.resized(tower, LENGTH).to_json()
    config = config_lib.read(runs / "cascade" / "config.json")
    built = experiment.build(config, runs / "cascade")
    assert built.text.length == LENGTH and set(built.parts) == set(PARTS)


def test_the_tower_is_a_part_of_the_cascade_and_the_one_that_the_prior_knows(runs, tmp_path):
    config = config_lib.read(runs / "cascade" / "config.json")
    loaded = reading.load(runs / "cascade").part
    parts = {name: reading.load(runs / name).part for name in PARTS if name != "text"}
    cond = {"text": np.ones((1, LENGTH), np.int32), "text_mask": np.ones((1, LENGTH), bool)}
    with pytest.raises(UserError, match="a prior on text features needs the part 'text'; this config has"):
        experiment.find(config.family).sample(
            loaded.model, {}, cond, jax.random.split(jax.random.key(0), 1), parts=parts, extra={}, options={}
        )
    shutil.copytree(runs / "text", tmp_path / "copy")
    about = read_json(runs / "text" / "text.json")
    about["tokenizer"]["model"]["vocab"][5][0] = "▁greens"
    (tmp_path / "copy" / "text.json").write_text(json.dumps(about))
    with config.unlocked():
        config.parts.text = str(tmp_path / "copy")
    with pytest.raises(UserError, match="copy/text.json is not the text tokenizer that the run was saved with"):
        experiment.build(config, runs / "cascade")
    known = {name: reading.load(runs / name) for name in ("prior", "text")}
    known["text"] = known["text"]._replace(text=text_lib.from_json(about))
    with pytest.raises(UserError, match="the parts prior and text read text differently"):
        experiment.read_by(known, config.data)
    state = {name: tensor.read() for name, tensor in open_weights(runs / "t5" / "weights.safetensors").items()}
    state["encoder.final_layer_norm.weight"] = state["encoder.final_layer_norm.weight"] + 1
    shutil.copytree(runs / "t5", tmp_path / "t5", ignore=shutil.ignore_patterns("*.safetensors"))
    safetensors.write(tmp_path / "t5" / "weights.safetensors", state)
    assert convert.main(["t5_encoder", str(tmp_path / "t5"), str(tmp_path / "other")]) == 0
    with config.unlocked():
        config.parts.text = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"part 'text' \(.*other\) is not the one that the other parts were trained"):
        experiment.build(config, runs / "cascade")


def test_from_prompts_to_pictures_by_run_and_by_bundle(runs, tmp_path):
    prompts = ["a small red circle", "there is a green picture"]
    model = hybridgen.load(runs / "cascade")
    drawn, turned = (model.sample(given, seed=3) for given in (prompts, prompts[::-1]))
    assert drawn.array.shape == (2, tiny.SIDE, tiny.SIDE, 3)
    assert all(not tiny.same(one, other) for one, other in zip(drawn.tokens, turned.tokens, strict=True))  # by one key
    export.export(runs / "cascade", tmp_path / "bundle")
    assert sorted(path.name for path in (tmp_path / "bundle" / "parts").iterdir()) == sorted(PARTS)
    requested = [part for prompt in prompts for part in ("--prompt", prompt)]
    command = ["--run", str(tmp_path / "bundle"), *requested, "--seed", "3", "--out", str(tmp_path / "out")]
    assert sample.main(command) == 0
    again = [np.asarray(Image.open(tmp_path / "out" / f"{number:05d}.png")) for number in range(2)]
    np.testing.assert_array_equal(drawn.array, again)


@pytest.mark.slow
def test_a_joint_step_with_the_tower_or_with_cached_features(runs):
    """Both members learn, what stands for a dropped caption does not, and cached features need no tower."""
    parts = {name: reading.load(runs / name).part for name in ("tokenizer", "text")}
    known = {"vocab": parts["tokenizer"].model.vocab, "grid": parts["tokenizer"].model.grid}
    options = tiny.cascade_options(parts["tokenizer"], decoder={"depth": 1})
    options["prior"] = {"family": "ar.llamagen", "model": PRIOR | known | {"cond_drop_prob": 0.5}}
    text = text_lib.from_json(read_json(runs / "cascade" / "text.json"))
    ids, mask = zip(*(text.encode(caption) for caption in ("a red circle", "a picture of a", "there", "")), strict=True)
    batch = tiny.batch(4) | {"text": np.stack(ids), "text_mask": np.stack(mask)}
    features, seen = parts["text"].call("encode", batch["text"], batch["text_mask"])
    cached = {name: value for name, value in batch.items() if name not in ("text", "text_mask")}
    cached |= {"text_features": np.asarray(features), "text_features_mask": np.asarray(seen)}
    run = tiny.Run(tiny.experiment("hybrid.cascade", options, parts), batch)
    model, before = run.experiment.model, jax.device_get(run.state["params"])
    prior = cascade.part(model, "prior", before, parts)
    reported = jax.jit(lambda batch, parts: llamagen.conditioning(prior.model, batch, parts))
    straight, kept = reported(batch, parts), reported(cached, {})
    assert tiny.gap(straight["text_features"], kept["text_features"]) < 1e-5
    assert tiny.same(straight["text_features_mask"], kept["text_features_mask"])

    def loss(batch, parts):
        given = {"parts": parts, "extra": {}, "step": 0, "train": True}
        return cascade.loss(model, before, batch, jax.random.key(0), **given)[0]

    bare = {"tokenizer": parts["tokenizer"]}
    assert jax.eval_shape(loss, cached, bare).shape == ()
    with pytest.raises(UserError, match="needs the part 'text'"):
        jax.eval_shape(loss, batch, bare)
    run.step(batch)
    flat, after = trees.flatten(before), trees.flatten(jax.device_get(run.state["params"]))
    assert [path for path, leaf in flat.items() if tiny.same(leaf, after[path])] == ["prior/caption/null"]


# ---------------------------------------------------------------- bench and preflight


def build(path, *overrides, **options):
    return programs.build(*programs.choose(config_lib.load(path, overrides), None), **options)


def test_programs_of_a_cascade_and_of_its_prior(runs):
    """The tower runs in training unless its features are cached, and prompts are those of its tokenizer."""
    parts = [f"parts.{name}={runs / name}" for name in PARTS]
    joined = build("configs/hybrid/cascade.py", *parts, f"data.resolution={tiny.SIDE}")
    assert joined.experiment.text.kind == "published" and joined.cond["text"].shape == (16, LENGTH)
    assert joined.decoding().steps == 15
    small = ["model.width=32", "model.depth=1", "model.heads=2", "model.hidden=64", "model.text_length=8", "batch=2"]
    small += [f"model.text_width={WIDTH}", "model.null_length=0", f"data.resolution={tiny.SIDE}"]
    small += ["data.text.length=8"]
    plain, cached = (build("configs/ar/llamagen.py:t2i_xl", *parts[:2], *small, cached=c) for c in (False, True))
    assert plain.batch["text"].shape == (2, LENGTH) and "text_features" not in plain.batch
    assert cached.batch["text_features"].shape == (2, LENGTH, WIDTH)
    assert cached.batch["text_features_mask"].shape == (2, LENGTH)
    assert sum(cached.train_flops()[0].values()) < sum(plain.train_flops()[0].values())
    assert plain.decoding().bytes == cached.decoding().bytes > 0
    # a tower that is not there yet: any config of one
    words = build(
        "configs/ar/llamagen.py:t2i_xl", parts[0], "parts.text=configs/text/lm.py:tiny", *small, "model.text_width=64"
    )
    assert words.experiment.text.kind == "words" and words.decoding().bytes > 0
