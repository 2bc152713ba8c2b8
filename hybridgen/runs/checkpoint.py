"""Checkpoints: Orbax stores the arrays; this file adds digests, a commit marker, fallback to older steps.

    <directory>/<step>/model/         params, ema, extra (Orbax): all that sampling or another run's `init_from` reads
    <directory>/<step>/training/      the rest of the state: optimizer, step, health (Orbax)
    <directory>/<step>/about/         the run's fingerprint and the caller's `meta`, as JSON
    <directory>/<step>/manifest.json  size and SHA-256 of every file; written last, it commits the step

Orbax has no checksum over array data and accepts an empty folder as a step. Here a step is read only if it matches its
manifest (manifest.py). Orbax's CheckpointManager is not used: it lists and deletes steps by its own markers, this file
by manifests only. A process that saves must hold the lock of the run folder (folder.py).
"""

import contextlib
import hashlib
import itertools
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

from hybridgen.core import distributed
from hybridgen.core.errors import PeerError, UserError
from hybridgen.runs import fingerprint as fingerprint_lib
from hybridgen.runs import folder as run_folder
from hybridgen.runs import manifest, upgrades

MODEL = ("params", "ema", "extra")  # the branches of a state that are stored in `model/`


class SaveError(RuntimeError):
    """A save failed, for instance because the disk is full. The earlier checkpoints are intact."""


