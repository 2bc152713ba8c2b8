"""The built-in captioned shapes: determinism, splits, layout, drawing, captions and vocabulary."""

import json
import pickle
import re
import time
import zlib

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.data.sources import captions
from hybridgen.data.sources.captions import caption, template_count, units, vocabulary
from hybridgen.data.sources.outlines import BACKGROUNDS, COLOURS, PALETTE, SHAPES, coverage, render
from hybridgen.data.sources.shapes import (
    CELLS,
    MARGIN,
    POSITIONS,
    RADII,
    RELATIONS,
    Shapes,
    description,
    held_out_pair,
    held_out_triple,
)

FULL = dict(sizes=tuple(RADII), objects=(1, 2, 3, 4), counts=True, backgrounds=BACKGROUNDS, languages=("en", "zh"))
TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(number, **options):
    source = Shapes(size=number, **options)
    return [source.scene(i) for i in range(number)]


def test_a_record_depends_on_seed_split_and_index_only():
    source, again = Shapes(**FULL), pickle.loads(pickle.dumps(Shapes(**FULL)))
    backwards = {i: again[i] for i in reversed(range(50))}
    for i in range(50):
        a, b = source[i], backwards[i]
        assert a["text"] == b["text"] and a["scene"] == b["scene"] == json.loads(json.dumps(a["scene"]))
        assert a["image"].dtype == np.uint8 and np.array_equal(a["image"], b["image"])
    texts = [source[i]["text"] for i in range(200)]
    for options in (dict(seed=1), dict(split="validation"), dict(split="holdout")):
        other = Shapes(**FULL, **options)
        assert sum(other[i]["text"] == texts[i] for i in range(200)) < 20
    larger = Shapes(resolution=64, **FULL)
    assert all(larger.scene(i) == source.scene(i) for i in range(50))


def test_pictures_are_the_same_on_every_machine():
    """Compares a recorded checksum: a change of the random stream or the rendering makes old runs irreproducible."""
    source = Shapes(**FULL)
    records = [source[i] for i in range(64)]
    scene = zlib.crc32(json.dumps([r["scene"] for r in records]).encode())
    assert (scene, zlib.crc32(b"".join(r["image"].tobytes() for r in records))) == (1926678845, 4085766314)


def test_length_and_bounds():
    source = Shapes(size=5)
    assert len(source) == 5 and len(list(source)) == 5
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]


def test_validation_and_train_share_no_description_whatever_the_seeds():
    train = {description(s) for seed in (0, 1) for s in scenes(4000, seed=seed)}
    validation = {description(s) for seed in (0, 2) for s in scenes(2000, seed=seed, split="validation")}
    assert len(validation) > 400 and not train & validation
    assert {len(d[-1]) for d in validation} == {1, 2}
    # the same distribution otherwise: every shape, colour and size about equally often
    for key in ("shape", "colour", "size"):
        shares = []
        for split in ("train", "validation"):
            values = [o[key] for s in scenes(2000, split=split) for o in s["objects"]]
            names = sorted({"shape": SHAPES, "colour": COLOURS, "size": ("large", "small")}[key])
            shares.append(np.array([values.count(name) / len(values) for name in names]))
        assert np.abs(shares[0] - shares[1]).max() < 0.25 * shares[0].mean(), (key, shares)


def test_small_kinds_share_descriptions_but_not_scenes():
    options = dict(objects=(3,), counts=True, shapes=("circle", "star", "ring"), colours=("red", "blue", "pink"))
    train, validation = (scenes(300, split=split, **options) for split in ("train", "validation"))
    equal = [[s for s in split if s["stated"]["same"]] for split in (train, validation)]
    assert {description(s) for s in equal[0]} == {description(s) for s in equal[1]}
    assert not {json.dumps(s) for s in train} & {json.dumps(s) for s in validation}


def test_every_choice_of_options_has_validation_scenes():
    """Selections whose words all have even indices, for which a sum modulo eight might never be zero."""
    for number in (1, 2, 3):
        options = dict(shapes=tuple(SHAPES)[::2], colours=COLOURS[1::2], objects=(number,))
        found = {description(s) for s in scenes(300, split="validation", **options)}
        assert len(found) > 40 and found.isdisjoint({description(s) for s in scenes(300, **options)}) == (number > 1)


