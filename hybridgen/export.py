"""Writes a run and its parts as a bundle: one folder of safetensors and JSON that loads on another machine.

    python -m hybridgen.export runs/shapes/cascade shapes
    hybridgen sample --run shapes --prompt "a small red circle"

The bundle generates the same images as the run and can be used in place of a run folder: in `sample`, `evaluate`,
`config.parts.NAME`, `init_from` and `hybridgen.load`. Training cannot resume from it: it has no optimizer state.
runs/bundle.py describes the files.
"""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core.arguments import DTYPES
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.runs import bundle, checkpoint
from hybridgen.runs.reading import find_run, load, model_of, outside, trusting


def export(folder: Path, out: Path, dtype: str = "float32", step: int | None = None) -> int:
    """Writes the bundle `out` of a run (or bundle) at its newest valid step or at `step`; returns its size in bytes.

    Raises UserError if `out` exists, or if a part differs from the one that the run was trained with; `out` is then
    removed.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists: give a new folder")
    try:
        _write(folder, out, "parts/", dtype, step, {}, ())
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write(
    folder: Path, out: Path, beside: str, dtype: str, step: int | None, done: dict[Path, Path], above: tuple[Path, ...]
) -> str:
    """Writes a run, after those of its parts that are not in `done` {run: its bundle}; returns its digest as read back.

    All parts are in `parts/` of the bundle, also the parts of a part: `beside` is that folder as seen from this config.
    """
    run = load(folder, step)
    run.check_finite()
    paths, digests = {}, {}
    for name, path in run.config.parts.items():
        place = find_run(path, folder)
        if place in (*above, folder):
            raise UserError(f"the run {place} is a part of itself")
        if run.part_digests.get(name, here := load(place).digest) != here:
            raise UserError(f"part {name!r}: {place} is not the run that {folder} was trained with")
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
    """The digest of the arrays as read back, which identifies the part."""
    return checkpoint.digest(bundle.read(folder).arrays)


def sampling(out: Path) -> str:
    """A command that samples the bundle `out`; "" if it generates no images."""
    configs = [config_lib.read(path / "config.json") for path in (out, *sorted(out.glob("parts/*/")))]
    if {"text", "features", "tokenizer"} & set(contract.roles(contract.find(configs[0].family))):
        return ""
    known = [contract.inputs(contract.find(config.family), model_of(config, out)) for config in configs]
    words = ["hybridgen", "sample", "--run", shlex.quote(str(out))]
    words += [trusting(module for config in configs for module in outside(config))]
    words += ['--prompt "TEXT"' if any(one.text for one in known) or "text" in configs[0].parts else ""]
    words += ["--label 0" if any(one.classes for one in known) else ""]
    return " ".join(filter(None, words))


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("export")
    args = parser.parse_args(argv)
    size = export(find_run(args.run, None), args.out, args.dtype, args.checkpoint)
    command = sampling(args.out)
    print(f"wrote {size / 1e6:.2f} MB to {args.out}" + (f"; try: {command}" if command else ""))
    return 0


if __name__ == "__main__":
    command(main)
