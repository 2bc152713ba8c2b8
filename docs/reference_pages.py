"""A hook of MkDocs: the API reference, one page for each public module of the package, made from its docstrings.

The pages exist during the build only. A module that moves takes its page with it; a page for a module that does not
exist, or a reference to one, fails the build.
"""

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[1] / "hybridgen"
TITLE = "API reference"


def submodules(folder: Path) -> dict[str, Path]:
    """{name: file or folder} of the public modules and packages of a package."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith("_")]
    return {path.stem: path for path in paths if path.suffix == ".py" or (path / "__init__.py").is_file()}


def dotted(path: Path) -> str:
    """hybridgen/nn/norm.py -> "hybridgen.nn.norm"."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def page(path: Path) -> str:
    """The address of a module's page in the documentation."""
    address = "reference/" + dotted(path).replace(".", "/")
    return f"{address}/index.md" if path.is_dir() else f"{address}.md"


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    file = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def content(path: Path) -> str:
    """The text of a page: what mkdocstrings makes of the docstrings and, of a package, a table of its modules."""
    text = f"::: {dotted(path)}\n"
    if path.is_dir():
        rows = [f"| [{name}][{dotted(each)}] | {summary(each)} |\n" for name, each in submodules(path).items()]
        text += "\n## Modules\n\n| module | |\n| --- | --- |\n" + "".join(rows)
    return text


def navigation(folder: Path) -> list[Any]:
    """The entries of a package: its own page, then its modules."""
    entries: list[Any] = [page(folder)]
    for name, path in submodules(folder).items():
        entries.append({name: navigation(path) if path.is_dir() else page(path)})
    return entries


def pages(folder: Path) -> list[Path]:
    """A package and everything below it."""
    found = [folder]
    for path in submodules(folder).values():
        found += pages(path) if path.is_dir() else [path]
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference to the navigation."""
    config.nav = [*config.nav, {TITLE: navigation(PACKAGE)}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for path in pages(PACKAGE):
        files.append(File.generated(config, page(path), content=content(path)))
    return files
