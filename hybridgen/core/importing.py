"""Imports what a user names: a family's module, the class of a data source, a config file, and the configs it imports.

An error in such a file becomes a UserError of one line with the file and the line that raised it.
"""

import argparse
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridgen.core.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = "configs"
LIBRARIES = (str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")

_trusted: set[str] = set()  # packages and modules outside hybridgen that a bundle may name


# ---------------------------------------------------------------- modules and classes by name


def module(name: str, what: str) -> ModuleType | None:
    """The module `name`, which may be in the current folder; None if Python finds none.

    Raises UserError, which begins with `what` (such as "family"), if the module cannot be imported.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            return None
        raise UserError(f"{what} {name!r} cannot be imported: {described(error)}") from error


def member(path: str, what: str) -> Any:
    """The class or function "package.module.Name". Raises UserError, which begins with `what`, if there is none."""
    home, _, name = path.rpartition(".")
    found = module(home, what)
    if found is None:
        raise UserError(f"{what} {path!r}: Python finds no module {home!r} (is its folder in PYTHONPATH?)")
    value = getattr(found, name, None) or module(path, what)
    if isinstance(value, ModuleType):
        raise UserError(f"{what} {path!r} is a module: name a class in it, such as '{path}.{_first_class(value)}'")
    if value is None:
        near = difflib.get_close_matches(name, vars(found), 1, 0.5)
        raise UserError(f"{what} {path!r}: {home} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return value


def _first_class(found: ModuleType) -> str:
    own = [kind for kind in vars(found).values() if inspect.isclass(kind) and kind.__module__ == found.__name__]
    return next((kind.__name__ for kind in own if not kind.__name__.startswith("_")), "MySource")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust` to a command, which imports its module as soon as it is parsed."""
    text = "import a module or package outside hybridgen, which a bundle may then name; may be given several times"
    parser.add_argument("--trust", action="append", type=_a_module, metavar="MODULE", help=text)


def _a_module(text: str) -> str:
    try:
        return trust(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def trust(name: str) -> str:
    """Imports a module or package outside hybridgen: bundles may name it and all modules in it. Returns `name`."""
    if module(name, "module") is None:
        raise UserError(f"Python finds no module {name!r} (is its folder in PYTHONPATH?)")
    _trusted.add(name)
    return name


def is_trusted(name: str) -> bool:
    """Whether a module outside hybridgen was trusted, by `trust` or by importing it."""
    return name in sys.modules or any(f"{name}.".startswith(f"{known}.") for known in _trusted)


def described(error: BaseException) -> str:
    """An error of a user's file in one line, with the user's file and line that led to it."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return text  # which ends with file and line
    kind = "" if isinstance(error, ImportError) and text else f"{type(error).__name__}: "
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{kind}{text}".removesuffix(": ") + place


def unexpected(error: TypeError, home: ModuleType, given: Any) -> tuple[str, list[str]] | None:
    """(the option of `given` that a call did not take, the options it takes), from the error of a call in `home`."""
    called, _, rest = str(error).partition("() got an unexpected keyword argument ")
    word = rest.partition("'")[2].partition("'")[0]
    function = getattr(home, called.removesuffix(".__init__").rpartition(".")[2], None)
    if not word or word not in given:
        return None
    known = inspect.signature(function).parameters if isinstance(function, Callable) else ()
    return word, [name for name in known if name not in ("self", "parent", "name")]


# ---------------------------------------------------------------- config files


def own_configs() -> Path | None:
    """The folder `configs` of hybridgen: in an installed package, or beside the package in a clone."""
    return next((folder for folder in (PACKAGE / CONFIGS, PACKAGE.parent / CONFIGS) if folder.is_dir()), None)


def find_config(path: str) -> Path | None:
    """The config file `path`; "configs/..." is also found in hybridgen's own folder, from any folder. None if none."""
    own, file = own_configs(), Path(path)
    places = [file, *([own.parent / file] if own and file.parts[:1] == (CONFIGS,) else [])]
    return next((place for place in places if place.is_file()), None)


def execute(file: Path) -> ModuleType:
    """The module of a config file, which may import `configs.x` and its neighbours. Raises UserError if it fails."""
    near = next((folder for folder in file.resolve().parents if folder.name == CONFIGS), None)
    beside, own = near.parent if near else file.resolve().parent, own_configs()
    if str(beside) not in sys.path and (own is None or near != own.resolve()):
        sys.path.insert(0, str(beside))
    _provide_configs(near or Path.cwd() / CONFIGS)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {described(error)}") from error
    return found


def _provide_configs(near: Path) -> None:
    """Makes `import configs.x` find the files of the folder `near`, if there is one, and hybridgen's own.

    A complete copy of hybridgen's folder replaces it. Raises UserError if `near` has some files of the same names.
    """
    own = own_configs()
    roots = [folder for folder in (near, own) if folder and folder.is_dir()]
    if len(roots) == 2 and near.resolve() != own.resolve():
        ours, theirs = ({file.relative_to(root) for file in root.rglob("*.py")} for root in (own, near))
        if both := sorted(map(str, ours & theirs)):
            if missing := sorted(map(str, ours - theirs)):
                raise UserError(
                    f"{near / both[0]} has the name of a config of hybridgen ({own}), but {near} has no {missing[0]}: "
                    f"rename the folder or the file, or copy the whole folder"
                )
            roots = [near]
    places = list(dict.fromkeys(str(folder.resolve()) for folder in roots))
    if list(getattr(sys.modules.get(CONFIGS), "__path__", ())) == places:
        return
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{CONFIGS}.")]:
        del sys.modules[name]  # of another folder
    spec = importlib.machinery.ModuleSpec(CONFIGS, None, is_package=True)
    spec.submodule_search_locations = places
    sys.modules[CONFIGS] = importlib.util.module_from_spec(spec)
