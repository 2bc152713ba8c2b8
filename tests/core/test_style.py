"""The code style, as far as a program can check it: sizes, docstrings, names, and no local paths."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES, FUNCTION_LINES = 400, 60
CONTRACT = ("build", "init", "loss", "sample", "merge", "main")
# spelled so that this file does not name them itself
UNFINISHED = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX"))
HOMES = "|".join(f"/{folder}/" for folder in ("ro" + "ot", "ho" + "me", "Us" + "ers", "wo" + "rk"))
HOSTS = "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "index" + "-url", "sources" + r"\.list"))


def tracked(*patterns: str) -> list[Path]:
    """The repository's files, also new ones, without what git ignores; outside a repository, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        return sorted(path for pattern in patterns or ("*",) for path in ROOT.rglob(pattern) if path.is_file())
    return sorted(ROOT / name for name in set(out.stdout.splitlines()) if (ROOT / name).is_file())


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_long():
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in tracked("*.py")}
    assert sizes and not {path: lines for path, lines in sizes.items() if lines > LINES}


def test_no_function_is_long():
    long = {}
    for path in tracked("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines >= FUNCTION_LINES:
                    long[f"{name(path)}:{node.lineno} {node.name}"] = lines
    assert not long


def test_every_public_name_is_documented():
    """Modules, public functions and public classes of the package have docstrings."""
    bare = []
    for path in tracked("*.py"):
        tree = tree_of(path)
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            bare.append(name(path))
        if path.is_relative_to(ROOT / "hybridgen"):
            bare += [f"{name(path)}:{node.lineno} {node.name}" for node in undocumented(tree)]
    assert not bare


def undocumented(tree: ast.Module) -> list:
    """Public functions and classes without a docstring. The family contract is documented once, in the design."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node for node in public if not ast.get_docstring(node) and node.name not in CONTRACT]


def test_every_public_function_is_annotated():
    files = [path for path in tracked("*.py") if path.is_relative_to(ROOT / "hybridgen")]
    found = [(path, node) for path in files for node in unannotated(tree_of(path))]
    assert files and not [f"{name(path)}:{node.lineno} {node.name}" for path, node in found]


def unannotated(tree: ast.AST) -> list:
    """Public functions and methods, such as `__call__` too, where a parameter or the result has no type.

    Functions within functions are nobody's interface. `self` and `cls` need no type, nor does what `__init__` returns.
    """
    found = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += unannotated(node)
        elif not node.name.startswith("_") or (node.name.startswith("__") and node.name.endswith("__")):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [one.arg for one in given if one and not one.annotation and one.arg not in ("self", "cls")]
            if bare or not (node.returns or node.name == "__init__"):
                found.append(node)
    return found


def test_a_function_without_types_is_found():
    source = """
def whole(a: int, /, b: int = 0, *c: int, d: int, **e: int) -> int:
    def inner(x): return x
def _private(a): return a
def no_result(a: int): return a
def no_parameter(a) -> int: return a
def no_rest(*rest) -> None: ...
def no_options(**options) -> None: ...
async def no_keyword(*, a) -> None: ...
if whole:
    def no_position(a, /) -> None: ...
class Public:
    def __init__(self, a: int): self.a = a
    def __call__(self, a: int): return a
    def _private(self, a): return a
    @classmethod
    def made(cls) -> "Public": ...
    class Inner:
        def __init__(self, a): ...
        def __len__(self) -> int: return 0
"""
    found = ["no_result", "no_parameter", "no_rest", "no_options", "no_keyword", "no_position", "__call__", "__init__"]
    assert [node.name for node in unannotated(ast.parse(source))] == found


def test_text_has_an_encoding():
    """Files, and the output of other programs, are UTF-8 and not in the encoding of whoever runs the program."""
    found = []
    for path in tracked("*.py"):
        if not path.is_relative_to(ROOT / "tests"):
            found += [f"{name(path)}:{line}" for line in local_text(path.read_text(encoding="utf-8"))]
    assert not found


BINARY_OPENS = ("Image", "os", "zipfile", "packed", "tarfile", "webbrowser")  # X.open() of these has no encoding
TEXT_CALLS = ("read_text", "write_text", "TextIOWrapper", "fdopen", "NamedTemporaryFile", "TemporaryFile")


def local_text(source: str) -> list[int]:
    """Lines with text input or output in the locale's encoding. A call on a name in BINARY_OPENS is none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        func, given = node.func, {word.arg: word.value for word in node.keywords}
        called = getattr(func, "attr", getattr(func, "id", ""))
        owner = getattr(getattr(func, "value", None), "id", "")
        modes = [given["mode"]] if "mode" in given else [*node.args, *given.values()]
        binary = any(
            isinstance(one, ast.Constant) and re.fullmatch("[rwax+]*b[rwax+]*", str(one.value)) for one in modes
        )
        opens = called in TEXT_CALLS or (called == "open" and owner not in BINARY_OPENS)
        opens = opens and not binary and (isinstance(func, ast.Attribute) or called not in ("read_text", "write_text"))
        piped = bool({"text", "universal_newlines", "errors"} & set(given)) and owner == "subprocess"
        if (opens or piped) and "encoding" not in given:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line, bad",
    [
        *(("open(p)", True), ("open(p, 'w')", True), ("p.open('a', buffering=1)", True), ("p.read_text()", True)),
        *(("p.write_text(x)", True), ("os.fdopen(f, 'w')", True), ("subprocess.run(c, text=True)", True)),
        *(("io.open(p, mode='r')", True), ("gzip.open(p, 'rt')", True), ("p.read_text(errors='replace')", True)),
        *(("open(p, 'rb')", False), ("p.open(mode='r+b')", False), ("p.open('w', encoding='utf-8')", False)),
        *(("Image.open(p)", False), ("os.open(p, 0)", False), ("subprocess.run(c, capture_output=True)", False)),
        *(("subprocess.run(c, encoding='utf-8')", False), ("p.read_text(encoding='utf-8')", False)),
    ],
)
def test_text_without_an_encoding_is_found(line, bad):
    assert bool(local_text(line)) == bad


def test_names_say_something():
    empty = re.compile(r"(utils?|helpers?|misc)$")
    assert not [name(path) for path in tracked() if any(empty.match(part.split(".")[0]) for part in path.parts[-2:])]


@pytest.mark.parametrize("what", [UNFINISHED, HOMES, HOSTS], ids=["unfinished", "paths", "hosts"])
def test_no_file_has(what):
    pattern = re.compile(rf"\b({what})\b" if what == UNFINISHED else what)
    found = []
    for path in tracked():
        content = path.read_bytes()
        text = "" if b"\0" in content else content.decode()  # what a picture spells is chance
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name(path)}:{number} {line.strip()[:80]}")
    assert not found
