"""Reconstruction quality: PSNR and SSIM, one number per picture.

SSIM follows Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity": Gaussian
window of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03, over all windows inside the picture, mean over channels.

Letters: `B` pictures, `H W` their size. Pictures are B H W 3 in [-1, 1], so the data range is 2.
"""

import numpy as np
from scipy import ndimage

from hybridgen.core.errors import UserError

RANGE = 2.0
WINDOW, DEVIATION = 11, 1.5
LEAST_ERROR = 1e-10  # equal pictures have 106 dB instead of infinity, so that means and JSON stay finite


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio: B float64, in dB. Both B H W 3 in [-1, 1]. Raises UserError if the shapes differ."""
    a, b = _pair(images, originals)
    error = np.mean((a - b) ** 2, axis=(1, 2, 3))  # B
    return 10 * np.log10(RANGE**2 / np.maximum(error, LEAST_ERROR))


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity: B float64, 1 for equal pictures. Both B H W 3 in [-1, 1], each side at least 11 pixels."""
    a, b = _pair(images, originals)
    if min(a.shape[1:3]) < WINDOW:
        raise UserError(f"ssim needs pictures of at least {WINDOW} x {WINDOW} pixels, not {a.shape[1]} x {a.shape[2]}")
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    mean_a, mean_b = _blur(a), _blur(b)  # B h w 3
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similar.mean(axis=(1, 2, 3))


def _blur(x):
    """Gaussian window means at every place where the window fits: B H W 3 -> B H-10 W-10 3."""
    edge = WINDOW // 2
    x = ndimage.gaussian_filter(x, (0, DEVIATION, DEVIATION, 0), radius=(0, edge, edge, 0))
    return x[:, edge:-edge, edge:-edge]


def _pair(images, originals):
    a, b = np.asarray(images), np.asarray(originals)
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
        raise UserError(f"pictures must both have the shape B H W 3, not {a.shape} and {b.shape}")
    if not all(np.issubdtype(x.dtype, np.floating) for x in (a, b)):
        raise UserError(f"pictures must be floats in [-1, 1], not {a.dtype} and {b.dtype}")
    return a.astype(np.float64), b.astype(np.float64)
