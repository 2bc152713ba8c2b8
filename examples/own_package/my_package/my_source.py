"""An example of a data source outside of hybridgen: images of stripes, with captions and labels."""

import numpy as np

NAMES = ("horizontal", "vertical")


class Stripes:
    """Record i is an image of stripes of the kind `i % 2`; everything is a function of (split, index)."""

    class_names = NAMES

    def __init__(self, split: str, resolution: int, size: int = 1000, width: int = 4):
        self.split, self.resolution, self.size, self.width = split, resolution, size, width

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        """The name of a record in messages."""
        return f"stripes {index}"

    def __getitem__(self, index: int) -> dict:
        draw = np.random.default_rng([("train", "validation", "holdout").index(self.split), index])
        kind, phase = index % 2, int(draw.integers(2 * self.width))
        bands = (np.arange(self.resolution) + phase) // self.width % 2  # R
        grid = np.broadcast_to(bands[:, None] if kind == 0 else bands[None, :], (self.resolution,) * 2)
        image = np.where(grid[..., None], draw.integers(256, size=3), 255).astype(np.uint8)  # R R 3
        return {"image": image, "text": f"{NAMES[kind]} stripes", "label": kind}
