"""Recipes: errors are reported before any training; a stopped recipe prints how to resume."""

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from hybridgen import recipe
from hybridgen.core.errors import UserError

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