@pytest.mark.parametrize("options", [{}, FULL, dict(shapes=tuple(SHAPES)[:6]), dict(relations=("below",))])
def test_holdout_is_compositional(options):
    def compositions(scene):
        objects, relation = scene["objects"], scene["stated"]["relation"]
        found = {(o["shape"], o["colour"]) for o in objects if held_out_pair(o["shape"], o["colour"])}
        if relation and held_out_triple(objects[0]["shape"], relation, objects[1]["shape"]):
            found.add((objects[0]["shape"], relation, objects[1]["shape"]))
        return found

    seen = scenes(3000, **options) + scenes(1500, split="validation", **options)
    holding = scenes(1500, split="holdout", **options)
    assert not any(compositions(s) for s in seen)
    assert all(compositions(s) for s in holding)
    assert {len(c) for s in holding for c in compositions(s)} == {2, 3}
    for key in ("shape", "colour"):  # every element of a held-out composition is learned in others
        assert {o[key] for s in holding for o in s["objects"]} == {o[key] for s in seen for o in s["objects"]}
    relations = [
        (s["objects"][0]["shape"], r, s["objects"][1]["shape"]) for s in seen if (r := s["stated"]["relation"])
    ]
    for s in holding:
        for c in compositions(s):
            if len(c) == 3:
                assert any(r[:2] == c[:2] for r in relations) and any(r[1:] == c[1:] for r in relations)


def test_a_relation_and_its_turned_form_are_one_composition():
    for a in SHAPES:
        for b in SHAPES:
            for relation, turned in TURNED.items():
                assert held_out_triple(a, relation, b) == held_out_triple(b, turned, a)


@pytest.mark.parametrize("options", [{}, FULL, dict(FULL, jitter=0.25, size_jitter=0.08, relations=(), positions=())])
def test_objects_keep_apart_and_stand_as_stated(options):
    for scene in scenes(1500, **options):
        objects, stated = scene["objects"], scene["stated"]
        assert len(objects) == stated["count"] in options.get("objects", (1, 2))
        for i, a in enumerate(objects):
            assert min(a["x"], a["y"]) - a["r"] >= MARGIN - 2e-5 and max(a["x"], a["y"]) + a["r"] <= 1 - MARGIN + 2e-5
            assert min(scene["radii"], key=lambda n: abs(np.log(RADII[n] / a["r"]))) == a["size"]
            assert a["colour"] != scene["background"]
            for b in objects[:i]:
                gap = max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) - a["r"] - b["r"]
                assert gap >= 2 * MARGIN - 4e-5  # two pixels at 32
        if stated["position"]:
            x, y = POSITIONS[stated["position"]]
            assert max(abs(objects[0]["x"] - x), abs(objects[0]["y"] - y)) < 0.1
        if stated["relation"]:
            ax, ay = RELATIONS[stated["relation"]]
            dx, dy = (objects[0][k] - objects[1][k] for k in "xy")
            assert ax * dx + ay * dy > 1.5 * abs(ay * dx + ax * dy)
        if stated["same"]:
            assert len({(o["shape"], o["colour"], o["size"]) for o in objects}) == 1
        else:
            assert len({(o["shape"], o["colour"]) for o in objects}) == len(objects)


def test_without_jitter_everything_is_in_its_place():
    for scene in scenes(200, jitter=0, size_jitter=0):
        for o in scene["objects"]:
            assert o["x"] in CELLS and o["y"] in CELLS and o["r"] == RADII[o["size"]]


def test_options_choose_what_is_drawn():
    options = dict(
        shapes=("ring", "heart", "star"),
        colours=("cyan", "red"),
        sizes=("medium",),
        objects=(1, 3),
        positions=("top", "centre"),
        backgrounds=("black",),
    )
    drawn = scenes(300, **options)
    objects = [o for s in drawn for o in s["objects"]]
    for key, names in (("shape", options["shapes"]), ("colour", options["colours"]), ("size", ("medium",))):
        assert {o[key] for o in objects} == set(names)
    assert {s["stated"]["position"] for s in drawn} == {"top", "centre", None}
    assert {len(s["objects"]) for s in drawn} == {1, 3} and {s["background"] for s in drawn} == {"black"}
    assert not any(s["stated"]["same"] or s["stated"]["background"] for s in drawn)
    silent = Shapes(state_sizes=False, state_positions=False)
    text = " ".join(silent[i]["text"] for i in range(200))
    assert not re.search("small|large|top|bottom|centre", text)
    assert {len(s["objects"]) for s in scenes(200, counts=True, objects=(2, 3)) if s["stated"]["same"]} == {2, 3}


