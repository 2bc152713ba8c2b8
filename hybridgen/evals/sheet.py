"""Draws a sheet of pictures, each with a caption and optionally a verdict: sample grids and evaluation reports.

Small pictures are enlarged by an integer factor without smoothing, so that every pixel is visible. Chinese text needs a
Chinese font; without one its characters are boxes, so a report should also contain captions as text.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hybridgen.core.errors import UserError
from hybridgen.evals.finite import finite, marked

MARGIN, LINE, FONT_SIZE = 8, 15, 12
GAP = 4  # pixels between the images of one caption
INK, RIGHT, WRONG = (40, 40, 40), (0, 120, 40), (190, 20, 30)
# Pillow's own font has no Chinese characters; these are usual fonts that have them on Linux, macOS and Windows
CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc")


def sheet(
    images: np.ndarray | Mapping[str, np.ndarray],
    captions: Sequence[str] | None = None,
    verdicts: Sequence[Mapping[str, bool] | None] | None = None,
    *,
    columns: int | None = None,
    cell: int = 128,
    title: str | None = None,
) -> Image.Image:
    """Arranges pictures on a white sheet, in RGB.

    Args:
      images: B H W 3, uint8 or float in [-1, 1]; or several images of each caption by name, such as "reference" and
        "render", which stand side by side with a gap, under their names in the first row. Pixels that are not finite
        are magenta, and the line under such a picture is "not finite".
      captions: B, or None. Long ones are wrapped to the width of a cell.
      verdicts: B (see `evals.alignment.judge`), each may be None, or None. The line under a picture is "all right" or
        lists the wrong attributes.
      columns: pictures in a row; None makes the sheet about square.
      cell: pictures (of a caption together) narrower than this many pixels are enlarged to about this width.
      title: a line at the top.

    Raises UserError if the numbers differ or there is no picture.
    """
    panels = images if isinstance(images, Mapping) else {"": images}
    pixels = [_as_uint8(one) for one in panels.values()]
    count, height, side = pixels[0].shape[:3]
    given = [(f"pictures {name!r}", one) for name, one in zip(panels, pixels, strict=True)]
    for name, rows in (*given, ("captions", captions), ("verdicts", verdicts)):
        if rows is not None and len(rows) != count:
            raise UserError(f"sheet: there are {count} pictures, but {len(rows)} {name}")
    whole = np.all([finite(one) for one in panels.values()], 0)  # B
    factor = max(1, round(cell / (side * len(panels))))
    height, side = height * factor, side * factor
    width = len(panels) * (side + GAP) - GAP
    columns = min(count, columns or math.ceil((count * height / width) ** 0.5))
    words = "".join(captions or ()) + (title or "")
    font = _font(chinese=any(ord(c) > 0x2E80 for c in words))
    texts = [_lines(captions, verdicts, i, width, font) for i in range(count)]  # B lists of (text, colour)
    texts = [lines if good else [*lines, ("not finite", WRONG)] for lines, good in zip(texts, whole, strict=True)]
    rows = [texts[i : i + columns] for i in range(0, count, columns)]
    heights = [height + LINE * max(map(len, row)) + MARGIN for row in rows]
    top = MARGIN + (LINE + MARGIN if title else 0) + (LINE if len(panels) > 1 else 0)
    paper = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top + sum(heights)), "white")
    draw = ImageDraw.Draw(paper)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, font)
    for i in range(count):
        x, y = MARGIN + (i % columns) * (width + MARGIN), top + sum(heights[: i // columns])
        for name, one in zip(panels, pixels, strict=True):
            if i < columns and len(panels) > 1:
                draw.text((x, y - LINE), _shortened(name, side, font), INK, font)
            paper.paste(Image.fromarray(one[i]).resize((side, height), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + side, y + height), outline=(200, 200, 200))
            x += side + GAP
        for k, (text, colour) in enumerate(texts[i]):
            draw.text((x - width - GAP, y + height + 2 + k * LINE), text, colour, font)
    return paper


def _shortened(name: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A name, cut to at most `width` pixels."""
    return next(name[:n] for n in range(len(name), -1, -1) if font.getlength(name[:n]) <= width)


def verdict_line(verdict: Mapping[str, bool]) -> str:
    """ "all right", or "wrong: shape, size"."""
    wrong = [name for name, right in verdict.items() if not right and name != "all_right"]
    return f"wrong: {', '.join(wrong)}" if wrong else "all right"


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, at spaces and between Chinese characters."""
    lines = [""]
    for piece in re.findall(r" *[!-~]+| *\S", text):
        if lines[-1] and font.getlength(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return lines


def _lines(captions, verdicts, i, width, font):
    lines = [(line, INK) for line in wrap(captions[i], width, font)] if captions is not None else []
    if verdicts is not None and verdicts[i] is not None:
        line = verdict_line(verdicts[i])
        lines += [(part, RIGHT if line == "all right" else WRONG) for part in wrap(line, width, font)]
    return lines


def _font(chinese):
    for name in CHINESE_FONTS if chinese else ():
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)


def _as_uint8(images):
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise UserError(f"sheet: pictures must have the shape B H W 3 with B > 0, not {images.shape}")
    if images.dtype == np.uint8:
        return images
    return np.round((np.clip(marked(images), -1, 1) + 1) * 127.5).astype(np.uint8)
