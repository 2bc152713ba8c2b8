"""Fine-tuning: what a config keeps of the run that it starts from, what it refuses, and what it says of new data."""

import json
from pathlib import Path

import numpy as np
import pytest
import saved_runs
import tiny
from PIL import Image

from hybridgen import export, recipe, train
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.runs import experiment, finetune, reading
from hybridgen.runs import folder as run_folder
from hybridgen.training import resume

TOWER = {"vocab": 9, "length": 4, "width": 8, "depth": 1}
CAPTIONS = ("a small red circle", "a large blue circle at night", "a green square", "night")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """tokenizer, prior, decoder, cascade."""
    return saved_runs.cascade(tmp_path_factory.mktemp("runs")).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "captioned", CAPTIONS)


def folder(place: Path, captions=(), classes=()) -> Path:
    """Images with captions in text files, or in a folder for each class."""
    for number, word in enumerate(captions or classes):
        name = place / (f"{number}.png" if captions else f"{word}/{number}.png")
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * number, 9, 9)).save(name)
        if captions:
            name.with_suffix(".txt").write_text(word)
    return place


def changed(run: Path, place: Path, **changes) -> Path:
    """A copy of a run's config with other entries ("model__classes"; None removes one), without arrays."""
    config = run_folder.read_json(run / "config.json")
    config["parts"] = {name: str((run / path).resolve()) for name, path in config["parts"].items()}
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node.pop(last, None)
        node.update({} if value is None else {last: value})
    place.mkdir()
    run_folder.write_json(place / "config.json", config)
    return place


def classes_run(runs: Path, place: Path, **changes) -> Path:
    only = {"model__text_vocab": 0, "model__text_length": 0, "model__classes": 3}
    return changed(runs / "prior", place, **only, **{"data__class_names": ["blue", "green", "red"]} | changes)


def test_what_is_kept_and_what_is_new(runs, images, tmp_path):
    run = reading.read_config(runs / "prior")
    config = finetune.one(str(runs / "prior"), [f"path={images}", "steps=9", "optim.b1=0.8"], tmp_path / "new")
    assert config.family == run.family and config.model.to_dict() == run.model.to_dict()
    assert config.parts.to_dict() == {"tokenizer": str(runs / "tokenizer")}
    assert config.init_from.to_dict() == {"all": str(runs / "prior")}
    assert config.sample.options.to_dict() == run.sample.options.to_dict()
    assert (config.batch, config.ema.decay, config.optim.lr) == (2, 0.9, run.optim.lr / 10)
    assert (config.steps, config.optim.b1, config.optim.b2) == (9, 0.8, run.optim.b2)
    assert config.data.source == "folder" and config.data.options.to_dict() == {"path": str(images)}
    assert config.data.resolution == tiny.SIDE and config.data.text == run.data.text
    assert not (tmp_path / "new").exists()


def test_the_vocabulary_and_the_averaged_weights_are_the_start(runs, images, tmp_path):
    config = finetune.one(str(runs / "prior"), [f"path={images}"], tmp_path / "new")
    built = experiment.build(config, tmp_path / "new", resume.checked(config))
    run = reading.load(runs / "prior")
    assert text_lib.digest(built.text) == text_lib.digest(run.text)
    assert built.options["text_vocab"] == run.text.vocab_size and "night" not in built.text.words
    params, _ = reading.earlier(config, tmp_path / "new")
    average = tiny.filled(built.family, built.model, {}, built.parts, 2 + 90)["params"]  # see saved_runs.save
    assert tiny.same(trees.flatten(params[""]), trees.flatten(average))


@pytest.mark.slow
def test_training_starts_from_them_and_resumes(runs, images, tmp_path, capsys):
    words = ["--from", str(runs / "prior"), "--workdir", str(tmp_path / "new"), f"--config.path={images}"]
    words += ["--config.steps=1", "--config.optim.lr=0.0"]
    assert train.main(words) == 0
    assert "does not know 1 of 7 words: 'night' 1 times" in capsys.readouterr().out
    new, old = (reading.load(place) for place in (tmp_path / "new", runs / "prior"))
    assert tiny.gap(new.part.params, old.part.params) < 1e-6 and text_lib.digest(new.text) == text_lib.digest(old.text)
    assert new.part_digests == old.part_digests
    assert train.main(words) == 0 and "steps 1 to 1" in capsys.readouterr().out
    assert train.main(["--from", str(tmp_path / "new"), *words[2:3], str(tmp_path / "next"), *words[4:]]) == 0


