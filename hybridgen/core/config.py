"""Configs: load `file.py:variant,key=value`, override `--config.a.b=value`, resolve "auto", compare.

A config is plain data (an `ml_collections.ConfigDict` from `get_config(arg)`): strings name components, and lists are
tuples. An unknown key or a value of the wrong type raises UserError, which names the nearest known key. Users may add
keys to four groups: `parts.NAME=RUN`, `init_from.SUBTREE=RUN[:SUBTREE]`, `optim.groups.NAME.OPTION=VALUE` and
`data.options.NAME=VALUE`, which the data source checks (in a recipe: for all stages with the first stage's source).

A value is a Python literal or one of the words true, false, none. An option of type str takes the text as written, so
`model.quantizer.kind=none` sets the string "none". A string option of a data source (`data.options.NAME`, or an entry
that stages share as one) may also be None or a tuple of strings: `text_key=none` reads a folder without captions.

Setting an entry that stages share (a recipe's `path`) changes it in all of them; setting it under one stage changes it
there only.
"""

import argparse
import ast
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from hybridgen.core import entries, importing, ranges
from hybridgen.core.errors import UserError

AUTO = "auto"
FILLED = ("resolution", "classes", "text_vocab", "text_length", "vocab", "grid", "plan_width")  # may be "auto"

MOST = ranges.MOST
SHAPES = (  # what to do instead, for a resolution with two sides
    ": it is the side of a square; for other shapes make a table of aspect-ratio buckets with "
    "python -m hybridgen.data.prepare.buckets and give it as data.options.buckets"
)
MAX_FILE, MAX_LEVELS = 2**24, 16  # bytes and nesting of a config that is read back

PATTERN = re.compile(r"optim\.decay_on|optim\.groups\.[^.]+\.(match|decay_on)|ema\.skip")
STAGE = r"(?:stages\.[^.]+\.)?"
OPEN = re.compile(rf"({STAGE}parts)\.([^.]+)|({STAGE}init_from)\.(.+)")
GROUP = re.compile(rf"({STAGE}optim)\.groups\.([^.]+)\.([^.]+)")
MEMBER = r"(?:sources\.[^.]+\.options\.)?"  # of a mixture
SOURCE_OPTION = re.compile(rf"({STAGE}data\.options)\.({MEMBER}[^.]+)")


