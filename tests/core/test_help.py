"""Help is fast: it imports neither JAX nor Flax; and the ways in which a command can be started are the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybridgen import cli, convert
from hybridgen.core import arguments
from hybridgen.core.errors import UserError
from hybridgen.runs import bundle

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "jaxlib", "flax", "orbax", "optax", "scipy", "tensorstore", "numpy")

ALL = f"""
import contextlib, io, sys, time
from hybridgen import cli
for name in cli.COMMANDS:
    for words in (["--help"], ["-h"], ["--workdir", "x", "--help"], ["-h", "--config", "y"]):
        sys.argv, out = ["hybridgen", name, *words], io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            cli.main()
        assert f"usage: hybridgen {{name}}" in out.getvalue(), (name, words, out.getvalue())
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
assert time.process_time() < 1.5, time.process_time()
"""


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_of_every_command_imports_nothing_large():
    """All of it together takes less processor time than one import of JAX."""
    done = run("-c", ALL)
    assert done.returncode == 0, done.stderr


def test_help_of_every_command_says_what_it_does():
    for name in arguments.ADD:
        text = cli.parser_of(name).format_help()
        assert cli.COMMANDS[name][1:20] in text and f"usage: hybridgen {name}" in text
    assert set(cli.COMMANDS) == {*arguments.ADD, "launch"}
    assert set(arguments.DTYPES) == {"float32", *bundle.HALVES, "int8"}


@pytest.mark.parametrize("start", [["-m", "hybridgen"], ["-m", "hybridgen.cli"]])
def test_modules_are_the_command(start):
    """`python -m hybridgen.cli sample` is `hybridgen sample`, also in what it refuses."""
    assert "usage: hybridgen sample" in run(*start, "sample", "--help").stdout
    done = run(*start, "smple")
    assert done.returncode == 2 and "unknown command 'smple'; did you mean 'sample'?" in done.stderr
    done = run(*start, "convert", "nothing", "a", "b")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown source 'nothing'") and not done.stdout


# ---------------------------------------------------------------- options of convert in any place


@pytest.mark.parametrize(
    "words",
    [
        ("vq", "in", "out", "--export", "--config", "c"),
        ("--export", "--config", "c", "vq", "in", "out"),
        ("vq", "--export", "in", "--config", "c", "out"),
        ("vq", "--config=c", "in", "out", "--export"),
        ("vq", "in", "--export", "out", "--config", "c"),
        ("--config", "c", "vq", "--export", "in", "out"),
    ],
)
def test_options_of_convert_in_any_place(words, monkeypatch):
    monkeypatch.setattr(convert.tables, "find", lambda name: name)
    seen = []
    monkeypatch.setattr(convert, "write_official", lambda *given: seen.append(given) or 7)
    assert convert.main(list(words)) == 0
    assert seen == [("vq", Path("in"), "c", Path("out"))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("vq", "--export", "in"), "three arguments are needed: SOURCE INPUT OUT"),
        (("--export",), "three arguments are needed"),
        ((), "three arguments are needed"),
        (("vq", "in", "--export", "out", "more"), "unrecognized arguments: more"),
        (("vq", "in", "out", "--exprt"), "unrecognized arguments: --exprt"),
    ],
)
def test_what_convert_does_not_take(words, says):
    with pytest.raises(UserError) as error:
        convert.main(list(words))
    assert says in str(error.value) and "\n" not in str(error.value)
