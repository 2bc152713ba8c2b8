"""The emoji folder from unpacked packages: names in two languages, no skin tones, both styles of a concept together."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text
from hybridgen.data.prepare import emoji

CONCEPTS = [f"1f{600 + i}" for i in range(30)]
NAMES = {"en": "face {}", "zh": "脸{}"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Four packages with 30 concepts: one with a variation selector, one with a skin tone, one without Chinese."""
    root = tmp_path_factory.mktemp("packages")
    drawn = [*CONCEPTS, "2764-fe0f", "1f44b-1f3fb", "1f9ff"]
    for vendor in ("google", "twitter"):
        folder = root / f"emoji-datasource-{vendor}" / "package"  # as tar unpacks it
        pictures = folder / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": f"emoji-datasource-{vendor}"}))
        for i, concept in enumerate(drawn):
            image = np.zeros((64, 64, 4), np.uint8)
            image[:, :32] = (i, 0, 255 * (vendor == "google"), 255)
            Image.fromarray(image).save(pictures / f"{concept}.png")
    for name, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        folder = root / name
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"name": name}))
        for language, pattern in NAMES.items():
            (folder / kind / language).mkdir(parents=True)
            known = {
                chr(int(c, 16)): {"tts": [pattern.format(i)], "default": ["face"]} for i, c in enumerate(CONCEPTS)
            } | {"\u2764": {"tts": [pattern.format("red")]}}
            known |= {"\U0001f44b\U0001f3fb": {"tts": ["x"]}}
            known |= {"\U0001f9ff": {"tts": ["x"]}} if language == "en" else {}
            content = known if kind == "annotations" else {}
            file = folder / kind / language / "annotations.json"
            file.write_text(json.dumps({kind: {"annotations": content}}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "emoji"
    assert emoji.build(packages, out) == 62
    return out


def test_the_folder(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 62 and {line["concept"] for line in lines} == {*CONCEPTS, "2764-fe0f"}
    assert all(
        (a["concept"], a["style"], b["style"]) == (b["concept"], "noto", "twemoji")
        for a, b in zip(lines[::2], lines[1::2], strict=True)
    )
    assert lines[::2] != sorted(lines[::2], key=lambda line: line["file_name"])  # kinds of concepts are mixed
    heart = next(line for line in lines if line["concept"] == "2764-fe0f")
    assert (heart["text"], heart["text_zh"], heart["keywords"]) == ("face red", "脸red", [])
    image = np.asarray(Image.open(folder / heart["file_name"]))
    assert image.shape == (64, 64, 3) and image[0, 0].tolist() == [30, 0, 255] and (image[:, 32:] == 255).all()
    splits = {}
    for line in lines:
        splits.setdefault(line["concept"], set()).add(line["split"])
    assert all(len(found) == 1 for found in splits.values()) and {"validation"} in splits.values()


def test_the_recipe_reads_it(folder):
    config = config_lib.load("configs/recipes/emoji.py:tiny", [f"path={folder}"])
    data = config.stages.prior.data
    source = sources.build(data, "train")
    reader = text.build(data, source)
    batch = next(pipeline.batches(source, reader, batch=64, seed=0))
    message = {reader.decode(ids) for ids in batch["text"]}
    assert any(caption.endswith(", twemoji") and "face" in caption for caption in message)
    assert any(caption.startswith("脸") and caption.endswith(", noto") for caption in message)
    assert not {"<unk>"} & {word for caption in message for word in caption.split()}


def test_weights_say_how_often_a_field_is_drawn(folder):
    data = {
        "source": "folder",
        "resolution": 8,
        "text": {"kind": "words", "length": 8},
        "options": {"path": str(folder), "text_key": ("text", "text_zh"), "text_weights": (3, 1)},
    }
    source = sources.build(data, "train")
    assert source[0]["texts"][0] == source[0]["texts"][2] != source[0]["texts"][3]
    reader, chinese = text.build(data, source), 0
    loader = pipeline.batches(source, reader, batch=64, seed=0)
    for _ in range(20):
        chinese += sum(reader.decode(ids).startswith("脸") for ids in next(loader)["text"])
    loader.close()
    assert abs(chinese / 1280 - 0.25) < 0.04
    for weights in ((1,), (0, 1), (1.5, 1)):
        with pytest.raises(UserError, match="text_weights"):
            sources.build({**data, "options": data["options"] | {"text_weights": weights}}, "train")


def test_what_is_missing_is_named(packages, tmp_path, capsys):
    shutil.copytree(packages, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "cldr-annotations-full")
    with pytest.raises(UserError, match="'cldr-annotations-full'"):
        emoji.build(tmp_path / "some", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert emoji.main(["--packages", str(packages), "--out", str(tmp_path / "out")]) == 0
    assert "wrote 62 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists"):
        emoji.build(packages, tmp_path / "out")
