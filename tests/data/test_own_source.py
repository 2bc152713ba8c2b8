"""A data source of one's own: every mistake in it is said in one line, by every way in which records are read."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hybridgen import evaluate
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text
from hybridgen.data.sources import reading
from hybridgen.runs import experiment

SIDE = 16


class Pictures:
    """Good records, apart from the last, which has the given entries; without those that are None there."""

    class_names = ("boat", "house")
    last = SimpleNamespace(entries={}, without=())

    def __init__(self, split, resolution, size=4):
        if split == "holdout":
            raise ValueError("there are two splits")
        self.size = 0 if split == "validation" else size

    def __len__(self):
        return self.size

    def name(self, index):
        return f"picture {index}"

    def __getitem__(self, index):
        item = {"image": np.full((SIDE, SIDE, 3), index, np.uint8), "text": f"a {index}", "label": index % 2}
        if index < self.size - 1:
            return item
        return {k: v for k, v in (item | self.last.entries).items() if k not in self.last.without}


class Fails(Pictures):
    def __getitem__(self, index):
        return [][index]


class Nameless:
    class_names = ()

    def __init__(self, split, resolution): ...
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {}


class WrongNames(Pictures):
    class_names = 2


class Unlabelled(Pictures):
    class_names = ()
    last = SimpleNamespace(entries={}, without=("label",))

    def __init__(self, split, resolution):
        self.size = 1


HERE = __name__


def data(name="Pictures", **changes):
    return {"source": f"{HERE}.{name}", "resolution": SIDE, **changes}


def mistaken(monkeypatch, *without, **entries):
    monkeypatch.setattr(Pictures, "last", SimpleNamespace(entries=entries, without=without))
    return sources.build(data(), "train")


def refused(function, *arguments, **options):
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


GREY = np.zeros((SIDE, SIDE), np.uint8)
MISTAKES = [
    (
        {"image": np.zeros((SIDE, SIDE, 3), np.float32)},
        "has an image of float32; it must be uint8 from 0 to 255: (image",
    ),
    ({"image": np.full((SIDE, SIDE, 3), 200.0)}, "has an image of float64; it must be uint8 from 0 to 255"),
    ({"image": np.zeros((24, 16, 3), np.uint8)}, "has an image of 24x16x3; data.resolution 16 asks for 16x16x3"),
    ({"image": np.zeros((48, 48, 3), np.uint8)}, "has an image of 48x48x3; data.resolution 16 asks for 16x16x3"),
    ({"image": GREY}, "has an image of 16x16; it must be height x width x 3: np.stack([image] * 3, -1)"),
    ({"image": GREY[..., None]}, "has an image of 16x16x1; it must be height x width x 3: image.repeat(3, -1)"),
    (
        {"image": Image.new("RGB", (SIDE, SIDE))},
        "has an image that is of type Image; it must be an array: np.asarray(image.c",
    ),
    ({"text": None}, 'has a text that is None: give a str, or "" for no caption'),
    ({"text": 7}, 'has a text that is of type int: give a str, or "" for no caption'),
    ({"texts": ("a", 3)}, "has texts that are of type tuple; they must be a tuple of str"),
    (
        {"label": "boat"},
        "has a label that is of type str; it must be a whole number, the place of its class in class_names",
    ),
    ({"label": True}, "has a label that is of type bool"),
    ({"label": 2}, "has the label 2, but class_names has 2 classes: 0 to 1"),
    ({"label": np.int64(-1)}, "has the label -1, but class_names has 2 classes: 0 to 1"),
]


@pytest.mark.parametrize(("entries", "says"), MISTAKES, ids=[says[:50] for _, says in MISTAKES])
def test_a_wrong_record_is_refused_by_name(entries, says, monkeypatch):
    source = mistaken(monkeypatch, **entries)
    assert f"data.source '{HERE}.Pictures': record 'picture 3' {says}" in refused(pipeline.examples, source, [0, 3])


@pytest.mark.parametrize(("key", "says"), [("image", "has no image"), ("text", 'has no text: give a str, or ""')])
def test_a_missing_entry_is_refused(key, says, monkeypatch):
    assert f"'picture 3' {says}" in refused(reading.read, mistaken(monkeypatch, key), 3)


def test_it_is_refused_wherever_records_are_read(monkeypatch):
    """Through the threads of the pipeline, in a mixture, when words are counted, and after a worker's copy."""
    source, says = mistaken(monkeypatch, label=5), "'picture 3' has the label 5"
    for threads in (0, 2):
        loader = pipeline.batches(source, text.Bytes(4), batch=4, seed=0, threads=threads)
        assert says in refused(next, loader)
        loader.close()
    assert says in refused(text.build, {"text": {"kind": "words"}}, source)
    assert says in refused(reading.read, pickle.loads(pickle.dumps(source)), 3)
    members = {"own": {"source": f"{HERE}.Pictures"}, "fails": {"source": f"{HERE}.Fails"}}
    mixture = sources.build(data() | {"source": "mixture", "options": {"sources": members}}, "train")
    assert f"{HERE}.Pictures': record 'own: picture 3' has the label 5" in refused(reading.read, mixture, 3)
    assert f"{HERE}.Fails': record 'fails: picture 2' (index 6): IndexError" in refused(reading.read, mixture, 6)


