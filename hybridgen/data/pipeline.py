"""Batches from a random-access source: a stateless seeded shuffle, the rows of this host, prefetching to a device.

    source = sources.build(config.data, "train")
    tokenizer = text.build(config.data, source)
    with prefetch(batches(source, tokenizer, batch=64, seed=0, start=step), jax.device_put) as loader:
        for batch in loader: ...

**The data position is a pure function of (seed, step).** Sample number p of a run is row p % batch of global batch
p // batch; it is read from `order(p)`, a new permutation of the source each epoch. So global batch k holds the same
samples for any number of hosts, workers and restarts, and a checkpoint stores only k and a fingerprint of the data.
Grain maps k to a batch in threads or worker processes. Grain's shuffle is not used: it permutes a block of at least
2**16 indices, which takes 20 us per index for 3,000 records and 10 ms for six, and may change with its version.

A host batch is a dict of numpy arrays: `id` B uint32, `image` B H W 3 float32 in [-1, 1], `text` B L int32 and
`text_mask` B L bool (only with a text tokenizer), `label` B int32 (0 if a source has no classes), `broken` B int32
(-1, or the index of an unreadable record, which was replaced by the next valid one; `take_broken` pops it), and `valid`
B bool when not shuffling. Cached entries (`tokens`, `latent`, ...) are passed on unchanged. Of a record with several
views, training takes a random one, seeded by the sample number, and an evaluation the first.

Letters: B rows of this host, H W image, L prompt length.
"""

import atexit
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from hybridgen.core.errors import UserError
from hybridgen.data import sources, storage, transforms
from hybridgen.data import text as text_lib
from hybridgen.data.shuffle import draw, order
from hybridgen.data.sources.protocol import Source
from hybridgen.data.sources.reading import read

LINGER = 60  # seconds that a worker process continues after a SIGTERM


