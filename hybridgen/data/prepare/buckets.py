"""Writes the table of aspect-ratio buckets for a folder of images (data/sources/buckets.py).

    python -m hybridgen.data.prepare.buckets --config configs/recipes/imagefolder.py --config.path=FOLDER \
        --out buckets.json
"""

import json
import sys
from pathlib import Path

import numpy as np

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data.prepare import write
from hybridgen.data.sources.buckets import build


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:

    parser = make_parser("data.prepare.buckets", __doc__)
    config_lib.add_argument(parser)
    parser.add_argument("--stage", help="stage whose folder is read, if the config is a recipe")
    text = "number of which all sides are multiples (default: 64)"
    parser.add_argument("--step", type=int, default=64, metavar="N", help=text)
    parser.add_argument("--aspect", type=float, default=2.0, help="largest ratio of the sides (default: 2)")
    parser.add_argument(
        "--least",
        type=int,
        default=256,
        metavar="N",
        help="smallest number of images in a bucket; at least the batch size (default: 256)",
    )
    parser.add_argument("--out", required=True, type=Path, help="new file, such as buckets.json")
    args, overrides = config_lib.parse(parser, argv)
    if args.step < 1 or args.least < 1 or not 1 <= args.aspect <= 16:
        given = f"--step {args.step}, --least {args.least}, --aspect {args.aspect}"
        raise UserError(f"{given}: --step and --least must be at least 1, --aspect from 1 to 16")
    if args.out.exists() or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out} already exists" if args.out.exists() else f"no folder {args.out.parent}")
    data = write.data_of(config_lib.load(args.config, overrides), args.stage)
    if data.source != "folder":
        raise UserError(f"data.source is {data.source!r}, but only the source 'folder' has buckets")
    options = {name: value for name, value in sources.checked("folder", data.options).items() if name != "buckets"}
    table = build(options, data.resolution, args.step, args.aspect, args.least, _warn)
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    temporary.write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(args.out)
    counts = np.bincount(table["splits"]["train"]["bucket"], minlength=len(table["shapes"]))
    for (height, width), count in zip(table["shapes"], counts, strict=True):
        print(f"{height:5d} x {width:<5d} {count} records")
    return 0


if __name__ == "__main__":
    command(main)
