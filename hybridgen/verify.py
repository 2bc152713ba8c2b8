"""Compares our model with the recorded outputs of the official model, after importing its weights.

    python -m hybridgen.verify taming_vqgan golden/taming_vqgan

The folder has `config.json`, `weights.safetensors` and `io.npz`: the official config, its state dict, and inputs with
the outputs that the official code computed from them. SOURCE is the system's name, or that of a variant of it
("sd_kl_vae_flux"). Every array must be either an input that is used or an output that is compared; each output prints
one line. In float32 the largest difference must be at most 2e-5 of the largest recorded magnitude (or of 1 if that is
less); integers and masks must be equal. Exit code 0: all are equal; 1: some differ; 2: the folder cannot be compared.
"""

import contextlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hybridgen.cli import command, parser_of
from hybridgen.core.errors import UserError
from hybridgen.replays import Case, find
from hybridgen.runs import folder as run_folder
from hybridgen.weights.tensors import shown

MAX_BYTES = 2**33  # of all recorded arrays, unpacked


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises UserError for any other file, and for one that holds pickled objects."""
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size} bytes unpacked; the limit is {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is not a valid .npz file of arrays: {shown(str(error)[:120])}") from None


def verify(source: str, folder: Path, report: Callable[[str], None] = print) -> bool:
    """Whether every recorded output is reproduced; `report` gets one line per output.

    Raises UserError for an unknown `source` and for a folder that cannot be compared.
    """
    system, replay = find(source)
    config = run_folder.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object")
    case = Case(system, folder, config, read_arrays(folder / "io.npz"), report)
    # always on the CPU in float32 and without a mesh: the tolerance is that of float32
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        replay(case)
    return case.close()


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("verify")
    args = parser.parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        return 0 if verify(args.source, args.folder) else 1
    return 1


if __name__ == "__main__":
    command(main)
