"""One interface to weights in all formats that checkpoints are published in.

    weights = open_weights("folder or file")
    for name, tensor in weights.items():      # no tensor has been read yet
        array = tensor.read()                 # reads this one, as numpy (bfloat16 through ml_dtypes)
    weights.other["epoch"]                    # other values of a PyTorch file

A file is `.safetensors` (safetensors.py) or PyTorch's `.pt .pth .bin .ckpt` (torchfiles.py). A folder contains one such
file, or shards and an `*.index.json` (of a variant, `*.index.fp16.json`) that maps tensors to shards, as Hugging Face
writes them. A file named `.safetensors` is never read as a pickle.
"""

import codecs
import dataclasses
import re
from collections.abc import ItemsView, Iterator
from pathlib import Path
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights import safetensors, torchfiles
from hybridgen.weights.tensors import LazyTensor, Malformed, checked_name, regular, shown, strict_json

TORCH = (".pt", ".pth", ".bin", ".ckpt")
SAFE = ".safetensors"
INDEX = re.compile(r".*\.index.*\.json")  # also of variants, such as model.safetensors.index.fp16.json
SHARD = re.compile(r"(.*)-\d+-of-0*([2-9]|1\d+)(\..*)")
MAX_INDEX = 2**24


@dataclasses.dataclass(frozen=True)
class Weights:
    """A mapping from name to LazyTensor. other: values that are not tensors, by name. metadata: of safetensors."""

    path: Path
    tensors: dict[str, LazyTensor]
    other: dict[str, Any]
    metadata: dict[str, str]

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def keys(self) -> Iterator[str]:
        return iter(self.tensors)

    def items(self) -> ItemsView[str, LazyTensor]:
        return self.tensors.items()


def open_weights(path: str | Path) -> Weights:
    """The weights in a file or folder; reads names, shapes and dtypes only. Raises UserError for an invalid file."""
    path = Path(path)
    if path.is_dir():
        path = _main_file(path)
    if INDEX.fullmatch(path.name):
        return _sharded(path)
    if path.suffix == SAFE:
        tensors, metadata = safetensors.read(path)
        return Weights(path, tensors, {}, metadata)
    if path.suffix in TORCH:
        tensors, other = torchfiles.read(path)
        return Weights(path, tensors, other, {})
    regular(path)  # raises if there is no such file
    raise UserError(
        f"{path} is not a weights file: its name must end in one of {', '.join((SAFE, *TORCH, '.index.json'))}"
    )


def _main_file(folder: Path) -> Path:
    """The file of a folder to open: an index before single files, safetensors before PyTorch, no variant before one."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    indexes = [name for name in names if INDEX.fullmatch(name)]
    plain = [name for name in indexes if name.endswith(".index.json")]
    choices = [[name for name in some if SAFE in name] for some in (plain, indexes)]
    choices = [
        choices[0],
        plain,
        choices[1],
        indexes,
        *([n for n in names if n.endswith(end)] for end in (SAFE, TORCH)),
    ]
    found = next(filter(None, choices), [])
    if shards := [name for name in found if SHARD.fullmatch(name)]:
        raise UserError(f"{folder} contains shards such as {shards[0]}, but not their index, {_index_of(shards[0])}")
    if len(found) > 1:
        raise UserError(f"{folder} contains {len(found)} weights files, give one of them: {', '.join(found[:8])}")
    if not found:
        raise UserError(f"{folder} contains no weights: no file named *.index.json, *{SAFE} or *{', *'.join(TORCH)}")
    return folder / found[0]


def _index_of(shard: str) -> str:
    """The usual name of the index of a shard."""
    match = SHARD.fullmatch(shard)
    return f"{match[1]}{match[3]}.index.json"


def _sharded(path: Path) -> Weights:
    if regular(path) > MAX_INDEX:
        raise UserError(f"{path} has more than {MAX_INDEX} bytes, the limit for an index")
    try:
        index = strict_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not where:
            raise Malformed("it has no 'weight_map'")
        pieces = {name: _piece(path.parent, name) for name in _file_names(where)}
    except Malformed as error:
        raise UserError(f"{path} is not a valid index of weights: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    tensors: dict[str, LazyTensor] = {}
    other: dict[str, Any] = {}
    for piece in map(open_weights, pieces.values()):
        for name, tensor in piece.items():
            if name in tensors:
                raise UserError(f"the tensor {name!r} is in {tensors[name].path} and in {piece.path}")
            tensors[name] = tensor
        other |= piece.other
    for name, file in where.items():
        if name not in tensors or tensors[name].path != pieces[file]:
            raise UserError(f"{path} lists the tensor {name!r} in {file!r}, which does not contain it")
    return Weights(path, tensors, other, {})


def _file_names(where: dict[str, Any]) -> list[str]:
    for name, file in where.items():
        checked_name(name)
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file or "\\" in file:
            raise Malformed(f"the file of the tensor {name!r} is {shown(file)}, not the name of a file in its folder")
        if Path(file).suffix not in (SAFE, *TORCH):
            raise Malformed(f"the file of the tensor {name!r} is {shown(file)}, not a weights file by its name")
    return sorted(set(where.values()))


def _piece(folder: Path, name: str) -> Path:
    """A file inside a folder. Raises Malformed for a link out of it, except to the blobs of the Hugging Face cache."""
    target, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"  # models--x/snapshots/<revision>/piece -> models--x/blobs/<digest>
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs):
        return folder / name
    raise Malformed(f"its file {shown(name)} is a link to a place outside the folder")
