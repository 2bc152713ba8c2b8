"""Generates images from prompts or classes.

    python -m hybridgen.sample --run runs/shapes/cascade --prompt "a small red circle left of a large blue square"

Writes numbered PNGs and a grid with captions. Image number i of a seed does not depend on the batch size. Each PNG has
text entries that say what it was generated from: prompt, label, seed, number, options, and digest, family and step of
the run.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from hybridgen.cli import command, parser_of
from hybridgen.core import distributed, meshes
from hybridgen.core.errors import UserError
from hybridgen.core.progress import progress
from hybridgen.data import transforms
from hybridgen.data.files import read_text
from hybridgen.evals import png
from hybridgen.evals.finite import finite, marked, message
from hybridgen.evals.sheet import sheet
from hybridgen.models.contract import Shape
from hybridgen.runs import drawing, folder
from hybridgen.runs.reading import find_run
from hybridgen.runs.restore import Loaded, check_draws, restore

SHOWN = 8  # classes in a message
Request = tuple[str | None, int | None]  # a prompt, a class


def sample(loaded: Loaded, requests: list[Request], count: int, seed: int, batch: int, out: Path, draft: bool) -> Path:
    """Writes `count` images for each (prompt, class) of `requests` into `out`; returns the path of the grid.

    `batch`: images generated at a time; `draft`: show the tokenizer's draft too. Raises UserError as `conditions`, and,
    after all images are written, if images or parameters are not finite.
    """
    everything = [one for one in requests for _ in range(count)]
    cond, prompts = conditions(loaded, everything), [words(one) for one in everything]
    about = loaded.about(seed)
    batch = meshes.padded(loaded.mesh, min(batch, len(prompts)))
    folder.make(out)
    kept, number, writes = [], 0, jax.process_index() == 0
    bad: list[int] = []  # numbers of images that are not finite
    if writes and (older := len(list(out.glob("[0-9]*.png")))):
        text = f"warning: {out} already has {older} images; images with the same number are overwritten"
        print(text, file=sys.stderr)
    with jax.set_mesh(loaded.mesh):
        pieces = drawing.draw_all(loaded.draw, cond, seed, batch, loaded.put)
        for piece in progress(pieces, total=-(-len(prompts) // batch), label="generating"):
            kept.append(drawing.panels(piece) if draft else {"image": piece["image"]})
            whole = np.all([finite(one) for one in kept[-1].values()], 0)
            bad += (number + np.flatnonzero(~whole)).tolist()
            for image in marked(piece["image"]):
                if writes:
                    image, path = Image.fromarray(transforms.to_uint8(image)), out / f"{number:05d}.png"
                    png.save(image, path, chunks(everything[number], number) | about)
                number += 1
    grid = out / "grid.png"
    if writes:
        shown = {name: np.concatenate([piece[name] for piece in kept]) for name in kept[0]}
        listed = {"prompts": json.dumps(prompts, ensure_ascii=False)}
        png.save(sheet(shown, prompts, cell=128), grid, listed | about)
    if bad or loaded.faults:
        where = f"{message(len(bad), len(prompts))}, the first is number {bad[0]}, see {grid}" if bad else ""
        raise UserError("; ".join(filter(None, (where, *loaded.faults))))
    return grid


def words(requests: Request) -> str:
    """The caption of a request: its prompt, its class, or both."""
    text, label = requests
    return ", ".join(filter(None, (text, label is not None and f"class {label}")))


def chunks(request: Request, number: int) -> dict[str, str]:
    """What image `number` of a seed was generated from, as text of its PNG file."""
    text, label = request
    known = {"prompt": text, "label": None if label is None else str(label)}
    return {name: value for name, value in known.items() if value is not None} | {"number": str(number)}


def conditions(loaded: Loaded, requests: list[Request]) -> dict[str, np.ndarray]:
    """Prompts and classes as model input. Raises UserError for a prompt or class that is missing or not taken."""
    kind, (text, label) = loaded.config.family, requests[0]
    check_draws(loaded)
    if not loaded.generates:
        raise UserError(f"a {kind} run takes no prompts: give the run of a prior, decoder or cascade")
    takes = " and ".join(filter(None, ("a prompt" * loaded.reads, "a class" * (loaded.classes > 0))))
    if loaded.reads and text is None:
        raise UserError(f"this {kind} run takes {takes}: add --prompt TEXT")
    if text is not None and not loaded.reads:
        instead = f": give --label N ({class_list(loaded)})" if loaded.classes else ""
        raise UserError(f"this {kind} run takes no prompts{instead}")
    if (label is not None) != (loaded.classes > 0):
        known = f"takes {takes}: add --label N ({class_list(loaded)})" if loaded.classes else "takes no --label"
        raise UserError(f"this {kind} run {known}")
    wrong = [n for _, n in requests if loaded.classes and not 0 <= n < loaded.classes]
    if wrong:
        raise UserError(f"this {kind} run takes a class: --label 0 to {loaded.classes - 1}, not {wrong[0]}")
    cond = drawing.text_cond(loaded.text, [text for text, _ in requests]) if loaded.reads else {}
    return cond | ({"label": np.asarray([n for _, n in requests], np.int32)} if loaded.classes else {})


def class_list(loaded: Loaded) -> str:
    """The classes of a run for a message: "0 boat, 1 house, ..." if the run has their names, else their range."""
    names = loaded.config.data.get("class_names", ())
    if not isinstance(names, tuple) or not any(isinstance(name, str) for name in names):
        return f"0 to {loaded.classes - 1}"
    listed = [f"{number} {str(name)[:40]}" for number, name in enumerate(names[:SHOWN])]
    text = ", ".join([*listed, "..."] if len(names) > SHOWN else listed)
    return text if text.isprintable() else ascii(text)


def shape_of(loaded: Loaded, size: str | None) -> Shape | None:
    """The (height, width) of a `size` "HxW", or the most square one that the run was trained on; None: its only one.

    Raises UserError for a shape that the run was not trained on.
    """
    if size is None and not loaded.shapes:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) if isinstance(size, str) else None
    if size is not None and not found:
        raise UserError(f"--size {size!r} is not HEIGHTxWIDTH, such as 256x384")
    shape = (int(found[1]), int(found[2])) if found else min(loaded.shapes, key=lambda shape: max(shape) / min(shape))
    known = loaded.shapes or ((loaded.config.data.resolution,) * 2,)
    if tuple(shape) not in map(tuple, known):
        names = ", ".join("{}x{}".format(*one) for one in known)
        raise UserError(f"--size {size}: this {loaded.config.family} run was trained on images of {names}")
    return tuple(shape) if loaded.shapes else None


def read_requests(args: argparse.Namespace) -> list[Request]:
    """All pairs of a prompt (from --prompt and the lines of --prompts) and a class (from --label)."""
    prompts = list(args.prompt)
    if args.prompts:
        if not args.prompts.is_file():
            raise UserError(f"--prompts: no such file {str(args.prompts)!r}")
        prompts += [line.strip() for line in read_text(args.prompts).split("\n") if line.strip()]
        if not prompts:
            raise UserError(f"--prompts {args.prompts} has no prompts: write one per line")
    if not prompts and not args.label:
        raise UserError("no prompt: give --prompt TEXT, --prompts FILE or, for a class-conditional model, --label N")
    return list(itertools.product(prompts or [None], args.label or [None]))


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("sample")
    args, changes = drawing.parse(parser, argv)
    drawing.check_arguments(args)
    requests = read_requests(args)
    distributed.start(args)
    loaded = restore(find_run(args.run, None), changes, args.checkpoint)
    if shape := shape_of(loaded, args.size):
        loaded = loaded._replace(draw=loaded.drawer({}, shape))
    grid = sample(loaded, requests, args.count, args.seed, args.batch, args.out, args.draft)
    print(f"wrote {len(requests) * args.count} images to {args.out}, grid {grid}")
    return 0


if __name__ == "__main__":
    command(main)
