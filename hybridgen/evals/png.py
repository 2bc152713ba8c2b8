"""Text in PNG files: what an image was generated from, so that it can be generated again.

save(image, "out.png", {"prompt": "a cat", "seed": "0"})
PIL.Image.open("out.png").text["prompt"]
"""

import functools
import os
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

LONGEST = 2**19  # characters of one entry; readers refuse much longer ones


def chunks(about: Mapping[str, str]) -> PngInfo:
    """The text chunks of a PNG file, in UTF-8 where Latin letters are not enough."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value.encode("utf-8", "replace").decode("utf-8")[:LONGEST])
    return info


def save(image: Image.Image, path: str | os.PathLike, about: Mapping[str, str]) -> None:
    """Writes a PNG file with `about` as text chunks."""
    image.save(path, format="PNG", pnginfo=chunks(about))


def labelled(image: Image.Image, about: Mapping[str, str]) -> Image.Image:
    """The image, whose `save` writes `about` as text chunks of a PNG file; they are also in its `info`."""
    image.info.update(about)
    image.save = functools.partial(image.save, pnginfo=chunks(about))
    return image
