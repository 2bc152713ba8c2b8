"""Meshes of devices, and which batches they take.

Axes, outermost first: `dcn` (data parallel across slices), `data`, `fsdp` (data parallel with sharded parameters) and
`tensor`. Every mesh has all four; an axis that a config does not name has size 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hybridgen.core.errors import UserError

MESH_AXES = ("dcn", "data", "fsdp", "tensor")
DATA_AXES = ("dcn", "data", "fsdp")  # rows of a batch are divided over these


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
    ways = int(np.prod([mesh.shape[axis] for axis in DATA_AXES]))
    if batch % accumulate or (batch // accumulate) % ways:
        raise UserError(
            f"batch {batch} in {accumulate} accumulation steps does not divide over {ways} data-parallel devices"
        )


def padded(mesh: Mesh, rows: int) -> int:
    """The least batch of at least `rows` rows that divides over the mesh's data axes."""
    ways = int(np.prod([mesh.shape[axis] for axis in DATA_AXES]))
    return -(-rows // ways) * ways


def platform() -> str:
    """Where the program will run ("cpu", "tpu", "gpu"): that of the mesh in force, else of this machine."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device  # what is compiled for may not be what is here
    return device.platform if device else jax.default_backend()
