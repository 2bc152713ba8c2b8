"""Who may import whom: the layers of the design, checked over the syntax tree of every file.

`nn` <- `models` <- commands. Sampling algorithms, shardings, trees, random numbers and metrics stand alone; data and
converters never see a model; evals are functions on arrays; only hybrid and unified models know other families.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("hybridgen", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]

SHARED = ("errors", "nn", "sampling", "sharding", "rng", "models.losses", "models.parts", "models.text")
ALONE = ("errors",)

# module -> what it may import of ours besides its own folder; the longest matching entry counts, the rest is free
ALLOWED = {
    "errors": (),
    "sampling": ALONE,
    "sharding": ALONE,
    "trees": ALONE,
    "rng": ALONE,
    "metrics": ALONE,
    "profiling": ALONE,
    "cost.flops": ALONE,
    "config": ALONE,
    "optim": ("errors", "trees"),
    "state": ("errors", "optim", "rng", "sharding", "trees"),
    "rundir": ALONE,
    "manifest": ("errors", "rundir"),
    "distributed": ALONE,
    "watchdog": ("errors", "distributed"),
    "identity": ALONE,
    "checkpoint": ("errors", "distributed", "identity", "manifest", "rundir"),
    "nn": ("errors", "sharding", "rng"),
    "models": SHARED,
    "models.losses": ("errors", "rng"),
    "models.parts": ("errors",),
    "models.hybrid": (*SHARED, "models"),
    "models.unified": (*SHARED, "models"),
    "data": ALONE,
    **dict.fromkeys(("data.write", "data.bpe", "data.buckets", "data.emoji"), ("errors", "cli", "config")),  # commands
    "evals": ("errors", "data.shapes"),
    "convert": ("errors", "trees"),
    "convert.tables": ("errors", "convert"),
    "convert.__main__": ("cli", "importing"),  # the entry point alone: the command is where the models are known
    "launch": ("errors", "config", "cli"),
}


def module_of(path: Path) -> str:
    """hybridgen/nn/norm.py -> "hybridgen.nn.norm"; a package's __init__ is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports; of `from a import b` both readings, `a.b` being a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def layer(module: str) -> str | None:
    """The entry of `ALLOWED` that speaks of a module."""
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
    if not within(inner, "convert"):
        bad += [name for name in names if within(name, "torch")]
    entry = layer(inner)
    if entry is not None:
        folder = inner if (ROOT / "hybridgen" / Path(*inner.split("."))).is_dir() else inner.rpartition(".")[0]
        # a file of a family's folder may import its neighbours; `models` itself is no such folder
        own = [folder] if folder not in ("", "models") else []
        bad += [f"hybridgen.{name}" for name in ours if not within(name, *ALLOWED[entry], *own)]
    return bad


def imported() -> dict[Path, list[str]]:
    return {path: list(imports(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}


def test_imports_follow_the_design():
    found = {module_of(path): faults(module_of(path), names) for path, names in imported().items()}
    assert len(FILES) > 50 and not {module: names for module, names in found.items() if names}


def test_what_is_imported_is_declared():
    """What is imported is a dependency in pyproject.toml, not something that came along with another."""
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
        ("hybridgen.data.text", "hybridgen.models.contract.find"),
        ("hybridgen.weights.llamagen", "hybridgen.models.ar.raster"),
        ("hybridgen.weights.tables.taming_vqgan", "hybridgen.runs.importing"),
        ("hybridgen.models.ar.raster", "hybridgen.models.diffusion.dit.DiT"),
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
        ("hybridgen.models.diffusion.dit", "hybridgen.models.text.transformer.TextTower"),
        ("hybridgen.sampling.decode", "hybridgen.sampling.tokens"),
        ("hybridgen.evals.alignment", "hybridgen.data.sources.shapes.PALETTE"),
        ("hybridgen.train", "hybridgen.models.contract.find"),
        ("configs.hybrid.cascade", "configs.ar.raster"),
    ):
        assert not faults(module, [name]), (module, name)
