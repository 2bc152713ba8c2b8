"""Configs: load `file.py:variant,key=value`, override `--config.a.b=value`, resolve "auto", compare.

A config is plain data (an `ml_collections.ConfigDict` from `get_config(arg)`): strings name things, tuples hold lists.
Unknown keys and values of another type are refused with the nearest known key.
"""

import argparse
import ast
import difflib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hybridgen.errors import UserError

AUTO = "auto"

# the least value of an entry of a stage; the most is what fits a seed
LEAST = {
    "seed": 0,
    "batch": 1,
    "accumulate": 1,
    "steps": 0,
    "data.resolution": 1,
    "data.workers": 0,
    "data.threads": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.every": 1,
    "eval.every": 0,
    "eval.batches": 1,
    "sample.every": 0,
    "sample.count": 1,
    "profile.start": 0,
    "profile.steps": 0,
}
MOST = 2**32 - 1


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` to a command."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT[,KEY=VALUE...]]",
        help="a file in configs/, such as configs/ar/raster.py:tiny; --config.a.b=VALUE overrides an entry",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses known arguments; what is left must be `--config.a.b=value`, returned as a list of "a.b=value"."""
    args, rest = parser.parse_known_args(argv)
    overrides = []
    for item in rest:
        if item.startswith("--config.") and "=" not in item:
            parser.error(f"{item} has no value: {item}=VALUE")
        if not item.startswith("--config."):
            known = [option for action in parser._actions for option in action.option_strings]
            parser.error(f"unknown argument {item!r}{hint(item.split('=')[0], known)}")
        overrides.append(item.removeprefix("--config."))
    return args, overrides


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that `spec` names, with overrides ("optim.lr=3e-4") applied and locked."""
    path, _, arg = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no config file {path!r}{hint(path, [str(p) for p in Path('configs').rglob('*.py')])}")
    root = str(next((p.parent for p in file.resolve().parents if p.name == "configs"), file.resolve().parent))
    if root not in sys.path:
        sys.path.insert(0, root)  # configs import each other as `configs.x`
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is not a config: it has no get_config(variant)")
    variant, settings = split_arg(arg)
    try:
        config = module.get_config(variant)
    except ValueError as error:  # configs import nothing of ours, so they cannot raise UserError
        raise UserError(f"{path}: {error}") from None
    override(config, [*settings, *overrides])
    check_numbers(config)
    return config.lock()


def check_numbers(config: Mapping) -> None:
    """Raises UserError for a number of a stage, or of a stage of a recipe, that is out of range."""
    for stage, prefix in [(config, ""), *((s, f"stages.{name}.") for name, s in config.get("stages", {}).items())]:
        for key, value in flatten(stage).items():
            if key in LEAST and isinstance(value, int) and not LEAST[key] <= value <= MOST:
                raise UserError(f"config key '{prefix}{key}' {value} is not within {LEAST[key]} and {MOST}")


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
            raise UserError(f"unknown config key {key!r}{hint(key, known)}")
        old = known[key]
        if isinstance(old, Mapping):
            raise UserError(f"config key {key!r} is a group; set one of {', '.join(f'{key}.{k}' for k in old)}")
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[name]
        with node.unlocked(), node.ignore_type():
            node[last] = _convert(key, text, old)


def _convert(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`; where that is None or "auto" it is free."""
    if isinstance(old, str) and old != AUTO:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return _typed(key, value, old)


def _typed(key: str, value: Any, old: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if old is None or old == AUTO:
        return value
    if isinstance(old, tuple):
        values = value if isinstance(value, tuple) else (value,)
        return tuple(_typed(key, one, old[0]) for one in values) if old else values
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(old):
        raise UserError(f"config key {key!r} takes {type(old).__name__}, such as {old!r}, and was given {value!r}")
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
    """Model options with every "auto" replaced by the entry of that name in `context` (data and parts know them)."""
    out = {}
    for name, value in model.items():
        if isinstance(value, Mapping | ConfigDict):
            value = resolve(value, context)
        elif isinstance(value, str) and value == AUTO:
            if name not in context:
                raise UserError(f"model.{name} is 'auto', and neither the data nor the parts tell it")
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


def from_plain(data: Any) -> Any:
    """Inverse of `plain`: dicts become ConfigDicts and lists tuples."""
    if isinstance(data, dict):
        config = ConfigDict(convert_dict=False)
        for name, value in data.items():
            config[name] = from_plain(value)
        return config
    return tuple(from_plain(value) for value in data) if isinstance(data, list) else data


def read(path: Path) -> ConfigDict:
    """The config that a run wrote. Raises UserError if the file is missing or damaged."""
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8"))).lock()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the config of a run: {error}") from None
