"""PNG files say what they were generated from; reports on images without scenes have numbers, and no empty columns."""

import json
from pathlib import Path

import numpy as np
import pytest
import saved_runs
import tiny
from PIL import Image

import hybridgen
from hybridgen import evaluate, sample
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.evals import png
from hybridgen.runs import folder as run_folder
from hybridgen.runs.restore import restore

PROMPT = saved_runs.PROMPT
DECODER = tiny.DECODER | {"plan_width": "auto"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return saved_runs.cascade(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(run):
    return hybridgen.load(run)


def texts(path: Path) -> dict[str, str]:
    return dict(Image.open(path).text)


def test_any_text_comes_back(tmp_path):
    about = {"prompt": "红心, “quoted”\nsecond line", "label": "3", "odd": "lone \ud800 surrogate", "long": "x" * 10**6}
    png.save(Image.new("RGB", (2, 2)), tmp_path / "a.png", about)
    found = texts(tmp_path / "a.png")
    assert found["prompt"] == about["prompt"] and found["label"] == "3" and found["odd"] == "lone ? surrogate"
    assert found["long"] == "x" * png.LONGEST


def test_what_the_command_writes(run, model, tmp_path):
    words = ["--run", str(run), "--prompt", PROMPT, "--prompt", "a large blue square", "--count", "2", "--seed", "5"]
    sample.main([*words, "--guidance", "3", "--steps", "2", "--out", str(tmp_path)])
    first, third, grid = (texts(tmp_path / name) for name in ("00000.png", "00002.png", "grid.png"))
    assert first["prompt"] == PROMPT and third["prompt"] == "a large blue square" and "label" not in first
    assert (first["number"], third["number"], first["seed"], first["step"]) == ("0", "2", "5", str(saved_runs.STEP))
    options = json.loads(first["options"])
    assert options["prior"]["guidance"] == 3.0 and options["decoder"] == {
        "steps": 2,
        "solver": "euler",
        "guidance": 1.0,
    }
    assert json.loads(grid["prompts"])[1:3] == [PROMPT, "a large blue square"] and "number" not in grid
    assert grid["digest"] == first["digest"] and len(first["digest"]) == 16
    images = model.sample([PROMPT, "a large blue square"], count=2, seed=5, guidance=np.float32(3), steps=2)
    images[2].save(tmp_path / "api.png")
    assert texts(tmp_path / "api.png") == third == dict(images.about[2])
    next(iter(images)).save(tmp_path / "first.png")
    assert texts(tmp_path / "first.png") == first
    images.sheet().save(tmp_path / "sheet.png")
    assert texts(tmp_path / "sheet.png") == grid
    images[0].save(tmp_path / "photo.jpg")  # which has no such text
    assert Image.open(tmp_path / "photo.jpg").format == "JPEG"


def test_the_digest_is_that_of_all_weights(run, tmp_path):
    """Also of the parts: a cascade has no weights of its own."""
    found = [restore(run.parent / name, {}).digest for name in ("cascade", "prior", "decoder", "cascade")]
    assert len(set(found)) == 3 and found[0] == found[3]
    other = run_folder.read_json(run / "config.json")
    other["parts"] = {name: str(run.parent / name) for name in ("tokenizer", "prior")}
    other["parts"]["decoder"] = str(
        saved_runs.save(run.parent / "again", "diffusion.dit", DECODER, {"tokenizer": "../tokenizer"}, 9)
    )
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    run_folder.write_json(tmp_path / "config.json", other)
    (tmp_path / "text.json").write_bytes((run / "text.json").read_bytes())
    assert restore(tmp_path, {}).digest not in found


def test_a_class_is_a_label():
    assert sample.chunks((None, 7), 3) == {"label": "7", "number": "3"}
    assert sample.chunks(("a cat", 0), 0) == {"prompt": "a cat", "label": "0", "number": "0"}


# ---------------------------------------------------------------- reports on images without scenes


class Pictures:
    """Ten images without scenes."""

    def __init__(self, split: str, resolution: int):
        self.inner = sources.build(saved_runs.DATA, split)

    def __len__(self) -> int:
        return 10

    def name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> dict:
        return {name: value for name, value in self.inner[index].items() if name in ("image", "text")}


def test_a_report_on_own_images(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["parts"] = {name: str((run / path).resolve()) for name, path in config["parts"].items()}
    config["data"] |= {"source": f"{__name__}.Pictures", "options": {}}
    own = run.parent / "own"
    own.mkdir()
    (own / "checkpoints").symlink_to(run / "checkpoints")
    (own / "config.json").write_text(json.dumps(config))
    (own / "text.json").write_bytes((run / "text.json").read_bytes())
    assert evaluate.main(["--run", str(own), "--count", "9", "--batch", "8", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| images | count | PSNR | SSIM |" in lines and "judge" not in "\n".join(lines)
    assert [line.split(" | ")[1] for line in lines if line.startswith("| from")] == ["9"] * 4
    found = json.loads((tmp_path / "report.json").read_text())["splits"]["validation"]["captions"]
    assert found["pictures"] == 9 and found["nll"] > 0 and 0 <= found["own_likelier"] <= 1
    assert f"given its own caption and {found['nll_other']:.3f} given another one" in "\n".join(lines)
    known = texts(tmp_path / "validation.png")
    assert known["split"] == "validation" and len(json.loads(known["prompts"])) == 9 and known["seed"] == "0"


def test_captions_name_classes():
    items = [{"text": "a cat", "label": 1}, {"text": "", "label": 0}, {"text": "x"}, {"text": "", "label": 5}]
    assert evaluate.captions_of(items, ("dog", "cat")) == ["a cat, class 1 cat", "class 0 dog", "x", "class 5"]
    assert evaluate.captions_of(items[1:2], (0, 1)) == ["class 0"]


def test_the_likelihood_of_captions():
    """A prior to which row i is likely given caption i and no other; with one caption only there is no other."""

    class Loaded:
        mesh = None

        @staticmethod
        def nll(given):
            return np.where(given["label"] == given["tokens"][:, 0], 1.0, 3.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.placement, "by_batches", lambda program, arrays, batch, mesh: [program(arrays)])
        label = np.array([0, 0, 1, 2])
        given = {"label": label, "tokens": label[:, None], "image": None}
        found = evaluate.caption_likelihood(Loaded, given, 4)
        assert found == {"nll": 1.0, "nll_other": 3.0, "own_likelier": 1.0, "pictures": 4}
        assert evaluate.caption_likelihood(Loaded, given | {"label": label * 0}, 4) is None
        assert evaluate.caption_likelihood(Loaded, {"tokens": label[:, None]}, 4) is None


def test_an_unknown_size_of_a_sheet_is_refused():
    with pytest.raises(UserError, match="the shape B H W 3"):
        hybridgen.api.sheet.sheet({"a": np.zeros((0, 2, 2, 3))})
