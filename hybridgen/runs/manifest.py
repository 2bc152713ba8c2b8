"""Manifests: size and SHA-256 of every file of a folder, written last. A folder that does not match its manifest is
not used.

`manifest.json` is {"step", "processes", "files": {name: [bytes, sha256]}, "digest"}; `digest` is over the other
entries, to detect a damaged manifest. With several processes each lists the files that it hashed, process p > 0 in
`manifest.<p>.json`, and the folder is complete when all manifests exist.
"""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from hybridgen.runs import folder as run_folder


class Damaged(Exception):
    """A manifest is missing or damaged; the message starts with the file's name."""


def write(folder: Path, step: int) -> None:
    """Hashes this process' share of `folder` and writes its manifest. All processes must have written their files."""
    process, processes = jax.process_index(), jax.process_count()
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_manifest(folder, path))
    names = [path.relative_to(folder).as_posix() for path in paths][process::processes]
    files = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in names}
    body = {"step": step, "processes": processes, "files": files}
    run_folder.write_json(folder / _name(process), body | {"digest": _digest(body)})


def remove(folder: Path) -> None:
    """Deletes the manifests, so that `folder` is no longer valid; called before the files of a step are deleted."""
    for path in folder.glob("manifest*.json"):
        path.unlink(missing_ok=True)


def read(folder: Path, step: int) -> dict[str, list]:
    """{file: [bytes, SHA-256]} of a folder. Raises Damaged for a missing or damaged manifest."""
    files: dict[str, list] = {}
    process, processes = 0, 1
    while process < processes:
        name = _name(process)
        try:
            body = json.loads((folder / name).read_text(encoding="utf-8"))
            digest = body.pop("digest")
            if digest != _digest(body) or body["step"] != step:
                raise Damaged(f"{name}: damaged, its digest or step is wrong")
            processes = body["processes"]
            files |= _listed(body["files"])
        except FileNotFoundError:
            raise Damaged(f"{name}: missing, so the save was not completed") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{name}: unreadable, {type(error).__name__}") from None
        process += 1
    return files


def faults(folder: Path, step: int, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The faults in this process' share of the files below `prefixes`: one line each, starting with the file."""
    try:
        files = read(folder, step)
    except Damaged as error:
        return [str(error)]
    names = sorted(name for name in files if name.startswith(prefixes))[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:  # hashing and reading release the GIL
        found = list(pool.map(lambda name: _fault(folder / name, *files[name]), names))
    return [f"{name}: {fault}" for name, fault in zip(names, found, strict=True) if fault]


def _listed(files: dict) -> dict[str, list]:
    """The files of a manifest. Raises ValueError for a path that leads out of the folder, which may be untrusted."""
    for name, (size, digest) in files.items():
        if {"", "..", "."} & {*name.split("/")} or not isinstance(size, int) or not isinstance(digest, str):
            raise ValueError(f"a file {name!r} of {size} bytes")
    return files


def sha256(path: Path) -> str:
    """SHA-256 of a file as a hex string; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path, size: int, digest: str) -> str:
    """The fault of a file, or ""."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe could block forever, reading a device never ends
            return "not a regular file"
        if found.st_size != size:
            return f"{found.st_size} bytes instead of {size}"
        return "" if sha256(path) == digest else "its SHA-256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable, {error.strerror}"


def _name(process: int) -> str:
    return f"manifest.{process}.json" if process else "manifest.json"


def _is_manifest(folder: Path, path: Path) -> bool:
    """Whether a file is a manifest, or one that another process is still writing."""
    return path.parent == folder and path.name.lstrip(".").startswith("manifest.")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
