"""From a random-access source to batches: a seeded shuffle without state, the rows a host holds, prefetch to a device.

    source = sources.build(config.data, "train")
    tokenizer = text.build(config.data, source)
    with prefetch(batches(source, tokenizer, batch=64, seed=0, start=step), jax.device_put) as loader:
        for batch in loader: ...

**The data position is a pure function of (seed, step).** Sample number p of a run is row p % batch of global batch
p // batch; it is read from `order(p)`, a new permutation of the source each epoch. So global batch k holds the same
samples whatever the number of hosts, workers or restarts, and nothing about data is saved but k and a fingerprint.
Grain maps k to a batch in threads or worker processes. Its own shuffle is not used: it walks a block of at least 2**16
indices, which takes 20 us an index for 3,000 records and 10 ms for six, and may change with its version.

A host batch is a dict of numpy arrays: `id` B uint32, `image` B H W 3 float32 in [-1, 1], `text` B L int32 and
`text_mask` B L bool (not without a text tokenizer), `label` B int32 (0 where a source has no classes), `broken` B int32
(-1, or the index of the record that could not be read and was replaced by the next good one; `take_broken` pops it),
and `valid` B bool when not shuffling.

Letters: B rows this host holds, H W picture, L prompt length.
"""

import atexit
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from hybridgen.data import sources, transforms
from hybridgen.data import text as text_lib
from hybridgen.errors import UserError

TRIES = 100  # broken records in a row before a run is stopped: by then the source itself is wrong
LINGER = 60  # seconds that a worker process goes on after a SIGTERM


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): uint64 -> well-spread uint64, of any shape."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(seed: int, stream: int, positions: np.ndarray) -> np.ndarray:
    """N uint64: one random number for each of N positions, the same whoever draws it."""
    key = _mix(_mix(np.asarray([seed % 2**64], np.uint64)) + np.uint64(stream))
    return _mix(key + np.asarray(positions).astype(np.uint64))


def order(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """N sample numbers -> N indices below `length`: in each epoch a new permutation of them all.

    A Feistel network over the fewest bits that hold an index, walked until it lands on one (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): nothing is stored, and an epoch may be as long as it likes.
    """
    epoch, index = np.divmod(np.asarray(positions, np.int64), length)
    bits = max(1, (length - 1).bit_length())
    low = (bits + 1) // 2  # width of the lower half
    low_mask, high_mask, low = np.uint64(2**low - 1), np.uint64(2 ** (bits - low) - 1), np.uint64(low)
    keys = [draw(seed, stream, epoch) for stream in range(2, 10)]  # 8 rounds of N uint64
    out, walk = index.astype(np.uint64), np.arange(index.size)
    while walk.size:
        high, rest = out[walk] >> low, out[walk] & low_mask
        for i, key in enumerate(keys):
            if i % 2:
                rest = rest ^ (_mix(high + key[walk]) & low_mask)
            else:
                high = high ^ (_mix(rest + key[walk]) & high_mask)
        out[walk] = high << low | rest
        walk = walk[out[walk] >= length]
    return out.astype(np.int64)


def read(source, index: int) -> tuple[dict, int]:
    """-> (item, -1), or the item of the next good index and `index` itself where record `index` is broken.

    The rule is fixed (index + 1, + 2, ... modulo the length), so a broken record changes no other sample.
    UserError after `TRIES` broken records in a row.
    """
    tried = min(len(source), TRIES)
    for step in range(tried):
        try:
            return source[(index + step) % len(source)], index if step else -1
        except sources.BrokenRecord as error:
            last = str(error)  # the exception itself would hold this frame, and this frame the exception
    raise UserError(f"{tried} records in a row cannot be read, from {source.name(index)} on; the last one: {last}")


def examples(source, indices: Iterable[int]) -> list[dict]:
    """The items of some indices as they are (`image` H W 3 uint8, `text`, `scene`, ...), with `index` and `broken`."""
    out = []
    for index in indices:
        item, broken = read(source, int(index))
        out.append({**item, "index": int(index), "broken": broken})
    return out


class _HostBatch:
    """k -> the rows of global batch k that this host holds. Picklable: worker processes get a copy."""

    def __init__(self, source, tokenizer, batch: int, seed: int, rows: Sequence[int], shuffle: bool, flip: bool):
        self.source, self.tokenizer, self.flip, self.shuffle = source, tokenizer, flip, shuffle
        self.batch, self.seed, self.rows = batch, seed, np.asarray(rows, np.int64)

    def __call__(self, k: int) -> dict[str, np.ndarray]:
        positions = k * self.batch + self.rows  # B int64
        length = len(self.source)
        indices = order(positions, length, self.seed) if self.shuffle else positions % length  # B int64
        own = draw(self.seed, 1, positions)  # B uint64; bit 0: flip, the others: which caption
        samples = [self._sample(*pair) for pair in zip(indices.tolist(), own.tolist(), strict=True)]
        image, texts, label, broken = zip(*samples, strict=True)
        out = {
            "id": (positions % 2**32).astype(np.uint32),
            "image": np.stack(image),  # uint8 until it has left the worker: a quarter of the bytes to hand over
            "label": np.asarray(label, np.int32),
            "broken": np.asarray(broken, np.int32),
        }
        if self.tokenizer:
            ids, mask = zip(*(self.tokenizer.encode(text) for text in texts), strict=True)
            out |= {"text": np.stack(ids), "text_mask": np.stack(mask)}
        return out if self.shuffle else out | {"valid": positions < length}

    def _sample(self, index: int, own: int):
        item, broken = read(self.source, index)
        image = transforms.flip(item["image"], own) if self.flip else item["image"]
        texts = item.get("texts") or (item["text"],)
        return image, texts[(own >> 1) % len(texts)], item.get("label", 0), broken


def _start_worker(_index: int, _count: int) -> None:
    """Runs first in each worker process: signals to the whole group are the parent's to answer, none outlives it.

    A scheduler's SIGTERM reaches workers too; the parent still needs batches until all hosts have agreed where to save.
    """
    parent, deadline = os.getppid(), [float("inf")]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: deadline.insert(0, time.monotonic() + LINGER))

    def watch():
        while os.getppid() == parent and time.monotonic() < deadline[0]:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def batches(source, tokenizer, *, batch: int, seed: int, start: int = 0, rows: Sequence[int] | None = None,
            shuffle: bool = True, flip: bool = False, workers: int = 0, threads: int = 1,
            ahead: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """Host batches from global batch `start` on: without end, shuffled anew each epoch; or, with shuffle=False, one
    sequential pass whose last batch is filled up from the start of the source, with a `valid` B bool to tell.

    batch: rows of the *global* batch; rows: those that this process holds, and only they are read (default all).
    workers: processes that prepare batches (they re-import `__main__`: guard it); 0 reads in `threads` threads of this
    process (0: none, in the caller's own). ahead: batches each of them prepares in advance.
    Close the returned generator, or let `prefetch` do it.
    """
    rows = range(batch) if rows is None else list(rows)
    if batch < 1 or len(rows) < 1 or not all(0 <= row < batch for row in rows):
        raise UserError(f"rows {list(rows)[:8]} do not lie in a global batch of {batch}")
    if start < 0 or workers < 0 or threads < 0 or ahead < 0:
        raise UserError(f"start, workers, threads and ahead must not be negative: {(start, workers, threads, ahead)}")
    if not 1 <= len(source) < 2**31:
        raise UserError(f"a source must have 1 to 2**31 - 1 records, this one has {len(source)}")
    stop = sys.maxsize // batch - 1 if shuffle else -(-len(source) // batch)
    data = grain.MapDataset.range(min(start, stop), stop)
    data = data.map(_HostBatch(source, tokenizer, batch, seed, rows, shuffle, flip))
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its absl flags when it starts a worker; we have none of our own
            flags.FLAGS.mark_as_parsed()
        # Through pipes, not shared memory: a container often has 64 MB of it, and dies on using more.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        data = grain.experimental.WithOptionsIterDataset(data, options)
        data = data.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(ahead, 1)),
                                worker_init_fn=_start_worker)
    return _closing(data)