def add_argument(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """Adds `--config` to a command."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:VARIANT[,KEY=VALUE...]]",
        help="config file with an optional variant, such as configs/ar/raster.py:tiny; --config.a.b=VALUE overrides an "
        "entry; VALUE is a number, true, false, none, a tuple or unquoted text",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses known arguments. All others must be `--config.a.b=value` and are returned as a list of "a.b=value"."""
    args, rest = parser.parse_known_args(argv)
    overrides = []
    for item in rest:
        if item.startswith("--config.") and "=" not in item:
            parser.error(f"{item} needs a value: {item}=VALUE")
        if not item.startswith("--config."):
            known = [option for action in parser._actions for option in action.option_strings]
            parser.error(f"unknown argument {item!r}{hint(item.split('=')[0], known)}")
        overrides.append(item.removeprefix("--config."))
    return args, overrides


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that `spec` names, with overrides ("optim.lr=3e-4") applied and locked."""
    path, _, arg = spec.partition(":")
    file = importing.find_config(path)
    if file is None:
        known = [str(p) for p in Path("configs").rglob("*.py")]
        raise UserError(f"no config file {path!r}{hint(path, known)}")
    if file.suffix != ".py":
        raise UserError(f"{path} is not a config: a config is a Python file such as configs/ar/raster.py")
    module = importing.execute(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is not a config: it has no get_config(variant)")
    variant, settings = split_arg(arg)
    try:
        config = module.get_config(variant)
    except ValueError as error:  # configs import nothing of ours, so they cannot raise UserError
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: {importing.described(error)}") from error
    override(config, [*settings, *overrides])
    check(config)
    return config.lock()


def check(config: Mapping) -> None:
    """Raises UserError for a value that is out of range, in a stage's config or in any stage of a recipe."""
    for stage, prefix in [(config, ""), *((s, f"stages.{name}.") for name, s in config.get("stages", {}).items())]:
        for key, value in flatten(stage).items():
            _check_value(f"config key '{prefix}{key}'", key, value)


def _check_value(where: str, key: str, value: Any) -> None:
    if key == "data.resolution" and isinstance(value, tuple):
        raise UserError(f"{where} takes int, not {value!r}{SHAPES}")
    if known := _range_of(key):
        if value == () and known.least:
            raise UserError(f"{where} is empty: give at least one number")
        if value != AUTO and (fault := known.wrong(value)):
            near = hint(value, known.words) if known.words and isinstance(value, str) else ""
            raise UserError(f"{where} {fault}{near}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and abs(number) > MOST:
            raise UserError(f"{where} {number} is not within {-MOST} and {MOST}")
    if key.startswith("sample.options.") and value is None:
        raise UserError(f"{where} is none: a sampling option needs a value")
    if key == "trainable":
        for rule in value if isinstance(value, tuple) else (value,):
            if not (isinstance(rule, tuple | list) and [type(part) for part in rule] == [str, bool]):
                raise UserError(f"{where} takes pairs, such as (('^text/', False),), not {value!r}")
            _check_pattern(where, rule[0])
    elif PATTERN.fullmatch(key):
        _check_pattern(where, value)


def _range_of(key: str) -> ranges.Range | None:
    """The range of an entry of a stage, if it has one."""
    name = key.rpartition(".")[2]
    if key.startswith("model."):
        return entries.MODEL.get(name)
    return entries.OPTIM.get(name) if key.startswith("optim.groups.") else entries.STAGE.get(key)


def _check_pattern(where: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, TypeError) as error:
        raise UserError(f"{where} {text!r} is not a regular expression: {error}") from None


def split_arg(arg: str) -> tuple[str, list[str]]:
    """ "tiny,resolution=64" -> ("tiny", ["resolution=64"]); commas inside brackets belong to the value."""
    parts, depth = [""], 0
    for letter in arg:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part for part in parts if part]
    variant = parts.pop(0) if parts and "=" not in parts[0] else ""
    return variant, parts


def override(config: ConfigDict, settings: Sequence[str]) -> None:
    """Sets "a.b=value" entries in place. Raises UserError for an unknown key or a value of another type."""
    for setting in settings:
        key, _, text = setting.partition("=")
        known = flatten(config, nodes=True)
        if key not in known:
            _add(config, known, key, text)
            continue
        old = known[key]
        if isinstance(old, Mapping):
            raise UserError(f"config key {key!r} is a group; set one of {', '.join(f'{key}.{k}' for k in old)}")
        references = _references(config)
        same = [other for other, reference in references.items() if reference is references.get(key)]
        node, last = _node(config, key)
        with node.unlocked(), node.ignore_type():
            if any(other.count(".") <= key.count(".") for other in same if other != key):
                del node[last]  # unshares the entry; only the topmost key of those that share it changes them all
            source_option = any(SOURCE_OPTION.fullmatch(other) for other in (key, *same))
            node[last] = _convert(key, text, old, source_option)


def _add(config: ConfigDict, known: Mapping, key: str, text: str) -> None:
    """Adds an entry to a group that accepts new keys (see the head). Raises UserError for any other key."""
    if match := OPEN.fullmatch(key):
        group, name = filter(None, match.groups())
        if group in known:
            node, _ = _node(config, f"{group}.")
            with node.unlocked():
                node[name.replace(".", "/")] = text  # a path in the parameters
            return
    elif match := SOURCE_OPTION.fullmatch(key):
        if groups := _option_groups(config, known, *match.groups()):
            for group in groups:
                node, name = _node(config, f"{group}.{match[2]}")
                with node.unlocked(), node.ignore_type():
                    node[name] = _convert(key, text, None)
            return
    elif match := GROUP.fullmatch(key):
        optim, name, option = match.groups()
        options = known.get(optim, {})
        if option in options and option != "groups" or option == "match":
            node, _ = _node(config, f"{optim}.groups.")
            with node.unlocked():
                node[name] = node.get(name, ConfigDict())
            with node[name].unlocked():
                node[name][option] = _convert(key, text, options.get(option, ""))
            return
        known = [f"{optim}.groups.{name}.{option}" for option in ("match", *options)]
    raise UserError(f"unknown config key {key!r}{hint(key, known)}")


def _option_groups(config: ConfigDict, known: Mapping, group: str, name: str) -> list[str]:
    """The option groups that a new source option is added to: the key's own, or the stages' for a recipe's `data`."""
    stages = [f"stages.{stage}.data" for stage in config.get("order", ()) if f"stages.{stage}.data.source" in known]
    several = "data" not in config and group == "data.options"
    datas = [data for data in stages if known[f"{data}.source"] == known[f"{stages[0]}.source"]] if several else []
    inside = f".{name}".rpartition(".")[0]
    groups = [f"{data}.options" for data in datas] if several else [group]
    return [group for group in groups if f"{group}{inside}" in known]


def _node(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that contains a key, and the key's last component."""
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    return config, last


def _references(config: ConfigDict, prefix: str = "") -> dict[str, FieldReference]:
    """{key: reference} of the shared entries; entries that share a value have the same reference object."""
    found = {}
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            found |= _references(value, f"{prefix}{name}.")
        elif isinstance(value, FieldReference):
            found[f"{prefix}{name}"] = value
    return found


def _convert(key: str, text: str, old: Any, source_option: bool = False) -> Any:
    """`text` as a value of the type of `old`; any type if that is None or "auto"."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(old, str) and old != AUTO:
        several = isinstance(value, tuple | list) and all(isinstance(one, str) for one in value)
        free = source_option and (value is None or isinstance(value, str) or several)
        return _typed(key, value, None) if free else text
    return _typed(key, value, old)


def _typed(key: str, value: Any, old: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    *groups, name = key.split(".")
    if value == AUTO and name in FILLED and "model" in groups:
        return value
    if old is None or old == AUTO:
        return value
    if isinstance(old, tuple):
        values = value if isinstance(value, tuple) else (value,)
        alike = len({type(one) for one in old}) == 1  # False for a pair of a pattern and a bool
        return tuple(_typed(key, one, old[0]) for one in values) if alike else values
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(old):
        sides = isinstance(value, tuple) or (isinstance(value, str) and re.fullmatch(r"\d+[x×*,: ]\d+", value))
        says = SHAPES if name == "resolution" and sides else ""
        raise UserError(f"config key {key!r} takes {type(old).__name__}, such as {old!r}, not {value!r}{says}")
    return value


def flatten(config: Mapping, prefix: str = "", nodes: bool = False) -> dict[str, Any]:
    """{"optim.lr": 3e-4, ...}; with `nodes` also the groups themselves."""
    flat = {}
    for name in config:
        value, path = config[name], f"{prefix}{name}"
        if isinstance(value, Mapping | ConfigDict):
            if nodes or not len(value):
                flat[path] = dict(value)
            flat |= flatten(value, f"{path}.", nodes)
        else:
            flat[path] = value
    return flat


def hint(word: str, known: Any) -> str:
    """ "; did you mean 'x'?" or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def resolve(model: Mapping, context: Mapping[str, Any]) -> dict[str, Any]:
    """Model options with every "auto" replaced by the entry of that name in `context`, which data and parts provide.

    Raises UserError for an "auto" whose name is not in `context`.
    """
    out = {}
    for name, value in model.items():
        if isinstance(value, Mapping | ConfigDict):
            value = resolve(value, context)
        elif isinstance(value, str) and value == AUTO:
            if name not in context:
                raise UserError(f"model.{name} is 'auto', but neither data nor parts provide it: set a value")
            value = context[name]
        out[name] = tuple(value) if isinstance(value, list) else value
    return out


def plain(config: Any) -> Any:
    """Nested dicts and lists of JSON values."""
    if isinstance(config, Mapping | ConfigDict):
        return {str(name): plain(config[name]) for name in config}
    if isinstance(config, tuple | list):
        return [plain(value) for value in config]
    return config


def from_plain(data: Any, levels: int = MAX_LEVELS) -> Any:
    """Inverse of `plain`: dicts become ConfigDicts, lists tuples. ValueError if nested in more than `levels` levels."""
    if not levels:
        raise ValueError(f"nested in more than {MAX_LEVELS} levels")
    if isinstance(data, dict):
        config = ConfigDict(convert_dict=False)
        for name, value in data.items():
            config[name] = from_plain(value, levels - 1)
        return config
    return tuple(from_plain(value, levels - 1) for value in data) if isinstance(data, list) else data


def read(path: Path) -> ConfigDict:
    """The config that a run wrote. Raises UserError if the file is missing or damaged or has values out of range."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise ValueError(f"it has {size} bytes, at most {MAX_FILE} are allowed")
            config = from_plain(json.loads(file.read(size))).lock()
        check(config)
        return config
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        text = str(error)[:300]
        raise UserError(f"{path} is not the config of a run: {text if text.isprintable() else ascii(text)}") from None
