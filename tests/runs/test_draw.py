"""Sampling from runs: on several devices, from classes, with every option of guidance, and the evaluation report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hybridgen import evaluate, sample, train
from hybridgen.core import config
from hybridgen.core.errors import UserError
from hybridgen.models.roles import denoiser, next_token
from hybridgen.runs import drawing, reading
from hybridgen.sampling import guidance
from hybridgen.training import profiling

ROOT = Path(__file__).parents[2]
PROMPT = "a small red circle in the centre"


@pytest.mark.slow
def test_on_eight_devices_the_same_pictures(tiny_run, tmp_path):
    """Five prompts do not divide over eight devices: rows are padded, and a picture does not depend on them."""
    run = tiny_run("configs/ar/raster.py").folder
    words = ["--run", str(run), "--prompt", PROMPT, "--count", "5", "--seed", "3"]
    assert sample.main([*words, "--out", str(tmp_path / "one")]) == 0
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    line = [sys.executable, "-m", "hybridgen.sample", *words, "--out", str(tmp_path / "eight")]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for number in range(5):
        one, eight = (np.asarray(Image.open(tmp_path / name / f"{number:05d}.png")) for name in ("one", "eight"))
        assert np.abs(one.astype(int) - eight).max() <= 1
    assert not (tmp_path / "eight" / "00005.png").exists()


def labelled(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for i in range(12):
        colour = [(250, 30, 30), (30, 30, 250), (30, 250, 30)][i % 3]
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "kind": ["red", "blue", "green"][i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_a_class_conditional_prior_without_captions(tmp_path, capsys):
    """Pictures with a class and no text: trains, draws classes, and refuses what it does not know."""
    data = {"source": "folder", "resolution": 32, "workers": 0, "threads": 1}
    data["options"] = {"path": str(labelled(tmp_path / "data")), "text_key": None, "label_key": "kind"}
    data["options"]["validation"] = 0.3

    def trained(spec: str, name: str, *words: str) -> Path:
        ready = config.load(f"{ROOT}/{spec}", ["steps=2", "batch=4", *words]).copy_and_resolve_references()
        with ready.unlocked():
            ready.data = type(ready.data)(data)
            for absent in ("text_vocab", "text_length"):
                if absent in ready.model:
                    with ready.model.ignore_type():
                        ready.model[absent] = 0
        assert train.run(ready, tmp_path / name)
        return tmp_path / name

    trained("configs/tokenizers/vq.py:tiny", "tokenizer", "model.channels=(16,16)", "model.attention=False")
    run = trained("configs/ar/raster.py:tiny", "prior", "model.width=32", "model.depth=1")
    assert json.loads((run / "config.json").read_text())["model"]["classes"] == 3
    assert not (run / "text.json").exists()
    words = ["--run", str(run), "--out", str(tmp_path / "out")]
    assert sample.main([*words, "--label", "0", "--label", "2", "--count", "2"]) == 0
    assert "4 images" in capsys.readouterr().out and len(list((tmp_path / "out").glob("0*.png"))) == 4
    for wrong, says in (
        (["--label", "3"], "takes a class: --label 0 to 2, not 3"),
        (["--label", "-1"], "--label 0 to 2, not -1"),
        (["--prompt", "red"], "takes no prompts"),
        ([], "no prompt: give --prompt"),
    ):
        with pytest.raises(UserError, match=says):
            sample.main([*words, *wrong])


@pytest.mark.slow
def test_a_prior_that_reads_takes_no_class(tiny_run, tmp_path):
    run = str(tiny_run("configs/ar/raster.py").folder)
    for wrong in (["--label", "1"], ["--label", "1", "--prompt", PROMPT]):
        with pytest.raises(UserError, match="takes a prompt|takes no --label"):
            sample.main(["--run", run, "--out", str(tmp_path), *wrong])


def test_guidance_is_a_scale_a_schedule_or_several_scales():
    known = {"prior": next_token.OPTIONS, "decoder": denoiser.OPTIONS}

    def checked(**options):
        return drawing.scheduled(drawing.checked(options, known))

    assert checked(prior={"guidance": 3, "guidance_schedule": "constant"}) == {"prior": {"guidance": 3.0}}
    ramp = checked(prior={"guidance": 3.0, "guidance_schedule": "linear"})["prior"]["guidance"]
    np.testing.assert_allclose([ramp(p) for p in (0.0, 0.5, 1.0)], [1, 2, 3])
    by_condition = {"guidance": {"plan": 1.5, "plan+text|text": 2}, "guidance_schedule": "linear"}
    levels = checked(decoder=by_condition)["decoder"]
    assert sorted(levels["guidance"]) == ["plan", "plan+text|text"] and callable(levels["guidance"]["plan"])
    assert len(guidance.parse(levels["guidance"])) == 2
    for wrong, says in (
        ({"decoder": {"guidance": {"plan": -1.0}}}, "decoder.guidance.plan -1.0 is not within"),
        ({"prior": {"guidance": None}}, "prior.guidance None is not within"),
        ({"prior": {"guidance": 2.0, "guidance_schedule": "steep"}}, "'steep' is not one of"),
        ({"decoder": {"size": 3}}, "unknown option 'decoder.size'; known options: prior.guidance, "),
        ({"prior": 3}, "unknown option 'prior'"),
        ({"other": {"guidance": 2.0}}, "unknown option 'other'"),
    ):
        with pytest.raises(UserError, match=says):
            checked(**wrong)
    assert drawing.checked({"other": {"guidance": 2.0}}, known, partial=True) == {}  # of a part that is not there yet


def test_render_and_draft_are_compared_picture_by_picture():
    """Equal means may hide differences between individual images."""
    right = {"render": [True, True, False, True], "draft": [True, False, True, True]}
    psnr = {"render": [30.0, 31.0, 28.0, 33.0], "draft": [29.0, 30.0, 29.0, 30.0]}
    one, other = ({"right": np.array(right[name]), "psnr": np.array(psnr[name])} for name in ("render", "draft"))
    got = evaluate.paired(one, other)
    assert got["only_render_right"] == 1 and got["only_draft_right"] == 1
    assert got["psnr_gain"] == 1.0 and got["psnr_higher"] == 0.75
    assert got["standard_error"] == pytest.approx(np.std([1, 1, -1, 3]) / 2)
    drawn = {"image": np.zeros((2, 16, 16, 3)), "draft": np.full((2, 16, 16, 3), 0.1)}
    verdict = evaluate.judge_pictures(drawn, None, np.zeros((2, 16, 16, 3)))
    assert verdict["paired"]["psnr_higher"] == 1.0 and "only_render_right" not in verdict["paired"]
    report = {"family": "x", "step": 1, "splits": {"validation": {"from true tokens": verdict}}}
    assert "PSNR +" in evaluate.markdown(report) and "higher in 100 %" in evaluate.markdown(report)


def test_a_profile_window_is_closed_by_whoever_leaves_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    for first, steps, upto, expected in (
        (2, 3, 10, [(2, "start"), (5, "stop")]),
        (2, 3, 4, [(2, "start"), (4, "stop")]),  # the run ends within
        (2, 0, 10, []),
        (20, 3, 10, []),
    ):
        seen = []
        with profiling.ProfileWindow(tmp_path, first, steps) as window:
            for step in range(upto):
                window.at(step, None)
                seen += [(step, call) for call in calls]
                calls.clear()
        seen += [(upto, call) for call in calls]
        calls.clear()
        assert seen == expected


def test_a_profile_window_writes_a_trace(tmp_path):
    with profiling.ProfileWindow(tmp_path, 1, 1) as window:
        for step in range(3):
            window.at(step, jnp.arange(4) + step)
    assert [path.stat().st_size > 0 for path in tmp_path.rglob("*.xplane.pb")] == [True]


def test_the_families_of_a_run_that_names_itself_as_a_part(tmp_path):
    """Parts have no parts: looking for the options of a run ends, whatever its config says."""
    groups = {name: {} for name in ("model", "data", "mesh", "sample")}
    config = groups | {"family": "ar.raster", "parts": {"tokenizer": "."}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert reading.families_of(tmp_path) == ["ar.raster", "ar.raster"]
