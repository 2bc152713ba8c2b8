"""Transfers of arrays between host and mesh devices, in one process or several (each with some of the devices)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridgen.core.meshes import DATA_AXES, padded


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A sharding that divides an array's first axis over the data axes."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """Rows of the global batch that this process's devices hold, in order; several hosts may hold the same rows."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(batch))})


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of each entry."""
    place = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), place)
    return {name: jax.make_array_from_process_local_data(place, rows) for name, rows in batch.items()}


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, rows over the data axes, from all rows of each entry, which every process has."""
    return put(dict(batch), batch_sharding(mesh))


def by_batches(program: Callable, arrays: Mapping[str, np.ndarray], batch: int, mesh: Mesh) -> Iterator[Any]:
    """Runs `program` on all rows of `arrays`, in batches of one shape (at least `batch` rows) -> trees of numpy arrays.

    The last batch is padded with copies of the last row; their outputs are removed.
    """
    count, batch = len(next(iter(arrays.values()))), padded(mesh, batch)
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        out = whole(program(shard_batch({name: x[rows] for name, x in arrays.items()}, mesh)))
        yield jax.tree.map(lambda x, kept=count - start: x[:kept], out)


def put(tree: Any, places: Any) -> Any:
    """Places arrays, which every process has in full, by `places`: a sharding, or a tree of shardings."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(x: Any, place: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=place)(x)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(one, tree, places)


def whole(tree: Any) -> Any:
    """Gathers global arrays into numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
