"""Checkpoints: Orbax for the arrays, and what it lacks: digests, a marker that counts, fall-back, a fingerprint.

    <directory>/<step>/model/         params, ema, extra (Orbax): all that sampling or another run's `init_from` reads
    <directory>/<step>/training/      the rest of the state: optimiser, step, health (Orbax)
    <directory>/<step>/about/         the run's fingerprint and the caller's `meta`, as JSON
    <directory>/<step>/manifest.json  size and SHA-256 of every file; written last: only then the step exists

Orbax keeps no checksum over array data and takes an empty folder for a step; so nothing is read here that does not fit
its manifest (manifest.py). Orbax's CheckpointManager is not used: it lists and deletes by markers of its own, this file
by manifests only. Whoever saves holds the run folder's lock (rundir.py).
"""

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from hybridgen import manifest, rundir
from hybridgen.errors import UserError

MODEL = ("params", "ema", "extra")  # the branches of a state that lie in `model/`


class SaveError(RuntimeError):
    """A save did not finish (disk full, for instance). The earlier checkpoints are as they were."""


class Checkpointer:
    """Saves and restores the steps of one directory. Close it (or use `with`): a program's end cuts a save in flight.

    Args:
      directory: created if missing (UserError if that cannot be).
      keep: how many of the newest steps stay; `keep_every`: steps that divide by it stay for good (0: none).
      fingerprint: plain nested dict saved with each step: what must be the same when a run goes on.
      read_only: for reading another run's parameters: makes, cleans and deletes nothing, and verifies `model/` only.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        fingerprint: Mapping | None = None,
        read_only: bool = False,
    ):
        if keep < 1:
            raise UserError(f"keep {keep} checkpoints: at least 1 must stay")
        self.directory = Path(directory).absolute()
        self.keep, self.keep_every, self.read_only = keep, keep_every, read_only
        self.fingerprint = dict(fingerprint or {})
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._scope = ("model/", "about/") if read_only else ("",)  # prefixes of the files that must be good
        self._verified: set[int] = set()
        self._rejected: set[int] = set()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if not read_only:
            rundir.make(self.directory)
            self._sweep()
        self._saved = {step for step in self._folders() if self._marked(step)}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- saving

    def save(self, step: int, state: Mapping, meta: Mapping | None = None) -> bool:
        """Starts saving `state` (nested dict of arrays) as `step`; False if that step is there already.

        Returns when the arrays may be donated; waits for the save before it. Raises SaveError, once, if this save
        cannot start or an earlier one failed in the background; calling again then tries this step.
        """
        if self.read_only:
            raise ValueError(f"{self.directory} was opened read_only")
        self.wait()
        if step in self._saved:
            return False
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}
        items["about"] = ocp.args.JsonSave({"fingerprint": self.fingerprint, "meta": dict(meta or {})})
        try:
            # force: what is there under this name did not verify
            self._orbax.save(self._folder(step), args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # whatever it is, the caller decides whether the run goes on
            raise self._failed(step, error) from error
        self._saved.add(step)
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._thread.start()
        return True

    def holds(self, step: int) -> bool:
        """Whether `step` was saved, or is being saved and has not failed yet."""
        return step in self._saved

    def wait(self) -> None:
        """Waits for the save in flight. Raises SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """As `wait`, and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _finish(self, step: int) -> None:
        """In the background: when Orbax is done, the manifest; then, never before, older steps may go."""
        try:
            self._orbax.wait_until_finished()
            manifest.write(self._folder(step), step)
            self._rejected.discard(step)
        except BaseException as error:  # handed to the caller's next save or wait
            self._failure = self._failed(step, error)
            self._failure.__cause__ = error
            return
        if jax.process_index() == 0:
            self._retain(step)

    def _failed(self, step: int, error: BaseException) -> SaveError:
        """Clears what a failed save left behind. A fresh Orbax, since the old one would raise this error again."""
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saved.discard(step)
        self._remove(step)
        for _ in range(20):  # writes still under way bring the folder back: the next save must not find them in it
            self._sweep()
            time.sleep(0.5)
            if not self._leftovers():
                break
        text = str(error).split(" [tensorstore_spec")[0].replace("\n", " ")
        text = text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"
        return SaveError(f"checkpoint {step} was not saved: {type(error).__name__}: {text}")

    def _retain(self, saved: int) -> None:
        """Deletes what is older than the newest `keep` steps, by number (clocks may go back), but never `saved`."""
        good = [step for step in self._folders() if step not in self._rejected and self._marked(step)]
        kept = {saved, *good[-self.keep :]}
        kept |= {step for step in good if self.keep_every and step % self.keep_every == 0}
        for step in self._folders():
            if good and step < good[-1] and step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        manifest.remove(self._folder(step))  # first: half a step must not look whole
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what saves left that were killed or failed."""
        if jax.process_index() == 0:
            for leftover in self._leftovers():
                shutil.rmtree(leftover, ignore_errors=True)

    def _leftovers(self) -> list[Path]:
        return list(self.directory.glob("*.orbax-checkpoint-tmp*"))

    # ---- which steps are good

    def verify(self, step: int) -> list[str]:
        """What is wrong with a step: one line a fault, naming the file; empty if every byte is as it was written."""
        problems = manifest.faults(self._folder(step), step, self._scope)
        if jax.process_count() > 1:  # all must come to the same answer
            total = int(multihost_utils.process_allgather(np.int32(len(problems))).sum())
            problems += [f"{total - len(problems)} faults found by other processes"] if total > len(problems) else []
        (self._verified.discard if problems else self._verified.add)(step)
        return problems

    def good_steps(self) -> list[int]:
        """Steps that verify, in order. Reads all of them."""
        return [step for step in self._folders() if not self.verify(step)]

    def newest_good(self, report: Callable[[str], Any] = print) -> int | None:
        """The newest step that verifies, or None; each newer one is named to `report` with its bad file."""
        self.wait()
        for step in reversed(self._folders()):
            problems = self.verify(step)
            if not problems:
                return step
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            report(f"checkpoint {step} in {self.directory} is not used: {problems[0]}{more}")
            self._rejected.add(step)
            self._saved.discard(step)
        return None

    def _folders(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _marked(self, step: int) -> bool:
        try:
            manifest.read(self._folder(step), step)
        except manifest.Damaged:
            return False
        return True

    # ---- restoring

    def restore(self, step: int, abstract: Mapping) -> dict:
        """The state of `step` as `abstract` says: nested dict of ShapeDtypeStructs (with shardings, or on one device).

        Raises UserError if the step does not verify, or naming the keys if it holds another tree, shapes or dtypes.
        """
        if self.read_only:
            raise ValueError(f"{self.directory} was opened read_only: restore_params")
        self._check(step)
        # an item without arrays is not on disk
        has = {name: {} for name, branch in abstract.items() if not jax.tree.leaves(branch)}
        for item in ("model", "training"):
            has |= self._metadata(step, item)
        _compare(f"checkpoint {self._folder(step)}", has, abstract)
        state = {name: {} for name in abstract}
        for item, wanted in _items(abstract).items():
            state |= self._read(step, item, wanted)
        return state

    def restore_params(
        self,
        step: int,
        subtree: str = "",
        place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    ) -> dict:
        """Parts of a step without reading the rest: {"params", "ema", "extra"}, or what lies at `subtree` ("params/x").

        Leaves are numpy arrays, or jax arrays with the sharding `place(path, shape)`. Raises UserError if there is no
        such subtree or the step does not verify.
        """
        self._check(step)
        tree = self._metadata(step, "model")
        names = subtree.split("/") if subtree else []
        wanted: Any = tree
        for name in names:
            if not isinstance(wanted, Mapping) or name not in wanted:
                raise UserError(f"checkpoint {self._folder(step)} has no {subtree!r}; at the top: {', '.join(tree)}")
            wanted = wanted[name]

        def leaf(path: tuple, meta: Any) -> Any:
            name = "/".join([*names, *(str(key.key) for key in path)])
            sharding = place(name, tuple(meta.shape)) if place else None
            return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=sharding)

        wanted = jax.tree_util.tree_map_with_path(leaf, wanted)
        if not jax.tree.leaves(wanted):
            return wanted
        for name in reversed(names):
            wanted = {name: wanted}
        found = self._read(step, "model", wanted, numpy=place is None)
        for name in names:
            found = found[name]
        return found

    def meta(self, step: int) -> dict:
        """The `meta` that was saved with a step."""
        return self._about(step)["meta"]

    def check_fingerprint(self, step: int, allow: Collection[str] = ()) -> None:
        """Raises UserError naming every key, but for `allow`, in which a step's fingerprint is not this run's."""
        check_fingerprint(self._about(step)["fingerprint"], self.fingerprint, allow)

    def _about(self, step: int) -> dict:
        self._check(step)
        return rundir.read_json(self._folder(step) / "about" / "metadata")

    def _check(self, step: int) -> None:
        self.wait()
        if step in self._verified:
            return
        if step not in (steps := self._folders()):
            raise UserError(f"no checkpoint {step} in {self.directory}; there are: {steps or 'none'}")
        problems = self.verify(step)
        if problems:
            raise UserError(f"checkpoint {self._folder(step)} cannot be used: {problems[0]}")

    def _metadata(self, step: int, item: str) -> dict:
        folder = self._folder(step) / item
        if not folder.is_dir():
            return {}  # had no arrays
        return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree

    def _read(self, step: int, item: str, wanted: Mapping, numpy: bool = False) -> dict:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def how(leaf: Any) -> ocp.RestoreArgs:
            if numpy:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            sharding = getattr(leaf, "sharding", None) or here
            return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

        args = ocp.args.PyTreeRestore(wanted, restore_args=jax.tree.map(how, wanted), partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(epath.Path(self._folder(step) / item), args=args)


def _items(state: Mapping) -> dict[str, dict]:
    """A state as it is laid out on disk; an item without arrays is left out, Orbax takes none."""
    model = {name: branch for name, branch in state.items() if name in MODEL}
    training = {name: branch for name, branch in state.items() if name not in MODEL}
    return {item: tree for item, tree in (("model", model), ("training", training)) if jax.tree.leaves(tree)}


def check_fingerprint(old: Mapping, new: Mapping, allow: Collection[str] = ()) -> None:
    """Raises UserError naming every dotted key in which two nested dicts differ; `allow`: keys or branches."""
    was, now = _dotted(old), _dotted(json.loads(json.dumps(new)))  # as JSON gives it back: tuples are lists
    missing = object()
    differ = []
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key, missing), now.get(key, missing)
        if a != b and not any(key == name or key.startswith(f"{name}.") for name in allow):
            a, b = ("nothing" if value is missing else json.dumps(value)[:80] for value in (a, b))
            differ.append((key, f"{key} was {a} and is {b}"))
    if differ:
        keys = ",".join(key for key, _ in differ)
        raise UserError(f"another run than the checkpoint's: {'; '.join(line for _, line in differ)} (--allow {keys})")


def _dotted(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _compare(what: str, saved: Mapping, abstract: Mapping) -> None:
    """Raises UserError naming the paths in which a checkpoint's tree is not the one asked for."""

    def shapes(tree: Mapping, prefix: str = "") -> dict[str, str]:
        flat = {}
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping) and leaf:
                flat |= shapes(leaf, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" if leaf != {} else "nothing"
        return flat

    def some(lines: list[str]) -> str:
        return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")

    has, wants = shapes(saved), shapes(abstract)
    faults = [
        ("lacks", [key for key in wants if key not in has]),
        ("has besides", [key for key in has if key not in wants]),
        ("differs in", [f"{k} {has[k]} instead of {wants[k]}" for k in wants if k in has and has[k] != wants[k]]),
    ]
    if any(lines for _, lines in faults):
        raise UserError(f"{what} is of another config: it " + "; it ".join(f"{w} {some(k)}" for w, k in faults if k))


def digest(tree: Any) -> str:
    """SHA-256 of a tree of arrays: paths, shapes, dtypes and bytes. The same wherever the arrays live."""
    total = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{path} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
