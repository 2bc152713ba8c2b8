"""`python -m hybridgen.convert SOURCE IN OUT`: the command is importing.py, for this package never sees a model."""

from hybridgen.cli import command
from hybridgen.runs.importing import main

if __name__ == "__main__":
    command(main)
