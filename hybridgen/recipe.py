"""Recipes: the stages of a config, run in order; what was trained is not trained again and a stopped stage resumes.

    python -m hybridgen.recipe --config configs/recipes/shapes.py:cpu --workdir runs/shapes

A recipe is a config with `order`, the names of its stages, and `stages`, their configs by name. A stage with a
`family` is trained in WORKDIR/name; one with `cache` writes there, once, what the run that it names makes of the data
(see cache.py), and a stage behind it reads that as {"source": "records", "options": {"path": "../NAME"}}; one with
`evaluate` measures the run that it names, each time, and writes report and contact sheets; one with `compare` makes a
table of what stages before it measured (see compare.py).
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hybridgen import cache, evaluate, train
from hybridgen.cli import a_path, command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core import distributed
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.reports import distances, points
from hybridgen.runs import folder as run_folder
from hybridgen.runs.reading import find_run
from hybridgen.runs.restore import restore
from hybridgen.training import resume


def run(config: Any, folder: Path, allow: tuple[str, ...] = ()) -> bool:
    """Runs the stages in `folder`. False if a signal stopped one."""
    check(config)
    check_stages(config)
    run_folder.make(folder)
    started = time.monotonic()
    for number, name in enumerate(config.order, 1):
        stage, place = placed(config.stages[name], folder / name), folder / name
        print(f"[{number}/{len(config.order)}] {name} ({time.monotonic() - started:.0f} s so far)", flush=True)
        if "evaluate" in stage:
            measure(stage, place)
        elif "cache" in stage:
            cache.stage(stage, place)
        elif "compare" in stage:
            points.stage(stage, place)
        elif not train.run(stage, place, allow=allow, label=name):
            return False
    print(f"done in {time.monotonic() - started:.0f} s")
    return True


def check(config: Any) -> None:
    """A recipe's names must fit: UserError otherwise."""
    for key in ("order", "stages"):
        if key not in config:
            raise UserError(
                f"this config is not a recipe: it has no {key!r} (a single stage is run by hybridgen train)"
            )
    for name in config.order:
        if name not in config.stages:
            raise UserError(f"stage {name!r} is in `order` and not in `stages`{config_lib.hint(name, config.stages)}")
        if "compare" in config.stages[name]:
            points.check(config.stages[name], list(config.stages))


def awaited(stage: Any) -> bool:
    """Whether its records are those of a stage before it ("../NAME")."""
    data = stage.get("data", {})
    return data.get("source") == "records" and str(data.options.get("path")).startswith("../")


def placed(stage: Any, place: Path) -> Any:
    """A stage whose records, if they are those of a neighbouring stage, are where that wrote them."""
    if not awaited(stage):
        return stage
    stage = stage.copy_and_resolve_references()
    with stage.unlocked():
        stage.data.options.path = str((place / stage.data.options.path).resolve())
    return stage


def check_stages(config: Any) -> None:
    """Raises UserError, before the first stage is trained, for what a later one would stumble over."""
    known: dict[str, Any] = {}

    def source(data: Any, split: str) -> Any:
        """Stages mostly read the same data, and a large folder takes long to go through."""
        key = json.dumps([config_lib.plain(data), split], sort_keys=True)
        return known[key] if key in known else known.setdefault(key, sources.build(data, split))

    for name in config.order:
        stage = config.stages[name]
        try:
            if "family" in stage and not awaited(stage):
                resume.checked(stage, source, stages=config.stages)
            measured = config.stages.get(Path(stage.get("evaluate", "")).name)
            if measured and not awaited(measured):
                for split in stage.splits:
                    source(measured.data, split)
        except UserError as error:
            raise UserError(f"stage {name!r}: {error}") from None


def measure(stage: Any, place: Path) -> None:
    """Evaluates the run that `stage.evaluate` names, and says where report and pictures are."""
    loaded = restore(find_run(stage.evaluate, place), {})
    splits, distance = tuple(stage.splits), None
    if stage.get("features"):
        about = (splits, stage.count, stage.batch, stage.seed)
        reference = (stage.get("reference"), stage.get("reference_count"))
        distance = distances.build(loaded, stage.features, *about, *reference)
    report = evaluate.evaluate(loaded, splits, stage.count, stage.batch, stage.seed, place, distance)
    print(evaluate.markdown(report))
    print(f"report {place / 'report.md'}")
    for split in stage.splits:
        print(f"grid   {place / f'{split}.png'}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("recipe", __doc__)
    config_lib.add_argument(parser)
    parser.add_argument("--workdir", required=True, type=a_path, help="folder that holds a run folder for every stage")
    parser.add_argument("--allow", default="", metavar="KEY,...", help="config keys that may differ on resume")
    distributed.add_arguments(parser)
    args, overrides = config_lib.parse(parser, argv)
    config = config_lib.load(args.config, overrides)
    check(config)
    stages = [(config.stages[name], args.workdir / name) for name in config.order if "family" in config.stages[name]]
    allow = resume.allowed(args.allow, stages)
    distributed.start(args)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # training has a handler of its own
    try:
        done = run(config, args.workdir, allow)
    except KeyboardInterrupt:
        print("the same command goes on from what is saved", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if done else 130


if __name__ == "__main__":
    command(main)
