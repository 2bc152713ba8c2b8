"""Device meshes, and the batch sizes that they can divide.

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
    """Mesh over all devices from `{axis: size}`; one size may be -1 (all remaining devices).

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise UserError(f"mesh axis {sorted(unknown)[0]!r} is not one of {', '.join(MESH_AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or min(size for size in shape.values() if size != -1) < 1:
        raise UserError(f"mesh {dict(sizes)} is not valid: sizes must be positive, and at most one may be -1")
    if devices.size % fixed or (not free and fixed != devices.size):
        raise UserError(f"mesh {dict(sizes)} needs {fixed} devices, but there are {devices.size}")
    if free:
        shape[free[0]] = devices.size // fixed
    types, (dcn, *inner) = (AxisType.Auto,) * len(MESH_AXES), shape.values()
    if devices[0].platform != "tpu":  # in order of rank; GPU hosts may report a slice_index though there are no slices
        return Mesh(devices.reshape(tuple(shape.values())), MESH_AXES, axis_types=types)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=types, devices=devices.tolist())
    if len(slices) != dcn:
        raise UserError(f"mesh.dcn {dcn} must be the number of slices, {len(slices)}: slices are data parallel")
    options = {"allow_split_physical_axes": True}  # a mesh axis may be larger than a dimension of the slice
    grid = mesh_utils.create_hybrid_device_mesh((1, *inner), (dcn, 1, 1, 1), devices.tolist(), **options)
    return Mesh(grid, MESH_AXES, axis_types=types)


def check_batch(mesh: Mesh, batch: int, accumulate: int = 1) -> None:
    """Raises UserError if the global batch does not divide over accumulation steps and the mesh's data axes."""
    ways = int(np.prod([mesh.shape[axis] for axis in DATA_AXES]))
    if batch % accumulate or (batch // accumulate) % ways:
        raise UserError(
            f"batch {batch} in {accumulate} accumulation steps does not divide over {ways} data-parallel devices"
        )


def padded(mesh: Mesh, rows: int) -> int:
    """The smallest multiple of the mesh's data-parallel devices that is at least `rows`."""
    ways = int(np.prod([mesh.shape[axis] for axis in DATA_AXES]))
    return -(-rows // ways) * ways


def platform() -> str:
    """The platform that the program runs on ("cpu", "tpu", "gpu"): of the current mesh, else of this machine."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device  # a program may be compiled for devices of another machine
    return device.platform if device else jax.default_backend()