def _closing(data: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(data)
    try:
        for item in iterator:
            yield item | {"image": transforms.to_float(item["image"])}
    finally:
        iterator.close()


def take_broken(batch: dict[str, np.ndarray]) -> list[int]:
    """Pops `broken` off a host batch -> the indices of the records replaced in it, to be counted and named."""
    return [int(index) for index in batch.pop("broken") if index >= 0]


def _plain(value: Any) -> Any:
    """Config values -> JSON types, so that a fingerprint compares equal after a trip through a file."""
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def fingerprint(data_config, source, text, *, batch: int, seed: int) -> dict:
    """Plain values of everything that decides which sample is where and what is in it.

    Not in it: workers and threads, which change nothing, and the path of a folder, which may move (its records are).
    """
    return _plain({
        "source": sources.describe(data_config, source),
        "flip": bool(data_config.get("flip", False)),
        "text": text and {"kind": text.kind, "length": text.length, "digest": text_lib.digest(text)},
        "batch": batch,
        "seed": seed,
    })


def prefetch(iterator: Iterator, put: Callable, depth: int = 2) -> "Prefetch":
    """Iterates over put(item) for the items of `iterator`, up to `depth` of them made ahead in a background thread.

    put: moves a host batch to the device (jax.device_put, or make_array_from_process_local_data). What the loader or
    put raises is raised to the consumer, after the batches before it. `close()` (or leaving a `with`) stops the thread
    and closes the iterator; without it the thread ends with the returned object, or with the interpreter.
    """
    return Prefetch(iterator, put, depth)


class Prefetch:
    """The iterator that `prefetch` returns; a context manager too."""

    def __init__(self, iterator: Iterator, put: Callable, depth: int):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(iterator, put, self._queue, self._stop),
                                  name="prefetch", daemon=True)
        # At garbage collection; or at exit, through atexit itself and not weakref's own hook, which may have been
        # installed before JAX's and would then run after it, with the thread still using a device.
        self._finish = weakref.finalize(self, _stop_thread, self._stop, thread)
        self._finish.atexit = False
        atexit.register(self._finish)
        thread.start()

    def __iter__(self):
        return self

    def __next__(self):
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _fill(iterator: Iterator, put: Callable, out: queue.Queue, stop: threading.Event) -> None:
    """The background thread. It holds no reference to the `prefetch` object, which may thus be collected."""

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
    except BaseException as error:  # whatever it is, the consumer must see it, not a thread that went away
        offer((None, error))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _stop_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=30)
