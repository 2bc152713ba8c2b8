"""Fine-tuning: configs that train a run further on other data, from its weights, in a new folder.

    hybridgen train --from RUN --config.path=FOLDER --workdir runs/tuned        one model
    hybridgen recipe --from RUN --config.path=FOLDER --workdir runs/tuned       prior and decoder of a cascade

RUN is a run folder, a bundle or imported weights. Its family, model, text tokenizer and parts are kept, and its weights
(EMA weights, if any) are the start, by `init_from.all`. Data, steps, optimizer and the like may be overridden. The
other entries are those of RUN or of configs/finetune.py. `path` is short for a folder of images as data.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.data import sources
from hybridgen.data import text as text_lib
from hybridgen.data.sources import reading as record_reading
from hybridgen.models import contract
from hybridgen.models.contract import Part, find
from hybridgen.runs import fitting, reading

ENTRIES = "configs/finetune.py"
KEPT = ("seed", "batch", "accumulate", "frozen_dtype", "trainable")  # of a run that was trained here
FIXED = ("family", "model", "parts", "init_from", "data.text", "data.resolution", "data.options.class_names")
SLOWER = 10  # the learning rate is that of the run divided by this
SHOWN = 10  # words or classes in a message
TRAINED = ("prior", "decoder")  # parts of a cascade that a recipe trains, in this order


class Start(NamedTuple):
    """A run to start from, without its arrays."""

    folder: Path
    config: Any
    model: Any
    text: Any  # the text tokenizer of the model or of its parts, or None

    @property
    def family(self) -> Any:
        return find(self.config.family)

    @property
    def assembled(self) -> bool:
        """Whether it was put together from trained parts, without weights of its own."""
        return bool(contract.optional(self.family, "members")) and not contract.members(self.family, self.model)

    @property
    def classes(self) -> int:
        """The number of classes that the model takes; 0: none."""
        return contract.inputs(self.family, self.model).classes

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its classes, if they have names."""
        names = self.config.data.get("class_names", ())
        named = self.classes and names and all(isinstance(name, str) for name in names)
        return tuple(names) if named else ()


def load(path: str) -> Start:
    """The run `path` as a start. Raises UserError if nothing can be trained from it."""
    folder = reading.find_run(path, None)
    config = reading.read_config(folder)
    family, model = find(config.family), reading.model_of(config, folder)
    roles = contract.roles(family)
    if not any(contract.ROLES[role].trained for role in roles):
        raise UserError(f"--from {path}: a {config.family} run is a {roles[0]} model, which hybridgen does not train")
    readers = [folder, *(place for name, place in places(config, folder).items() if name == "text")]
    texts = [reading.text_of(place) for place in readers if place != folder or reading.reads_text(place)]
    return Start(folder, config, model, next(filter(None, texts), None))


def places(config: Any, folder: Path) -> dict[str, Path]:
    """The folders of a run's parts."""
    return {name: reading.find_run(path, folder) for name, path in config.parts.items()}


def one(path: str, settings: Sequence[str], workdir: Path) -> ConfigDict:
    """The config that fine-tunes the run `path`, with overrides ("steps=200"). Raises UserError, in words, for a start,
    an override or data that cannot be used, and prints what the model does not know of the new captions and classes."""
    start = load(path)
    if workdir.resolve() == start.folder:
        raise UserError(f"--workdir {workdir} is the run that --from names: give a new folder")
    if start.assembled:
        parts = {name: place for name, place in places(start.config, start.folder).items() if _trainable(place)}
        choices = ", ".join(f"--from {_shown(place)}" for place in parts.values())
        raise UserError(
            f"--from {path} is a {start.config.family} of trained parts without weights of its own; say which part to "
            f"train: {choices} (or prior and decoder: hybridgen recipe --from {path})"
        )
    _check_workdir(workdir, start.folder)
    path_given, rest = _checked(settings, path)
    config = stage(start, (start,), path_given, _source_given(rest))
    config_lib.override(config, rest)
    config_lib.check(config)
    _check(start, config, path)
    return config.lock()


