"""Numbers that are not finite: in weights they are named, images of them are counted and marked, reports are JSON."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import saved_runs
from PIL import Image

from configs import common
from hybridgen import cache, evaluate, export, sample
from hybridgen.core import config as config_lib
from hybridgen.core import meshes, trees
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, transforms
from hybridgen.evals.finite import finite, marked
from hybridgen.evals.sheet import sheet
from hybridgen.runs import checkpoint, experiment, reading
from hybridgen.runs import folder as run_folder
from hybridgen.runs.restore import restore

BAD = (np.nan, np.inf, -np.inf)


def images(count, bad=(), value=np.nan, side=16):
    """Grey images; those with the numbers `bad` have one number that is not finite."""
    out = np.zeros((count, side, side, 3), np.float32)
    for number in bad:
        out[number, 1, 2, number % 3] = value
    return out


@pytest.mark.parametrize("value", BAD)
def test_one_number_makes_an_image_not_finite(value):
    given = images(4, (1, 3), value)
    assert finite(given).tolist() == [True, False, True, False] and finite(given.astype(np.float16)).sum() == 2
    shown = marked(given)
    assert shown[1, 1, 2].tolist() == [1, -1, 1] and np.isfinite(shown).all() and (shown[0] == 0).all()
    with pytest.raises(UserError, match=r"^2 of the 3072 numbers of an image are not finite"):
        transforms.to_uint8(given)


@pytest.mark.parametrize("value", BAD)
def test_a_sheet_marks_them(value):
    pixels = np.asarray(sheet(images(2, (0,), value), cell=16))
    clean = np.asarray(sheet(images(2), cell=16))
    magenta = (pixels == (255, 0, 255)).all(-1)
    assert magenta.sum() == 1 and not (clean == (255, 0, 255)).all(-1).any()
    assert pixels.shape[0] > clean.shape[0]  # the line "not finite"


def test_a_report_is_json(tmp_path):
    values = {"a": np.float64("nan"), "b": [1.5, -np.inf, {"c": (float("inf"), 2)}], "d": "nan", "e": True}
    run_folder.write_report(tmp_path / "r.json", values)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {
        "a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "nan", "e": True
    }  # fmt: skip


# ---------------------------------------------------------------- runs whose images are not finite


def loaded(out, faults=()):
    """A run that takes prompts and whose program returns the rows of `out` that its conditions name."""
    data = saved_runs.DATA
    config = config_lib.from_plain({"family": "toy", "data": config_lib.plain(data), "sample": {"options": {}}})
    text = SimpleNamespace(encode=lambda prompt, strict=False: (np.zeros(2, np.int32), np.ones(2, bool)))
    done = []

    def draw(cond, keys):
        start = sum(done)
        done.append(len(keys))
        return {"image": jax.numpy.asarray(out[start : start + len(keys)])}

    has = {"draws": True, "plans": False, "generates": True, "reads": True, "classes": 0, "tokenizer": None}
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    return SimpleNamespace(
        **has,
        config=config,
        text=text,
        mesh=mesh,
        step=3,
        draw=draw,
        put=lambda x: x,
        faults=faults,
        shapes=(),
        about=lambda seed: {},
    )


@pytest.mark.parametrize("value", BAD)
def test_sample_counts_them(tmp_path, value):
    with pytest.raises(UserError, match=r"^3 of 5 images are not finite .* the first is number 1, see .*grid.png$"):
        sample.sample(loaded(images(6, (1, 3, 4), value)), [("a", None)], 5, 0, 2, tmp_path, False)
    assert len(list(tmp_path.glob("0*.png"))) == 5 and (tmp_path / "grid.png").is_file()
    pixels = [np.asarray(Image.open(tmp_path / f"{number:05d}.png")) for number in range(5)]
    assert [bool((one == (255, 0, 255)).all(-1).any()) for one in pixels] == [False, True, False, True, True]


def test_sample_refuses_good_images_of_bad_weights(tmp_path):
    with pytest.raises(UserError, match="^the run x is damaged$"):
        sample.sample(loaded(images(2), ("the run x is damaged",)), [("a", None)], 2, 0, 2, tmp_path, False)
    sample.sample(loaded(images(2)), [("a", None)], 2, 0, 2, tmp_path, False)


@pytest.mark.parametrize("value", BAD)
def test_evaluate_counts_them(tmp_path, value):
    about = {"features": "f", "reference": "train", "reference_pictures": 16, "statistics": False}

    class Compare(SimpleNamespace):
        def __call__(self, given, label):
            return {"pictures": len(given), "fd": 1.0}

    match = r"^validation, from captions, render: 2 of 16 images are not finite .*report.md\)$"
    with pytest.raises(UserError, match=match):
        evaluate.evaluate(loaded(images(16, (0, 5), value)), ("validation",), 16, 16, 0, tmp_path, Compare(about=about))
    text = (tmp_path / "report.json").read_text()
    split = json.loads(text, parse_constant=lambda word: pytest.fail(word))["splits"]["validation"]
    assert split["from captions"]["render"]["not_finite"] == 2
    assert split["distances"] == {
        "true pictures": {"pictures": 16, "fd": 1.0},
        "from captions, render": {"pictures": 16, "not_finite": 2},
    }
    assert "| 2 not finite |" in (tmp_path / "report.md").read_text() and (tmp_path / "validation.png").is_file()


def test_measures_of_them_are_not_numbers():
    """PSNR of a mean with NaN is null in the report; an image with one bad pixel is not a correct one."""
    items = pipeline.examples(sources.build(saved_runs.DATA, "validation"), range(4))
    true = np.stack([item["image"] for item in items]).astype(np.float32) / 127.5 - 1
    scenes = [item["scene"] for item in items]
    drawn = {"image": np.where(np.arange(true.size).reshape(true.shape) == 0, np.nan, true), "draft": true}
    out = evaluate.judge_pictures(drawn, scenes, true)
    right = out["draft"]["judge"]["all"]["all_right"]
    assert np.isnan(out["render"]["psnr"]) and out["render"]["judge"]["all"]["all_right"] == right - 0.25
    report = {"family": "x", "step": 1, "splits": {"validation": {"true": out}}}
    assert "nan" in evaluate.markdown(report)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A tokenizer with a NaN in its newest checkpoint."""
    place = saved_runs.save(tmp_path_factory.mktemp("runs") / "tokenizer", "tokenizers.vq", saved_runs.tiny.FSQ, {}, 1)
    with checkpoint.Checkpointer(place / "checkpoints") as saved:
        state = saved.restore_params(saved_runs.STEP)
        path, leaf = next((p, x) for p, x in trees.flatten(state["ema"]).items() if p.endswith("kernel"))
        leaf = np.array(leaf)
        leaf.flat[3] = np.inf
        state["ema"] = trees.unflatten(trees.flatten(state["ema"]) | {path: leaf})
        saved.save(saved_runs.STEP + 1, state, meta={"parts": {}})
    return place, rf"1 of the {leaf.size} numbers of params/{path} are NaN or infinite"


def as_part(place, out):
    parts = {"tokenizer": str(place)}
    config = common.stage("ar.raster", saved_runs.tiny.PRIOR, saved_runs.DATA, steps=1, batch=2, parts=parts)
    experiment.verify(config, {"tokenizer": reading.load(place)}, sources.build(saved_runs.DATA, "train"))


@pytest.mark.parametrize(
    "use",
    [
        lambda place, out: export.export(place, out),
        lambda place, out: cache.cache([reading.load(place)], None, out, {}),
        lambda place, out: reading.earlier(config_lib.from_plain({"init_from": {"all": str(place)}}), out),
        as_part,
    ],
)
def test_a_damaged_run_is_named(damaged, tmp_path, use, capsys):
    place, says = damaged
    with pytest.raises(UserError, match=says):
        use(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "warning: the run" in capsys.readouterr().out


def test_an_earlier_checkpoint_is_not_damaged(damaged, capsys):
    reading.load(damaged[0], saved_runs.STEP).check_finite()
    assert restore(damaged[0], {}, saved_runs.STEP).faults == () and "warning" not in capsys.readouterr().out
    (fault,) = restore(damaged[0], {}).faults
    assert "are NaN or infinite" in fault
