"""Runs the stages of a recipe in order; finished stages are not trained again, and a stopped stage resumes.

    python -m hybridgen.recipe --config configs/recipes/shapes.py:cpu --workdir runs/shapes

With --from RUN in place of --config, the recipe fine-tunes prior and decoder of the cascade RUN (runs/finetune.py):

    python -m hybridgen.recipe --from runs/shapes/cascade --config.path=FOLDER --workdir runs/tuned

With --seeds 0,1,2 the whole recipe runs once for each seed, in WORKDIR/seed_0 and so on: parameters, order of the data
and generated images differ. seeds.md then has the median, the worst and the best of every result (reports/seeds.py).

A recipe is a config with `order`, the names of its stages, and `stages`, their configs by name. There are four kinds of
stages, and each writes to WORKDIR/name:

- with `family`: trains a model;
- with `cache`: precomputes tokens, latents or text features with the run that it names, once (cache.py). Later stages
  read them as {"source": "records", "options": {"path": "../NAME"}};
- with `evaluate`: evaluates the run that it names, each time, and writes a report and image grids (evaluate.py);
- with `compare`: makes a table of the results of earlier stages (reports/points.py).
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hybridgen import cache, evaluate, train
from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import distributed, progress
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.reports import distances, points
from hybridgen.reports import seeds as seeds_table
from hybridgen.runs import finetune
from hybridgen.runs import folder as run_folder
from hybridgen.runs.reading import find_run
from hybridgen.runs.restore import restore
from hybridgen.training import resume


def run(config: Any, folder: Path, allow: tuple[str, ...] = ()) -> bool:
    """Runs the stages in `folder`. Returns False if a signal stopped one.

    `allow`: config keys that may differ on resume. Raises UserError for an invalid recipe, before the first stage runs.
    """
    check(config)
    check_stages(config)
    run_folder.make(folder)
    started = time.monotonic()
    for number, name in enumerate(config.order, 1):
        stage, place = placed(config.stages[name], folder / name), folder / name
        if progress.shown():
            print(f"[{number}/{len(config.order)}] {name} (after {time.monotonic() - started:.0f} s)", flush=True)
        if "evaluate" in stage:
            measure(stage, place)
        elif "cache" in stage:
            cache.stage(stage, place)
        elif "compare" in stage:
            points.stage(stage, place)
        elif not train.run(stage, place, allow=allow, label=name):
            return False
    if progress.shown():
        print(f"done in {time.monotonic() - started:.0f} s")
    return True


def run_seeds(config: Any, folder: Path, seeds: tuple[int, ...], allow: tuple[str, ...] = ()) -> bool:
    """Runs the recipe once for each seed, and writes seeds.json and seeds.md. Returns False if a signal stopped one."""
    evaluations = [name for name in config.order if "evaluate" in config.stages[name]]
    places = {seed: folder / f"seed_{seed}" for seed in seeds}
    for seed, place in places.items():
        print(f"seed {seed} of {', '.join(map(str, seeds))}", flush=True)
        if not run(seeded(config, seed), place, allow):
            return False
    seeds_table.write(places, evaluations, folder)
    return True


def seeded(config: Any, seed: int) -> Any:
    """A copy of a recipe in which every stage has this seed."""
    config = config.copy_and_resolve_references()
    for stage in config.stages.values():
        if "seed" in stage:
            stage.seed = seed
    return config


def check(config: Any) -> None:
    """Raises UserError for a config without stages, and for names of stages that do not exist."""
    for key in ("order", "stages"):
        if key not in config:
            raise UserError(f"--config is not a recipe: it has no {key!r}; to train a single model use hybridgen train")
    for name in config.order:
        if name not in config.stages:
            hint = config_lib.hint(name, config.stages)
            raise UserError(f"config key 'order': stage {name!r} is not in `stages`{hint}")
        if "compare" in config.stages[name]:
            points.check(config.stages[name], list(config.stages))


def awaited(stage: Any) -> bool:
    """Whether a stage reads the records of an earlier stage ("../NAME")."""
    data = stage.get("data", {})
    return data.get("source") == "records" and str(data.options.get("path")).startswith("../")


def placed(stage: Any, place: Path) -> Any:
    """A stage with its path "../NAME" of another stage's records made absolute."""
    if not awaited(stage):
        return stage
    stage = stage.copy_and_resolve_references()
    with stage.unlocked():
        stage.data.options.path = str((place / stage.data.options.path).resolve())
    return stage


def check_stages(config: Any) -> None:
    """Raises UserError, before the first stage is trained, for errors in the config or data of any stage."""
    known: dict[str, Any] = {}

    def source(data: Any, split: str) -> Any:
        """A cached source: most stages read the same data, and listing a large folder takes long."""
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
    """Evaluates the run that `stage.evaluate` names, and prints the report and the paths of the grids."""
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
    parser = parser_of("recipe")
    args, overrides = config_lib.parse(parser, argv)
    if any(override.partition("=")[0] == "data.source" for override in overrides):
        raise UserError(
            "--config.data.source is not for recipes, whose stages have options of their own source: a recipe over "
            "another source is a config file of 8 lines, see 'A recipe over another source' in docs/data.md"
        )
    if args.start and args.seeds:
        raise UserError("--seeds is for recipes that train from a config, not for --from")
    if args.start:
        config = finetune.several(args.start, overrides, args.workdir)
    else:
        config = config_lib.load(args.config, overrides)
    check(config)
    trained = [name for name in config.order if "family" in config.stages[name]]
    folders = [args.workdir / f"seed_{seed}" for seed in args.seeds] if args.seeds else [args.workdir]
    stages = [(config.stages[name], folder / name) for folder in folders for name in trained]
    allow = resume.allowed(args.allow, stages)
    distributed.start(args)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # training has a handler of its own
    try:
        if args.seeds:
            done = run_seeds(config, args.workdir, args.seeds, allow)
        else:
            done = run(config, args.workdir, allow)
    except KeyboardInterrupt:
        print("run the same command again to resume", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if done else 130


if __name__ == "__main__":
    command(main)
