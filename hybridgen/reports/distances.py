"""Distances of generated images to a reference (FID, KID, precision and recall), on features of a pretrained network.

The network is a run of a family with `encode(image) -> features b d` and a model with a `feature_width`; `hybridgen
convert` imports efficientnet_lite0 and inception_v3. The reference is a split of the run's own data, a folder of
images, or a reference file of ADM. All images are rounded to 8 bits before the network, as if read from PNG files.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.core import meshes, placement
from hybridgen.core.errors import UserError
from hybridgen.core.progress import progress
from hybridgen.data import pipeline, sources, transforms
from hybridgen.evals import fid, prdc, reference
from hybridgen.evals.finite import finite, message
from hybridgen.runs import experiment, reading
from hybridgen.runs.restore import Loaded

SPLITS = ("train", "validation", "holdout")
LEAST = 2 * (prdc.COVERED + 1)  # smallest number of images of either set
MOST = 10_000  # largest number of features that are compared in pairs: KD, precision and recall take quadratic time


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`compare(images) -> {"fd", "kd", ...}` of `images [n, H, W, 3]`, floats in [-1, 1].

    encode: uint8 images -> features `[b, d]`. known: mean and covariance of the reference, if a file has them.
    pictures: the reference, as uint8 batches.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    width: int
    batch: int
    seed: int
    about: dict[str, Any]
    known: tuple[np.ndarray, np.ndarray] | None
    pictures: Callable[[], Iterator[np.ndarray]] | None

    def __call__(self, images: np.ndarray, label: str) -> dict[str, Any]:
        """{"pictures", "fd", "kd", ...} of images `[n, H, W, 3]`; `label`: of the progress line.

        Raises UserError if an image or its features are not finite: any distance of them would be meaningless.
        """
        if bad := int((~finite(images)).sum()):
            raise UserError(f"{message(bad, len(images))}: they have no distance to a reference")
        starts = range(0, len(images), self.batch)
        batches = (transforms.to_uint8(images[start : start + self.batch]) for start in starts)
        mean, root, rows = self._side(progress(batches, total=len(starts), label=f"features, {label}"))
        *gaussian, others = self._reference
        out: dict[str, Any] = {"pictures": len(images)}
        out["fd"] = fid.frechet_of_roots(mean, root, *gaussian)
        if others is not None:
            out["kd"], out["kd_standard_error"] = fid.kernel(rows, others, self.seed)
            out |= prdc.prdc(others, rows)
        return out

    @functools.cached_property
    def _reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(mean, root of the covariance, features or None); a file's statistics take precedence over its images."""
        known = (self.known[0], fid.root(self.known[1])) if self.known else ()
        if self.pictures is None:
            return *known, None
        count = -(-self.about["reference_pictures"] // self.batch)
        *gaussian, rows = self._side(progress(self.pictures(), total=count, label="features, reference"))
        return *(known or gaussian), rows

    def _side(self, batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean and root of the covariance of all features, the first `MOST` of them)."""
        moments, kept = fid.Moments(self.width), []
        for batch in batches:
            features = self.encode(batch)  # b d
            if moments.count < MOST:
                kept.append(features[: MOST - moments.count])
            moments.add(features)
        rows = np.concatenate(kept)
        mean, covariance = moments.statistics()
        few = moments.count == len(rows) <= self.width
        return mean, fid.root_of_rows(rows) if few else fid.root(covariance), rows


def build(
    loaded: Loaded,
    features: str,
    splits: tuple[str, ...],
    count: int,
    batch: int,
    seed: int,
    against: str | None = None,
    most: int | None = None,
) -> Comparison:
    """The comparison of `count` images with `most` of the reference `against`, on the network of the run `features`.

    The default reference is the split "train", the default of `most` is `count`. `splits`: those that are evaluated; if
    the reference is one of them, it starts after the evaluated images. Raises UserError for a network or reference that
    cannot be used, before anything is computed.
    """
    against, most = "train" if against is None else against, count if most is None else most
    for name, value in (("count", count), ("reference-count", most)):
        if value < LEAST:
            raise UserError(f"--{name} {value}: distances need at least {LEAST} images")
    batch = meshes.padded(loaded.mesh, batch)
    run = reading.load(reading.find_run(features, None))
    run.check_finite()
    width = getattr(run.part.model, "feature_width", 0)
    if not width:
        raise UserError(f"--features {features} is a run of {run.part.family}, not of a feature network")
    start = count if against in splits else 0
    known, pictures, used = _opened(loaded.config.data, against, start, most, batch, width)
    if pictures is not None and used < LEAST:
        raise UserError(f"--reference {against} has {used} usable images, but distances need at least {LEAST}")
    about = {"features": run.part.family, "digest": run.digest, "reference": against, "reference_pictures": used}
    about |= {"statistics": known is not None, "pairs_of_at_most": MOST}
    return Comparison(_encoder(run.part, loaded, batch), width, batch, seed, about, known, pictures)


def _encoder(part: Any, loaded: Loaded, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function: uint8 images -> features as numpy, `batch` at a time over all devices; the last batch is padded."""
    placed = placement.put(part, experiment.part_shardings(part, loaded.mesh))
    program = jax.jit(lambda part, image: part.call("encode", image))

    def encode(pictures: np.ndarray) -> np.ndarray:
        given = {"image": transforms.to_float(pictures)}
        run = placement.by_batches(lambda given: program(placed, given["image"]), given, batch, loaded.mesh)
        return np.concatenate(list(run))

    return encode


def _opened(data: Any, against: str, first: int, most: int, batch: int, width: int) -> tuple:
    """(statistics or None, images or None, number of images) of a reference; a split starts at image `first`."""
    if against in SPLITS:
        source = sources.build(data, against)
    elif Path(against).is_dir():
        options = {"path": against, "text_key": None, "validation": 0.0}
        folder = {"source": "folder", "options": options, "resolution": data.resolution}
        source = sources.build(folder, "train")
    elif Path(against).is_file():
        file = reference.open_reference(Path(against))
        if file.statistics is not None and len(file.statistics[0]) != width:
            wide = len(file.statistics[0])
            raise UserError(f"--reference {against} has statistics of {wide} features, but the network has {width}")
        used = min(most, file.count)
        return file.statistics, (lambda: file.pictures(used, batch)) if used else None, used
    else:
        raise UserError(f"--reference {against!r} is neither a file nor a folder nor one of {', '.join(SPLITS)}")
    used = max(0, min(most, len(source) - first))

    def pictures() -> Iterator[np.ndarray]:
        for start in range(first, first + used, batch):
            items = pipeline.examples(source, range(start, min(start + batch, first + used)))
            yield np.stack([item["image"] for item in items])

    return None, pictures, used


def table(report: dict) -> list[str]:
    """Lines of Markdown: the distances of a report, one row per set of images; empty if it has none."""
    if "distances" not in report:
        return []
    about = report["distances"]
    head = ("split", "images", "count", "FD", "KD x 1000", "precision", "recall", "density", "coverage")
    lines = [f"## Distances on {about['features']}", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for split, kinds in report["splits"].items():
        for name, found in kinds["distances"].items():
            distance = f"{found['fd']:.3f}" if "fd" in found else f"{found['not_finite']} not finite"
            cells = [split, name, str(found["pictures"]), distance]
            if "kd" in found:
                cells += [f"{1000 * found['kd']:.3f} (s.e. {1000 * found['kd_standard_error']:.3f})"]
                cells += [f"{found[share]:.3f}" for share in head[5:]]
            lines.append(f"| {' | '.join(cells + [''] * (len(head) - len(cells)))} |")
    count = about["reference_pictures"]
    what = ["its statistics (FD)"] * about["statistics"] + [f"{count} of its images"] * (count > 0)
    last = "The real images are the floor: generated images are not expected to be closer to the reference."
    return [*lines, "", f"Reference: {about['reference']}, {' and '.join(what)}. {last}", ""]
