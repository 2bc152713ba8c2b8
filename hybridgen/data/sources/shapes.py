"""`shapes`: the built-in data set of images generated from a seed, with exact captions and the scene of each image.

A scene is plain JSON data in units of the image side (x to the right, y down), so it can be rendered at any size:

    {"objects": [{"shape", "colour", "size", "position", "x", "y", "r"}, ...], "background": "white",
     "radii": {"small": 0.135, ...},     the nominal radius of every size in use, for the evaluator
     "stated": {"count": 2, "size": True, "position": None, "relation": "left of", "same": False, "background": False}}

`stated` is what the caption states beyond colour and shape. A relation is that of objects[0] to objects[1].

Splits. Everything is a pure function of (seed, split, index), which are the key of the random stream SplitMix64 (Steele
et al. 2014, "Fast splittable pseudorandom number generators"). Guarantees:
- holdout: every image has a held-out (shape, colour) pair or a held-out (shape, relation, shape) triple, defined by
  `held_out_pair` and `held_out_triple` for all seeds; train and validation never have one. "b right of a" is the same
  triple as "a left of b". Each single shape, colour and relation does occur in train.
- validation: scenes are sampled as in train. A kind of scene is one object; 2, 3 or 4 different objects; or equal
  objects. Of every kind with at least `DIVIDED_FROM` descriptions under the options (sizes, colours, shapes, cell or
  relation, background; without the jitter), one description in eight, chosen by `in_validation`, is in validation and
  never in train, for all seeds. Kinds with fewer descriptions (such as "three green stars", or one object without a
  cell) share them between the splits, which then differ only in the random streams and so in the jitter.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.data.sources.captions import LANGUAGES, caption, template_count
from hybridgen.data.sources.outlines import BACKGROUNDS, COLOURS, SHAPES, render

RADII = {"small": 0.135, "medium": 0.168, "large": 0.21}  # half the side of an object's box
CELLS = (0.25, 0.5, 0.75)  # columns and rows of the nine positions
POSITIONS = {
    name: (CELLS[i % 3], CELLS[i // 3])
    for i, name in enumerate(
        ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
    )
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction of the first object
SPLITS = ("train", "validation", "holdout")
MARGIN = 1 / 32  # free space at each side of an object's slot: one pixel at 32, so objects are two pixels apart
DIVIDED_FROM, VALIDATION_PART = 500, 8


# ---- randomness and splits

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_STEPS = np.arange(1, 33, dtype=np.uint64) * np.uint64(_GAMMA)


def _mix(z):
    """The output function of SplitMix64, for a Python int or an array of uint64."""
    whole = isinstance(z, int)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift)) * factor & _MASK if whole else (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> 31) if whole else z ^ (z >> np.uint64(31))


def uniforms(seed: int, split: int, index: int) -> Iterator[float]:
    """Yields floats in [0, 1) without end, an independent stream for every (seed, split, index)."""
    key = 0
    for part in (seed, split, index):
        key = _mix((key + part + _GAMMA) & _MASK)
    while True:
        block = _mix(np.uint64(key) + _STEPS) >> np.uint64(11)
        yield from (block * 2.0**-53).tolist()
        key = (key + 32 * _GAMMA) & _MASK


_INDEX = {name: i for names in (SHAPES, COLOURS, BACKGROUNDS, RADII, POSITIONS) for i, name in enumerate(names)}


def held_out_pair(shape: str, colour: str) -> bool:
    """Whether a (shape, colour) pair is held out: one colour of each shape."""
    return _INDEX[colour] == (3 * _INDEX[shape] + 1) % 8


def held_out_triple(first: str, relation: str, second: str) -> bool:
    """Whether a (shape, relation, shape) triple is held out: at most one partner for each shape and axis."""
    if relation in ("right of", "below"):
        first, second = second, first
    axis = relation in ("above", "below")
    return (_INDEX[first] + 2 * _INDEX[second] + 3 * axis) % 11 == 5


def description(scene: Mapping[str, Any]) -> tuple[str, str | None, str | None, int, tuple[tuple[str, str, str], ...]]:
    """A scene without jitter: (background, axis, cell, number, ((shape, colour, size), ...)), for the splits.

    "a left of b" and "b right of a" have the same description, and so do lists in a different order.
    """
    stated, objects = scene["stated"], scene["objects"]
    looks = [(o["shape"], o["colour"], o["size"]) for o in (objects[:1] if stated["same"] else objects)]
    if stated["relation"] in ("right of", "below"):
        looks.reverse()
    elif not stated["relation"]:
        looks.sort()
    axis = {"right of": "left of", "below": "above"}.get(stated["relation"], stated["relation"])
    return scene["background"], axis, objects[0]["position"], len(objects), tuple(looks)


def in_validation(scene: Mapping[str, Any]) -> bool:
    """Whether a scene's description belongs to validation.

    The rule is a weighted sum of the indices of its words, modulo eight, like a Latin square. So about an eighth of the
    scenes with any given word is in validation too; a hash would not ensure this with only a thousand descriptions.
    The objects after the first, with their many combinations, add a hash.
    """
    background, axis, cell, _, ((shape, colour, size), *rest) = description(scene)
    total = _INDEX[colour] + 3 * _INDEX[shape] + 5 * _INDEX[size] + _INDEX.get(cell, 0) + _INDEX[background]
    if rest:
        total += _mix(zlib.crc32(f"{axis} {rest}".encode()))
    return total % VALIDATION_PART == 0


class Shapes:
    """Random-access source: `len(s)`, `s[i] -> {"image": H W 3 uint8, "text": str, "scene": dict}`.

    Args:
      split: "train", "validation" or "holdout"; `size` images each.
      shapes, colours, sizes, positions, relations, backgrounds, languages: names to use (all are in the tables above).
        Without positions a single object can be anywhere; without relations two objects are only listed.
      objects: numbers of objects, 1 to 4. One has a position, two a relation, three and four are listed. A number that
        is given several times is as many times as frequent.
      counts: half of the images with two or more objects show equal ones ("three green stars").
      templates: number of paraphrases of each kind, the simplest first; None: all.
      state_sizes, state_positions: whether captions state them. Backgrounds are stated if there are several.
      jitter: largest random shift of an object, in image sides; size_jitter: largest relative change of its radius.

    Raises UserError for an unknown name, an empty selection, numbers out of range, and an empty holdout split.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        size: int = 100_000,
        resolution: int = 32,
        shapes: Sequence[str] = tuple(SHAPES),
        colours: Sequence[str] = COLOURS,
        sizes: Sequence[str] = ("small", "large"),
        positions: Sequence[str] = tuple(POSITIONS),
        objects: Sequence[int] = (1, 2),
        relations: Sequence[str] = tuple(RELATIONS),
        counts: bool = False,
        backgrounds: Sequence[str] = ("white",),
        languages: Sequence[str] = ("en",),
        templates: int | None = None,
        state_sizes: bool = True,
        state_positions: bool = True,
        jitter: float = 0.03,
        size_jitter: float = 0.04,
    ):
        for name, given, known, empty in (
            ("split", (split,), SPLITS, False),
            ("shapes", shapes, SHAPES, False),
            ("colours", colours, COLOURS, False),
            ("sizes", sizes, RADII, False),
            ("positions", positions, POSITIONS, True),
            ("objects", objects, (1, 2, 3, 4), False),
            ("relations", relations, RELATIONS, True),
            ("backgrounds", backgrounds, BACKGROUNDS, False),
            ("languages", languages, LANGUAGES, False),
        ):
            _choose(name, given, known, empty)
        if resolution < 16 or size < 1 or (templates is not None and templates < 1):
            raise UserError(
                f"shapes: resolution {resolution}, size {size}, templates {templates}: must be at least 16, 1 and 1"
            )
        if not (0 <= jitter <= 0.25 and 0 <= size_jitter <= 0.08):
            given = f"jitter {jitter}, size_jitter {size_jitter}"
            raise UserError(f"shapes: {given}: must be within [0, 0.25] and [0, 0.08]")
        self.split, self.seed, self.size, self.resolution = split, int(seed), size, resolution
        self.sizes, self.positions, self.objects, self.relations = map(tuple, (sizes, positions, objects, relations))
        self.backgrounds, self.languages = tuple(backgrounds), tuple(languages)
        self.counts, self.templates = counts, templates
        self.state_sizes, self.state_positions = state_sizes, state_positions
        self.jitter, self.size_jitter = jitter, size_jitter
        self.radii = {name: RADII[name] for name in RADII if name in sizes}
        self._divide(tuple(shapes), tuple(colours))

    def _divide(self, shapes, colours):
        """Determines the held-out pairs and triples, and the kinds of scene that `in_validation` splits."""
        pairs = [(s, c) for s in shapes for c in colours]
        # with fewer than three of each, holding out could remove a shape or colour from training entirely
        enough = len(shapes) >= 3 and len(colours) >= 3
        self.held_pairs = [p for p in pairs if enough and held_out_pair(*p)]
        self.pairs = [p for p in pairs if p not in self.held_pairs]
        self.held_triples = [
            (a, r, b)
            for a in shapes
            for r in self.relations
            for b in shapes
            if enough and 2 in self.objects and held_out_triple(a, r, b)
        ]
        if self.split == "holdout" and not (self.held_pairs or self.held_triples):
            few = f"{len(shapes)} shapes and {len(colours)} colours"
            raise UserError(f"shapes: the split 'holdout' is empty with {few}: use more")
        if max(self.objects) > len(self.pairs):
            raise UserError(
                f"shapes: {max(self.objects)} different objects need as many pairs of shape and colour, but "
                f"{len(shapes)} x {len(colours)} leave {len(self.pairs)}"
            )
        one = len(self.pairs) * len(self.sizes) * len(self.backgrounds)
        self.divided = {
            "count": one >= DIVIDED_FROM,
            1: one * len(self.positions) >= DIVIDED_FROM,
            **{n: one**n >= DIVIDED_FROM for n in (2, 3, 4)},
        }

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        """The name of a record: its split and number."""
        return f"{self.split} {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, draw = self._scene(index)
        language = _pick(draw, self.languages)
        forms = template_count(scene, language)
        template = int(draw() * min(forms, self.templates or forms))
        return {
            "image": render(scene, self.resolution),
            "text": caption(scene, language, template),
            "scene": scene,
        }

    def scene(self, index: int) -> dict[str, Any]:
        """The scene of a record, without rendering it."""
        return self._scene(index)[0]

    def _scene(self, index):
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} is out of range for {self.size} records")
        draw = uniforms(self.seed, SPLITS.index(self.split), int(index)).__next__
        while True:
            scene, kind = self._words(draw)
            if self._belongs(scene, kind):
                self._place(scene, draw)
                return scene, draw

    def _words(self, draw):
        """(the discrete part of a scene, its kind: "count" or the number of objects)."""
        number = _pick(draw, self.objects)
        same = number > 1 and self.counts and draw() < 0.5
        relation = _pick(draw, self.relations) if number == 2 and self.relations and not same else None
        pairs = [_pick(draw, self.pairs) for _ in range(1 if same else number)]
        if self.split == "holdout":
            relation = self._compose(pairs, relation, draw)
        sizes = [_pick(draw, self.sizes) for _ in pairs]
        position = _pick(draw, self.positions) if number == 1 and self.positions else None
        objects = [
            {"shape": s, "colour": c, "size": z, "position": position} for (s, c), z in zip(pairs, sizes, strict=True)
        ]
        scene = {
            "objects": [dict(objects[0]) for _ in range(number)] if same else objects,
            "background": _pick(draw, self.backgrounds),
            "radii": dict(self.radii),
            "stated": {
                "count": number,
                "size": self.state_sizes,
                "position": position if self.state_positions else None,
                "relation": relation,
                "same": same,
                "background": len(self.backgrounds) > 1,
            },
        }
        return scene, "count" if same else number

    def _compose(self, pairs, relation, draw):
        """Puts a held-out pair or triple into `pairs`; returns the relation."""
        if relation and self.held_triples and (draw() < 0.5 or not self.held_pairs):
            first, relation, second = _pick(draw, self.held_triples)
            pairs[:] = [_pick(draw, [p for p in self.pairs if p[0] == shape]) for shape in (first, second)]
        elif self.held_pairs:
            pairs[int(draw() * len(pairs))] = _pick(draw, self.held_pairs)
        return relation

    def _belongs(self, scene, kind):
        """Whether a sampled scene belongs to the split; otherwise it is sampled again."""
        objects, relation = scene["objects"], scene["stated"]["relation"]
        looks = {(o["shape"], o["colour"]) for o in objects}
        if len(looks) < len(objects) and not scene["stated"]["same"]:
            return False  # two objects that differ only in position cannot be told apart in a caption
        triple = relation and (objects[0]["shape"], relation, objects[1]["shape"]) in self.held_triples
        if self.split == "holdout":
            return triple or not looks.isdisjoint(self.held_pairs)
        return not triple and (not self.divided[kind] or in_validation(scene) == (self.split == "validation"))

    def _place(self, scene, draw):
        """Sets x, y and r of every object. Each stays in its own slot, so objects never touch."""
        objects, stated = scene["objects"], scene["stated"]
        position = objects[0]["position"]
        if len(objects) == 1:
            slots = [(*POSITIONS[position or "centre"], 0.5)]
        elif stated["relation"]:
            dx, dy = RELATIONS[stated["relation"]]
            slots = [(0.5 + 0.25 * dx, 0.5 + 0.25 * dy, 0.25), (0.5 - 0.25 * dx, 0.5 - 0.25 * dy, 0.25)]
        else:
            free = [(x, y, 0.25) for y in (0.25, 0.75) for x in (0.25, 0.75)]
            slots = [free.pop(int(draw() * len(free))) for _ in objects]
        # at most 0.09 from the centre of a cell: the next cell begins at 0.125; an object without a cell is anywhere
        reach = min(self.jitter, 0.09) if position or len(objects) > 1 else 0.5
        for obj, (x, y, half) in zip(objects, slots, strict=True):
            r = min(RADII[obj["size"]] * (1 + self.size_jitter * (2 * draw() - 1)), 0.25 - MARGIN)
            obj["r"] = round(r, 5)
            for axis, at in (("x", x), ("y", y)):
                low, high = (0.5 - half, 0.5 + half) if half == 0.5 or at == 0.5 else (at - half, at + half)
                low, high = max(low + MARGIN + r, at - reach), min(high - MARGIN - r, at + reach)
                obj[axis] = round(low + (high - low) * draw(), 5)


def _pick(draw, items):
    return items[int(draw() * len(items))]


def _choose(name, given, known, may_be_empty):
    """Raises UserError if `given` is not a list of different known names."""
    wrong = [item for item in given if item not in known]
    repeated = name != "objects" and len(set(given)) < len(given)
    if wrong or isinstance(given, str) or repeated or not (given or may_be_empty):
        what = f"has no {wrong[0]!r}" if wrong else f"cannot be {given!r}"
        raise UserError(f"shapes: {name} {what}; choose from {', '.join(map(str, known))}")
