"""text.json of a run is required and verified against the checkpoint by everything that reads the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import saved_runs
import tiny

import hybridgen
from hybridgen import cache, cli, convert, evaluate, export, sample
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import text as text_lib
from hybridgen.runs import experiment, reading
from hybridgen.runs.restore import check_draws

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A decoder that reads captions, and an imported text encoder with its tokenizer."""
    place = tmp_path_factory.mktemp("runs")
    model = tiny.DECODER | {"plan_width": 0, "draft": False, "text_vocab": "auto", "text_length": "auto"}
    saved_runs.save(place / "decoder", "diffusion.dit", model, {}, 1)
    shutil.copytree(GOLDEN / "t5_encoder", place / "t5")
    shutil.copytree(GOLDEN / "tokenizers" / "t5", place / "t5", dirs_exist_ok=True)
    assert convert.main(["t5_encoder", str(place / "t5"), str(place / "text")]) == 0
    return place


@pytest.fixture
def runs(saved, tmp_path):
    for name in ("decoder", "text"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path


def swapped(file):
    words = json.loads(file.read_text())
    words["words"][:2] = reversed(words["words"][:2])
    file.write_text(json.dumps(words))


def longer(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"length": 9}))


def another(file):
    file.write_text(json.dumps(text_lib.Bytes(8).to_json()))


def damaged(file):
    file.write_text(file.read_text()[:-5])


CHANGES = {
    "deleted": (Path.unlink, "text.json is missing: the run was saved with a text tokenizer"),
    "swapped": (swapped, "text.json is not the text tokenizer that the run was saved with: digest "),
    "longer": (longer, "is not the text tokenizer"),
    "another": (another, "is not the text tokenizer"),
    "damaged": (damaged, "text.json is not valid JSON"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "text.json is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused(runs, change):
    reading.load(runs / "decoder")
    make, says = CHANGES[change]
    make(runs / "decoder" / "text.json")
    with pytest.raises(UserError) as error:
        reading.load(runs / "decoder")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_another_layout_of_the_same_words_is_not_a_change(runs):
    file = runs / "decoder" / "text.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, ensure_ascii=True))
    assert reading.load(runs / "decoder").text.length == saved_runs.DATA["text"]["length"]


USES = {
    "sample": lambda run, out: sample.main(["--run", str(run), "--prompt", "a red circle", "--out", str(out)]),
    "evaluate": lambda run, out: evaluate.main(["--run", str(run), "--out", str(out)]),
    "export": lambda run, out: export.main([str(run), str(out)]),
    "cache": lambda run, out: cache.main(["--run", str(run), "--out", str(out)]),
    "init_from": lambda run, out: reading.earlier(config_lib.from_plain({"init_from": {"all": str(run)}}), out),
    "part": lambda run, out: experiment.load(config_lib.from_plain({"parts": {"text": str(run)}}), out),
    "api": lambda run, out: hybridgen.load(run),
}


@pytest.mark.parametrize("name", ["decoder", "text"])
@pytest.mark.parametrize("use", USES)
def test_every_reader_refuses(runs, use, name, capsys):
    (runs / name / "text.json").unlink()
    with pytest.raises(SystemExit) as end:
        cli.command(lambda: USES[use](runs / name, runs / "out"))
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"{name}/text.json is missing" in err and err.count("\n") == 1, err
    assert not (runs / "out").exists()


def test_a_run_that_never_had_one_takes_no_prompts(saved, tmp_path):
    """Imported without a tokenizer: it encodes token ids."""
    assert convert.main(["t5_encoder", str(GOLDEN / "t5_encoder"), str(tmp_path / "bare")]) == 0
    assert reading.load(tmp_path / "bare").text is None
    loaded = SimpleNamespace(
        config=SimpleNamespace(family="ar.llamagen"), draws=True, plans=False, reads=True, text=None
    )
    with pytest.raises(UserError, match=r"^this ar.llamagen run reads text, but has no text tokenizer \(text.json\)"):
        check_draws(loaded)
