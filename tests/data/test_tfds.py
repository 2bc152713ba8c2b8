"""The source "tfds" on a data set that is built here, as ArrayRecord and without TensorFlow."""

import io
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BUILDER = """
    import tensorflow_datasets as tfds

    class Greys(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
                        "kind": tfds.features.ClassLabel(names=["even", "odd"])}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(20)), "test": self._generate_examples(range(20, 26))}

        def _generate_examples(self, numbers):
            for i in numbers:  # bytes of a file: an array would be encoded by TensorFlow
                with open(f"{FOLDER}/{i}.png", "rb") as file:
                    yield i, {"image": file.read(), "caption": f"grey {i}", "kind": i % 2}
"""

PREPARE = """
    import sys
    sys.path.insert(0, FOLDER)
    from greys.greys import Greys
    Greys(data_dir=f"{FOLDER}/data", file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder of a prepared version. The builder is in a package: tfds takes neither a module nor `__main__`."""
    pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")
    folder = tmp_path_factory.mktemp("tfds")
    for i in range(26):
        out = io.BytesIO()
        Image.new("RGB", (24, 16 + i), (i, i, i)).save(out, "PNG")
        (folder / f"{i}.png").write_bytes(out.getvalue())
    (folder / "greys").mkdir()
    (folder / "greys" / "__init__.py").write_text("")
    for name, code in (("greys/greys.py", BUILDER), ("prepare.py", PREPARE)):
        (folder / name).write_text(f"FOLDER = {str(folder)!r}\n" + textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(folder / "prepare.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "data" / "greys" / "1.0.0"


def config(prepared, **options):
    options = {"path": str(prepared), "text_key": "caption", "label_key": "kind", **options}
    return {"source": "tfds", "options": options, "resolution": 8, "text": {"kind": "words", "length": 4}}


def test_what_was_built_is_read(prepared):
    data = config(prepared, splits=(("validation", "test"),))
    source = sources.build(data, "train")
    assert len(source) == 20 and source.class_names == ["even", "odd"] and len(sources.build(data, "validation")) == 6
    reader = text.build(data, source)
    loader = pipeline.batches(source, reader, batch=4, seed=0, threads=2)
    seen = []
    for _ in range(5):
        batch = next(loader)
        greys = np.rint((batch["image"][:, 4, 4, 1] + 1) * 127.5).astype(int)
        assert batch["image"].shape == (4, 8, 8, 3) and (batch["label"] == greys % 2).all()
        assert [reader.decode(ids) for ids in batch["text"]] == [f"grey {i}" for i in greys]
        seen += greys.tolist()
    loader.close()
    assert sorted(seen) == list(range(20)) and "tensorflow" not in sys.modules


def test_slices_and_names(prepared):
    part = sources.build(config(prepared, splits=(("validation", "train[75%:]"),)), "validation")
    assert len(part) == 5 and "greys/1.0.0 train[75%:]" in part.name(0)
    named = config(prepared, data_dir=str(prepared.parents[1]))
    named["options"]["path"] = "greys:1.0.0"
    assert len(sources.build(named, "train")) == 20


@pytest.mark.parametrize(
    "options, says",
    [
        ({"text_key": "captoin"}, "'captoin'.*'caption'"),
        ({"splits": (("train", "dev"),)}, "dev"),
        ({"path": "no_such"}, "no_such"),
    ],
)
def test_what_is_refused(prepared, options, says):
    with pytest.raises(UserError, match=says):
        sources.build(config(prepared, **options), "train")