def test_drawing_is_the_shape_at_any_resolution():
    """The area of the soft mask does not depend on subpixel position, and the circle's is pi r^2."""
    for shape in SHAPES:
        exact = coverage(shape, 0.5, 0.5, 0.4, 512)[0].sum() / 512**2 / 0.4**2
        for resolution, slack in ((32, 0.09), (64, 0.04), (256, 0.01)):
            for shift in (0.0, 0.3, 0.7):
                cover, box = coverage(shape, 0.5 + shift / resolution, 0.5, 0.21, resolution)
                assert cover.dtype == np.float32 and cover.shape == np.empty((resolution,) * 2)[box].shape
                assert cover.min() >= 0 and cover.max() == 1
                assert cover.sum() / resolution**2 / 0.21**2 == pytest.approx(exact, rel=slack), (shape, resolution)
    area = coverage("circle", 0.5, 0.5, 0.4, 512)[0].sum() / 512**2
    assert area == pytest.approx(np.pi * (0.97 * 0.4) ** 2, rel=1e-3)


def test_a_picture_has_its_colours_and_soft_edges():
    scene = scenes(1, shapes=("circle",), colours=("red",), objects=(1,), backgrounds=("grey",))[0]
    image = render(scene, 64)
    at = scene["objects"][0]
    assert tuple(image[0, 0]) == PALETTE["grey"]
    assert tuple(image[int(at["y"] * 64), int(at["x"] * 64)]) == PALETTE["red"]
    colours = {tuple(p) for p in image.reshape(-1, 3).tolist()}
    assert len(colours) > 10  # blended edge pixels, all between the two
    low, high = np.minimum(PALETTE["grey"], PALETTE["red"]), np.maximum(PALETTE["grey"], PALETTE["red"])
    assert (image >= low).all() and (image <= high).all()


def read_english(text):
    """An independent reading of a caption: (nouns as (number, size, colour, shape), statement)."""
    noun = rf"\b(an?|two|three|four)( small| medium| large)? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:s|es)?\b"
    background = re.search(r" on an? (\w+) background$", text)
    text = text[: background.start()] if background else text
    found = list(re.finditer(noun, text))
    nouns = [("a an two three four".split().index(m[1]) or 1, (m[2] or "").strip(), m[3], m[4]) for m in found]
    rest = re.sub(noun, "#", text)
    where = re.search(r"\b(?:in the|at the|on the) ((?:top|bottom)? ?(?:left|right)|top|bottom|centre)\b", rest)
    if m := re.search(r"# with # (?:on its )?(left|right|above it|below it)", rest):
        nouns = nouns[::-1]
        statement = {"left": "left of", "right": "right of", "above it": "above", "below it": "below"}[m[1]]
    elif m := re.search(r"# (?:to the )?(left of|right of|above|below) #", rest):
        statement = m[1]
    else:
        statement = where[1].strip() if where else None
    return nouns, statement, background[1] if background else None


def read_chinese(text):
    def name(words):
        table = {(v if isinstance(v, str) else v[-1]): k for k, v in words.items()}
        return table, "|".join(sorted(table, key=len, reverse=True))

    (shapes, s), (colours, c), (sizes, z), (places, p), (backgrounds, b), (relations, r) = map(
        name,
        (
            captions.SHAPE_WORDS,
            captions.COLOUR_WORDS,
            captions.SIZE_WORDS,
            captions.POSITION_WORDS,
            captions.BACKGROUND_WORDS,
            captions.RELATION_WORDS,
        ),
    )
    background = re.match(f"({b})背景上", text)
    text = text[background.end() :] if background else text
    noun = f"([一两三四])个({z})?({c})({s})"
    nouns = [
        ("_一两三四".index(m[1]), sizes.get(m[2], ""), colours[m[3]], shapes[m[4]]) for m in re.finditer(noun, text)
    ]
    rest = re.sub(noun, "#", text)
    if m := re.search(f"#在#的?({r})", rest):
        statement = relations[m[1]]
    elif m := re.search(f"#({r})有#", rest):
        nouns, statement = nouns[::-1], relations[m[1]]
    else:
        where = re.search(p, rest)
        statement = places[where[0]] if where else None
    return nouns, statement, backgrounds[background[1]] if background else None


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("options", [{}, FULL, dict(FULL, state_sizes=False)])
def test_every_paraphrase_says_what_the_scene_shows(language, options):
    """Each caption is read back by a parser that knows nothing of the templates."""
    read, paraphrases = {"en": read_english, "zh": read_chinese}[language], {}
    for scene in scenes(400, **options):
        stated, objects = scene["stated"], scene["objects"]
        want = [(1, o["size"] if stated["size"] else "", o["colour"], o["shape"]) for o in objects]
        if stated["same"]:
            want = [(len(objects), *want[0][1:])]
        for k in range(template_count(scene, language)):
            text = caption(scene, language, k)
            nouns, statement, background = read(text)
            if stated["relation"] and nouns != want:
                nouns, statement = nouns[::-1], TURNED[statement]
            assert nouns == want and statement == (stated["relation"] or stated["position"]), text
            assert background == (scene["background"] if stated["background"] else None), text
            assert set(units(text)) <= set(vocabulary([language])), text
            assert " ".join(text.split()) == text and "{" not in text
            paraphrases.setdefault(captions.kind(scene), set()).add(k)
    assert min(map(len, paraphrases.values())) >= 3


