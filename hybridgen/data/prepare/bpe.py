"""Trains a byte-pair encoding (data/text/bpe.py) on the captions of a data source.

python -m hybridgen.data.prepare.bpe --config configs/recipes/imagefolder.py:base --size 4096 --out bpe.json
"""

import json
from pathlib import Path

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.data.prepare import write
from hybridgen.data.text.bpe import FIRST, MAX_MERGES, Bpe, train


def main(argv: list[str] | None = None) -> int:

    parser = make_parser("data.prepare.bpe", __doc__)
    config_lib.add_argument(parser)
    parser.add_argument("--stage", help="stage whose captions are read, if the config is a recipe")
    text = "vocabulary size, of which 257 ids are padding and bytes (default: 4096)"
    parser.add_argument("--size", type=int, default=4096, help=text)
    parser.add_argument(
        "--count",
        type=int,
        default=50_000,
        metavar="N",
        help="records that are read if the source has no list of captions (default: 50000)",
    )
    parser.add_argument("--out", required=True, type=Path, help="new file, such as bpe.json")
    args, overrides = config_lib.parse(parser, argv)
    if not FIRST <= args.size <= MAX_MERGES or args.count < 1:
        limits = f"from {FIRST} to {MAX_MERGES}, and --count at least 1"
        raise UserError(f"--size {args.size}, --count {args.count}: --size must be {limits}")
    if args.out.exists() or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out} already exists" if args.out.exists() else f"no folder {args.out.parent}")
    source = sources.build(write.data_of(config_lib.load(args.config, overrides), args.stage), "train")
    items = (source[index] for index in range(min(args.count, len(source))))
    captions = (
        source.captions()
        if hasattr(source, "captions")
        else (text for item in items for text in item.get("texts") or (item["text"],))
    )
    merges = train(captions, args.size)
    if not merges and not text_lib.captioned(source):
        raise UserError(
            f"all captions of data.source {type(source).__name__.lower()!r} are empty: there is nothing to merge"
        )
    text = json.dumps({"kind": Bpe.kind, "merges": merges}, separators=(",", ":"))
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(args.out)
    print(f"wrote {FIRST + len(merges)} ids to {args.out}")
    return 0


if __name__ == "__main__":
    command(main)
