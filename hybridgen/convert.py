"""Imports official weights as a run folder, or exports a run folder as official weights.

    python -m hybridgen.convert taming_vqgan vqgan.ckpt runs/vqgan --config config.json
    python -m hybridgen.convert taming_vqgan runs/vqgan vqgan.safetensors --export
    python -m hybridgen.convert llamagen_gpt c2i_L_256.pt runs/gpt --config c2i-L-256 --part tokenizer=runs/vq
    python -m hybridgen.convert --list

The official config is that of --config (a JSON file or the name of a preset), otherwise `config.json` in the folder of
the weights. If the model needs other models to generate images (a tokenizer, a text encoder), name their runs with
--part. The text tokenizer of a text model is read from the folder of its weights, or from the folder --text. The work
is done in runs/importing.py.
"""

import contextlib
import sys
from pathlib import Path

from hybridgen.cli import command, parser_of
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing
from hybridgen.runs.importing import read_config, write_official, write_run
from hybridgen.weights import nesting, tables
from hybridgen.weights.files import open_weights


def listing() -> str:
    """The text that `--list` prints."""
    lines = []
    for name in tables.names():
        about = tables.find(name).about
        lines.append(f"{name:14s} {about.what}; {about.licence}; {about.sizes}")
        if about.presets:
            lines.append(f"{'':14s} presets: {', '.join(about.presets)}")
    return "\n".join(lines)


def named_runs(given: list[str]) -> dict[str, Path]:
    """{name: run folder} of arguments `NAME=RUN`. Raises UserError for another form or a repeated name."""
    runs = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in runs:
            raise UserError(f"--part {text!r} is not NAME=RUN, each name once, such as tokenizer=runs/vq")
        runs[name] = Path(path)
    return runs


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("convert")
    args = parser.parse_intermixed_args(argv)  # options in any place
    if args.list:
        with contextlib.suppress(BrokenPipeError):
            print(listing())
        return 0
    if args.out is None:
        parser.error("three arguments are needed: SOURCE INPUT OUT")
    source = tables.find(args.source)
    if args.export:
        with doing(f"exporting {args.input} to {args.out}"):
            count = write_official(source, args.input, args.config, args.out)
        print(f"wrote {count} tensors to {args.out}")
        return 0
    weights = open_weights(args.input)
    if not len(weights):
        raise UserError(f"{args.input} holds no tensors")
    for root in nesting.empty_roots(weights.tensors, weights.other, source.about.roots):
        print(f"warning: {args.input} has no tensors in {root!r}: others are converted", file=sys.stderr)
    config = read_config(source.about, args.config, args.input)
    beside = args.input if args.input.is_dir() else args.input.parent
    required = args.text is not None
    with doing(f"converting {args.input} to {args.out}"):
        count = write_run(args.out, source, config, weights, named_runs(args.part), args.text or beside, required)
    print(f"wrote {count:,} parameters to {args.out}")
    return 0


if __name__ == "__main__":
    command(main)