def arrange(
    source: Source, positions: np.ndarray, batch: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    """N sample numbers -> (N indices of the source, N bool: not yet seen in a sequential pass)."""
    if hasattr(source, "arrange"):
        return source.arrange(positions, batch, seed, shuffle)
    length = len(source)
    return order(positions, length, seed) if shuffle else positions % length, positions < length


def examples(source: Source, indices: Iterable[int]) -> list[dict]:
    """The items of some indices, unbatched (`image` H W 3 uint8, `text`, `scene`, ...), with `index` and `broken`."""
    out = []
    for index in indices:
        item, broken = read(source, int(index))
        out.append({**item, "index": int(index), "broken": broken})
    return out


class _HostBatch:
    """k -> this host's rows of global batch k. Picklable: worker processes get a copy."""

    def __init__(
        self,
        source: Source,
        tokenizer: text_lib.Tokenizer | None,
        batch: int,
        seed: int,
        rows: Sequence[int],
        shuffle: bool,
        flip: bool,
        classes: int,
        retry: float,
    ):
        self.source, self.tokenizer, self.flip, self.shuffle = source, tokenizer, flip, shuffle
        self.classes, self.retry = classes, retry
        self.batch, self.seed, self.rows = batch, seed, np.asarray(rows, np.int64)

    def __call__(self, k: int) -> dict[str, np.ndarray]:
        positions = k * self.batch + self.rows  # B int64
        indices, valid = arrange(self.source, positions, self.batch, self.seed, self.shuffle)  # B int64, B bool
        own = draw(self.seed, 1, positions)  # B uint64; bit 0: flip, the others: which caption
        samples = [self._sample(*pair) for pair in zip(indices.tolist(), own.tolist(), strict=True)]
        arrays, texts, label, broken = zip(*samples, strict=True)
        out = {
            "id": (positions % 2**32).astype(np.uint32),
            "label": np.asarray(label, np.int32),
            "broken": np.asarray(broken, np.int32),
        }
        # images stay uint8 in the worker: a quarter of the bytes to transfer
        out |= {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
        if self.tokenizer:
            ids, mask = zip(*(self.tokenizer.encode(text) for text in texts), strict=True)
            out |= {"text": np.stack(ids), "text_mask": np.stack(mask)}
        return out if self.shuffle else out | {"valid": valid}

    def _sample(self, index: int, own: int):
        item, broken = read(self.source, index, own if self.shuffle else None, self.retry)
        arrays = {name: value for name, value in item.items() if isinstance(value, np.ndarray)}
        if self.flip and "image" in arrays:
            arrays["image"] = transforms.flip(arrays["image"], own)
        texts, label = item.get("texts") or (item["text"],), item.get("label", 0)
        if self.classes and label >= self.classes:
            name = self.source.name(index)
            raise UserError(f"record {name!r} has the label {label}, but the model has {self.classes} classes")
        return arrays, texts[(own >> 1) % len(texts)], label, broken


def _start_worker(_index: int, _count: int) -> None:
    """Runs first in each worker process: ignores signals that the parent handles, and exits with the parent.

    A scheduler's SIGTERM reaches workers too; the parent still needs batches until all hosts agree on the step to save.
    """
    parent, deadline = os.getppid(), [float("inf")]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: deadline.insert(0, time.monotonic() + LINGER))

    def watch():
        while os.getppid() == parent and time.monotonic() < deadline[0]:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def batches(
    source: Source,
    tokenizer: text_lib.Tokenizer | None,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
    flip: bool = False,
    classes: int = 0,
    retry: float = storage.RETRY,
    workers: int = 0,
    threads: int = 1,
    ahead: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Host batches from global batch `start` on, endless and shuffled in each epoch.

    With shuffle=False, one sequential pass; its last batch is filled up with the first records, and `valid` B bool is
    False for these.

    batch: rows of the *global* batch; rows: those of this process, the only ones that are read (default: all).
    classes: those of the model, if it takes a class: a larger label is an error. retry: seconds for which a record is
    read again while the storage fails.
    workers: processes that prepare batches (they re-import `__main__`: guard it); 0 uses `threads` threads of this
    process (0: the caller's thread). ahead: batches that each prepares in advance.
    Close the returned generator, or let `prefetch` do it. Raises UserError for rows or numbers out of range.
    """
    rows = range(batch) if rows is None else list(rows)
    if batch < 1 or len(rows) < 1 or not all(0 <= row < batch for row in rows):
        raise UserError(f"rows {list(rows)[:8]} are not within 0 and {batch - 1}, those of a global batch of {batch}")
    if start < 0 or workers < 0 or threads < 0 or ahead < 0:
        raise UserError(f"start, workers, threads and ahead must be at least 0: {(start, workers, threads, ahead)}")
    if not 1 <= len(source) < 2**31:
        raise UserError(f"the data source has {len(source)} records, but must have 1 to 2**31 - 1")
    once = source.batches_once(batch) if hasattr(source, "batches_once") else -(-len(source) // batch)
    stop = sys.maxsize // batch - 1 if shuffle else once
    data = grain.MapDataset.range(min(start, stop), stop)
    data = data.map(_HostBatch(source, tokenizer, batch, seed, rows, shuffle, flip, classes, retry))
    # a thread without a free buffer would wait
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads)))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts a worker; this program has none
            flags.FLAGS.mark_as_parsed()
        # through pipes, not shared memory: containers often have only 64 MB of it and crash if they use more
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        data = grain.experimental.WithOptionsIterDataset(data, options)
        data = data.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(ahead, 1)), worker_init_fn=_start_worker
        )
    return _closing(data)


def _closing(data: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(data)
    try:
        for item in iterator:
            yield item | ({"image": transforms.to_float(item["image"])} if "image" in item else {})
    finally:
        iterator.close()


def take_broken(batch: dict[str, np.ndarray]) -> list[int]:
    """Pops `broken` from a host batch -> the indices of the records that were replaced, to be logged."""
    return [int(index) for index in batch.pop("broken") if index >= 0]


def plain(value: Any) -> Any:
    """Config values -> JSON types, so that a fingerprint compares equal after it was written and read."""
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def fingerprint(
    data_config: Mapping[str, Any], source: Source, text: text_lib.Tokenizer | None, *, batch: int, seed: int
) -> dict:
    """Plain values of everything that determines the order and content of the samples.

    It excludes workers and threads, which do not matter, and the path of a folder, which may move (its records matter).
    """
    return plain(
        {
            "source": sources.describe(data_config, source),
            "flip": bool(data_config.get("flip", False)),
            "text": text and {"kind": text.kind, "length": text.length, "digest": text_lib.digest(text)},
            "batch": batch,
            "seed": seed,
        }
    )


def prefetch(iterator: Iterator, put: Callable, depth: int = 2) -> "Prefetch":
    """Iterates over put(item) for the items of `iterator`; a background thread prepares up to `depth` of them ahead.

    put: moves a host batch to the device (jax.device_put, or make_array_from_process_local_data). Exceptions of the
    loader or of put are raised to the consumer, after the batches before them. `close()` (or leaving a `with`) stops
    the thread and closes the iterator; without it the thread ends with the returned object, or with the interpreter.
    """
    return Prefetch(iterator, put, depth)


class Prefetch:
    """The iterator that `prefetch` returns; a context manager too."""

    def __init__(self, iterator: Iterator, put: Callable, depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        thread = threading.Thread(
            target=_fill, args=(iterator, put, self._queue, self._stop), name="prefetch", daemon=True
        )
        # At garbage collection; or at exit, through atexit itself and not weakref's own hook, which may have been
        # installed before JAX's and would then run after it, with the thread still using a device.
        self._finish = weakref.finalize(self, _stop_thread, self._stop, thread)
        self._finish.atexit = False
        atexit.register(self._finish)
        thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is None:
            return item
        self.close()
        raise error

    def close(self) -> None:
        self._finish()
        atexit.unregister(self._finish)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(iterator: Iterator, put: Callable, out: queue.Queue, stop: threading.Event) -> None:
    """The background thread. It has no reference to the `Prefetch` object, so that it can be garbage-collected."""

    def offer(pair) -> None:
        while not stop.is_set():
            try:
                return out.put(pair, timeout=0.1)
            except queue.Full:
                continue

    try:
        for item in iterator:
            if stop.is_set():
                break
            offer((put(item), None))
        else:
            offer((None, StopIteration()))
    except BaseException as error:  # any error must reach the consumer
        offer((None, error))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _stop_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=30)
