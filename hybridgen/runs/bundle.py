"""Bundles: a run and its parts as files that load on another machine, as `hybridgen export` writes them.

    BUNDLE/config.json          the run's config; its parts are parts/NAME
    BUNDLE/text.json            its text tokenizer, if it reads text
    BUNDLE/weights.safetensors  params/... (EMA parameters, if any) and extra/...
    BUNDLE/bundle.json          {"format", "step", "parts": {name: digest of its arrays}}
    BUNDLE/manifest.json        size and SHA-256 of every file, which are checked before a file is read
    BUNDLE/parts/NAME/          the parts, also bundles; a part's own parts are ../NAME

Parameters are stored as float32, in half the size (float16, bfloat16), or in about a quarter (int8: matrices in blocks
of 64 numbers with a float32 scale each, as GGUF's Q8_0; other parameters in float32). They are float32 when read.
Bundles may come from untrusted sources: nothing in them is executed, and no path in them leads out of the bundle.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.runs import folder as run_folder
from hybridgen.runs import manifest
from hybridgen.weights import safetensors

FORMAT = 1
ABOUT, WEIGHTS = "bundle.json", "weights.safetensors"
OWN = ("config.json", "text.json", ABOUT, WEIGHTS)
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BLOCK, SCALE = 64, ".scale"  # int8: numbers per scale, and the suffix of the name of the tensor of scales
LEAST = 4096  # smallest number of elements of a parameter that is stored as int8
PART = re.compile(r"(parts|\.\.)/[A-Za-z0-9_][\w.-]*")


class Bundle(NamedTuple):
    """The content of a bundle: `arrays` {"params", "extra"}, the digests of its parts, and its training step."""

    arrays: dict[str, Any]
    parts: dict[str, str]
    step: int


def at(folder: Path) -> bool:
    """Whether a folder is a bundle, not a run folder."""
    return (folder / ABOUT).is_file()


def read(folder: Path) -> Bundle:
    """Verifies the files of a bundle, without its parts, and reads its arrays. Raises UserError if it is damaged."""
    about = run_folder.read_json(folder / ABOUT)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        given = about.get("format") if isinstance(about, dict) else None
        raise UserError(f"{folder / ABOUT} has the format {str(given)[:40]!r}; supported is {FORMAT}")
    step, parts = about.get("step"), about.get("parts")
    if type(step) is not int or not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
        raise UserError(f"{folder / ABOUT} has no valid `step` and `parts`")
    _verify(folder, step)
    tensors, metadata = safetensors.read(folder / WEIGHTS)
    flat = _widened(folder / WEIGHTS, tensors, metadata.get("dtype", ""))
    return Bundle({"params": {}, "extra": {}} | trees.unflatten(flat), parts, step)


def check_parts(folder: Path, parts: Mapping[str, str]) -> None:
    """Raises UserError for a part of a bundle's config that is not inside the bundle."""
    for name, path in parts.items():
        if not isinstance(path, str) or not PART.fullmatch(path):
            raise UserError(f"part {name!r} of the bundle {folder}: the path {str(path)[:80]!r} is outside the bundle")


def _verify(folder: Path, step: int) -> None:
    """Raises UserError if a file of the bundle does not match its manifest; checks this process' share of them."""
    try:
        listed = manifest.read(folder, step)
    except manifest.Damaged as error:
        raise UserError(f"the bundle {folder} is damaged: {error}") from None
    here = [name for name in OWN if name in listed or name != "text.json" or (folder / name).exists()]
    problems = [f"{name}: not in the manifest" for name in here if name not in listed]
    if problems := problems or manifest.faults(folder, step, OWN):
        raise UserError(f"the bundle {folder} is damaged: {problems[0]}")


def _widened(path: Path, tensors: Mapping[str, Any], stored: str) -> dict[str, np.ndarray]:
    """{path: array}, with parameters converted to float32."""
    flat = {}
    for name, tensor in tensors.items():
        steps = name.split("/")
        inside = any("/".join(steps[:i]) in tensors for i in range(1, len(steps)))  # below an array
        if steps[0] not in ("params", "extra") or "" in steps or len(steps) < 2 or inside:
            raise UserError(f"{path} has the tensor {name!r}, which is not an array of a run")
        if stored == "int8" and name.endswith(SCALE):
            if name.removesuffix(SCALE) not in tensors:
                raise UserError(f"{path} has the scales {name!r} without their tensor")
            continue
        if stored in HALVES and steps[0] == "params" and tensor.dtype == HALVES[stored]:
            flat[name] = tensor.read().astype(np.float32)
        elif stored == "int8" and name + SCALE in tensors:
            flat[name] = _from_blocks(path, tensor, tensors[name + SCALE])
        else:
            flat[name] = tensor.read()
    return flat


def write(folder: Path, bundle: Bundle, config: Any, text: Any, dtype: str) -> None:
    """Writes a bundle; `config` and `text` (or None) are plain data. Its parts must be written before."""
    run_folder.make(folder)
    stored: dict[str, np.ndarray] = {}
    for path, leaf in trees.flatten(bundle.arrays).items():
        stored |= _narrowed(path, np.asarray(leaf), dtype)
    safetensors.write(folder / WEIGHTS, stored, {"format": "np", "dtype": dtype})
    run_folder.write_json(folder / "config.json", config)
    if text is not None:
        run_folder.write_json(folder / "text.json", text)
    run_folder.write_json(folder / ABOUT, {"format": FORMAT, "step": bundle.step, "parts": bundle.parts})
    manifest.write(folder, bundle.step)


def _narrowed(path: str, array: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The tensors that an array is stored as; arrays of `extra` are not converted."""
    wide = array.dtype in (np.float32, np.float64) and path.startswith("params/")
    if not wide or dtype == "float32" or (dtype == "int8" and (array.ndim < 2 or array.size < LEAST)):
        return {path: array}
    if dtype == "int8":
        return _to_blocks(path, array)
    with np.errstate(over="ignore"):
        half = array.astype(HALVES[dtype])
    if not np.isfinite(half.astype(np.float32)).all():
        raise UserError(f"--dtype {dtype} overflows: {path} reaches {np.abs(array).max():.3g}; choose another dtype")
    return {path: half}


def _to_blocks(path: str, array: np.ndarray) -> dict[str, np.ndarray]:
    flat = array.astype(np.float32).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1) / np.float32(127)
    if not np.isfinite(scale).all():
        raise UserError(f"--dtype int8: {path} has values that are not finite; choose float32")
    whole = np.rint(blocks / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
    return {path: whole.reshape(-1)[: flat.size].reshape(array.shape), path + SCALE: scale}


def _from_blocks(path: Path, tensor: Any, scales: Any) -> np.ndarray:
    count = math.ceil(tensor.size / BLOCK)
    if tensor.dtype != np.int8 or scales.dtype != np.float32 or scales.shape != (count,):
        what = f"{tensor.name!r}, {tensor.dtype}{list(tensor.shape)},"
        raise UserError(f"{path}: {what} and its scales, {scales.dtype}{list(scales.shape)}, do not match")
    whole = tensor.read().reshape(-1).astype(np.float32)
    return (whole * scales.read().repeat(BLOCK)[: whole.size]).reshape(tensor.shape)
