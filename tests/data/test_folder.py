"""Folders of images, also hostile ones: what is read, what is refused, and that a bad record affects no other."""

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text, transforms

EMOJI = Path(__file__).parents[3] / "shared" / "data" / "emoji"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(path, colour=RED, size=(24, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def metadata(folder, records):
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def folder_of(path, count=8, **fields):
    for i in range(count):
        picture(path / f"{i}.png", (i, 2 * i, 3 * i))
    metadata(path, [{"file_name": f"{i}.png", "text": f"number {i}", **fields} for i in range(count)])
    return path


def read(path, **options):
    return sources.Folder(path, **{"resolution": 8, "validation": 0, **options})


def png_header(width, height):
    """A PNG header that claims a size, with almost no pixel data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def refusal(source, index=0):
    with pytest.raises(sources.BrokenRecord) as error:
        source[index]
    assert source.name(index) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ---- what is read


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_formats_crop_and_resize(tmp_path, suffix):
    image = np.zeros((40, 80, 3), np.uint8)  # the sides are cut off; what stays is red above blue
    image[:, :20] = image[:, 60:] = 255
    image[:20, 20:60], image[20:, 20:60] = RED, BLUE
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", quality=100)
    item = read(tmp_path)[0]
    assert item["image"].shape == (8, 8, 3) and item["image"].dtype == np.uint8 and item["text"] == ""
    inside = item["image"][:, 1:-1].astype(int)
    assert abs(inside[:3] - RED).max() < 24 and abs(inside[5:] - BLUE).max() < 24


def test_header_agrees_with_decoder(tmp_path):
    cases = [
        ("a.png", {}),
        ("b.jpg", {}),
        ("c.jpg", {"progressive": True}),
        ("d.webp", {}),
        ("e.webp", {"lossless": 1}),
        ("f.webp", {"exif": b"Exif\0\0"}),
        ("g.jpg", {"exif": b"Exif\0\0" + b"\xff" * 300}),
    ]
    for name, options in cases:
        picture(tmp_path / name, size=(37, 23), **options)
        assert sources.header_size((tmp_path / name).read_bytes()) == (37, 23), name
    Image.new("RGBA", (9, 5), (1, 2, 3, 4)).save(tmp_path / "h.webp")
    assert sources.header_size((tmp_path / "h.webp").read_bytes()) == (9, 5)


@pytest.mark.parametrize(
    "mode, colour, seen",
    [
        ("RGBA", (255, 0, 0, 0), (0, 255, 0)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("LA", (7, 0), (0, 255, 0)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 90 * 257, (90, 90, 90)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_modes_and_alpha(tmp_path, mode, colour, seen):
    Image.new(mode, (8, 8), colour).save(tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    image = read(tmp_path, background=(0, 255, 0))[0]["image"]
    assert abs(image.astype(int) - seen).max() <= 1


def test_palette_transparency(tmp_path):
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0, 0, 0] * 3 + [200, 3, 3])
    image.save(tmp_path / "a.png", transparency=3)
    assert (read(tmp_path)[0]["image"] == 255).all()


def test_floats_are_exact_at_the_ends():
    every = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(every)
    assert floats.dtype == np.float32 and floats[0] == -1 and floats[255] == 1
    np.testing.assert_array_equal(transforms.to_uint8(floats), every)
    np.testing.assert_array_equal(transforms.flip(every.reshape(1, 64, 4), 1)[0, ::-1], every.reshape(1, 64, 4)[0])


def test_captions_by_key_list_and_language(tmp_path):
    picture(tmp_path / "a.png")
    metadata(tmp_path, [{"file_name": "a.png", "text": {"en": "red", "zh": "红"}, "more": ["one", "two"], "kind": "x"}])
    assert read(tmp_path)[0]["texts"] == ("red", "红")
    assert read(tmp_path, language="zh")[0]["texts"] == ("红",)
    source = read(tmp_path, text_key=("text", "more"))
    assert source[0]["texts"] == ("red", "红", "one", "two") and source[0]["text"] == "red"
    assert list(source.captions()) == ["red", "红", "one", "two"]
    assert read(tmp_path, text_key=None)[0]["texts"] == ("",)
    assert read(tmp_path, label_key="kind")[0]["label"] == 0


def test_every_caption_is_drawn(tmp_path):
    picture(tmp_path / "a.png")
    metadata(tmp_path, [{"file_name": "a.png", "text": ["one", "two", "three"]}])
    source, tokenizer = read(tmp_path), text.Words(["one", "two", "three"], 2)
    loader = pipeline.batches(source, tokenizer, batch=32, seed=0)
    assert set(next(loader)["text"][:, 0].tolist()) == {2, 3, 4}
    loader.close()


def test_splits(tmp_path):
    folder_of(tmp_path, 40)
    parts = {split: read(tmp_path, split=split, validation=0.3) for split in ("train", "validation")}
    names = {split: {source.name(i) for i in range(len(source))} for split, source in parts.items()}
    assert not names["train"] & names["validation"] and len(names["train"] | names["validation"]) == 40
    assert 3 < len(names["validation"]) < 25
    picture(tmp_path / "new.png")
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "new.png", "text": ""}))
    again = read(tmp_path, split="validation", validation=0.3)
    assert names["validation"] <= {again.name(i) for i in range(len(again))}  # an addition moves no other
    assert len(read(tmp_path, split="validation", validation=1e-9)) == 1  # a small folder has one to look at


def test_split_and_classes_from_metadata(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    metadata(
        tmp_path,
        [
            {"file_name": f"{i}.png", "text": "", "part": "train" if i < 3 else "validation", "kind": "dbca"[i]}
            for i in range(4)
        ],
    )
    train, validation = (
        read(tmp_path, split=split, split_key="part", label_key="kind") for split in ("train", "validation")
    )
    assert [train[i]["label"] for i in range(3)] == [3, 1, 2] and validation[0]["label"] == 0
    assert train.class_names == list("abcd")


def test_pictures_without_metadata(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/.hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name, format="PNG")
    source = read(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b/2.JPG"]
    with pytest.raises(UserError, match="metadata.jsonl.*'kind'"):
        read(tmp_path, label_key="kind")


# ---- what is refused


def test_missing_empty_and_wrong(tmp_path):
    with pytest.raises(UserError, match="no folder of images at .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no usable image.*0 records"):
        read(tmp_path)
    metadata(tmp_path, [b"[]", b"nonsense"])
    with pytest.raises(UserError, match="2 of them broken; metadata.jsonl line 1: a JSON list"):
        read(tmp_path)
    folder_of(tmp_path)
    with pytest.raises(UserError, match="'validation'"):
        read(tmp_path, split="validation")  # with validation=0
    for options, says in [
        ({"split": "holdout"}, "'holdout'"),
        ({"resolution": 0}, "resolution is 0"),
        ({"validation": 1.5}, "1.5"),
        ({"max_pixels": 0}, "max_pixels is 0"),
    ]:
        with pytest.raises(UserError, match=says):
            read(tmp_path, **options)


def test_build_names_the_nearest(tmp_path):
    folder_of(tmp_path)
    config = {"source": "folder", "options": {"path": str(tmp_path)}, "resolution": 8, "text": {"kind": "bytes"}}
    assert len(sources.build(config, "train")) == 7
    for change, says in [
        ({"source": "folders"}, "'folders'.*'folder'"),
        ({"workres": 1}, "'workres'.*'workers'"),
        ({"options": {"path": "x", "text_keys": "a"}}, "'text_keys'.*'text_key'"),
        ({"options": {}}, "options.path"),
        ({"options": {"path": "x", "resolution": 3}}, "resolution"),
    ]:
        with pytest.raises(UserError, match=says):
            sources.build({**config, **change}, "train")
    with pytest.raises(UserError, match="data.resolution is missing"):
        sources.build({"source": "folder", "options": {"path": str(tmp_path)}}, "train")


def test_pixel_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "flat.png").write_bytes(png_header(0, 7))
    webp = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + b"\0" * 40
    (tmp_path / "huge.webp").write_bytes(webp)
    picture(tmp_path / "large.png", size=(101, 100))
    picture(tmp_path / "right.png", size=(100, 100))
    source = read(tmp_path, max_pixels=10_000)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    assert "100000 x 100000 pixels; max_pixels is 10000" in refusal(source, 0)
    assert "0 x 7" in refusal(source, 1)
    assert "16384 x 16384" in refusal(source, 2)
    assert "101 x 100" in refusal(source, 3)
    assert not opened
    assert source[4]["image"].shape == (8, 8, 3) and opened


def test_files_that_are_not_what_they_say(tmp_path):
    for name, cut in (("cut.jpg", 0.6), ("cut.png", 0.6), ("cut.webp", 0.6), ("header.jpg", 0.01)):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * cut)])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "really.tiff")
    (tmp_path / "really.tiff").rename(tmp_path / "tiff.png")
    (tmp_path / "dir.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    picture(tmp_path / "ok.png")
    (tmp_path / "long.png").write_bytes(b"\0" * 60_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    metadata(tmp_path, [{"file_name": name, "text": ""} for name in [*names, "missing.png"]])
    source = read(tmp_path, max_bytes=50_000)
    reasons = {source.name(i): refusal(source, i) for i in range(len(source)) if source.name(i) != "ok.png"}
    assert len(reasons) == len(names)
    assert "truncated" in reasons["cut.jpg"] and "truncated" in reasons["cut.png"]
    assert "not an image in PNG, JPEG, WEBP" in reasons["tiff.png"] and "No such file" in reasons["missing.png"]
    assert "cut off" in reasons["header.jpg"] and "60000 bytes; max_bytes is 50000" in reasons["long.png"]
    assert all("not a regular file" in reasons[name] for name in ("pipe.png", "dir.png"))


def test_names_that_lead_out(tmp_path):
    picture(tmp_path / "secret.png")
    inside = tmp_path / "data"
    picture(inside / "ok.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "fine.png").symlink_to(inside / "ok.png")
    bad = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "a/../../secret.png",
        "..\\secret.png",
        "C:\\secret.png",
        "link.png",
        "linked/secret.png",
        "",
        ".",
        "x" * 5000,
        "a\0b.png",
        "\x1b[2Jx.png",
        "\ud800.png",
        7,
        None,
        ["ok.png"],
    ]
    metadata(inside, [{"file_name": name, "text": ""} for name in [*bad, "ok.png", "fine.png"]])
    source = read(inside)
    assert len(source) == len(bad) + 2
    for i in range(len(bad)):
        assert "pixels" not in refusal(source, i) and refusal(source, i).isprintable()
    assert (source[len(bad)]["image"] == source[len(bad) + 1]["image"]).all()


def test_hostile_metadata_is_counted_and_named(tmp_path):
    picture(tmp_path / "ok.png")
    good = {"file_name": "ok.png", "text": "fine"}
    bad = [
        b"[1, 2]",
        b'"text"',
        b"{",
        b"\xff\xfe{}",
        b"nul\0l",
        b"[" * 100_000,
        b'{"file_name": ' + b"9" * 6000 + b"}",
        b'{"file_name": "ok.png", "text": "' + b"x" * sources.MAX_LINE + b'"}',
        b"{}",
        {"file_name": "ok.png"},
        {"file_name": "ok.png", "text": 7},
        {"file_name": "ok.png", "text": []},
        {"file_name": "ok.png", "text": ["a", None]},
        {"text": "no name"},
    ]
    metadata(tmp_path, [good, b"", b"  ", *bad, good])
    source = read(tmp_path)
    count, lines = source.problems(limit=3)
    assert len(source) == len(bad) + 2 and count == len(bad) and len(lines) == 3
    assert lines[0] == "metadata.jsonl line 4: a JSON list, not an object"
    assert source[0]["text"] == source[len(source) - 1]["text"] == "fine"
    assert "more than 1048576 bytes" in refusal(source, 8)
    assert "'text'" in refusal(source, 10) and source.name(10) == "ok.png"


def test_a_huge_line_is_never_held_whole(tmp_path):
    picture(tmp_path / "ok.png")
    with open(tmp_path / "metadata.jsonl", "wb") as file:
        file.write(b'{"file_name": "')
        for _ in range(40):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + json.dumps({"file_name": "ok.png", "text": "fine"}).encode())
    tracemalloc.start()
    source = read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 2 and source[1]["text"] == "fine" and peak < 8 * 2**20


def test_long_captions_are_cut(tmp_path):
    picture(tmp_path / "ok.png")
    metadata(tmp_path, [{"file_name": "ok.png", "text": "red " * 10_000 + "\ud800"}])
    assert len(read(tmp_path)[0]["text"]) == sources.MAX_TEXT