class Checkpointer:
    """Saves and restores the steps of one directory. Close it (or use `with`): an exit of the program ends a save.

    Args:
      directory: created if missing (UserError if that fails).
      keep: how many of the newest steps to keep; `keep_every`: multiples of it are never deleted (0: none).
      fingerprint: plain nested dict saved with each step: the values that must be equal when a run resumes.
      read_only: to read another run's parameters: creates and deletes nothing, and verifies `model/` only.
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
            raise UserError(f"checkpoint.keep is {keep}: at least 1 checkpoint must be kept")
        self.directory = Path(directory).absolute()
        self.keep, self.keep_every, self.read_only = keep, keep_every, read_only
        self.fingerprint = dict(fingerprint or {})
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._scope = ("model/", "about/") if read_only else ("",)  # prefixes of the files that are verified
        self._verified: set[int] = set()
        self._rejected: set[int] = set()
        self._turns = itertools.count()  # equal in all processes: numbers the messages that they exchange
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if not read_only:
            run_folder.make(self.directory)
            self._sweep()
        self._saved = {step for step in self._folders() if self._marked(step)}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- saving

    def save(self, step: int, state: Mapping, meta: Mapping | None = None, sound: bool = True) -> bool:
        """Starts saving `state` (nested dict of arrays) as `step`; False if that step exists already.

        sound: a rollback may restore this step; the newest sound step is never deleted.
        Waits for the previous save, and returns when the arrays may be donated. Raises SaveError, once, if this save
        cannot start or an earlier one failed in the background; a second call then tries again to save this step.
        """
        if self.read_only:
            raise ValueError(f"{self.directory} was opened read_only")
        self.wait_until_saved()
        if step in self._saved:
            return False
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}
        items["about"] = ocp.args.JsonSave({"fingerprint": self.fingerprint, "meta": dict(meta or {}), "sound": sound})
        turn, failure = next(self._turns), None
        try:
            # force: overwrite, since an existing folder of this name did not verify
            self._orbax.save(self._folder(step), args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # reported as SaveError: the caller decides whether training continues
            failure = error
        if problem := _anyone(f"save/{turn}/start", failure):
            raise self._failed(step, problem) from failure
        self._saved.add(step)
        self._thread = threading.Thread(target=self._finish, args=(step, turn), name=f"checkpoint-{step}")
        self._thread.start()
        return True

    def holds(self, step: int) -> bool:
        """Whether `step` was saved, or is being saved and has not failed yet."""
        return step in self._saved

    def wait_until_saved(self) -> None:
        """Waits for the save in flight. Raises SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Calls `wait_until_saved` and ends Orbax's threads."""
        try:
            self.wait_until_saved()
        finally:
            self._orbax.close()

    def _finish(self, step: int, turn: int) -> None:
        """In the background: waits for Orbax, writes the manifests, and only then deletes older steps."""
        failure = None
        try:
            self._orbax.wait_until_finished()
        except BaseException as error:  # raised by the caller's next save or wait_until_saved
            failure = error
        try:
            problem = _anyone(f"save/{turn}/written", failure)  # also: the files of all processes are final
            if not problem:
                try:
                    manifest.write(self._folder(step), step)
                except Exception as error:
                    failure = error
                problem = _anyone(f"save/{turn}/digested", failure)
        except PeerError as error:
            failure = problem = error
        if problem:
            self._failure = self._failed(step, problem)
            self._failure.__cause__ = failure
            return
        self._rejected.discard(step)
        if jax.process_index() == 0:
            self._retain(step)

    def _failed(self, step: int, error: BaseException | str) -> SaveError:
        """Deletes the files of a failed save. Creates a new Orbax checkpointer: the old one raises the error again."""
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saved.discard(step)
        self._remove(step)
        for _ in range(20):  # pending writes can recreate the folder, where the next save would find their files
            self._sweep()
            time.sleep(0.5)
            if not self._leftovers():
                break
        text = (
            (error if isinstance(error, str) else describe_error(error))
            .split(" [tensorstore_spec")[0]
            .replace("\n", " ")
        )
        text = text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"
        return SaveError(f"checkpoint {step} was not saved: {text}")

    def _retain(self, saved: int) -> None:
        """Deletes steps older than the newest `keep`, by number (a clock may be set back), but never `saved`.

        It keeps the newest sound step too: bad steps are detected late, so a few unsound steps may follow it.
        """
        good = [step for step in self._folders() if step not in self._rejected and self._marked(step)]
        kept = {saved, next(filter(self._sound, reversed(good)), saved), *good[-self.keep :]}
        kept |= {step for step in good if self.keep_every and step % self.keep_every == 0}
        for step in self._folders():
            if good and step < good[-1] and step not in kept:
                self._remove(step)

    def _sound(self, step: int) -> bool:
        try:
            return run_folder.read_json(self._folder(step) / "about" / "metadata").get("sound", True)
        except (UserError, AttributeError):  # damaged after it was saved
            return False

    def _remove(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        manifest.remove(self._folder(step))  # first: a partly deleted step must not look complete
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def _sweep(self) -> None:
        """Removes the temporary folders of killed or failed saves."""
        if jax.process_index() == 0:
            for leftover in self._leftovers():
                shutil.rmtree(leftover, ignore_errors=True)

    def _leftovers(self) -> list[Path]:
        return list(self.directory.glob("*.orbax-checkpoint-tmp*"))

    # ---- which steps are valid

    def verify(self, step: int) -> list[str]:
        """The faults of a step, one line each, starting with the file; empty if all files match the manifest."""
        problems = manifest.faults(self._folder(step), step, self._scope)
        if jax.process_count() > 1:  # all processes must get the same answer
            total = int(multihost_utils.process_allgather(np.int32(len(problems))).sum())
            problems += [f"{total - len(problems)} faults found by other processes"] if total > len(problems) else []
        (self._verified.discard if problems else self._verified.add)(step)
        return problems

    def good_steps(self) -> list[int]:
        """The valid steps, in order. Reads all files of all steps."""
        return [step for step in self._folders() if not self.verify(step)]

    def newest_good(self, report: Callable[[str], Any] = print) -> int | None:
        """The newest valid step, or None; `report` gets one line for each newer step, with its faulty file."""
        self.wait_until_saved()
        for step in reversed(self._folders()):
            problems = self.verify(step)
            if not problems:
                return step
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            report(f"warning: checkpoint {step} in {self.directory} is damaged and not used: {problems[0]}{more}")
            self._rejected.add(step)
            self._saved.discard(step)
        return None

    def drop_after(self, most: int) -> int | None:
        """Deletes the steps after `most`; returns the newest valid step that is left, or None."""
        self.wait_until_saved()
        for step in [step for step in self._folders() if step > most]:
            self._remove(step)
        # by number, so that all processes agree: another process may have deleted the folders already
        self._saved = {step for step in self._saved if step <= most}
        self._verified = {step for step in self._verified if step <= most}
        self._rejected = {step for step in self._rejected if step <= most}
        distributed.exchange(f"dropped/{next(self._turns)}", "done")
        return self.newest_good()

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
        """The state of `step`. `abstract`: nested dict of ShapeDtypeStructs (with shardings; without, on one device).

        Raises UserError if the step is damaged, or if its tree, shapes or dtypes differ (the message names the keys).
        """
        if self.read_only:
            raise ValueError(f"{self.directory} was opened read_only: use restore_params")
        self._check(step)
        # an item without arrays is not stored
        has = {name: {} for name, branch in abstract.items() if not jax.tree.leaves(branch)}
        for item in ("model", "training"):
            has |= self._metadata(step, item)
        fingerprint_lib.compare(f"checkpoint {self._folder(step)}", has, abstract)
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
        """The model of a step without the rest: {"params", "ema", "extra"}, or the branch `subtree` ("params/x").

        Leaves are numpy arrays, or JAX arrays with the sharding `place(path, shape)`. Raises UserError if the step has
        no such subtree or is damaged.
        """
        self._check(step)
        tree = self._metadata(step, "model")
        names = subtree.split("/") if subtree else []
        wanted: Any = tree
        for name in names:
            if not isinstance(wanted, Mapping) or name not in wanted:
                raise UserError(f"checkpoint {self._folder(step)} has no {subtree!r}; top level: {', '.join(tree)}")
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
        return self.about(step)["meta"]

    def check_fingerprint(self, step: int, allow: Collection[str] = ()) -> None:
        """Raises UserError if a step's fingerprint differs from this run's in other keys than `allow`; names them."""
        fingerprint_lib.check_fingerprint(self.about(step)["fingerprint"], self.fingerprint, allow)

    def check_model(self, step: int, config: Mapping) -> None:
        """Raises UserError if the config's model differs from the one that the step was saved with; names the keys."""
        if saved := self.about(step)["fingerprint"].get("config"):
            fingerprint_lib.check_model(f"checkpoint {self._folder(step)}", saved, config)

    def about(self, step: int) -> dict:
        """The fingerprint, the `meta` and the flag `sound` of a step, with current options."""
        self._check(step)
        about = run_folder.read_json(self._folder(step) / "about" / "metadata")
        config = about["fingerprint"].get("config", {})
        if {"family", "model"} <= set(config):  # convert options of an earlier version
            config["family"], config["model"] = upgrades.renewed(config["family"], config["model"])
        return about

    def _check(self, step: int) -> None:
        self.wait_until_saved()
        if step in self._verified:
            return
        if step not in (steps := self._folders()):
            raise UserError(f"no checkpoint {step} in {self.directory}; it has: {steps or 'none'}")
        problems = self.verify(step)
        if problems:
            raise UserError(f"checkpoint {self._folder(step)} is damaged: {problems[0]}")

    def _metadata(self, step: int, item: str) -> dict:
        folder = self._folder(step) / item
        if not folder.is_dir():
            return {}  # an item without arrays is not stored
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


def _anyone(name: str, failure: BaseException | None) -> str:
    """The error of this process or of another one, the same text in all processes; "" if there is none."""
    reports = distributed.exchange(name, describe_error(failure) if failure else "")
    return next((f"process {i}: {text}" if len(reports) > 1 else text for i, text in enumerate(reports) if text), "")


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).replace(chr(10), ' ')}"


def _items(state: Mapping) -> dict[str, dict]:
    """A state as it is stored; an item without arrays is left out, since Orbax does not accept it."""
    model = {name: branch for name, branch in state.items() if name in MODEL}
    training = {name: branch for name, branch in state.items() if name not in MODEL}
    return {item: tree for item, tree in (("model", model), ("training", training)) if jax.tree.leaves(tree)}


def digest(tree: Any) -> str:
    """SHA-256 of a tree of arrays: paths, shapes, dtypes and bytes. It does not depend on device or sharding."""
    total = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{path} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