def test_exact_captions():
    scene = {
        "objects": [
            {"shape": "circle", "colour": "red", "size": "small", "position": None},
            {"shape": "square", "colour": "orange", "size": "large", "position": None},
        ],
        "background": "white",
        "stated": {
            "count": 2,
            "size": True,
            "position": None,
            "relation": "left of",
            "same": False,
            "background": False,
        },
    }
    assert caption(scene) == "a small red circle left of a large orange square"
    assert caption(scene, "en", 1) == "a large orange square with a small red circle on its left"
    assert caption(scene, "zh") == "一个小的红色圆形在一个大的橙色正方形左边"
    scene["stated"] |= {"size": False, "background": True}
    assert caption(scene, "en", 2) == "an orange square right of a red circle on a white background"
    equal = {
        "objects": [{"shape": "star", "colour": "green", "size": "small", "position": None}] * 3,
        "stated": {"size": False, "position": None, "relation": None, "same": True, "background": False},
    }
    assert caption(equal) == "three green stars" and caption(equal, "zh", 1) == "画面里有三个绿色星形"
    one = {
        "objects": [{"shape": "circle", "colour": "red", "size": "small", "position": "top left"}],
        "stated": {"size": False, "position": "top left", "relation": None, "same": False, "background": False},
    }
    assert caption(one) == "a red circle in the top left"


def test_templates_limits_the_paraphrases():
    source = Shapes(templates=1)
    for i in range(100):
        record = source[i]
        assert record["text"] == caption(record["scene"], "en", 0)
    assert len({caption(source.scene(0), "en", k) for k in range(10)}) == template_count(source.scene(0))


def test_the_vocabulary_is_closed_and_tight():
    """Every unit of every caption is in it, and every unit in it is in some caption."""
    for language in ("en", "zh"):
        message = set()
        for options in ({}, FULL, dict(state_sizes=False)):
            for scene in scenes(2000, **options):
                for k in range(template_count(scene, language)):
                    message |= set(units(caption(scene, language, k)))
        assert message == set(vocabulary([language]))
    both = vocabulary()
    assert both == vocabulary(("en", "zh")) and len(both) == len(set(both))
    assert both[: len(vocabulary(["en"]))] == vocabulary(["en"])
    assert units("一个 red 圆形 circle") == ["一", "个", "red", "圆", "形", "circle"]


def test_the_words_cover_the_tables():
    for words, names in (
        (captions.SHAPE_WORDS, SHAPES),
        (captions.COLOUR_WORDS, COLOURS),
        (captions.SIZE_WORDS, RADII),
        (captions.BACKGROUND_WORDS, BACKGROUNDS),
        (captions.POSITION_WORDS, POSITIONS),
        (captions.RELATION_WORDS, RELATIONS),
    ):
        assert tuple(words) == tuple(names)


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(split="test"), "train"),
        (dict(shapes=("blob",)), "blob"),
        (dict(shapes="circle"), "circle"),
        (dict(colours=()), "colours"),
        (dict(colours=("red", "red")), "red"),
        (dict(objects=(5,)), "5"),
        (dict(languages=("fr",)), "fr"),
        (dict(resolution=8), "8"),
        (dict(size=0), "0"),
        (dict(templates=0), "0"),
        (dict(jitter=0.5), "0.5"),
        (dict(size_jitter=-0.1), "-0.1"),
        (dict(backgrounds=("red",)), "red"),
        (dict(shapes=("circle",), colours=("red", "blue"), objects=(1, 3)), "1 x 2"),
        (dict(split="holdout", shapes=("circle",), colours=("red", "blue")), "the split 'holdout' is empty"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(UserError, match=re.escape(word)):
        Shapes(**options)


def test_speed():
    """An idle machine is five times as fast; measured in CPU time; -s prints the speed."""
    source = Shapes()
    source[0]
    start = time.process_time()
    for i in range(1000):
        source[i]
    rate = 1000 / (time.process_time() - start)
    print(f"shapes: {rate:.0f} pictures a second at 32 pixels on one core")
    assert rate > 2000
