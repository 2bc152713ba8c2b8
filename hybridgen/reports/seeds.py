"""A table of the evaluations of several seeds of one recipe: the median, the worst and the best of every number.

`hybridgen recipe --seeds 0,1,2` writes it. Reports of the same stage in the folders of the seeds are compared number by
number, by their position in report.json.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from hybridgen.core.errors import UserError
from hybridgen.runs import folder as run_folder

SHOWN = ("all right", "one object", "two objects", "relation", "clean", "PSNR")


def write(places: Mapping[int, Path], evaluations: list[str], out: Path) -> None:
    """Writes seeds.json and seeds.md into `out` and prints the tables.

    places: the folder of each seed; evaluations: the names of the stages with a report. Raises UserError if there is
    none, or if the reports have different entries.
    """
    if not evaluations:
        raise UserError("the recipe has no stage with an evaluation, so there is nothing to compare over its seeds")
    tables = {name: over_seeds({seed: place / name for seed, place in places.items()}) for name in evaluations}
    text = "\n".join(markdown(name, list(places), table) for name, table in tables.items())
    if jax.process_index() == 0:
        run_folder.write_json(out / "seeds.json", {"seeds": list(places), "evaluations": tables})
        (out / "seeds.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"table  {out / 'seeds.md'}")


def over_seeds(folders: Mapping[int, Path]) -> dict[str, dict[str, Any]]:
    """{"validation/from captions/render/judge/all/all_right": {"median", "least", "greatest", "values"}, ...}.

    folders: the evaluation of each seed, whose report.json is read. Values are in the order of the seeds.
    """
    found = {}
    for seed, folder in folders.items():
        file = folder / "report.json"
        if not file.is_file():
            raise UserError(f"seed {seed}: {folder} has no report")
        found[seed] = dict(_numbers(run_folder.read_json(file)["splits"]))
    first, *others = found.values()
    if any(other.keys() != first.keys() for other in others):
        raise UserError(f"the reports of the seeds {', '.join(map(str, found))} have different entries")
    table = {}
    for key in first:
        values = [numbers[key] for numbers in found.values()]
        ends = {"least": min(values), "greatest": max(values)}
        table[key] = {"median": statistics.median(values), **ends, "values": values}
    return table


def _numbers(tree: Mapping, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every number in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield path + name, value


def markdown(name: str, seeds: list[int], table: Mapping[str, Mapping]) -> str:
    """One row for each kind of image: median (worst to best) over the seeds; then render against draft, paired."""
    keys = dict.fromkeys(key.rpartition("/judge/")[0] or key.rpartition("/")[0] for key in table)
    rows = [key for key in keys if not key.endswith("/paired")]
    lines = [f"## {name}: median (least to greatest) of {len(seeds)} seeds", ""]
    lines += [f"| images | {' | '.join(SHOWN)} |", f"| {' | '.join(['---'] * (1 + len(SHOWN)))} |"]
    for row in rows:
        accuracy = f"{row}/judge"
        places = (f"{accuracy}/all/all_right", f"{accuracy}/1/all_right", f"{accuracy}/2/all_right")
        places += (f"{accuracy}/all/relation", f"{accuracy}/all/clean")
        cells = [_cell(table.get(place), 100, " %") for place in places] + [_cell(table.get(f"{row}/psnr"), 1, "", 2)]
        lines.append(f"| {row.replace('/', ', ')} | {' | '.join(cells)} |")
    for key in keys:
        if key.endswith("/paired"):
            pair = {k.rpartition("/")[2]: v for k, v in table.items() if k.startswith(f"{key}/")}
            lines += ["", f"- {key.rpartition('/')[0].replace('/', ', ')}, render against draft of the same tokens:"]
            lines += [f"  {', '.join(f'{k} {_cell(v, 1, str(), 3)}' for k, v in pair.items())}"]
    return "\n".join([*lines, ""])


def _cell(entry: Mapping | None, factor: float, unit: str, digits: int = 1) -> str:
    """ "93.1 (89.0 to 95.2) %"; empty without an entry."""
    if entry is None:
        return ""
    low, middle, high = (f"{factor * entry[k]:.{digits}f}" for k in ("least", "median", "greatest"))
    return f"{middle} ({low} to {high}){unit}"
