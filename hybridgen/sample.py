"""Prompts to pictures.

    python -m hybridgen.sample --run runs/shapes/cascade --prompt "a small red circle left of a large blue square"

Writes numbered PNGs and a captioned grid. Picture i of a seed is the same whatever the batch it is drawn in.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from hybridgen import pictures, rundir
from hybridgen.cli import command, make_parser
from hybridgen.errors import UserError
from hybridgen.evals.sheet import sheet
from hybridgen.experiment import Loaded, find_run, restore
from hybridgen.metrics import progress


def sample(loaded: Loaded, prompts: list[str], count: int, seed: int, batch: int, out: Path, draft: bool) -> Path:
    """Draws `count` pictures of each prompt into `out`; returns the path of the grid."""
    if not loaded.plans:
        raise UserError(f"a {loaded.config.family} run takes no prompts")
    prompts = [prompt for prompt in prompts for _ in range(count)]
    cond = pictures.text_cond(loaded.text, prompts)
    batch = min(batch, len(prompts))
    rundir.make(out)
    kept, number = [], 0
    with jax.set_mesh(loaded.mesh):
        pieces = pictures.draw_all(loaded.draw, cond, seed, batch, loaded.put)
        for piece in progress(pieces, total=-(-len(prompts) // batch), label="drawing"):
            shown = [piece[name] for name in ("draft", "image") if name in piece and (draft or name == "image")]
            kept.append(np.concatenate(shown, 2))
            for image in piece["image"]:
                Image.fromarray(to_uint8(image)).save(out / f"{number:05d}.png")
                number += 1
    grid = out / "grid.png"
    sheet(np.concatenate(kept), prompts, cell=128).save(grid)
    return grid


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as bytes."""
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line and of the file, a line each."""
    prompts = list(args.prompt)
    if args.prompts:
        if not args.prompts.is_file():
            raise UserError(f"no file of prompts {str(args.prompts)!r}")
        try:
            text = args.prompts.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompts in {args.prompts}: {error}") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT or --prompts FILE")
    return prompts


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("sample", __doc__)
    parser.add_argument("--run", required=True, help="run folder of a cascade or of anything that draws from text")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt a line")
    parser.add_argument("--count", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for PNGs and grid.png")
    parser.add_argument("--draft", action="store_true", help="show the tokenizer's draft beside each render")
    pictures.add_arguments(parser)
    args = parser.parse_args(argv)
    pictures.check_arguments(args)
    prompts = read_prompts(args)
    loaded = restore(find_run(args.run, None), pictures.changes(args))
    grid = sample(loaded, prompts, args.count, args.seed, args.batch, args.out, args.draft)
    print(f"{len(prompts) * args.count} pictures in {args.out}, grid {grid}")
    return 0


if __name__ == "__main__":
    command(main)