@pytest.mark.parametrize(
    "setting",
    ["model.width=64", "model={}", "family=ar.taming", "parts.tokenizer=x", "parts.text=x", "init_from.all=x"]
    + ["data.text.kind=bytes", "data.text.length=3", "data.resolution=64", "stages.prior.model.depth=3"],
)
def test_a_change_of_the_model_is_refused(runs, images, tmp_path, setting):
    for start in (finetune.one, finetune.several):
        with pytest.raises(UserError, match=f"^--config.{setting.partition('=')[0]}: --from .* keeps .* of that run"):
            start(str(runs / "prior"), [f"path={images}", setting], tmp_path / "new")


def test_a_cascade_names_its_parts(runs, images, tmp_path):
    with pytest.raises(UserError) as error:
        finetune.one(str(runs / "cascade"), [f"path={images}"], tmp_path / "new")
    assert all(f"--from {runs / name}" in str(error.value) for name in ("prior", "decoder"))
    assert f"hybridgen recipe --from {runs / 'cascade'}" in str(error.value)


def test_other_starts_and_data_that_are_refused(runs, images, tmp_path):
    tower = changed(runs / "tokenizer", tmp_path / "tower", family="text.transformer", model=TOWER)
    other = changed(runs / "prior", tmp_path / "other", init_from={"all": str(runs)})
    bare = changed(runs / "prior", tmp_path / "imported", optim=None)
    alone = changed(runs / "prior", tmp_path / "alone", optim=None, parts={})
    strange = folder(tmp_path / "strange", ["dog", "cats"])
    silent = folder(tmp_path / "silent", classes=["red", "blue"])
    prior, new = runs / "prior", tmp_path / "new"
    for run, path, workdir, says in (
        (tower, images, new, "is a text model, which hybridgen does not train"),
        (runs, images, new, "it has the runs cascade, decoder, prior, tokenizer"),
        (prior, images, prior, "is the run that --from names"),
        (prior, images, other, f"has a run that was started from {runs}, not from {prior}"),
        (prior, tmp_path / "none", new, "--config.path: no folder of images at"),
        (prior, silent, new, f"reads captions, but {silent} has none"),
        (prior, strange, new, "does not know 1 of 1 words: .* train from a config"),
        (alone, images, new, "^--from .*: ar.raster generates tokens, but has no part 'tokenizer'.*convert --part$"),
        (bare, None, new, "imported weights have no data: give --config.path=FOLDER"),
    ):
        with pytest.raises(UserError, match=says):
            finetune.one(str(run), [f"path={path}"] * (path is not None), workdir)
    with pytest.raises(UserError, match="give one of them"):
        finetune.one(str(prior), [f"path={images}", "data.source=records"], new)
    for words, says in ((["--config", "x.py"], "not allowed with"), (["--from"], "expected one argument")):
        with pytest.raises(UserError, match=says):
            train.main(["--from", str(prior), "--workdir", str(new), *words])
    with pytest.raises(UserError, match="one of the arguments --config --from is required"):
        train.main(["--workdir", str(new)])


def test_imported_weights_and_bundles(runs, images, tmp_path):
    """Imported weights have no training entries: these are those of configs/finetune.py."""
    bare = changed(runs / "prior", tmp_path / "imported", optim=None, ema=None, steps=None, trainable=None)
    config = finetune.one(str(bare), [f"path={images}"], tmp_path / "new")
    assert (config.batch, config.optim.lr, config.ema.decay, config.steps) == (16, 1e-4, 0.0, 500)
    export.export(runs / "cascade", tmp_path / "bundle")
    config = finetune.one(str(tmp_path / "bundle/parts/prior"), [f"path={images}"], tmp_path / "new")
    assert config.parts.tokenizer == str(tmp_path / "bundle/parts/tokenizer")
    built = experiment.build(config, tmp_path / "new", resume.checked(config))
    assert built.text.words == reading.load(runs / "prior").text.words


