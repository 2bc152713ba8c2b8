"""`python -m hybridgen COMMAND ...`, the same as `hybridgen COMMAND ...`."""

from hybridgen.cli import main

if __name__ == "__main__":
    main()
