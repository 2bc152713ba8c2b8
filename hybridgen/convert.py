"""Official weights to a run folder, and back (runs/importing.py).

    python -m hybridgen.convert taming_vqgan vqgan.ckpt runs/vqgan --config config.json
    python -m hybridgen.convert taming_vqgan runs/vqgan vqgan.safetensors --export
    python -m hybridgen.convert llamagen_gpt c2i_L_256.pt runs/gpt --config c2i-L-256 --part tokenizer=runs/vq
    python -m hybridgen.convert --list

The official config is that of --config (a JSON file or the name of a preset), otherwise `config.json` beside the
weights. A model that needs others to draw pictures (a tokenizer, a text tower) takes their runs from --part. A text
model brings the text tokenizer that lies beside its weights, or in the folder --text.
"""

import contextlib
from pathlib import Path

from hybridgen.cli import command, make_parser
from hybridgen.core.errors import UserError
from hybridgen.runs.importing import read_config, write_official, write_run
from hybridgen.weights import tables
from hybridgen.weights.files import open_weights


def listing() -> str:
    """What `--list` prints."""
    lines = []
    for name in tables.names():
        about = tables.find(name).about
        lines.append(f"{name:14s} {about.what}; {about.licence}; {about.sizes}")
        if about.presets:
            lines.append(f"{'':14s} presets: {', '.join(about.presets)}")
    return "\n".join(lines)


def named_runs(given: list[str]) -> dict[str, Path]:
    """`NAME=RUN` of a command line. Raises UserError for anything else, and for a name twice."""
    runs = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in runs:
            raise UserError(f"--part takes NAME=RUN, each name once, such as tokenizer=runs/vq, and was given {text!r}")
        runs[name] = Path(path)
    return runs


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("convert", __doc__)
    parser.add_argument("source", nargs="?", help="where the weights are from; see --list")
    parser.add_argument("input", nargs="?", type=Path, help="file or folder of weights; with --export a run folder")
    parser.add_argument("out", nargs="?", type=Path, help="new run folder; with --export a .safetensors file")
    parser.add_argument("--config", help="official config: a JSON file or a preset (default: config.json there)")
    parser.add_argument("--part", action="append", default=[], metavar="NAME=RUN", help="a run that it is used with")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="text tokenizer (default: beside the weights)")
    parser.add_argument("--export", action="store_true", help="from a run folder to official weights")
    parser.add_argument("--list", action="store_true", help="show sources, licences and sizes")
    args = parser.parse_args(argv)
    if args.list:
        with contextlib.suppress(BrokenPipeError):
            print(listing())
        return 0
    if args.out is None:
        parser.error("three things are asked for: SOURCE IN OUT")
    source = tables.find(args.source)
    if args.export:
        count = write_official(source, args.input, args.config, args.out)
        print(f"{count} tensors in {args.out}")
        return 0
    weights = open_weights(args.input)
    config = read_config(source.about, args.config, args.input)
    beside = args.input if args.input.is_dir() else args.input.parent
    required = args.text is not None
    count = write_run(args.out, source, config, weights, named_runs(args.part), args.text or beside, required)
    print(f"{count:,} parameters in {args.out}")
    return 0


if __name__ == "__main__":
    command(main)
