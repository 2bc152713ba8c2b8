"""Recipes: errors are reported before any training; a stopped recipe prints how to resume."""

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from hybridgen import recipe
from hybridgen.core.errors import UserError
from hybridgen.runs import folder as run_folder

ROOT = Path(__file__).parents[2]
RECIPE = f"{ROOT}/configs/recipes/shapes.py:tiny"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cascade.sample.options.decoder.steps=0", "stage 'cascade': decoder.steps 0 is not within 1 and 1000"),
        ("cascade.family=hybrid.cascad", "stage 'cascade': no family 'hybrid.cascad'"),
        ("decoder.mesh.data=3", "stage 'decoder': mesh"),
        ("decoder.data.source=cloud", "stage 'decoder': unknown data.source 'cloud'"),
        ("evaluation.splits=('validation','test')", "stage 'evaluation': shapes: split has no 'test'"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_said_before_the_first(override, says, tmp_path):
    with pytest.raises(UserError) as error:
        recipe.main(["--config", RECIPE, "--workdir", str(tmp_path / "run"), f"--config.stages.{override}"])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_source_is_a_config_file(tmp_path):
    with pytest.raises(UserError, match="a recipe over another source is a config file of 8 lines.*docs/data.md"):
        recipe.main(["--config", RECIPE, "--workdir", str(tmp_path / "run"), "--config.data.source=mine.Pictures"])


def test_what_could_not_be_sampled_is_refused_before_the_first_stage(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / f"{number}.png")
    words = ["--config", f"{ROOT}/configs/recipes/imagefolder.py:tiny", "--workdir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="stage 'prior': data.source 'folder' has no captions and no classes"):
        recipe.main([*words, f"--config.path={tmp_path / 'pictures'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_is_stopped_says_how_to_go_on(number, tmp_path, monkeypatch, capsys):
    """Stages without training are not saved; they are repeated on resume."""

    def measure(stage, place):
        os.kill(os.getpid(), number)
        time.sleep(20)

    monkeypatch.setattr(recipe, "measure", measure)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(["--config", f"{RECIPE},order=('evaluation',)", "--workdir", str(tmp_path)])
    assert "run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_seeds_are_trained_apart_and_compared(tmp_path, monkeypatch, capsys):
    """Each seed has a folder of its own; the table has the median, the least and the greatest of every number."""
    seen = []

    def train(stage, place, **_):
        seen.append((place.parent.name, place.name, stage.seed))
        return True

    def measure(stage, place):
        accuracy = {"all": {"all_right": stage.seed / 10, "pictures": 4}, "2": {"all_right": 0.5, "pictures": 2}}
        entry = {"from captions": {"render": {"judge": accuracy}, "draft": {"judge": accuracy}}}
        entry["from true tokens"] = {"render": {"psnr": 30.0 + stage.seed}, "paired": {"psnr_gain": stage.seed / 4}}
        place.mkdir(parents=True)
        run_folder.write_json(place / "report.json", {"splits": {"validation": entry}})

    monkeypatch.setattr(recipe.train, "run", train)
    monkeypatch.setattr(recipe, "measure", measure)
    run = ["--config", RECIPE, "--workdir", str(tmp_path), "--seeds"]
    assert recipe.main([*run, "1,7,2"]) == 0
    assert [seed for _, _, seed in seen] == [1] * 4 + [7] * 4 + [2] * 4
    assert seen[4] == ("seed_7", "tokenizer", 7)
    table = run_folder.read_json(tmp_path / "seeds.json")["evaluations"]["evaluation"]
    right = table["validation/from captions/render/judge/all/all_right"]
    assert right == {"median": 0.2, "least": 0.1, "greatest": 0.7, "values": [0.1, 0.7, 0.2]}
    shown = capsys.readouterr().out
    assert "| validation, from captions, render | 20.0 (10.0 to 70.0) % |" in shown
    assert "psnr_gain 0.500 (0.250 to 1.750)" in shown and (tmp_path / "seeds.md").is_file()
    for wrong in ("1,1", "-1,2", "one", ""):
        with pytest.raises(UserError, match="must be different whole numbers, separated by commas"):
            recipe.main([*run[:-1], f"--seeds={wrong}"])
