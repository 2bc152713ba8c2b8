"""Writes any data source as ArrayRecord shards, which the source "records" reads.

    python -m hybridgen.data.prepare.write --config configs/recipes/imagefolder.py:base --config.path=FOLDER \
        --out records

The source is the `data` of a config, or of a stage of a recipe; images are stored at its resolution. Training from the
records gives the same samples as training from the source. A broken record is replaced as in training, and reported.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources import records
from hybridgen.data.sources.reading import read, why_broken

NAMED = 20  # largest number of broken records that an index names


def data_of(config: Any, stage: str | None) -> Any:
    """The `data` of a config, or of a stage of a recipe (default: the first with data). Raises UserError."""
    stages = config.get("stages", {})
    if not stages:
        if stage or "data" not in config:
            raise UserError(f"--stage {stage} is for recipes only" if stage else "--config: this config has no `data`")
        return config.data
    known = [name for name in config.order if "data" in stages[name]]
    if stage is not None and stage not in known:
        raise UserError(f"--stage: this recipe has no stage {stage!r} with data{config_lib.hint(stage, known)}")
    return stages[stage or known[0]].data


def about(data: Mapping, source: Any, split: str, resolution: int | None = None) -> dict[str, Any]:
    """The entries of an index that describe the source of its records."""
    words = text_lib.words_of(source) if hasattr(source, "captions") or hasattr(source, "languages") else []
    return {
        "split": split,
        "resolution": resolution or data["resolution"],
        "class_names": list(getattr(source, "class_names", ())),
        "words": words,
        "encoders": sources.encoders(source),
        "source": pipeline.plain(sources.describe(data, source)),
    }


def read_all(source: Any, threads: int) -> Iterator[tuple[dict, int]]:
    """Yields (item with its `name`, the index if it was broken or -1) for every record in order."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), 16 * threads):
            part = range(start, min(start + 16 * threads, len(source)))
            for index, (item, broken) in zip(part, pool.map(functools.partial(read, source), part), strict=True):
                yield item | {"name": source.name(index)}, broken


def write(data: Mapping, split: str, out: Path, shards: int, threads: int, report: Callable = print) -> dict:
    """Writes one split of a source; returns the index. Raises UserError for a mixture, or if `out` has the split."""
    if data["source"] == "mixture":
        raise UserError("data.source is 'mixture', which has no records of its own: write each of its sources")
    source, broken, reasons = sources.build(data, split), [], []
    with records.writing(out, split, len(source), shards) as writer:
        for item, bad in tqdm(read_all(source, threads), desc=split, total=len(source), disable=None):
            arrays = {name: value[None] for name, value in item.items() if isinstance(value, np.ndarray)}
            writer.add(item | arrays)
            broken += [source.name(bad)] if bad >= 0 else []
            reasons += [why_broken(source, bad)] if bad >= 0 and len(reasons) < NAMED else []
        index = writer.finish(about(data, source, split) | {"broken": {"count": len(broken), "names": broken[:NAMED]}})
    report(f"{split}: wrote {index['count']} records to {out / split}, {shards} shards, digest {index['digest']}")
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        report(f"{split}: replaced {len(broken)} broken records: {'; '.join(reasons)}{more}")
    return index


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("data.prepare.write", __doc__)
    config_lib.add_argument(parser)
    parser.add_argument("--stage", help="stage whose data is written, if the config is a recipe")
    parser.add_argument("--out", required=True, type=Path, help="output folder, with one folder of records per split")
    parser.add_argument("--split", default="train,validation", help="comma-separated (default: train,validation)")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files per split (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="threads that read images")
    args, overrides = config_lib.parse(parser, argv)
    for name in ("shards", "threads"):
        if not 1 <= getattr(args, name) <= config_lib.MOST:
            raise UserError(f"--{name} {getattr(args, name)} is not within 1 and {config_lib.MOST}")
    data = data_of(config_lib.load(args.config, overrides), args.stage)
    for split in args.split.split(","):
        write(data, split, args.out, args.shards, args.threads)
    return 0


if __name__ == "__main__":
    command(main)
