"""The comparison table of a recipe has the numbers of the runs; the points of the sweep match their names."""

import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from hybridgen import recipe
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.models.contract import find
from hybridgen.reports import points as points_lib

ROOT = Path(__file__).parents[2]
SWEEP = f"{ROOT}/configs/recipes/sweep.py"
JUDGE = {"all": {"all_right": 0.25, "pictures": 48}, "1": {"all_right": 1.0, "pictures": 12}}


def wrote(folder: Path, model: dict, *lines: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": model}))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def reported(folder: Path, kinds: dict, **others) -> None:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"splits": {"validation": kinds}} | others))


@pytest.fixture
def points(tmp_path):
    """Two points with numbers of ours, and the stage that compares them."""
    wrote(tmp_path / "codes", {}, {"step": 3, "eval/psnr": 19.0})
    nll = [{"step": 4, "eval/nll": 9.0}, {"step": 7, "eval/nll": 1.5}, {"step": 7, "nll": 0.1}]
    wrote(tmp_path / "prior", {"grid": [2, 4], "vocab": 512}, *nll)
    render = {"psnr": 20.5, "judge": {"all": {"all_right": 0.75, "pictures": 48}}}
    drawn = {"from captions": {"render": {"judge": JUDGE}}, "from true tokens": {"render": render}}
    reported(tmp_path / "drawn", drawn, codes={"perplexity": 0.5})
    wrote(tmp_path / "latents", {}, {"step": 3, "eval/divergence": 20 * math.log(2)})
    wrote(tmp_path / "diffusion", {"resolution": 4, "channels": 8}, {"step": 7, "eval/loss": 0.125})
    reported(tmp_path / "diffused", {"from captions": {"render": {"judge": JUDGE}}})
    reported(tmp_path / "decoded", {"reconstructed": {"render": render | {"psnr": 31.0}}})
    codes = {"tokenizer": "../codes", "prior": "../prior", "pictures": ("../drawn",)}
    latents = {"tokenizer": "../latents", "prior": "../diffusion", "pictures": ("../diffused", "../decoded")}
    return ConfigDict({"compare": {"8x512": codes, "16x8": latents}, "split": "validation"}, convert_dict=True)


def test_the_table_has_the_numbers_of_the_runs(points, tmp_path, capsys):
    points_lib.stage(points, tmp_path / "table")
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    codes, latents = table["points"]["8x512"], table["points"]["16x8"]
    assert codes["code_bits"] == 8 * 9 and codes["perplexity"] == 0.5 and codes["psnr"] == 20.5
    # of a picture: times its tokens, by the last evaluation; and the same in bits
    assert (codes["nats_a_token"], codes["nats_a_picture"], codes["prior_step"]) == (1.5, 12.0, 7)
    assert codes["bits_a_picture"] == pytest.approx(math.log2(math.exp(12.0)))
    assert codes["drawn"] == {"right": 0.25, "standard_error": 0.0625, "pictures": 48, "by_objects": {"1": 1.0}}
    assert latents["code_bits"] == pytest.approx(20) and latents["error"] == 0.125
    assert not latents.keys() & {"nats_a_token", "nats_a_picture", "bits_a_picture", "perplexity"}
    text = (tmp_path / "table" / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(points_lib.HEAD)}
    assert rows[2] == ["8x512", "72", "50 %", "20.5", "75.0 % (s.e. 6.2)", "1.50 per token", "12.0", "17.3",
                       "25.0 % (s.e. 6.2)", "1: 100.0 %"]  # fmt: skip
    assert rows[3][:8] == ["16x8", "20", "", "31.0", "75.0 % (s.e. 6.2)", "(0.125)", "", ""]
    assert rows[3][8:] == ["25.0 % (s.e. 6.2)", "1: 100.0 %"]
    assert "not comparable with nats" in text and "No results yet" not in text and text in capsys.readouterr().out


def test_a_point_that_is_not_measured_is_named(points, tmp_path):
    (tmp_path / "drawn" / "report.json").unlink()
    points_lib.stage(points, tmp_path / "table")
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    assert list(table["points"]) == ["16x8"] and "has no report yet" in table["missing"]["8x512"]
    assert "\nNo results yet: 8x512.\n" in (tmp_path / "table" / "table.md").read_text()
    (tmp_path / "diffusion" / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    with pytest.raises(UserError, match="no point has results yet: .*diffusion has logged no evaluation yet"):
        points_lib.stage(points, tmp_path / "table")


def test_a_point_of_no_stage_is_refused_before_anything_is_trained(tmp_path):
    config = config_lib.load(f"{SWEEP}:tiny").copy_and_resolve_references()
    with config.unlocked():
        config.stages.table.compare["4x64"].prior = "../prior_4x46"
    with pytest.raises(UserError, match="point '4x64': there is no stage 'prior_4x46'; did you mean 'prior_4x64'?"):
        recipe.run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["tiny", "cpu"])
def test_points_of_the_sweep_are_what_they_are_called(variant):
    """Grid, codebook and latent of every tokenizer; and each prior is on its own one."""
    config = config_lib.load(f"{SWEEP}:{variant}")
    codes, latents = [], []
    for name, point in config.stages.table.compare.items():
        tokenizer, prior = (config.stages[Path(point[role]).name] for role in ("tokenizer", "prior"))
        assert list(prior.parts.values()) == [point.tokenizer]
        model = find(tokenizer.family).build(config_lib.resolve(tokenizer.model, {"resolution": 32}))
        places, size = map(int, name.removesuffix("_latent").split("x"))
        assert model.length == places and size == (model.vocab or model.width)
        assert tokenizer.data == prior.data and tokenizer.batch == prior.batch
        (codes if model.vocab else latents).append((places, size))
        if not model.vocab:
            assert (prior.model.resolution**2, prior.model.channels) == (places, size)
    if variant == "cpu":
        assert {n for n, v in codes if v == 1000} == {4, 16, 64, 256}
        assert sorted(v for n, v in codes if n == 16) == [64, 240, 1000, 4375] and len(latents) == 2
        trained = [(name.partition("_")[0], s.steps, s.batch) for name, s in config.stages.items() if "family" in s]
        assert len(set(trained)) == 2  # equal steps of all tokenizers, and of all priors


@pytest.mark.slow
def test_the_sweep_runs_at_tiny(tmp_path, capfd):
    config = config_lib.load(f"{SWEEP}:tiny")
    assert recipe.run(config, tmp_path / "run")
    table = json.loads((tmp_path / "run" / "table" / "table.json").read_text())
    assert list(table["points"]) == ["4x64", "16x64", "16x8_latent"] and not table["missing"]
    for point in table["points"].values():
        assert point["drawn"]["pictures"] == point["reconstructed"]["pictures"] == 16
        assert point["psnr"] > 5 and math.isfinite(point["code_bits"])
    assert (tmp_path / "run" / "table" / "table.md").read_text() in capfd.readouterr().out
