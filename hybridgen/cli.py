"""`hybridgen COMMAND ...`, the same as `python -m hybridgen.COMMAND ...`; a user's mistake is one line and exit code 2."""

import importlib
import sys
from collections.abc import Callable

from hybridgen.errors import UserError

COMMANDS = {
    "train": "train one config",
    "recipe": "run the stages of a recipe, one after the other",
    "sample": "prompts to pictures",
    "evaluate": "measure a run: judge, PSNR, report and contact sheet",
    "preflight": "compile a config for a TPU topology: does it fit",
    "bench": "step time, tokens a second and fraction of this machine's rate",
}


def command(main: Callable[[], int]) -> None:
    """Runs a command's `main` and exits with its code; UserError is one line on stderr and code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def main() -> None:
    """The console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        print("usage: hybridgen COMMAND [--help] ...\n")
        print("\n".join(f"  {known:10s} {what}" for known, what in COMMANDS.items()))
        sys.exit(0 if name in ("-h", "--help") else 2)
    module = importlib.import_module(f"hybridgen.{name}")
    command(lambda: module.main(sys.argv[2:]))
