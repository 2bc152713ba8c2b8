"""Limits that keep the code small as systems are added: fields per module, top-level files, private words, guesses."""

import ast
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import pytest

import hybridgen
from hybridgen import models, replays
from hybridgen import nn as layers
from hybridgen.models import contract
from hybridgen.runs import upgrades
from hybridgen.weights import tables

ROOT = Path(__file__).parents[2]
FIELDS, TOP_FILES = 20, 12
BANNED = {"told", "asked", "held", "apart", "said", "judged", "spread", "play", "wait"}


def modules_in(package) -> list:
    """Every module of a package, imported."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(module.name) for module in found]


def fields_of(kind: type) -> list[str]:
    """The hyper-parameters of a Flax module or of a frozen dataclass."""
    return [field.name for field in dataclasses.fields(kind) if field.name not in ("parent", "name")]


def test_no_module_has_many_fields():
    """A module that needs more options should be two modules."""
    kinds = {
        kind
        for module in (*modules_in(models), *modules_in(layers))
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and dataclasses.is_dataclass(kind)
    }
    assert len([kind for kind in kinds if issubclass(kind, nn.Module)]) > 30
    many = {
        f"{kind.__module__}.{kind.__name__}": len(fields_of(kind)) for kind in kinds if len(fields_of(kind)) > FIELDS
    }
    assert not many


def test_few_files_at_the_top():
    files = {path.stem for path in (ROOT / "hybridgen").glob("*.py")} - {"__init__", "__main__", "api", "cli"}
    assert len(files) <= TOP_FILES, sorted(files)


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every identifier that a file defines: functions, classes, parameters, variables."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str()):
                yield node.lineno, node.asname
            case ast.keyword(arg=str()):
                yield node.value.lineno, node.arg


def banned(text: str) -> list[tuple[int, str]]:
    """The private words among a file's identifiers."""
    return [(line, name) for line, name in bound(ast.parse(text)) if name.strip("_").lower() in BANNED]


def test_names_are_the_fields_own():
    found = []
    for path in (*ROOT.glob("hybridgen/**/*.py"), *ROOT.glob("configs/**/*.py"), *ROOT.glob("tests/**/*.py")):
        found += [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in banned(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("text", ["told = 1", "def _asked(): 0", "def f(held): 0", "f(apart=1)", "import x as play"])
def test_a_private_word_is_found(text):
    assert len(banned(text)) == 1


GUESSES = re.compile(r"(hasattr|getattr)\((\w+\.)*(family\b|find\()|family\)?\.(startswith|partition|split)\(")


def test_what_a_family_can_do_is_declared():
    """Only the contract module checks whether a family has a function, or reads its name."""
    found = []
    for path in ROOT.glob("hybridgen/**/*.py"):
        if path.name == "contract.py" or path.parent.name == "upgrades":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number} {line.strip()}"] if GUESSES.search(line) else []
    assert not found
    assert GUESSES.search('hasattr(find(part.family), "embed")') and GUESSES.search('config.family.partition(".")')


def families() -> list[str]:
    """Every family of the package, by its dotted name."""
    return [contract.named(module) for module in modules_in(models) if hasattr(module, "build")]


@pytest.mark.parametrize("family", families())
def test_every_family_keeps_the_contract(family):
    assert contract.faults(contract.find(family)) == []


def test_a_broken_family_is_found():
    module = importlib.import_module("hybridgen.models.ar.raster")
    broken = type(module)("broken")
    assert "declares no ROLE" in contract.faults(broken)[0]
    vars(broken).update({**vars(module), "ROLE": "poet"})
    assert "'poet' is not one of" in contract.faults(broken)[0]
    vars(broken).update({**vars(module), "sample": None})
    assert "it has no function sample(model, params, cond, keys" in contract.faults(broken)[0]
    vars(broken).update({**vars(module), "score": lambda model, tokens: 0})
    assert (
        "score has the parameters (model, tokens), but needs (model, params, extra, tokens, cond)"
        in contract.faults(broken)[0]
    )
    vars(broken).update({**vars(module), "build": lambda config, size: 0})
    assert "of which 'size' needs a default" in contract.faults(broken)[0]
    vars(broken).update({**vars(module), "OPTIONS": {"prior": {"temperature": 1.0}}})
    assert "OPTIONS" in contract.faults(broken)[0]


# ---------------------------------------------------------------- one system, one name


def family_of(source: str) -> str:
    """The family that a table of official weights makes."""
    return importlib.import_module(f"hybridgen.weights.tables.{source}").FAMILY


@pytest.mark.parametrize("source", tables.names())
def test_official_weights_have_a_family_a_replay_and_a_recording(source):
    family = family_of(source)
    assert contract.faults(contract.find(family)) == []
    if "features" in contract.roles(contract.find(family)):
        return  # networks that measure: their recordings are those of the measures
    assert source in replays.names()
    recorded = [*ROOT.glob(f"tests/golden/{source}*"), *ROOT.glob(f"../shared/golden/{source}")]
    assert recorded or source in LARGE, f"no recording of {source}"


# their smallest recordings are too large to keep here
LARGE = ("taming_vqgan", "mar_kl16")


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_config_or_is_a_frozen_part(family):
    module = contract.find(family)
    trained = any(contract.ROLES[role].trained for role in contract.roles(module))
    if trained:
        assert (ROOT / "configs" / Path(*family.split("."))).with_suffix(".py").is_file()


def test_old_names_of_families_are_known():
    """Every upgrade converts a former family to an existing one."""
    for module in pkgutil.iter_modules(upgrades.__path__):
        found = importlib.import_module(f"{upgrades.__name__}.{module.name}")
        assert callable(found.upgrade)
    assert hybridgen.__doc__
