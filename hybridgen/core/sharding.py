"""Meshes and shardings: one table for parameters (path patterns), one for activations (logical axes).

Mesh axes, outermost first: `dcn` (data parallel across slices), `data`, `fsdp` (data parallel with sharded parameters)
and `tensor`. Parameters match the first rule of `PARAM_RULES` whose pattern is found in their path; a stacked layer
axis in front is never sharded. Every parameter must match a rule. Activations are named by
`shard(x, "batch", None, "mlp")`, which does nothing outside a mesh.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridgen.core.errors import UserError

MESH_AXES = ("dcn", "data", "fsdp", "tensor")

# logical axis -> mesh axes
LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": ("dcn", "data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# path pattern -> logical axes of the trailing dimensions (a leading layer axis is added by itself)
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(qkv|kv)/kernel$", ("embed", "heads", None, None)),
    (r"attention/(qkv|kv)/bias$", ("heads", None, None)),
    (r"attention/q/kernel$", ("embed", "heads", None, None)),
    (r"attention/out/kernel$", ("heads", None, None, "embed")),
    (r"mlp/up/kernel$", ("embed", None, "mlp")),
    (r"mlp/up/bias$", (None, "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"modulation/kernel$", ("embed", None, None)),
    (r"modulation/bias$", (None, None)),
    (r"table$", ("vocab", "embed")),
    (r"head/kernel$", ("embed", "vocab")),
    (r"head/bias$", ("vocab",)),
    (r"conv\w*/kernel$", (None, None, None, "embed")),
    (r"codebook$", (None, "embed")),
    (r"relative$", (None, "heads")),
    (r"position$", (None, "embed")),
    (r"null\w*$", (None, None)),
    (r"kernel$", ("embed", None)),
    (r"(scale|bias)$", (None,)),
)


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
    """Mesh over all devices from `{axis: size}`; one size may be -1 (the rest). UserError if it does not divide."""
    devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise UserError(f"mesh axis {sorted(unknown)[0]!r} is not one of {', '.join(MESH_AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or min(size for size in shape.values() if size != -1) < 1:
        raise UserError(f"mesh {dict(sizes)} is not usable: sizes are positive and at most one is -1")
    if devices.size % fixed or (not free and fixed != devices.size):
        raise UserError(f"mesh {dict(sizes)} takes {fixed} devices and there are {devices.size}")
    if free:
        shape[free[0]] = devices.size // fixed
    types, (dcn, *inner) = (AxisType.Auto,) * len(MESH_AXES), shape.values()
    if devices[0].platform != "tpu":  # in order of rank; hosts of GPUs may say that they are slices, and are none
        return Mesh(devices.reshape(tuple(shape.values())), MESH_AXES, axis_types=types)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=types, devices=devices.tolist())
    if len(slices) != dcn:
        raise UserError(f"mesh.dcn {dcn} is not the number of slices, {len(slices)}: between slices is data parallel")
    options = {"allow_split_physical_axes": True}  # an axis may be wider than a side of the slice
    grid = mesh_utils.create_hybrid_device_mesh((1, *inner), (dcn, 1, 1, 1), devices.tolist(), **options)
    return Mesh(grid, MESH_AXES, axis_types=types)


def check_batch(mesh: Mesh, batch: int, accumulate: int = 1) -> None:
    """The global batch must divide over accumulation steps and the mesh's data axes."""
    ways = int(np.prod([mesh.shape[axis] for axis in LOGICAL["batch"]]))
    if batch % accumulate or (batch // accumulate) % ways:
        raise UserError(
            f"batch {batch} in {accumulate} accumulation steps does not divide over {ways} data-parallel devices"
        )


def padded(mesh: Mesh, rows: int) -> int:
    """The least batch of at least `rows` rows that divides over the mesh's data axes."""
    ways = int(np.prod([mesh.shape[axis] for axis in LOGICAL["batch"]]))
    return -(-rows // ways) * ways


def logical_spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of logical axis names. Two logical axes on one mesh axis are an error."""
    spec = [LOGICAL[name] if name else None for name in names]
    used = [axis for axes in spec for axis in axes or ()]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {names} put two dimensions on one mesh axis: {spec}")
    return PartitionSpec(*spec)


def platform() -> str:
    """Where the program will run ("cpu", "tpu", "gpu"): that of the mesh in force, else of this machine."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device  # what is compiled for may not be what is here
    return device.platform if device else jax.default_backend()


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation to the mesh in force, by logical axis names, one a dimension; without a mesh, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    spec = logical_spec(*names)
    return jax.lax.with_sharding_constraint(x, _divisible(spec, x.shape, mesh))


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Drops the axes of `spec` that do not divide their dimension (3 heads over 2 devices stay whole)."""
    kept = []
    for size, axes in zip(shape, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes
        ways = int(np.prod([mesh.shape[axis] for axis in axes])) if axes else 1
        kept.append(axes if axes and size % ways == 0 else None)
    return PartitionSpec(*kept)


def param_spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Rule for one parameter by its path ("prior/blocks/attention/qkv/kernel"). ValueError if no rule matches."""
    for pattern, names in PARAM_RULES:
        if re.search(pattern, path) and len(shape) >= len(names):
            return logical_spec(*(None,) * (len(shape) - len(names)), *names)
    raise ValueError(f"no sharding rule matches parameter {path!r} of shape {shape}")


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a nested dict of parameters (or their averages)."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        spec = param_spec("/".join(str(key.key) for key in path), leaf.shape)
        return NamedSharding(mesh, _divisible(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def gathered(params: Any) -> Any:
    """Constrains a nested dict of parameters to be whole over `fsdp`, in the mesh in force; over `tensor` they stay."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        spec = param_spec("/".join(str(key.key) for key in path), leaf.shape)
        kept = PartitionSpec(*(None if axes in ("fsdp", ("fsdp",)) else axes for axes in spec))
        return jax.lax.with_sharding_constraint(leaf, _divisible(kept, leaf.shape, mesh))

    # the barriers: what was cast to a narrower dtype is sent in it, and nothing is sent again within a loop
    params = jax.lax.optimization_barrier(params)
    return jax.lax.optimization_barrier(jax.tree_util.tree_map_with_path(place, params))


def mirror_shardings(tree: Any, params: Any, mesh: Mesh) -> Any:
    """NamedShardings of an optimiser's state: a moment lies as its parameter does, everything else on every device.

    A moment has the path of its parameter at the end of its own, and its shape; a factored one (Adafactor) has not.
    """
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = dict(zip(shapes, jax.tree.leaves(param_shardings(params, mesh)), strict=True))

    def place(path: tuple, leaf: Any) -> NamedSharding:
        ends = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
        return next((places[end] for end in ends if shapes.get(end) == leaf.shape), replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL["batch"]))


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
    """What `program` makes of all rows of `arrays`, at least `batch` at a time and in one shape: trees of numpy arrays.

    The last rows are filled up with copies of the very last, which are cut off again.
    """
    count, batch = len(next(iter(arrays.values()))), padded(mesh, batch)
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        out = whole(program(shard_batch({name: x[rows] for name, x in arrays.items()}, mesh)))
        yield jax.tree.map(lambda x, kept=count - start: x[:kept], out)


def put(tree: Any, places: Any) -> Any:
    """Arrays that every process has whole, laid out by `places`: a sharding, or a tree of them."""
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
    """Global arrays as numpy, in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
