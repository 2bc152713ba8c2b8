"""Aspect-ratio buckets: batches of images with similar shapes, without cropping them to squares (NovelAI 2022; SDXL).

data/prepare/buckets.py reads the headers of a folder's images and writes a table: a few shapes of about the same area,
and the shape of each record. With `data.options.buckets = "buckets.json"` in a config (on the command line:
--config.data.options.buckets=buckets.json) every batch has one shape. Batch k is a function of (seed, k): an epoch has
floor(n / B) batches of a bucket with n records, in a seeded order, from a seeded permutation of its records; the
records that are left over differ between epochs. A sequential pass has all records, with the batches of all buckets
evenly mixed.

Letters: B rows of a global batch, N sample numbers, n records of a bucket, m batches of an epoch.
"""

import bisect
import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.data.files import read_json
from hybridgen.data.shuffle import order
from hybridgen.data.sources.folder import SPLITS, Folder
from hybridgen.data.sources.protocol import BrokenRecord, Source

FORMAT = 1
LARGEST = 4096  # pixels per side
MUCH = 0.15  # share of a picture's area that is much to lose by cropping


def shapes(resolution: int, step: int, aspect: float) -> list[tuple[int, int]]:
    """(height, width), multiples of `step`, with at most the area of the square and a ratio of at most `aspect`.

    For each width the largest height, sorted from tall to wide. Raises UserError if there is none.
    """
    out = set()
    for width in range(step, int(resolution * math.sqrt(aspect)) + step, step):
        height = resolution * resolution // width // step * step
        if height and max(height / width, width / height) <= aspect:
            out |= {(height, width), (width, height)}
    if not out:
        raise UserError(f"--step {step}: no shape with sides of multiples of {step} fits the area of {resolution}^2")
    return sorted(out, key=lambda shape: (shape[1] / shape[0], shape))


def nearest(sizes: np.ndarray, choice: list[tuple[int, int]]) -> np.ndarray:
    """Widths and heights `[r, 2]` -> number of the shape with the nearest aspect ratio (by its logarithm) `[r]`."""
    wanted = np.log(sizes[:, 0] / sizes[:, 1])
    offered = np.log([width / height for height, width in choice])
    return np.abs(wanted[:, None] - offered).argmin(1)


def cropped(sizes: np.ndarray, choice: list[tuple[int, int]]) -> np.ndarray:
    """Widths and heights `[r, 2]` -> the share of each picture's area that cropping to the nearest shape removes."""
    ratio = np.log(sizes[:, 0] / sizes[:, 1])
    offered = np.log([width / height for height, width in choice])
    return 1 - np.exp(-np.abs(ratio - offered[nearest(sizes, choice)]))


