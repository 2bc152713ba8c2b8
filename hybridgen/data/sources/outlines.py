"""Outlines, colours and rendering of `shapes`. Outlines are signed distances in a box from -1 to 1, negative inside.

Letters: `H W` image, `h w` box of one object.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

PALETTE = {
    "red": (220, 20, 40),
    "green": (30, 160, 60),
    "blue": (30, 60, 220),
    "yellow": (255, 225, 0),
    "orange": (255, 125, 0),
    "purple": (130, 30, 170),
    "cyan": (0, 200, 235),
    "pink": (255, 130, 200),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
}
COLOURS, BACKGROUNDS = tuple(PALETTE)[:8], tuple(PALETTE)[8:]
_RGB = {name: np.array(rgb, np.float32) for name, rgb in PALETTE.items()}


def _length(x, y):
    """Vector length. np.hypot is slower, and its rounding depends on the platform's libm; these operations do not."""
    return np.sqrt(x * x + y * y)


def _star(x, y):
    """Folds five arms onto half of one by reflections (I. Quilez, "2D distance functions"); then one edge is left."""
    x, y = np.abs(x), 0.08 - y
    for side in (1, -1):
        fold = 2 * np.maximum(0.809017 * side * x - 0.587785 * y, 0)
        x, y = x - 0.809017 * side * fold, y + 0.587785 * fold
    return (y - 1.05) * 0.38403 + np.abs(x) * 0.92333  # from a tip at 1.05 to a notch at 0.45 of that


def _heart(x, y):
    """A square standing on its corner, with half discs on its two upper sides."""
    side, half = 1.15, 0.5**0.5
    low, x = side * half, np.abs(x)
    square = (x + np.abs(y - 0.92 + low)) * half - side / 2
    return np.minimum(square, _length(x - low / 2, y - 0.92 + 1.5 * low) - side / 2)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.34)


SHAPES = {
    "circle": lambda x, y: _length(x, y) - 0.97,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: np.maximum((np.abs(x) * 1.8 - y - 0.95) / 2.059, y - 0.85),
    "star": _star,
    "cross": _cross,
    "diamond": lambda x, y: (np.abs(x) + np.abs(y) - 1) * 0.7071,
    "heart": _heart,
    "ring": lambda x, y: np.abs(_length(x, y) - 0.74) - 0.24,
    "crescent": lambda x, y: np.maximum(_length(x - 0.1, y) - 1, 0.82 - _length(x - 0.56, y)),
}


def coverage(shape: str, x: float, y: float, r: float, resolution: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """(coverage of each pixel by an object, h w float32 in [0, 1]; its box). x, y, r: in units of the image side."""
    scale, cx, cy = r * resolution, x * resolution, y * resolution
    reach = scale + 1
    left, right = max(int(cx - reach), 0), min(int(cx + reach) + 1, resolution)
    top, low = max(int(cy - reach), 0), min(int(cy + reach) + 1, resolution)
    u = ((np.arange(left, right, dtype=np.float32) + (0.5 - cx)) / scale)[None, :]  # 1 w
    v = ((np.arange(top, low, dtype=np.float32) + (0.5 - cy)) / scale)[:, None]  # h 1
    cover = np.minimum(np.maximum(0.5 - scale * SHAPES[shape](u, v), 0), 1)  # np.clip is three times slower here
    return cover, (slice(top, low), slice(left, right))


def render(scene: Mapping[str, Any], resolution: int = 32) -> np.ndarray:
    """Renders a scene -> H W 3 uint8, with edges blended over one pixel."""
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = _RGB[scene["background"]]
    for obj in scene["objects"]:
        cover, box = coverage(obj["shape"], obj["x"], obj["y"], obj["r"], resolution)
        patch = image[box]
        patch[:] = patch + cover[:, :, None] * (_RGB[obj["colour"]] - patch) + 0.5
    return image
