"""Checks the allowed imports between packages, by the syntax tree of every file.

`core` <- `nn`, `sampling`, `data`, `weights` <- `models` <- `runs` <- `training`, `reports`, `cost`, `replays` <- the
commands. Data and weights never see a model; evals are functions on arrays; only hybrid and unified models know other
families. There are no import cycles, also none through imports inside functions.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("hybridgen", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]

SHARED = ("core", "nn", "sampling", "models.contract", "models.losses", "models.roles", "models.text")
BELOW = ("core", "nn", "sampling", "data", "weights", "evals", "models")

# module -> what it may import of ours besides its own folder; the longest matching entry counts, the rest is free
ALLOWED = {
    "core": (),
    "nn": ("core",),
    "sampling": ("core.errors",),
    "data": ("core.errors", "core.importing"),
    "data.prepare": ("core", "data", "cli"),  # commands
    "evals": ("core.errors", "data.sources"),
    "weights": ("core",),
    "weights.tables": ("core.errors", "weights"),
    "models": SHARED,
    "models.contract": ("core", "models.checks"),
    "models.checks": ("core",),
    "models.losses": ("core",),
    "models.roles": SHARED,
    "models.roles.denoiser": (*SHARED, "models.diffusion.process", "models.diffusion.variance"),  # no family
    "models.hybrid": (*SHARED, "models"),
    "models.unified": (*SHARED, "models"),
    "runs": BELOW,
    "training": (*BELOW, "runs"),
    "reports": (*BELOW, "runs"),
    "cost": (*BELOW, "runs", "training", "train"),  # what is compiled is the step that trains
    "replays": (*BELOW, "runs"),
    "cli": ("core", "__version__"),
    "launch": ("core.errors", "core.config", "cli"),
}


def module_of(path: Path) -> str:
    """hybridgen/nn/norm.py -> "hybridgen.nn.norm"; a package's __init__ is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """All dotted names that a file imports; for `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def layer(module: str) -> str | None:
    """The entry of `ALLOWED` for a module."""
    return max((entry for entry in ALLOWED if within(module, entry)), key=len, default=None)


def faults(module: str, names: list[str]) -> list[str]:
    """The imports of a hybridgen or configs module that the design forbids."""
    top = module.partition(".")[0]
    ours = [name.removeprefix("hybridgen.") for name in names if within(name, "hybridgen")]
    if top == "configs":
        return [name for name in names if not within(name, "configs", "ml_collections")]
    inner = module.removeprefix("hybridgen.")
    bad = [name for name in names if within(name, "configs", "tests", "tensorflow", "clu")]
    if not within(inner, "nn", "models"):
        bad += [name for name in names if within(name, "flax")]
    if not within(inner, "weights"):
        bad += [name for name in names if within(name, "torch")]
    entry = layer(inner)
    if entry is not None:
        folder = inner if (ROOT / "hybridgen" / Path(*inner.split("."))).is_dir() else inner.rpartition(".")[0]
        # a file of a family's folder may import its neighbours, and any other file its whole package
        top = inner.partition(".")[0]
        own = [folder] if top == "models" and folder != "models" else [top] if top != "models" and folder else []
        bad += [f"hybridgen.{name}" for name in ours if not within(name, *ALLOWED[entry], *own)]
    return bad


def imported() -> dict[Path, list[str]]:
    return {path: list(imports(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}


def test_imports_follow_the_design():
    found = {module_of(path): faults(module_of(path), names) for path, names in imported().items()}
    assert len(FILES) > 50 and not {module: names for module, names in found.items() if names}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The import cycles: groups of modules that import each other, directly or indirectly (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def modules_of(names: list[str], known: set[str]) -> set[str]:
    """The modules that imported names are, or are in."""
    heads = (name if name in known else name.rpartition(".")[0] for name in names if within(name, "hybridgen"))
    return {head for head in heads if head in known and head != "hybridgen"}


def test_no_module_imports_itself_by_way_of_others():
    found = {module_of(path): names for path, names in imported().items() if path.is_relative_to(ROOT / "hybridgen")}
    assert not circles({module: modules_of(names, set(found)) for module, names in found.items()})


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}
    assert circles(graph) == [["b", "c"], ["d"]]


def test_what_is_imported_is_declared():
    """Every imported package is a direct dependency in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=]", item)[0].lower().replace("-", "_") for item in project["dependencies"]}
    called = {"PIL": "pillow", "absl": "absl_py", "orbax": "orbax_checkpoint", "tensorboardX": "tensorboardx"}
    optional = {"tensorflow_datasets", "torch", "libtpu"}  # extras, imported where they are used
    roots = {name.partition(".")[0] for names in imported().values() for name in names}
    roots -= {"hybridgen", "configs", *sys.stdlib_module_names}
    assert {called.get(root, root) for root in roots} - optional <= declared


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("hybridgen.sampling.decode", "hybridgen.models.ar.raster"),
        ("hybridgen.sampling.decode", "hybridgen.core.rng"),
        ("hybridgen.core.trees", "hybridgen.nn.norm"),
        ("hybridgen.runs.experiment", "hybridgen.training.state"),
        ("hybridgen.training.resume", "hybridgen.train"),
        ("hybridgen.data.text", "hybridgen.models.contract.find"),
        ("hybridgen.weights.llamagen", "hybridgen.models.ar.raster"),
        ("hybridgen.weights.tables.taming_vqgan", "hybridgen.runs.importing"),
        ("hybridgen.models.ar.raster", "hybridgen.models.diffusion.dit.DiT"),
        ("hybridgen.models.roles.denoiser", "hybridgen.models.diffusion.dit.DiT"),
        ("hybridgen.models.ar.raster", "hybridgen.train"),
        ("hybridgen.models.ar.raster", "hybridgen.data.sources.shapes"),
        ("hybridgen.nn.norm", "hybridgen.models.losses"),
        ("hybridgen.evals.recon", "hybridgen.nn.conv"),
        ("hybridgen.train", "flax.linen.Module"),
        ("hybridgen.train", "configs.common"),
        ("hybridgen.train", "torch"),
        ("hybridgen.launch", "hybridgen.train"),
        ("configs.ar.raster", "hybridgen.core.errors"),
        ("configs.ar.raster", "jax"),
    ],
)
def test_a_forbidden_import_is_found(module, name):
    assert faults(module, [name]) == [name]


def test_allowed_imports_pass():
    for module, name in (
        ("hybridgen.models.hybrid.cascade", "hybridgen.models.ar.raster"),
        ("hybridgen.models.diffusion.dit", "hybridgen.models.diffusion.process"),
        ("hybridgen.models.roles.denoiser", "hybridgen.models.diffusion.process.Process"),
        ("hybridgen.models.diffusion.dit", "hybridgen.models.text.transformer.TextTower"),
        ("hybridgen.sampling.decode", "hybridgen.sampling.tokens"),
        ("hybridgen.evals.alignment", "hybridgen.data.sources.shapes.PALETTE"),
        ("hybridgen.train", "hybridgen.models.contract.find"),
        ("configs.hybrid.cascade", "configs.ar.raster"),
    ):
        assert not faults(module, [name]), (module, name)
