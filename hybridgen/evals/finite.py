"""Images with numbers that are not finite (NaN or infinity): they are counted, and marked wherever they are shown."""

import numpy as np

MARK = np.array((1, -1, 1), np.float32)  # magenta: such a pixel must not look like a black or a white one


def finite(images: np.ndarray) -> np.ndarray:
    """Whether all numbers of an image are finite: `[b, H, W, c]` -> `[b]` bool."""
    return np.isfinite(images).reshape(len(images), -1).all(1)


def marked(images: np.ndarray) -> np.ndarray:
    """Images `[..., H, W, 3]`, floats, with every pixel that is not finite in magenta."""
    images = np.asarray(images, np.float32)
    return np.where(np.isfinite(images).all(-1, keepdims=True), images, MARK)


def message(bad: int, count: int) -> str:
    """ "3 of 8 images are not finite (NaN or infinity)"."""
    return f"{bad} of {count} images {'is' if bad == 1 else 'are'} not finite (NaN or infinity)"
