"""Exact evaluator of `shapes`: finds the objects of a picture and checks its caption's attributes, without a model.

The method (all in NumPy; a soft mask has values from 0 to 1):
1. background: the median of the picture's border.
2. every pixel is fitted as background + alpha * (palette colour - background), by the colour of the smallest residual;
   so blended edges belong to the object's colour, and touching objects of different colours are separated.
3. objects: connected pixels of one colour class; specks and thin seams between objects are dropped. An object's colour
   is the median of its pixels with the most coverage.
4. shape: the soft mask is compared with every shape drawn with the mask's area and centre. The best overlap decides. It
   must reach a threshold, so that an irregular blob is not a circle, and exceed the second best by a margin, so that a
   shape half way between two kinds is neither.
5. size from the area, place from the centre. The scene's objects are matched to those found by optimal assignment.
6. debris: connected pixels that differ from the background and belong to no object, such as a pale second shape. The
   picture is smoothed by a median over 3 x 3 pixels; the threshold is NOISE, or follows from the picture's own noise
   where that is higher.

Letters: `H W` picture, `n` pixels, `c` palette colours, `o` objects found, `s` objects of the scene.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from hybridgen.core.errors import UserError
from hybridgen.data.sources.outlines import BACKGROUNDS, COLOURS, PALETTE, SHAPES, coverage
from hybridgen.data.sources.shapes import CELLS, POSITIONS, RADII, RELATIONS

ATTRIBUTES = ("shape", "colour", "size", "count", "position", "relation", "background", "clean")
COLOUR_TOLERANCE = 75  # largest distance of an object's colour from the palette's, of 255 a channel
LEAST_OVERLAP = 0.75  # intersection over union, chosen at 32 pixels
LEAST_MARGIN = 0.065  # over the second best overlap; undistorted shapes have at least 0.12
SOFT_EDGES = (0.5, 0.75)  # standard deviations of tolerated blur, in pixels at resolution 32
NOISE = 7.5  # smallest visible distance of a colour from the background, of 255 a channel: 3 % of blue on white
DEBRIS = 8  # connected pixels, at resolution 32, from which on debris makes a picture unclean
CLEARANCE = 3  # width in pixels, at resolution 32, of the zone around an object in which its blurred edge may lie
SPECK = 0.3  # share of the smallest object's area below which a piece is not an object
_COLOURS = np.array([PALETTE[name] for name in COLOURS], np.float32)  # c 3
_BACKGROUNDS = np.array([PALETTE[name] for name in BACKGROUNDS], np.float32)
_GRID = 128


@functools.cache
def moments(shape: str) -> tuple[float, float, float]:
    """(area, x, y) of a shape of radius 1: its area and centre of mass, from a fine drawing."""
    cover, (rows, columns) = coverage(shape, 0.5, 0.5, 0.4, _GRID)
    cover = cover.astype(np.float64)
    x, y = ((np.arange(s.start, s.stop) + 0.5) / _GRID - 0.5 for s in (columns, rows))
    area = cover.sum()
    return area / (0.4 * _GRID) ** 2, (cover.sum(0) @ x) / area / 0.4, (cover.sum(1) @ y) / area / 0.4


def as_pixels(image: np.ndarray) -> np.ndarray:
    """H H 3, uint8 or float in [-1, 1] -> float32 in [0, 255]. Floats are clipped to the range, NaN becomes -1.

    Raises UserError for another shape.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.shape[0] != image.shape[1]:
        raise UserError(f"a picture must have the shape H H 3, not {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32)
    return (np.clip(np.nan_to_num(image.astype(np.float32), nan=-1.0), -1, 1) + 1) * 127.5


def _median(values):
    """Upper median along the first axis; np.median is many times slower on small arrays."""
    return np.sort(values, axis=0)[len(values) // 2]


def _explain(pixels):
    """(background 3, colour class H W int, alpha H W float32: 0 background, 1 colour) of pixels H W 3."""
    height = pixels.shape[0]
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = _median(border)
    rays = _COLOURS - background  # c 3
    lengths = np.maximum((rays * rays).sum(-1), 1.0)  # c
    offset = pixels.reshape(-1, 3) - background  # n 3
    dots = offset @ rays.T  # n c
    alpha = np.clip(dots / lengths, 0, 1)
    rest = alpha * (alpha * lengths - 2 * dots)  # n c, the squared residual minus |offset|^2
    best = rest.argmin(-1)
    alpha = np.take_along_axis(alpha, best[:, None], 1)[:, 0]
    return background, best.reshape(height, height), alpha.reshape(height, height)


def _pieces(classes, alpha):
    """Connected pieces of one colour that are large and thick enough to be objects: list of H W bool masks."""
    height = alpha.shape[0]
    solid = alpha > 0.4
    least = SPECK * min(moments(s)[0] for s in SHAPES) * (RADII["small"] * height) ** 2
    block = max(2, round(0.045 * height))
    pieces, thin = [], []
    for c in np.flatnonzero(np.bincount(classes[solid], minlength=len(COLOURS)) >= least):
        labels, count = ndimage.label(solid & (classes == c), structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        for k in np.flatnonzero(sizes[1:] >= least) + 1:
            mask = labels == k
            thick = ndimage.minimum_filter(mask, block, mode="constant").any()
            (pieces if thick else thin).append(mask)
    for mask in thin:  # a seam between two colours touches a larger piece; an isolated piece is an object
        around = ndimage.binary_dilation(mask, np.ones((3, 3)))
        if not any((around & piece).any() for piece in pieces):
            pieces.append(mask)
    return sorted(pieces, key=lambda mask: -mask.sum())


def _debris(pixels, background, pieces):
    """Area of the largest piece of debris, in pixels at resolution 32; 0 without debris. pixels: H W 3."""
    height = pixels.shape[0]
    scale = height / 32
    free = np.ones((height, height), bool)
    if pieces:
        reach = round(CLEARANCE * scale)
        free = ~ndimage.binary_dilation(np.logical_or.reduce(pieces), np.ones((3, 3)), iterations=reach)
    if not free.any():
        return 0.0
    steps = np.abs(np.diff(pixels - background, axis=0)).ravel()
    noise = 1.05 * np.partition(steps, len(steps) // 2)[len(steps) // 2]  # standard deviation of normal noise
    wide = 2 * round(scale) + 1
    smooth = ndimage.median_filter(pixels, (wide, wide, 1), mode="nearest")
    smooth -= _median(smooth[free])  # noise that is clipped at white or black shifts it from the border's median
    # a median deviates 1.25 times as much as a mean; 8 deviations, because clipped noise is underestimated
    faint = free & (np.linalg.norm(smooth, axis=-1) > max(NOISE, 8 * 1.25 * noise / wide))
    labels, count = ndimage.label(faint, structure=np.ones((3, 3)))
    return float(np.bincount(labels.ravel(), minlength=count + 1)[1:].max(initial=0)) / scale**2


def _overlaps(soft, blur=0.0):
    """Every shape, drawn with a soft mask's area and centre, against it: [(overlap, shape, x, y, r)], best first.

    soft: H W float32; blur: standard deviation of the Gaussian, in pixels, that blurs the shapes; x, y, r in sides.
    """
    height = soft.shape[0]
    area = float(soft.sum())
    at = (np.arange(height) + 0.5) / height
    cx, cy = float(soft.sum(0) @ at) / area, float(soft.sum(1) @ at) / area
    fits = []
    for shape in SHAPES:
        unit, mx, my = moments(shape)
        r = (area / unit) ** 0.5 / height
        x, y = cx - mx * r, cy - my * r
        cover, box = coverage(shape, x, y, r, height)
        if blur:
            cover = ndimage.gaussian_filter(cover, blur, mode="constant")
        both = float(np.minimum(cover, soft[box]).sum())
        fits.append((both / (area + float(cover.sum()) - both), shape, x, y, r))
    return sorted(fits, reverse=True)


def _fit(soft):
    """The shape that overlaps a soft mask best: (name or None, overlap, x, y, r), in sides. soft: H W float32."""
    (overlap, shape, x, y, r), second, *_ = _overlaps(soft)
    clear = overlap - second[0] >= LEAST_MARGIN
    if overlap >= LEAST_OVERLAP and not clear:
        # blur brings all overlaps closer to each other; comparing with blurred shapes corrects for that
        clear = any(_margin(soft, shape, blur) >= LEAST_MARGIN for blur in SOFT_EDGES)
    return shape if clear and overlap >= LEAST_OVERLAP else None, overlap, x, y, r


def _margin(soft, shape, blur):
    """The overlap of a shape less that of the best other one, all blurred: `blur` in pixels of a picture of 32."""
    overlaps = {name: overlap for overlap, name, *_ in _overlaps(soft, blur * soft.shape[0] / 32)}
    return overlaps.pop(shape) - max(overlaps.values())


def read(image: np.ndarray, most: int = 12) -> dict[str, Any]:
    """The content of a picture: {"background": name, "objects": [{"shape", "colour", "x", "y", "r", "overlap"}],
    "debris": area}.

    image: H H 3, uint8 or float in [-1, 1]. Objects are sorted by area, largest first; after the first `most` they are
    counted but not fitted (shape None). A colour that matches none well enough is None, as is a shape that matches none
    well enough or two about equally. debris: area of the largest piece of it, in pixels at resolution 32.
    """
    pixels = as_pixels(image)
    height = pixels.shape[0]
    background, classes, alpha = _explain(pixels)
    pieces = _pieces(classes, alpha)
    objects = []
    for mask in pieces[:most]:
        core = mask & (alpha >= _median(alpha[mask]))
        colour = _median(pixels[core])
        ray = colour - background
        zone = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=max(1, height // 32))
        for other in pieces:
            if other is not mask:
                zone &= ~other
        soft = np.where(zone, np.clip((pixels - background) @ ray / max(ray @ ray, 1.0), 0, 1), 0)
        soft[soft < 0.1] = 0
        shape, overlap, x, y, r = _fit(soft)
        away = np.linalg.norm(_COLOURS - colour, axis=-1)
        objects.append(
            {
                "shape": shape,
                "colour": COLOURS[away.argmin()] if away.min() <= COLOUR_TOLERANCE else None,
                "x": x,
                "y": y,
                "r": r,
                "overlap": overlap,
            }
        )
    objects += [{"shape": None, "colour": None, "x": 0.0, "y": 0.0, "r": 0.0, "overlap": 0.0}] * (len(pieces) - most)
    name = BACKGROUNDS[np.linalg.norm(_BACKGROUNDS - background, axis=-1).argmin()]
    return {"background": name, "objects": objects, "debris": _debris(pixels, background, pieces)}


def size_name(r: float, radii: Mapping[str, float]) -> str | None:
    """The size in `radii` nearest to r by ratio; None if r is much smaller or larger than all."""
    if not min(radii.values()) / 1.3 < r < max(radii.values()) * 1.3:
        return None
    return min(radii, key=lambda name: abs(np.log(radii[name] / r)))


def cell_name(x: float, y: float) -> str:
    """The name of the position, one of nine, that contains a point."""
    at = tuple(min(CELLS, key=lambda cell: abs(cell - v)) for v in (x, y))
    return next(name for name, cell in POSITIONS.items() if cell == at)


def _match(stated, found, radii):
    """Optimal assignment of the scene's objects to those found: for each of `stated`, one of `found` or None."""
    score = np.zeros((len(stated), len(found)))  # s o
    for i, want in enumerate(stated):
        for j, have in enumerate(found):
            near = max(0.0, 1 - np.hypot(want["x"] - have["x"], want["y"] - have["y"]))
            score[i, j] = (
                (want["shape"] == have["shape"])
                + (want["colour"] == have["colour"])
                + 0.5 * (want["size"] == size_name(have["r"], radii))
                + 0.1 * near
            )  # distance only breaks ties, so that swapping the objects does not hide a wrong relation
    matched = [None] * len(stated)
    for i, j in zip(*linear_sum_assignment(-score), strict=True):
        matched[i] = found[j]
    return matched


def judge(image: np.ndarray, scene: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the picture has the attributes of the scene's caption: {attribute: bool, ..., "all_right": bool}.

    image: H H 3, uint8 or float in [-1, 1]; scene: see `data.shapes`. The keys are "shape", "colour", "count", "clean",
    and those of "size", "position", "relation" and "background" that the caption states. An attribute is right only if
    it is right for every object of the scene; for an object that was not found, all are wrong.
    """
    seen, stated, radii = read(image), scene["stated"], scene["radii"]
    objects = scene["objects"]
    found = seen["objects"]
    pairs = list(zip(objects, _match(objects, found, radii), strict=True))
    whole = all(have for _, have in pairs)
    verdict = {
        "shape": whole and all(want["shape"] == have["shape"] for want, have in pairs),
        "colour": whole and all(want["colour"] == have["colour"] for want, have in pairs),
    }
    if stated["size"]:
        verdict["size"] = whole and all(want["size"] == size_name(have["r"], radii) for want, have in pairs)
    verdict["count"] = len(found) == stated["count"]
    if stated["position"]:
        verdict["position"] = whole and cell_name(pairs[0][1]["x"], pairs[0][1]["y"]) == stated["position"]
    if stated["relation"]:
        verdict["relation"] = whole and _stands(pairs[0][1], stated["relation"], pairs[1][1])
    if stated["background"]:
        verdict["background"] = seen["background"] == scene["background"]
    verdict["clean"] = seen["debris"] < DEBRIS
    verdict["all_right"] = all(verdict.values())
    return verdict


def _stands(first, relation, second):
    """Whether the relation of the first object to the second holds, and dominates those along the other axis."""
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    ax, ay = RELATIONS[relation]
    return ax * dx + ay * dy > abs(ay * dx) + abs(ax * dy)


def judge_batch(images: np.ndarray, scenes: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Verdicts of B pictures: {attribute: B int8: 1 right, 0 wrong, -1 not stated}, and "objects": B, their number.

    images: B H H 3, uint8 or float in [-1, 1]; scenes: B scenes. Raises UserError if the numbers differ.
    """
    if len(images) != len(scenes):
        raise UserError(f"there are {len(images)} pictures, but {len(scenes)} scenes")
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    table = {name: np.array([v.get(name, -1) for v in verdicts], np.int8) for name in (*ATTRIBUTES, "all_right")}
    return table | {"objects": np.array([len(scene["objects"]) for scene in scenes], np.int8)}


def summary(table: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means of `judge_batch`'s table: {"all": {attribute: share, "pictures": B}, "1": ..., ...} by number of objects.

    A group has no entry for an attribute that none of its captions states.
    """
    numbers = table["objects"]
    groups = {"all": np.ones_like(numbers, bool)} | {str(n): numbers == n for n in np.unique(numbers)}
    means = {}
    for group, rows in groups.items():
        kept = {name: column[rows] for name, column in table.items() if name != "objects"}
        means[group] = {name: float((c[c >= 0] == 1).mean()) for name, c in kept.items() if (c >= 0).any()}
        means[group]["pictures"] = int(rows.sum())
    return means