def test_what_fails_inside_is_one_line_with_its_place():
    loader = pipeline.batches(sources.build(data("Fails"), "train"), None, batch=2, seed=0, threads=1)
    says = refused(next, loader)
    loader.close()
    assert f"data.source '{HERE}.Fails': record 'picture" in says and "Grain" not in says
    assert "IndexError: list index out of range (test_own_source.py line" in says


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        (
            "Pictures",
            "holdout",
            f"data.source '{HERE}.Pictures' fails for the split 'holdout': ValueError: there are two",
        ),
        ("Pictures", "validation", f"data.source '{HERE}.Pictures' has no records in the split 'validation'"),
        ("Nameless", "train", f"data.source '{HERE}.Nameless' has no method name(index)"),
        ("WrongNames", "train", f"data.source '{HERE}.WrongNames': class_names is 2, but must be a list of names"),
        ("HERE", "train", f"data.source '{HERE}.HERE' is not a class"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(name, split, says):
    assert says in refused(sources.build, data(name), split)


def test_an_empty_split_is_refused_before_an_evaluation(tmp_path):
    config = SimpleNamespace(data=data(), family="ar.raster")
    loaded = SimpleNamespace(config=config, draws=True, plans=False, reads=False)
    arguments = (("validation",), 4, 4, 0, tmp_path / "out")
    assert "no records in the split 'validation'" in refused(evaluate.evaluate, loaded, *arguments)
    assert not list(tmp_path.iterdir())


# ---- classes of the data and of a model


@pytest.mark.parametrize(
    ("name", "takes", "says"),
    [
        (
            "Pictures",
            {"model": 1},
            "model.classes is 1, but data.source '{}' has 2 classes: set model.classes=2, or auto",
        ),
        ("Pictures", {"model": 0, "prior": 1}, "the part 'prior' takes 1 classes, but data.source '{}' has 2 classes"),
        (
            "Unlabelled",
            {"model": 10},
            "model.classes is 10, but data.source '{}' has no classes: give each record a label",
        ),
        ("Pictures", {"model": 2}, ""),
        ("Pictures", {"model": 1000}, ""),
        ("Unlabelled", {"model": 0}, ""),
    ],
)
def test_classes_of_data_and_model_must_agree(name, takes, says):
    config = SimpleNamespace(source=f"{HERE}.{name}")
    source = sources.build(data(name), "train")
    if says:
        assert says.format(config.source) in refused(experiment.fits_classes, config, source, takes)
    else:
        experiment.fits_classes(config, source, takes)


def test_the_stand_in_data_have_one_class(capsys):
    source = sources.build({"source": "shapes", "resolution": SIDE}, "train")
    experiment.fits_classes(SimpleNamespace(source="shapes"), source, {"model": 10})
    assert "has one class: only class 0 is trained" in capsys.readouterr().err


def test_a_label_beyond_the_model_is_refused_without_class_names():
    class Numbers(Pictures):
        class_names = ()

    loader = pipeline.batches(Numbers("train", SIDE), None, batch=4, seed=0, classes=1)
    assert "has the label 1, but the model has 1 classes" in refused(next, loader)
    loader.close()
