"""PSNR and SSIM against their definitions, and the sheet that shows pictures with their verdicts."""

import numpy as np
import pytest
from PIL import ImageFont

from hybridgen.core.errors import UserError
from hybridgen.evals.recon import psnr, ssim
from hybridgen.evals.sheet import GAP, sheet, verdict_line, wrap


def pictures(number=3, side=20, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (number, side, side, 3)).astype(np.float32)


def test_psnr_is_its_definition():
    a = pictures() * 0.5
    shifts = np.array([0.5, 0.1, 0.01], np.float32)
    got = psnr(a + shifts[:, None, None, None], a)
    np.testing.assert_allclose(got, 20 * np.log10(2 / shifts), rtol=1e-4)
    assert got.shape == (3,) and got.dtype == np.float64
    assert np.isfinite(psnr(a, a)).all() and psnr(a, a).min() > 100


def ssim_by_loops(a, b):
    """Wang et al. 2004 window by window, for one picture."""
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for c in range(3):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = (v[y : y + 11, x : x + 11, c].astype(np.float64) for v in (a, b))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                both = (weights * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_ssim_is_its_definition():
    a = pictures(2, 14)
    b = np.clip(a + 0.4 * pictures(2, 14, seed=1), -1, 1)
    np.testing.assert_allclose(ssim(a, b), [ssim_by_loops(*pair) for pair in zip(a, b, strict=True)], rtol=1e-10)


def test_both_are_per_picture_symmetric_and_fall_with_noise():
    a, noise = pictures(), pictures(seed=2)
    b = a + np.array([0.05, 0.2, 0.6], np.float32)[:, None, None, None] * noise
    for measure in (psnr, ssim):
        got = measure(b, a)
        np.testing.assert_array_equal(got, [measure(b[i : i + 1], a[i : i + 1])[0] for i in range(3)])
        np.testing.assert_allclose(measure(a, b), got)
        assert got[0] > got[1] > got[2]
    np.testing.assert_allclose(ssim(a, a), 1)


def test_bad_pictures_are_named():
    a = pictures()
    with pytest.raises(UserError, match="20, 20, 3.*10, 20, 3"):
        psnr(a, a[:, :10])
    with pytest.raises(UserError, match="uint8"):
        psnr(a, a.astype(np.uint8))
    with pytest.raises(UserError, match="11"):
        ssim(a[:, :8, :8], a[:, :8, :8])


def test_a_sheet_shows_every_picture_enlarged_without_smoothing():
    images = np.zeros((5, 4, 8, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None] * 40
    paper = np.asarray(sheet(images, columns=3, cell=64))
    for i in range(5):
        assert (paper == i * 40).all(-1).sum() >= 32 * 64  # eight times as wide and high
    assert paper.shape[1] == 3 * (64 + 8) + 8
    assert np.array_equal(paper, np.asarray(sheet(images / np.float32(127.5) - 1, columns=3, cell=64)))


def test_a_sheet_says_the_verdict():
    images = pictures(2, 16)
    verdicts = [{"shape": True, "all_right": True}, {"shape": False, "size": False, "count": True, "all_right": False}]
    assert [verdict_line(v) for v in verdicts] == ["all right", "wrong: shape, size"]
    paper = np.asarray(sheet(images, ["a red circle"] * 2, verdicts, columns=2, title="step 100")).astype(int)
    left, right = np.split(paper, 2, axis=1)
    under = slice(16 * 8 + 35, None)  # below the pictures
    ink = [(half[..., 0] - half[..., 1])[under] for half in (left, right)]  # more red than green
    assert ink[0].min() < -80 and ink[0].max() < 20 and ink[1].max() > 80 and ink[1].min() > -20
    bare = np.asarray(sheet(images, ["a red circle"] * 2, [None, None], columns=2))
    assert bare.shape[0] < paper.shape[0]


def test_wrapped_lines_fit_and_lose_nothing():
    font = ImageFont.load_default(12)
    for text in (
        "a large blue square with a small red circle on its left",
        "一个小的红色圆形在一个大的蓝色正方形左边",
        "averyveryverylongwordthatfitsnowhere a",
    ):
        lines = wrap(text, 100, font)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "") and len(lines) > 1
        assert all(font.getlength(line) <= 100 for line in lines if len(line.split()) > 1)
    assert wrap("", 100, font) == [""]


def test_a_sheet_refuses_unequal_numbers():
    with pytest.raises(UserError, match="there are 2 pictures, but 1 captions"):
        sheet(pictures(2), ["one"])
    with pytest.raises(UserError, match="the shape B H W 3 with B > 0"):
        sheet(pictures(2)[:0])


def test_images_of_a_caption_stand_apart_under_their_names():
    """Black, grey and black images on white paper: the gap between them is white, and so is the first row's legend."""
    images = {name: np.full((2, 16, 16, 3), value, np.uint8) for name, value in zip("abc", (0, 128, 0), strict=True)}
    paper = np.asarray(sheet(images, columns=1, cell=3 * 64)).astype(int)
    one = np.asarray(sheet(images["a"], columns=1, cell=64))
    assert paper.shape[1] == one.shape[1] + 2 * (64 + GAP)
    row = paper[one.shape[0] // 3 + 15, :, 0]  # through the first row of images
    runs = np.flatnonzero(np.diff(row > 200))
    assert len(runs) == 6  # three images, each with white on both sides
    assert ((paper[:20] < 100).any(0).any(-1)).nonzero()[0].size > 3  # the names
    named = {"reference": images["a"], "a very long name of a panel": images["b"]}
    assert sheet(named, cell=32).size[0] > 0
    with pytest.raises(UserError, match="there are 2 pictures, but 1 pictures 'b'"):
        sheet({"a": images["a"], "b": images["b"][:1]})
    with pytest.raises(UserError, match="there are 2 pictures, but 1 captions"):
        sheet(images, ["one"])
