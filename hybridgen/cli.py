"""`hybridgen COMMAND ...`, the same as `python -m hybridgen COMMAND ...` and `python -m hybridgen.COMMAND ...`.

A user error prints one line, exit code 2.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hybridgen import __version__
from hybridgen.core import arguments, hostmemory, importing, progress, quiet
from hybridgen.core.errors import PeerError, StorageError, UserError

COMMANDS = {
    "train": "train one model from a config, or resume its run",
    "cache": "precompute tokens, latents and text features of a data source",
    "recipe": "run the stages of a recipe in order",
    "sample": "generate images from prompts or classes",
    "evaluate": "evaluate a run: caption accuracy, PSNR, FID, image grids",
    "preflight": "estimate memory and speed on a TPU, GPU or this machine, by compiling",
    "bench": "measure step time, tokens per second and MFU on this machine",
    "convert": "import official weights as a run folder, or export them",
    "export": "write a run and its parts as one folder that loads on another machine",
    "verify": "compare an imported model with recorded outputs of the official one",
    "launch": "print or run the commands that train on a machine or a cluster",
}

WITH_RUNS = tuple(name for name in COMMANDS if name not in ("verify", "launch"))  # these may read bundles


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a command, described by the first line of `doc`; invalid arguments raise UserError, not usage."""
    called = f"hybridgen {name}" if name in COMMANDS else f"python -m hybridgen.{name}"
    parser = argparse.ArgumentParser(called, description=doc.split("\n")[0], allow_abbrev=False)

    def error(message: str) -> NoReturn:
        raise UserError(f"{message} (see {called} --help)")

    parser.error = error
    progress.show(True)  # this command's parser, not that of an earlier one in the same process, says otherwise
    parser.add_argument("--quiet", action=Quiet, nargs=0, help="print no progress: only results, warnings and errors")
    if name in WITH_RUNS:
        importing.add_argument(parser)
    return parser


class Quiet(argparse.Action):
    """The option `--quiet`."""

    def __call__(self, *_: object) -> None:
        progress.show(False)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command with its arguments; of sampling commands without the options of a run."""
    what = COMMANDS[name]
    parser = make_parser(name, f"{what[0].upper()}{what[1:]}.")
    arguments.ADD[name](parser)
    return parser


def own_cache() -> None:
    """Creates JAX_COMPILATION_CACHE_DIR, if set, with access for its owner only: JAX executes what it finds there."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if folder and "://" not in folder:
        with contextlib.suppress(OSError):  # JAX reports it
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)


def command(main: Callable[[], int]) -> NoReturn:
    """Runs a command's `main` and exits with its code; a UserError prints one line on stderr and exits with code 2."""
    hostmemory.keep()
    own_cache()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caption need not fit into the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    quiet.failed_saves()
    try:
        sys.exit(main())  # also the normal end of each of several processes
    except (UserError, PeerError, StorageError) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if "hybridgen.core.distributed" in sys.modules:
        sys.modules["hybridgen.core.distributed"].leave(code)
    sys.exit(code)


def main() -> None:
    """The console script `hybridgen`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"hybridgen {__version__}")
    elif name in ("-h", "--help"):
        print("usage: hybridgen COMMAND [--help] ...   or   hybridgen --version\n")
        print("\n".join(f"  {known:10s} {what}" for known, what in COMMANDS.items()))
    elif name in arguments.ADD and _plain_help(sys.argv[2:]):
        parser_of(name).print_help()  # without the command's module, which imports JAX
    else:
        command(lambda: _module(name).main(sys.argv[2:]))


def _plain_help(words: list[str]) -> bool:
    """Whether a command line asks for help, and not for that of a run's options."""
    return bool({"-h", "--help"} & {*words}) and not any(word.startswith(("--run", "--trust")) for word in words)


def _module(name: str):
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"hybridgen.{name}")


if __name__ == "__main__":
    main()
