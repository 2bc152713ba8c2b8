"""Image transforms between file and batch; images stay uint8 until the batch is complete.

`cover`, `square` and `flatten` take a PIL image (opened, but not decoded yet), `flip` and `crops` one H W 3 array,
`to_float` and `to_uint8` arrays of any leading shape, such as a whole batch.
"""

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hybridgen.core.errors import UserError

WHITE = (255, 255, 255)


def flatten(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An image in any mode -> RGB; composites transparency on `background` and applies EXIF rotation."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which PIL would clip to white
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65_535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def turned(image: Image.Image) -> bool:
    """Whether `flatten` exchanges width and height, as EXIF or XMP state."""
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scales an image to cover height x width and crops the centre, in one resampling -> H W 3 uint8."""
    wide, high = image.size
    least = min(wide * height, high * width)
    side, up = max(least // height, 1), max(least // width, 1)  # box of the crop
    left, top = (wide - side) // 2, (high - up) // 2
    if (wide, high) != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + side, top + up))
    return np.asarray(image)


def square(image: Image.Image, resolution: int) -> np.ndarray:
    """Scales the shorter side to `resolution` and crops the centre -> R R 3 uint8."""
    return cover(image, resolution, resolution)


def crops(image: np.ndarray, resolution: int) -> np.ndarray:
    """H W 3 -> 5 R R 3: crops of the four corners and the centre."""
    down, right = image.shape[0] - resolution, image.shape[1] - resolution
    corners = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    return np.stack([image[top : top + resolution, left : left + resolution] for top, left in corners])


def flip(image: np.ndarray, bit: int) -> np.ndarray:
    """H W 3 -> the same, mirrored left to right if `bit` is odd."""
    return image[:, ::-1] if bit & 1 else image


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], 0 to -1 and 255 to 1 exactly."""
    out = np.divide(image, np.float32(127.5), dtype=np.float32)
    out -= 1
    return out


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float in [-1, 1] (clipped) -> uint8; the inverse of `to_float` on its range.

    Raises UserError for numbers that are not finite: as integers they would be pixels like any other.
    """
    if bad := int(np.size(image) - np.isfinite(image).sum()):
        raise UserError(f"{bad} of the {np.size(image)} numbers of an image are not finite (NaN or infinity)")
    return np.rint((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)
