"""Aspect-ratio buckets: every batch has one shape, batch k is a function of (seed, k), each record once per epoch."""

import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, transforms
from hybridgen.data.prepare import buckets as prepare
from hybridgen.data.sources import buckets

SIZES = [(40, 40)] * 9 + [(60, 30)] * 7 + [(30, 60)] * 5 + [(90, 10)]  # width, height


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """22 images of three shapes and one of another shape; image i has the grey level i, image 3 is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (i, i, i)).save(folder / f"{i:02d}.png")
    (folder / "03.png").write_bytes(b"")
    options = {"path": str(folder), "validation": 0}
    table = buckets.build(options, resolution=16, step=4, aspect=2, least=4)
    (folder / "buckets.json").write_text(json.dumps(table))
    return {"source": "folder", "options": options | {"buckets": str(folder / "buckets.json")}, "resolution": 16}


def take(data, count, start=0, **options):
    source = sources.build(data, "train")
    loader = pipeline.batches(source, None, batch=4, seed=2, start=start, **options)
    out = [batch for _, batch in zip(range(count), loader, strict=False)]
    loader.close()
    return out


def numbers(batch):
    """The numbers of the images of a batch; a broken one counts as itself."""
    greys = np.rint((batch["image"][:, 5, 5, 0] + 1) * 127.5).astype(int)
    return [int(broken) if broken >= 0 else int(grey) for grey, broken in zip(greys, batch["broken"], strict=True)]


def test_shapes_have_about_the_same_area():
    found = buckets.shapes(256, 64, 2)
    assert (256, 256) in found and {shape[::-1] for shape in found} == set(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0 and 0.7 * 256**2 <= height * width <= 256**2
        assert max(height / width, width / height) <= 2
    with pytest.raises(UserError, match="multiples of 64"):
        buckets.shapes(32, 64, 2)


def test_rare_shapes_go_to_the_nearest(data):
    source = sources.build(data, "train")
    counts = {shape: len(members) for shape, members in zip(source.shapes, source._members, strict=True)}
    assert sorted(counts.values()) == [5, 8, 9] and counts[16, 16] == 9  # the odd one is with the wide ones
    assert source.shapes[source._of[21]] == source.shapes[source._of[9]]


def test_every_batch_is_of_one_shape_and_pictures_fill_it(data):
    source, seen = sources.build(data, "train"), set()
    for batch in take(data, 20):
        shape = batch["image"].shape[1:3]
        seen.add(shape)
        assert {source.shapes[source._of[i]] for i in numbers(batch)} == {shape}
        assert np.ptp(batch["image"], (1, 2, 3)).max() == 0  # nothing is filled up with a border
    assert seen == set(source.shapes)


def test_an_epoch_has_each_record_at_most_once(data):
    """5 + 8 + 9 records in batches of 4 give 1 + 2 + 2 batches; the left-over records differ between epochs."""
    left_out = []
    for epoch in range(8):
        seen = [i for batch in take(data, 5, start=5 * epoch) for i in numbers(batch)]
        assert len(set(seen)) == 20
        left_out.append(frozenset(range(22)) - set(seen))
    assert len(set(left_out)) > 3


def test_a_batch_is_a_function_of_its_number(data):
    all_of_them = take(data, 12)
    (late,) = take(data, 1, start=11)
    assert numbers(late) == numbers(all_of_them[11])
    halves = [take(data, 12, rows=rows)[7] for rows in ((0, 1), (2, 3))]  # as two hosts read it
    np.testing.assert_array_equal(np.concatenate([half["image"] for half in halves]), all_of_them[7]["image"])


def test_a_sequential_pass_sees_all(data):
    batches = take(data, 99, shuffle=False)
    assert len(batches) == 2 + 2 + 3
    seen = [i for batch in batches for i, valid in zip(numbers(batch), batch["valid"], strict=True) if valid]
    assert sorted(seen) == list(range(22))
    assert len({batch["image"].shape for batch in batches[:3]}) == 3  # an evaluation of a few batches tells of all


def test_the_largest_shape_alone(data):
    """The shape that bench and preflight compile for, for batches of any size."""
    source = sources.build(data, "train")
    assert source.occurring(4, True) == source.shapes and source.occurring(8, True) == [(16, 16), (12, 20)]
    only = buckets.largest(source, 4)
    assert only.shape == (16, 16) and only.occurring(1, True) == [(16, 16)] and len(source._members[0]) > 0
    for batch in (2, 4, 9):
        indices, _ = only.arrange(np.arange(batch), batch, 0, True)
        assert {source.shapes[source._of[index]] for index in indices} == {(16, 16)}
    assert buckets.largest(source.source, 4) is source.source


def test_a_broken_record_is_replaced_from_its_bucket(data):
    source = sources.build(data, "train")
    item, broken = pipeline.read(source, 3)
    assert broken == 3 and item["image"].shape == (16, 16, 3) and item["image"][0, 0, 0] == 4
    assert source.after(8, 1) == 0  # round to the first of the square ones


def test_what_is_refused(data, tmp_path):
    path = tmp_path / "table.json"
    table = json.loads(open(data["options"]["buckets"]).read())
    other = {**data, "options": data["options"] | {"buckets": str(path)}}
    for changes, says in (
        ({"resolution": 32}, "resolution 32.*resolution 16"),
        ({"shapes": 3}, "is not a table of buckets"),
        ({"splits": {}}, "is not a table of buckets with the split 'train'"),
        ({"format": 9}, "other records"),
        ({"shapes": [[16, 16]]}, "other records"),
    ):
        path.write_text(json.dumps(table | changes))
        with pytest.raises(UserError, match=says):
            sources.build(other, "train")
    source = sources.build(data, "train")
    with pytest.raises(UserError, match="the 64 records of a batch; the largest has 9"):
        source.arrange(np.arange(64), 64, 0, True)


def test_the_fingerprint_tells_tables_apart(data, tmp_path):
    whole = buckets.build({name: data["options"][name] for name in ("path", "validation")}, 16, 4, 2, least=99)
    (tmp_path / "one.json").write_text(json.dumps(whole))
    other = {**data, "options": data["options"] | {"buckets": str(tmp_path / "one.json")}}
    message = [
        pipeline.fingerprint(d, sources.build(d, "train"), None, batch=4, seed=0)["source"] for d in (data, other)
    ]
    assert message[0]["records"] != message[1]["records"] and message[0]["options"] == message[1]["options"]


def test_the_command(data, tmp_path, capsys):
    out = tmp_path / "buckets.json"
    options = [
        "--config",
        "configs/recipes/imagefolder.py:tiny",
        f"--config.path={data['options']['path']}",
        "--step=8",
        "--least=4",
        f"--out={out}",
    ]
    assert prepare.main(options) == 0
    assert "records" in capsys.readouterr().out and len(json.loads(out.read_text())["splits"]["train"]["bucket"]) > 15


def oriented(path, orientation, how):
    """A picture of 40 x 20 pixels, wide before it is turned."""
    exif, image = Image.Exif(), Image.new("RGB", (40, 20), (200, 0, 0))
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    if how == "profile":
        info.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n", zip=True)
    elif how == "xmp":
        info.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    options = {"exif": {"exif": exif}, "xmp.jpg": {"xmp": xmp.encode()}, "xmp.webp": {"xmp": xmp.encode()}}
    image.save(path, **options.get(how, {} if path.suffix != ".png" else {"pnginfo": info}))
    if how == "late":  # after the pixels
        body, data = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0"), path.read_bytes()
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(data[:-12] + chunk + data[-12:])


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "name, how",
    [
        *(("a.jpg", "exif"), ("a.jpg", "xmp.jpg"), ("a.webp", "exif"), ("a.webp", "xmp.webp"), ("a.png", "exif")),
        *(("a.png", "late"), ("a.png", "profile"), ("a.png", "xmp")),
    ],
)
def test_pictures_are_assigned_upright(name, how, orientation, tmp_path):
    oriented(tmp_path / name, orientation, how)
    source = sources.Folder(tmp_path, resolution=16, validation=0)
    with Image.open(tmp_path / name) as image:
        want = transforms.flatten(image).size
    assert source.size(0) == want == ((20, 40) if orientation >= 5 else (40, 20))


def test_a_picture_that_cannot_be_turned_is_broken(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n4\nno number")
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png", pnginfo=info)
    source = sources.Folder(tmp_path, resolution=16, validation=0)
    for act in (source.size, source.__getitem__):
        with pytest.raises(sources.BrokenRecord, match="a.png: "):
            act(0)


@pytest.mark.parametrize(
    "sizes, least, says",
    [
        (
            [(64, 64)] * 40 + [(64, 36)] * 40 + [(36, 64)] * 40,
            64,
            r"80 of 120 pictures lose \d\d% .* instead of \d%: --least 64",
        ),
        ([(64, 64)] * 40 + [(64, 36)] * 40 + [(36, 64)] * 40, 8, ""),
        ([(64, 64)] * 120, 256, ""),  # one shape is enough
        ([(64, 8)] * 120, 8, ""),  # too wide for any shape: not because of --least
        ([(64, 60)] * 100 + [(64, 36)] * 2, 8, r"2 of 102 pictures lose .*--least 8 leaves"),
    ],
)
def test_a_warning_if_least_crops_pictures(sizes, least, says, tmp_path, capsys):
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i:03d}.png")
    words = ["--config", "configs/recipes/imagefolder.py:tiny", f"--config.path={tmp_path}", "--step=8"]
    assert (
        prepare.main([*words, "--config.data.options.validation=0", f"--least={least}", f"--out={tmp_path / 'b.json'}"])
        == 0
    )
    err = capsys.readouterr().err
    assert re.match(f"warning: {says}", err) and err.count("\n") == 1 if says else not err


def test_the_share_that_is_cropped():
    sizes, square = np.asarray([(64, 64), (64, 32), (32, 64), (64, 16)]), [(64, 64)]
    np.testing.assert_allclose(buckets.cropped(sizes, square), [0, 0.5, 0.5, 0.75])
    np.testing.assert_allclose(buckets.cropped(sizes, [(64, 64), (32, 64)]), [0, 0, 0.5, 0.5])


@pytest.mark.parametrize("text", ["48x64", "48×64", "48*64", "(48,64)", "[48,64]", "48,64", "48:64"])
@pytest.mark.parametrize("key, config", [("resolution", "recipes/imagefolder"), ("data.resolution", "tokenizers/vq")])
def test_two_sides_are_refused_with_what_to_do(text, key, config):
    with pytest.raises(UserError, match=f"config key '{key}' takes int.*buckets.*data.options.buckets"):
        config_lib.load(f"configs/{config}.py:tiny", [f"{key}={text}"])


def test_two_sides_in_a_config_file_are_refused_alike():
    config = config_lib.load("configs/tokenizers/vq.py:tiny").copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.data.resolution = (48, 64)
    with pytest.raises(
        UserError, match=r"config key 'data.resolution' takes int, not \(48, 64\).*data.options.buckets"
    ):
        config_lib.check(config)