def test_an_image_tokenizer_needs_no_captions(runs, tmp_path, capsys):
    place = folder(tmp_path / "silent", classes=["red", "blue"])
    config = finetune.one(str(runs / "tokenizer"), [f"path={place}"], tmp_path / "new")
    assert experiment.build(config, tmp_path / "new", resume.checked(config)).text is None
    assert not capsys.readouterr().out


def test_classes_keep_their_numbers(runs, tmp_path, capsys):
    run = classes_run(runs, tmp_path / "run")
    some = folder(tmp_path / "some", classes=["red", "blue", "red", "blue"])
    config = finetune.one(str(run), [f"path={some}"], tmp_path / "new")
    source = sources.build(config.data, "train")
    assert {source[i]["label"] for i in range(len(source))} <= {0, 2} and source.class_names == ["blue", "green", "red"]
    assert "classes: 0 blue, 1 green, 2 red (the run has 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "names", "says"),
    [
        (["red", "cat"], ["blue", "green", "red"], "1 classes are not among class_names .*: 'cat'"),
        (["0", "3"], ["blue", "green", "red"], "the class 3 is none of the 3 of class_names"),
        (["0", "3"], [0, 1, 2], "takes 3 classes, but .* has 4"),
        (["a", "b", "c", "d"], None, "takes 3 classes, but .* has 4"),
        ([".", "."], None, "takes 3 classes, but .* has no classes"),
        (["0", "2"], ["blue", "green", "red"], None),
        (["cat", "dog"], None, None),
        (["cat", "dog"], [0, 1, 2], None),
    ],
)
def test_classes_of_new_data(runs, tmp_path, capsys, classes, names, says):
    run = classes_run(runs, tmp_path / "run", data__class_names=names)
    place = folder(tmp_path / "data", classes=classes)
    if says:
        with pytest.raises(UserError, match=says):
            finetune.one(str(run), [f"path={place}"], tmp_path / "new")
    else:
        finetune.one(str(run), [f"path={place}"], tmp_path / "new")
        assert "classes: 0 " in capsys.readouterr().out


# ---------------------------------------------------------------- the recipe


def test_the_recipe_of_a_cascade(runs, images, tmp_path):
    settings = [f"path={images}", "steps=7", "stages.decoder.optim.lr=2e-5", "data.options.validation=0.5"]
    config = finetune.several(str(runs / "cascade"), settings, tmp_path)
    assert config.order == ("prior", "decoder", "cascade", "evaluation")
    assert [config.stages[name].steps for name in config.order[:3]] == [7, 7, 0]
    places = {"prior": "../prior", "decoder": "../decoder", "tokenizer": str(runs / "tokenizer")}
    assert config.stages.cascade.parts.to_dict() == places and not config.stages.cascade.init_from
    assert config.stages.decoder.optim.lr == 2e-5
    for name in config.order[:3]:
        assert config.stages[name].data.options.to_dict() == {"path": str(images), "validation": 0.5}
    assert config.stages.evaluation.evaluate == "../cascade"
    recipe.check(config)
    recipe.check_stages(config)


def test_the_stages_of_a_recipe_read_the_same_data(runs, tmp_path, capsys):
    """A cascade of a prior that takes classes: its decoder and the cascade number them as the prior does."""
    prior = classes_run(runs, tmp_path / "prior")
    cascade = changed(runs / "cascade", tmp_path / "cascade")
    config = run_folder.read_json(cascade / "config.json")
    config["parts"]["prior"] = str(prior)
    run_folder.write_json(cascade / "config.json", config)
    some = folder(tmp_path / "some", classes=["red", "blue", "red", "blue"])
    config = finetune.several(str(cascade), [f"path={some}"], tmp_path / "new")
    options = {"path": str(some), "text_key": None, "class_names": ("blue", "green", "red")}
    assert all(config.stages[name].data.options.to_dict() == options for name in config.order[:3])
    recipe.check_stages(config)