def several(path: str, settings: Sequence[str], workdir: Path) -> ConfigDict:
    """The recipe that fine-tunes prior and decoder of the cascade `path`, or another model, and evaluates the result.

    The tokenizer stays, so that the tokens mean the same to prior and decoder. Raises UserError as `one`.
    """
    whole = load(path)
    if not whole.assembled:
        starts, last = {contract.roles(whole.family)[0]: whole}, contract.roles(whole.family)[0]
    else:
        found = places(whole.config, whole.folder)
        starts, last = {name: load(str(found[name])) for name in TRAINED if name in found}, "cascade"
    given, rest = _checked(settings, path)
    among = tuple(starts.values())
    stages = {name: stage(start, among, given) for name, start in starts.items()}
    for name, start in starts.items():
        _check_workdir(workdir / name, start.folder)
    if last == "cascade":
        stages[last] = stage(whole, among, given)
        stages[last].steps, stages[last].init_from = 0, ConfigDict()
        stages[last].parts.update({name: f"../{name}" for name in starts})
    evaluation = {"evaluate": f"../{last}", "splits": ("validation", "train"), "count": 64, "batch": 16, "seed": 0}
    recipe = ConfigDict({"steps": config_lib.load(ENTRIES).steps, "order": (*stages, "evaluation")})
    recipe.stages = ConfigDict({**stages, "evaluation": evaluation})
    for name in starts:
        recipe.stages[name].steps = recipe.get_ref("steps")
    config_lib.override(recipe, rest)
    config_lib.check(recipe)
    for name, start in starts.items():
        _check(start, recipe.stages[name], path)
    return recipe.lock()


def _trainable(place: Path) -> bool:
    family = find(reading.read_config(place).family)
    return any(contract.ROLES[role].trained for role in contract.roles(family))


def _shown(place: Path) -> str:
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def _check_workdir(workdir: Path, start: Path) -> None:
    """Raises UserError for the folder of a run that was started from another one, which still exists."""
    if (workdir / "config.json").is_file():
        before = reading.read_config(workdir).get("init_from", {}).get("all")
        if before != str(start) and (before is None or Path(before).is_dir()):
            was = f"started from {before}" if before else "not started by --from"
            raise UserError(f"--workdir {workdir} has a run that was {was}, not from {start}: give a new folder")


# ---------------------------------------------------------------- the config of a stage


def stage(start: Start, among: Sequence[Start], path: str | None = None, source: str | None = None) -> ConfigDict:
    """The config that fine-tunes a run, before overrides. among: the runs that are trained on the same data, of which
    some may read captions or classes; path: a folder of images; source: another kind of data."""
    config, run = config_lib.load(ENTRIES).copy_and_resolve_references(), start.config
    with config.unlocked(), config.ignore_type():
        config.family, config.model = run.family, ConfigDict(run.model)
        config.parts = ConfigDict({name: str(place) for name, place in places(run, start.folder).items()})
        config.init_from = ConfigDict({"all": str(start.folder)})
        config.sample.options = ConfigDict(run.sample.options)
        for name in KEPT if "optim" in run else ():
            config[name] = run.get(name, config[name])
        if "optim" in run:
            warmup = config.optim.warmup
            config.optim, config.ema = ConfigDict(config.optim.to_dict() | run.optim.to_dict()), ConfigDict(run.ema)
            config.optim.warmup = warmup
            for group in (config.optim, *config.optim.groups.values()):
                if "lr" in group:
                    group.lr = float(f"{group.lr / SLOWER:.12g}")
        config.data = _data(start, among, config.data, path, source)
    return config


def _data(start: Start, among: Sequence[Start], base: ConfigDict, path: str | None, source: str | None) -> ConfigDict:
    """The `data` of a stage: that of the run, or a folder of images, or another source without options yet."""
    old = start.config.data
    kept = {name: old[name] for name in old if name not in ("shapes", "class_names")}  # these are found anew
    data = ConfigDict(base.to_dict() | kept)
    if start.text is None and not start.assembled:
        data.text = None  # an image tokenizer has one of the captions that it was trained with, and does not read them
    if path is None and source is None and "optim" not in start.config:
        raise UserError(f"--from {_shown(start.folder)}: imported weights have no data: give --config.path=FOLDER")
    if path is not None or source is not None:
        data.source, data.options = source or "folder", ConfigDict()
    if path is not None:
        data.options.path = path
        if not any(one.text for one in among):
            data.options.text_key = None
    if data.source == "folder" and (names := next(filter(None, (one.names for one in among)), ())):
        data.options.class_names = names
    return data


