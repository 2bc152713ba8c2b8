"""`hybridgen COMMAND ...`, the same as `python -m hybridgen.COMMAND ...`; a mistake is one line and exit code 2."""

import argparse
import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hybridgen.core import hostmemory, quiet
from hybridgen.core.errors import PeerError, UserError

COMMANDS = {
    "train": "train one config",
    "cache": "tokens, latents and text features of a source, made once",
    "recipe": "run the stages of a recipe, one after the other",
    "sample": "prompts to pictures",
    "evaluate": "measure a run: judge, PSNR, report and contact sheet",
    "preflight": "compile a config for a TPU topology: does it fit",
    "bench": "step time, tokens a second and fraction of this machine's rate",
    "convert": "official weights to a run folder, and back",
    "export": "a run and its parts to a folder that loads on another machine",
    "verify": "replay recorded outputs of an official model: equal or not",
    "launch": "print or run the commands that train on a machine or a cluster",
}


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of a command, described by the first line of `doc`; what it refuses is a UserError, not usage."""
    parser = argparse.ArgumentParser(f"hybridgen {name}", description=doc.split("\n")[0], allow_abbrev=False)

    def error(message: str) -> NoReturn:
        raise UserError(f"{message} (see hybridgen {name} --help)")

    parser.error = error
    return parser


def a_path(text: str) -> Path:
    """An argparse type: a path. An empty one, as an unset variable gives it, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; the current folder is '.'")
    return Path(text)


def own_cache() -> None:
    """Makes the folder of JAX's compile cache, if one is asked for, its owner's only: what lies there is run."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if folder and "://" not in folder:
        with contextlib.suppress(OSError):  # JAX says what is wrong with it
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)


def command(main: Callable[[], int]) -> NoReturn:
    """Runs a command's `main` and exits with its code; UserError is one line on stderr and code 2."""
    hostmemory.keep()
    own_cache()
    quiet.failed_saves()
    try:
        sys.exit(main())  # where there are several processes, all of them end so
    except (UserError, PeerError) as error:
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
    """The console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: hybridgen COMMAND [--help] ...\n")
        print("\n".join(f"  {known:10s} {what}" for known, what in COMMANDS.items()))
    else:
        command(lambda: _module(name).main(sys.argv[2:]))


def _module(name: str):
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"hybridgen.{name}")