def assign(sizes: np.ndarray, choice: list[tuple[int, int]], least: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(the shapes with at least `least` records, the number of its shape for each record).

    Removes the rarest shape and reassigns its records until all remaining shapes have enough, or one is left.
    """
    while True:
        found = nearest(sizes, choice)
        counts = np.bincount(found, minlength=len(choice))
        if counts.min() >= least or len(choice) == 1:
            return choice, found
        choice = choice[: counts.argmin()] + choice[counts.argmin() + 1 :]


class Buckets:
    """A folder with the image shapes of a table, and with one shape per batch. Raises UserError for a wrong table."""

    def __init__(self, source: Folder, path: str, split: str):
        self.source, self.class_names = source, source.class_names
        table = read_json(Path(path))
        try:
            self.shapes = [(int(height), int(width)) for height, width in table["shapes"]]
            records, resolution = table["splits"][split]["records"], table["resolution"]
            self._of = np.asarray(table["splits"][split]["bucket"], np.int64)  # the bucket of each record
            fits = table["format"] == FORMAT and self._of.shape == (len(source),)
            fits = fits and ((0 <= self._of) & (self._of < len(self.shapes))).all()
            fits = fits and all(0 < side <= LARGEST for shape in self.shapes for side in shape)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a table of buckets with the split {split!r}: {type(error).__name__}: {error}"
            ) from None
        if records != source.digest() or resolution != source.resolution or not fits:
            raise UserError(
                f"{path} is of other records (digest {records}, resolution {resolution}) than the folder "
                f"(digest {source.digest()}, resolution {source.resolution}): make it again"
            )
        self._members = [np.flatnonzero(self._of == number) for number in range(len(self.shapes))]
        described = json.dumps([self.shapes, self._of.tolist()]).encode()
        self._digest = hashlib.sha256(described).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self.source.at(index, self.shapes[self._of[index]])

    def name(self, index: int) -> str:
        """The file name of a record."""
        return self.source.name(index)

    def captions(self) -> Iterator[str]:
        """All captions of this split."""
        return self.source.captions()

    def summary(self) -> str:
        """How many of the folder's pictures are used, in one line."""
        return self.source.summary()

    def digest(self) -> str:
        """Digest of the records and of the table."""
        return f"{self.source.digest()}-{self._digest}"

    def after(self, index: int, step: int) -> int:
        """The replacement of a broken record, from the same bucket."""
        members = self._members[self._of[index]]
        return int(members[(np.searchsorted(members, index) + step) % len(members)])

    def _counts(self, batch: int, whole: bool) -> list[int]:
        """Number of batches of each bucket, in an epoch (`whole` batches) or in a sequential pass."""
        return [len(members) // batch if whole else -(-len(members) // batch) for members in self._members]

    def batches_once(self, batch: int) -> int:
        """Number of batches in a sequential pass over all records."""
        return sum(self._counts(batch, False))

    def occurring(self, batch: int, whole: bool) -> list[tuple[int, int]]:
        """The shapes of batches, in training (`whole` batches) or in a sequential pass."""
        counts = self._counts(batch, whole)
        return [shape for shape, count in zip(self.shapes, counts, strict=True) if count]

    def _mixed(self, batch: int) -> np.ndarray:
        """The m batches of a sequential pass as (bucket, number in it) `[m, 2]`, with the shapes evenly mixed."""
        counts = np.asarray(self._counts(batch, False))
        bucket = np.repeat(np.arange(len(counts)), counts)  # m
        inner = np.concatenate([np.arange(count) for count in counts])
        return np.stack([bucket, inner], 1)[np.lexsort((bucket, (inner + 0.5) / counts[bucket]))]

    def arrange(self, positions: np.ndarray, batch: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """N sample numbers of one global batch -> (N indices, N bool: not yet seen in a sequential pass)."""
        positions = np.asarray(positions, np.int64)
        number, rows = int(positions[0]) // batch, positions % batch
        if not shuffle:
            mixed = self._mixed(batch)
            bucket, own = mixed[number % len(mixed)].tolist()
            members, inner = self._members[bucket], own * batch + rows
            return members[inner % len(members)], inner < len(members)
        counts = self._counts(batch, True)
        total = sum(counts)  # m
        if not total:
            raise UserError(
                f"no bucket has the {batch} records of a batch; the largest has {max(map(len, self._members))}"
            )
        slot = int(order(np.asarray([number]), total, seed)[0])
        starts = [0, *itertools.accumulate(counts)]
        bucket = bisect.bisect_right(starts, slot) - 1
        members, inner = self._members[bucket], (slot - starts[bucket]) * batch + rows
        places = order(number // total * len(members) + inner, len(members), seed + 7919 * (bucket + 1))
        return members[places], np.ones(len(rows), bool)


def largest(source: Source, batch: int) -> Source:
    """A source unchanged; of one with buckets, its records of the largest shape with a whole batch (`shape`)."""
    if not isinstance(source, Buckets):
        return source
    only = copy.copy(source)
    found = source.occurring(batch, True) or source.occurring(1, True)
    only.shape = max(found, key=lambda shape: (shape[0] * shape[1], shape))
    only._members = [
        members if shape == only.shape else members[:0]
        for shape, members in zip(source.shapes, source._members, strict=True)
    ]
    return only


def build(
    options: Mapping, resolution: int, step: int, aspect: float, least: int, warn: Callable[[str], None] | None = None
) -> dict:
    """The table for a folder: shapes chosen on its training split, and the shape of each record of both splits.

    warn: is called with a line if pictures lose much of their area because of `least`.
    """
    sizes = {}
    for split in SPLITS:
        try:
            source = Folder(split=split, resolution=resolution, **options)
        except UserError:
            if split == "train":
                raise
            continue  # there is no validation split
        sizes[split] = (source.digest(), _sizes(source))
    offered, known = shapes(resolution, step, aspect), sizes["train"][1]
    choice, _ = assign(known, offered, least)
    lost, free = cropped(known, choice), cropped(known, offered)
    hit = (lost > MUCH) & (lost > free + 0.05)
    if warn and hit.any():
        warn(
            f"{hit.sum()} of {len(hit)} pictures lose {lost[hit].mean():.0%} of their area by cropping, instead of "
            f"{free[hit].mean():.0%}: --least {least} leaves {len(choice)} of {len(offered)} shapes; lower it "
            f"(at least to the batch size)"
        )
    splits = {
        split: {"records": digest, "bucket": nearest(found, choice).tolist()}
        for split, (digest, found) in sizes.items()
    }
    return {"format": FORMAT, "resolution": resolution, "shapes": choice, "splits": splits}


def _sizes(source: Folder) -> np.ndarray:
    """(width, height) of each record `[r, 2]`; a broken record counts as square."""
    out = np.ones((len(source), 2))
    for index in range(len(source)):
        try:
            out[index] = source.size(index)
        except BrokenRecord:
            continue
    return out