def test_the_recipe_of_one_model(runs, images, tmp_path):
    config = finetune.several(str(runs / "decoder"), [f"path={images}", "stages.decoder.batch=4"], tmp_path)
    assert config.order == ("decoder", "evaluation") and config.stages.evaluation.evaluate == "../decoder"
    recipe.check_stages(config)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.prior.mesh.data=3", "stage 'prior': mesh"),
        ("stages.decoder.data.options.layout=txd", "unknown layout|no 'txd'"),
        ("stages.decoder.sample.options.prior.guidance=1", "unknown config key"),
        ("steps=-1", "config key 'steps' -1 is not within"),
        ("data.source=records", "--config.data.source is not for recipes"),
    ],
)
def test_all_stages_are_checked_before_the_first(runs, images, tmp_path, setting, says):
    words = ["--from", str(runs / "cascade"), f"--config.path={images}", "--workdir", str(tmp_path / "new")]
    with pytest.raises(UserError, match=says):
        recipe.main([*words, f"--config.{setting}"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_recipe_of_no_steps_has_the_weights_of_the_run(runs, images, tmp_path, capsys):
    words = ["--from", str(runs / "cascade"), f"--config.path={images}", "--workdir", str(tmp_path), "--config.steps=0"]
    assert recipe.main(words) == 0
    for name in ("prior", "decoder"):
        new, old = (reading.load(place / name) for place in (tmp_path, runs))
        assert tiny.gap(new.part.params, old.part.params) == 0
    assert "trained on other data" not in "".join(capsys.readouterr()) and (tmp_path / "evaluation/train.png").is_file()


# ---------------------------------------------------------------- init_from in general


def test_a_config_that_starts_from_a_run_has_its_vocabulary(runs, images, tmp_path):
    """Word embeddings mean something with their vocabulary only; another one of the same size would be no error."""
    config = finetune.one(str(runs / "prior"), [f"path={images}"], tmp_path / "new").copy_and_resolve_references()
    words = reading.load(runs / "prior").text.words
    assert experiment.starting_text(config, None).words == words
    with config.unlocked():
        config.init_from.all = str(runs / "tokenizer")
    assert experiment.starting_text(config, None) is None  # it reads no text
    other = changed(runs / "prior", tmp_path / "other")
    run_folder.write_json(other / "text.json", text_lib.Words(words[::-1], 8).to_json())
    with config.unlocked():
        config.init_from.update({"a": str(runs / "prior"), "b": f"{other}:blocks"})
    assert experiment.starting_text(config, None).words == words
    with config.unlocked():
        config.init_from.b = str(other)
    with pytest.raises(UserError, match="init_from: .* read text differently"):
        experiment.starting_text(config, None)


def test_another_tokenizer_than_the_run_knew_is_said(runs, images, tmp_path, capsys):
    config = finetune.one(str(runs / "prior"), [f"path={images}"], tmp_path / "new")
    right = reading.load(runs / "prior").part_digests
    reading.earlier(config, tmp_path, right)
    assert "warning" not in capsys.readouterr().err
    reading.earlier(config, tmp_path, {"tokenizer": "another"})
    assert "was trained with another tokenizer than this run has" in capsys.readouterr().err


def test_labels_of_a_file_are_those_of_the_folders(tmp_path):
    """`class_names` also orders the names in a field of the metadata."""
    place = folder(tmp_path / "data", ["x", "y", "z"])
    rows = [{"file_name": f"{i}.png", "kind": kind} for i, kind in enumerate(("red", "blue", "red"))]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"path": str(place), "label_key": "kind", "text_key": None, "validation": 0.0}
    data = {"source": "folder", "options": options | {"class_names": ("red", "green", "blue")}, "resolution": 8}
    source = sources.build(data, "train")
    assert [source[i]["label"] for i in range(3)] == [0, 2, 0] and np.shape(source[0]["image"]) == (8, 8, 3)