def _checked(settings: Sequence[str], path: str) -> tuple[str | None, list[str]]:
    """(the value of the setting `path`, the other settings). Raises UserError for one that changes the model."""
    folder, rest = None, []
    for setting in settings:
        key, _, value = setting.partition("=")
        words = key.split(".")
        inner = ".".join(words[2:] if words[0] == "stages" else words)
        if kept := next((name for name in FIXED if f"{inner}.".startswith(f"{name}.")), None):
            raise UserError(
                f"--config.{key}: --from {path} keeps {kept} of that run, whose weights fit nothing else; to change it "
                f"train from a config (--config FILE)"
            )
        if key == "path":
            if not Path(value).is_dir():
                raise UserError(f"--config.path: no folder of images at {value!r}")
            folder = value
        else:
            rest.append(setting)
    if folder is not None and _source_given(rest):
        raise UserError(
            "--config.path is a folder of images, and --config.data.source another source: give one of them"
        )
    return folder, rest


def _source_given(settings: Sequence[str]) -> str | None:
    found = [setting.partition("=")[2] for setting in settings if setting.startswith("data.source=")]
    return found[-1] if found else None


# ---------------------------------------------------------------- what the model knows of the data


def _check(start: Start, config: Any, path: str) -> None:
    """Raises UserError for data without captions or classes that a model needs, and prints what it does not know."""
    source = sources.build(config.data, "train")
    record = record_reading.read(source, 0)[0]
    if not {"tokens", "latent"} & set(record):  # cached ones need no part that makes them
        parts = {name: _without_arrays(place) for name, place in places(start.config, start.folder).items()}
        try:
            fitting.check_drawable(start.family, start.model, parts)
        except UserError as error:
            raise UserError(
                f"--from {path}: {error}; of imported weights give it to hybridgen convert --part"
            ) from None
    where = config.data.options.get("path") or f"data.source {config.data.source!r}"
    if start.text is not None:
        if not text_lib.captioned(source):
            raise UserError(f"--from {path} reads captions, but {where} has none (see Layouts in docs/data.md)")
        for line in unread(start.text, source):
            print(line, flush=True)
    if start.classes:
        print(_classes(start, source, record, path, where), flush=True)


def _without_arrays(folder: Path) -> Part:
    config = reading.read_config(folder)
    return Part({}, {}, config.family, reading.model_of(config, folder))


def _classes(start: Start, source: Any, record: dict, path: str, where: str) -> str:
    """A line with the classes of the data. Raises UserError if they are not those of the run."""
    names = list(getattr(source, "class_names", ()))
    if not names and "label" not in record:
        hint = "a folder for each class, or data.options.label_key"
        raise UserError(f"--from {path} takes {start.classes} classes, but {where} has no classes: give it {hint}")
    if len(names) > start.classes:
        raise UserError(f"--from {path} takes {start.classes} classes, but {where} has {len(names)}")
    for number, (name, was) in enumerate(zip(names, start.names, strict=False)):
        if name not in (was, number):
            raise UserError(f"class {number} is {name!r} in {where}, but was {was!r} in --from {path}")
    first = (f"{number} {name}" if name != number else str(name) for number, name in enumerate(names[:SHOWN]))
    return f"classes: {', '.join(first)}{' ...' if len(names) > SHOWN else ''} (the run has {start.classes})"


def unread(text: Any, source: Any) -> list[str]:
    """Lines on the captions of `source` that a text tokenizer cannot read in full: unknown words, too many tokens.

    Raises UserError if it knows no word of any caption.
    """
    known, long = set(getattr(text, "words", ())), 0
    if not known:  # it reads any text
        return []
    captions = list(source.captions()) if hasattr(source, "captions") else text_lib.words_of(source)
    words: collections.Counter = collections.Counter()
    for caption in captions:
        found = text_lib.split(caption)
        words.update(found)
        long += len(found) > text.length
    unknown = [(word, count) for word, count in words.most_common() if word not in known]
    lines = []
    if unknown:
        named = ", ".join(f"{word[:40]!r} {count} times" for word, count in unknown[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        line = f"captions: the run does not know {len(unknown)} of {len(words)} words: {named}{more}"
        if len(unknown) == len(words):
            raise UserError(f"{line}: to learn other words train from a config (--config FILE)")
        lines.append(f"{line}; all of them are read as the same unknown word")
    if long:
        lines.append(f"captions: {long} of {len(captions)} have more than {text.length} tokens: their ends are cut off")
    return lines
