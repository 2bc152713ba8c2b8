"""The Python API: `hybridgen.load(path)` and `model.sample(prompts, seed=...)`, as the command `hybridgen sample`.

    model = hybridgen.load("runs/shapes/cascade")                 # a run folder or a bundle
    images = model.sample("a small red circle", count=4, seed=1, guidance=3.0, steps=8)
    images[0].save("circle.png")                                   # a PIL image; also: for image in images
    images.array, images.draft, images.tokens, images.prompts      # numpy
    images.sheet().save("grid.png")                                # a grid with captions

Image number i of a seed does not depend on the batch size or on the other images, and equals image i of
`hybridgen sample`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from hybridgen.core import meshes, numbers, ranges
from hybridgen.core.errors import UserError
from hybridgen.data import transforms
from hybridgen.evals import sheet
from hybridgen.runs import drawing
from hybridgen.runs.reading import find_run
from hybridgen.runs.restore import Loaded, restore
from hybridgen.sample import conditions, shape_of, words


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images in the order of their prompts, `count` per prompt; `samples[i]` is image i as a PIL image.

    array: uint8 [n, H, W, 3]; draft: the tokenizer's decoding of the generated tokens, as `array`, or None if the
    model generates no tokens; tokens: int32 [n, N] generated tokens, or None; prompts: n texts ("class 3" for a class).
    """

    array: np.ndarray
    draft: np.ndarray | None
    tokens: np.ndarray | None
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])

    def __iter__(self) -> Iterator[Image.Image]:
        return map(Image.fromarray, self.array)

    def sheet(self, cell: int = 128) -> Image.Image:
        """A grid of all images with their prompts, in cells `cell` pixels wide."""
        return sheet.sheet(self.array, list(self.prompts), cell=cell)


class Model:
    """A loaded run or bundle. `config`: its config; `step`: the training step of its parameters."""

    def __init__(self, loaded: Loaded):
        self._loaded = loaded

    @property
    def config(self) -> Any:
        return self._loaded.config

    @property
    def step(self) -> int:
        return self._loaded.step

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        labels: Any = None,
        seed: int = 0,
        count: int = 1,
        batch: int = 16,
        size: str | None = None,
        **options: Any,
    ) -> Samples:
        """Generates `count` images per prompt, at most `batch` at a time.

        Class-conditional models take `labels`, a whole number or several (a sequence or an array); models that read
        text too take one label per prompt. `size`, such as
        "24x40", is one of the shapes of a run that was trained on several (default: the most square one). `options`
        override the sampling options of the model's config. Most priors have guidance, guidance_schedule, temperature,
        top_k and top_p; most decoders have decoder_guidance, steps and solver. The first call compiles, and so does
        one with another solver, number of steps or number of images at a time, or which switches guidance or a filter
        of tokens on or off; another value of these does not.

        Raises UserError for a prompt, label, size or option that this model does not take, and for parameters or images
        that are not finite.
        """
        requests = _requests(prompts, labels)
        count, batch, seed = (
            drawing.check_number(name, value) for name, value in (("count", count), ("batch", batch), ("seed", seed))
        )
        loaded, draw = self._loaded, self._drawn_by(options, size)
        if loaded.faults:
            raise UserError("; ".join(loaded.faults))
        repeated = [one for one in requests for _ in range(count)]
        cond = conditions(loaded, repeated)
        batch = meshes.padded(loaded.mesh, min(batch, len(repeated)))
        with jax.set_mesh(loaded.mesh):
            pieces = list(drawing.draw_all(draw, cond, seed, batch, loaded.put))
        out = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        draft = transforms.to_uint8(out["draft"]) if "draft" in out else None
        return Samples(transforms.to_uint8(out["image"]), draft, out.get("tokens"), tuple(map(words, repeated)))

    def _drawn_by(self, options: dict[str, Any], size: str | None) -> Callable:
        """The sampling program with these options for this size. Raises UserError for an unknown option or size."""
        flags = self._loaded.flags
        if odd := sorted(options.keys() - flags.keys()):
            raise UserError(f"unknown option {odd[0]!r}{drawing.unknown(odd[0], flags)}")
        changes = {flags[name]: value for name, value in options.items() if value is not None}
        shape = shape_of(self._loaded, size)
        return self._loaded.drawer(changes, shape) if changes or shape else self._loaded.draw


def load(path: str | os.PathLike, checkpoint: int | None = None) -> Model:
    """See `hybridgen.load`."""
    step = None if checkpoint is None else numbers.checked("checkpoint", checkpoint, 0, ranges.MOST, whole=True)
    return Model(restore(find_run(os.fspath(path), None), {}, step))


def _requests(prompts: Any, labels: Any) -> list[tuple[str | None, int | None]]:
    """One (prompt, class) per request, from a single value or a sequence of each."""
    texts, classes = (None if given is None else _several(given) for given in (prompts, labels))
    for text in texts or ():
        if not isinstance(text, str):
            raise UserError(f"the prompt must be a string, not {type(text).__name__}")
    classes = classes and [numbers.checked("label", one, -ranges.MOST, ranges.MOST, whole=True) for one in classes]
    if not texts and not classes:
        raise UserError("no prompt and no label: give prompts, or labels=")
    if texts and classes and len(texts) != len(classes):
        raise UserError(f"{len(texts)} prompts and {len(classes)} labels were given: give one label per prompt")
    return list(zip(texts or [None] * len(classes), classes or [None] * len(texts), strict=True))


def _several(given: Any) -> list:
    """The members of a sequence or array; a single value as a list of one."""
    alone = isinstance(given, str | bytes) or not hasattr(given, "__iter__") or getattr(given, "shape", None) == ()
    return [given] if alone else list(given)
