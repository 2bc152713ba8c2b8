"""Entries that a command line may add: options that a source has, and keys of --allow."""

import json

import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from hybridgen import recipe, train
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data.prepare import buckets
from hybridgen.training import resume

VQ, RECIPE = (f"{tiny.ROOT}/configs/{name}.py:tiny" for name in ("tokenizers/vq", "recipes/imagefolder"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures of two classes."""
    path = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(4):
        Image.new("RGB", (8, 8), (i, i, i)).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "one", "class": ["cat", "dog"][i % 2]}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def test_a_recipe_takes_an_option_for_all_its_stages(folder):
    words = [f"path={folder}", "data.options.label_key=class", "stages.prior.data.options.validation=0.5"]
    stages = config_lib.load(RECIPE, words).stages
    datas = {name: stage.data for name, stage in stages.items() if "data" in stage}
    assert len(datas) == 4 and {data.options.label_key for data in datas.values()} == {"class"}
    assert [name for name, data in datas.items() if "validation" in data.options] == ["prior"]
    assert sources.build(datas["prior"], "train").class_names == ["cat", "dog"]


def test_a_stage_takes_an_option_of_another_source(folder):
    words = ["data.source=folder", f"data.options.path={folder}", "data.options.text_weights=2", "data.resolution=8"]
    data = config_lib.load(VQ, words).data
    assert sources.build(data, "train").text_weights == (2,)  # one is a tuple of one


def test_a_member_of_a_mixture_takes_one(folder):
    config = config_lib.load(VQ).copy_and_resolve_references()
    member = {"source": "folder", "options": {"path": str(folder), "validation": 0}}
    with config.unlocked():
        config.data = {"source": "mixture", "options": {"sources": {"a": member}}, "resolution": 8}
    config_lib.override(config, ["data.options.sources.a.options.label_key=class"])
    assert sources.build(config.data, "train").class_names == ["cat", "dog"]
    with pytest.raises(UserError, match="unknown config key 'data.options.sources.b.options.label_key'"):
        config_lib.override(config, ["data.options.sources.b.options.label_key=class"])
    config_lib.override(config, ["data.options.sources.a.options.buckets=table"])
    with pytest.raises(UserError, match="data.options.sources.a.options.buckets: a mixture cannot have buckets"):
        sources.build(config.data, "train")


REFUSED = {
    "option": (
        ["data.options.labelkey=class"],
        "'folder': 'labelkey'; the nearest known one is 'label_key' .known: .*text_weights.*buckets",
    ),
    "of another": (["data.options.templates=2"], "unknown option of the source 'folder': 'templates'"),
    "float": (["data.options.validation=much"], "data.options.validation takes float, such as 0.02, not 'mu"),
    "int": (["data.options.max_bytes=True"], "data.options.max_bytes takes int, such as 67108864, not True"),
    "none": (["data.source=shapes", "data.options.templates=few"], "templates takes an integer or none, not 'few'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_source_does_not_take_is_refused_by_name(case, folder, tmp_path):
    words, says = REFUSED[case]
    path = [] if case == "none" else ["data.source=folder", f"data.options.path={folder}"]
    with pytest.raises(UserError, match=says):
        train.run(config_lib.load(VQ, [*path, *words]), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_recipe_and_the_table_of_buckets_refuse_it_too(folder, tmp_path):
    words = ["--config", RECIPE, f"--config.path={folder}", "--config.data.options.labels=class"]
    with pytest.raises(UserError, match="stage 'tokenizer': unknown option of the source 'folder': 'labels'"):
        recipe.main([*words, "--workdir", str(tmp_path / "run")])
    with pytest.raises(UserError, match="unknown option of the source 'folder': 'labels'"):
        buckets.main([*words, "--out", str(tmp_path / "table.json")])
    with pytest.raises(UserError, match="unknown config key 'stages.priors.data.options.label_key'"):
        config_lib.load(RECIPE, ["stages.priors.data.options.label_key=class"])


# ---- keys that may differ on resume


def test_allow_takes_keys_and_groups_of_the_run(tmp_path):
    config = config_lib.load(VQ)
    words = "config.optim,config.model.codes,data,data.source.length,parts.old"
    with pytest.raises(UserError, match="--allow 'config.model.codes' is not a key"):
        resume.allowed(words, [(config, tmp_path)])
    about = tmp_path / "checkpoints" / "3" / "about"
    about.mkdir(parents=True)  # what a checkpoint has, and the config no more
    about.joinpath("metadata").write_text(
        json.dumps({"fingerprint": {"config": {"model": {"codes": 3}}, "parts": {"old": "ab"}}})
    )
    assert resume.allowed(words, [(config, tmp_path)]) == tuple(words.split(","))
    assert resume.allowed("", [(ConfigDict({"data": {}, "parts": {}}), tmp_path)]) == ()


@pytest.mark.parametrize("word", ["seed", "lr", "config.opti", "config.log.every", "all", "parts.tokenizer"])
def test_allow_refuses_what_is_no_key(word, tmp_path):
    with pytest.raises(
        UserError, match=rf"--allow '{word}' is not a key.*config.batch, .*config.optim.lr, .*data.seed"
    ):
        train.main(["--config", VQ, "--workdir", str(tmp_path / "run"), "--allow", f"config.seed,{word}"])
    assert not (tmp_path / "run").exists()


def test_a_recipe_allows_what_one_of_its_stages_has(tmp_path):
    config = config_lib.load(f"{tiny.ROOT}/configs/recipes/shapes.py:tiny")
    stages = [(config.stages[name], tmp_path) for name in config.order if "family" in config.stages[name]]
    assert resume.allowed("config.model.quantizer.levels,config.model.heads", stages)
    with pytest.raises(UserError, match="--allow 'config.model.hats' is not a key; did you mean 'config.model.heads'"):
        resume.allowed("config.model.hats", stages)
