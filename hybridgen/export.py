"""A run and its parts to a bundle: a folder of safetensors and JSON that loads on another machine.

    python -m hybridgen.export runs/shapes/cascade shapes
    hybridgen sample --run shapes --prompt "a small red circle"

The bundle draws what the run draws, and stands wherever a run is read: `sample`, `evaluate`, `config.parts.NAME`,
`init_from`, `hybridgen.load`. It does not train on: the optimiser stays behind. For the files see runs/bundle.py.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.runs import bundle, checkpoint
from hybridgen.runs.reading import find_run, load


def export(folder: Path, out: Path, dtype: str = "float32", step: int | None = None) -> int:
    """Writes the bundle `out` of a run (or bundle) at its newest good step or at `step`; returns its bytes.

    Raises UserError if `out` is there, or a part is not the one that a run was trained with. Nothing is left then.
    """
    if dtype not in bundle.DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(bundle.DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: give a new folder")
    try:
        _write(folder, out, "parts/", dtype, step, {}, ())
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write(
    folder: Path, out: Path, beside: str, dtype: str, step: int | None, done: dict[Path, Path], above: tuple[Path, ...]
) -> str:
    """One run and, before it, the parts that are not in `done` {run: its bundle}; the digest as it will be read back.

    Parts of the bundle lie in its `parts/`, those of a part beside it: `beside` is how the config names that folder.
    """
    run = load(folder, step)
    paths, digests = {}, {}
    for name, path in run.config.parts.items():
        place = find_run(path, folder)
        if place in (*above, folder):
            raise UserError(f"{place} is a part of itself")
        if run.part_digests.get(name, here := load(place).digest) != here:
            raise UserError(f"the part {name!r} in {place} is not the one that {folder} was trained with")
        if place not in done:
            home = (out if beside == "parts/" else out.parent.parent) / "parts"
            taken = {path.name for path in done.values()}
            done[place] = home / next(free for free in _names(name) if free not in taken)
            digests[name] = _write(place, done[place], "../", dtype, None, done, (*above, folder))
        else:
            digests[name] = _digest(done[place])
        paths[name] = beside + done[place].name
    config = config_lib.plain(run.config) | {"parts": paths, "init_from": {}}
    text = run.text.to_json() if run.text else None
    made = bundle.Bundle({"params": run.part.params, "extra": run.part.extra}, digests, run.step)
    bundle.write(out, made, config, text, dtype)
    return _digest(out)


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in range(2, 1000))


def _digest(folder: Path) -> str:
    """Of the arrays as they are read back: what a part is told from another one by."""
    return checkpoint.digest(bundle.read(folder).arrays)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("export", __doc__)
    parser.add_argument("run", help="run folder, with its parts where its config says")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--dtype", default="float32", help=f"of stored parameters, one of {', '.join(bundle.DTYPES)}")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="step to export (default: the newest good one)")
    args = parser.parse_args(argv)
    size = export(find_run(args.run, None), args.out, args.dtype, args.checkpoint)
    print(f"{size / 1e6:.2f} MB in {args.out}; try: hybridgen sample --run {args.out} --prompt ...")
    return 0


if __name__ == "__main__":
    command(main)
