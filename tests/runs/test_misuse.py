"""What is said when a run cannot do what it is asked: unused parts, missing classes, folders of several runs."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridgen import evaluate, sample
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import text
from hybridgen.runs import experiment, reading
from hybridgen.training import resume

ROOT = Path(__file__).parents[2]
CASCADE = f"{ROOT}/configs/hybrid/cascade.py"


@pytest.mark.parametrize("variant", ["tiny", "joint"])
@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_a_part_that_a_cascade_would_not_use_is_refused(variant, name):
    config = config_lib.load(f"{CASCADE}:{variant}", [f"parts.{name}=runs/it"])
    with pytest.raises(
        UserError, match=rf"config.parts.{name} is given, .* trains a {name} of its own \(model.{name}\): use"
    ):
        resume.checked(config)
    resume.unshadowed(config_lib.load(CASCADE, [f"parts.{name}=runs/it"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": "folder", "options": {"path": "x"}}, "data.source is 'shapes' here and was 'folder' there"),
        ({"options": {"size": 9}}, "data.options.size is None here and was 9 there"),
        ({"options": {"path": "elsewhere"}, "resolution": 64}, ""),
        ({"source": "records", "options": {"path": "../tokens"}}, ""),
    ],
)
@pytest.mark.parametrize("family", ["ar.raster", "diffusion.dit", "tokenizers.vq"])
def test_other_data_than_a_part_s_are_named(change, says, family, capsys):
    config = config_lib.load(CASCADE)
    with config.unlocked():
        config.data.options = {}
    there = copy.deepcopy(config_lib.plain(config.data)) | change
    run = SimpleNamespace(
        step=5, part=SimpleNamespace(family=family), config=SimpleNamespace(data=config_lib.from_plain(there))
    )
    experiment.trained_alike(config, {"it": run})
    shown = capsys.readouterr().err
    assert shown == (
        f"warning: the part 'it' was trained on other data: {says}\n" if says and "vq" not in family else ""
    )


def loaded(reads, classes, names=()):
    data = config_lib.from_plain({"class_names": list(names)})
    return SimpleNamespace(
        config=SimpleNamespace(family="ar.raster", data=data),
        draws=True,
        plans=True,
        tokenizer=object(),
        generates=True,
        reads=reads,
        classes=classes,
        text=text.Bytes(8),
    )


NAMES = ["boat", "house"]


@pytest.mark.parametrize(
    ("run", "request_", "says"),
    [
        (loaded(True, 2, NAMES), ("a", None), "takes a prompt and a class: add --label N (0 boat, 1 house)"),
        (loaded(True, 2, NAMES), (None, 1), "takes a prompt and a class: add --prompt TEXT"),
        (loaded(False, 2, NAMES), ("a", 1), "takes no prompts: give --label N (0 boat, 1 house)"),
        (
            loaded(False, 9, "abcdefghi"),
            (None, None),
            "takes a class: add --label N (0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h, ...",
        ),
        (loaded(True, 388, range(388)), ("a", None), "add --label N (0 to 387)"),
        (loaded(True, 2), ("a", None), "add --label N (0 to 1)"),
        (loaded(True, 2, ["\x1b[2J"]), ("a", None), "0 \\x1b[2J"),
        (loaded(True, 2, NAMES), ("a", 2), "takes a class: --label 0 to 1, not 2"),
        (loaded(True, 0), ("a", 0), "takes no --label"),
    ],
)
def test_a_missing_prompt_or_class_is_asked_for(run, request_, says):
    with pytest.raises(UserError) as error:
        sample.conditions(run, [request_])
    assert says in str(error.value) and "None" not in str(error.value)


def test_the_folder_of_a_recipe_names_its_runs(tmp_path):
    for name in ("tokenizer", "prior", "cascade"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with pytest.raises(UserError) as error:
        reading.find_run(str(tmp_path), None)
    assert f"it has the runs cascade, prior, tokenizer: give one of them, such as {tmp_path / 'cascade'}" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "red", "cat"], "'xyz' (it knows 3 words: a, cat, red)"),
        ([f"w{i}" for i in range(81)], "(it knows 81 words)"),
    ],
)
def test_few_words_are_listed(words, says):
    with pytest.raises(UserError) as error:
        text.Words(words, 8).encode("xyz", strict=True)
    assert says in str(error.value)


def test_a_report_has_no_empty_columns():
    entry = {
        "draft": {"pictures": 4, "psnr": 20.0, "ssim": 0.5},
        "render": {"pictures": 4, "psnr": 21.0, "ssim": 0.625},
    }
    report = {
        "family": "hybrid.cascade",
        "step": 3,
        "splits": {"validation": {"from captions": {"render": {"pictures": 4}}, "true": entry}},
    }
    assert evaluate.markdown(report).splitlines()[4:9] == [
        "| images | count | PSNR | SSIM |",
        "| --- | --- | --- | --- |",
        "| from captions, render | 4 |  |  |",
        "| true, draft | 4 | 20.00 | 0.50 |",
        "| true, render | 4 | 21.00 | 0.62 |",
    ]
