"""Shardings of parameters, by the table in core/param_rules.py, and of activations, by a table of logical axes.

An activation is constrained by `shard(x, "batch", None, "mlp")`, which does nothing outside a mesh and does not shard
an axis that the mesh does not divide evenly. A parameter's rule lists alternative axes for this case; a large parameter
that would still be replicated is an error when its sharding is made.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hybridgen.core.errors import UserError
from hybridgen.core.meshes import DATA_AXES
from hybridgen.core.param_rules import find_rule
from hybridgen.core.placement import replicated

LARGE = 1_000_000  # a parameter with more elements must not be replicated

# logical axis of an activation -> mesh axes
LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def logical_spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of logical axis names. Raises ValueError for two logical axes on one mesh axis."""
    spec = [LOGICAL[name] if name else None for name in names]
    used = [axis for axes in spec for axis in axes or ()]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {names} put two dimensions on one mesh axis: {spec}")
    return PartitionSpec(*spec)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to the current mesh by logical axis names, one for each dimension; no-op without a mesh.

    Raises ValueError if the number of names is not that of dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    spec = logical_spec(*names)
    return jax.lax.with_sharding_constraint(x, _divisible(spec, x.shape, mesh))


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Drops the axes of `spec` that do not divide their dimension (3 heads over 2 devices are not sharded)."""
    kept = []
    for size, axes in zip(shape, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes
        ways = int(np.prod([mesh.shape[axis] for axis in axes])) if axes else 1
        kept.append(axes if axes and size % ways == 0 else None)
    return PartitionSpec(*kept)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of a parameter ("prior/blocks/layers/attention/qkv/kernel"). Raises UserError without a rule.

    `tensor` takes the first axis of its rule that it divides evenly, then `fsdp` the first such axis that is left.
    """
    rule, start = find_rule(path, shape)
    spec: list[str | None] = [None] * len(shape)
    for axis, letters in (("tensor", rule.tensor), ("fsdp", rule.fsdp)):
        ways = mesh.shape[axis]
        places = (start + rule.axes.index(letter) for letter in letters)
        best = next((i for i in places if spec[i] is None and shape[i] % ways == 0), None)
        if ways > 1 and best is not None:
            spec[best] = axis
    return PartitionSpec(*spec)


def check_divided(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError for a large parameter that is replicated although the mesh has an axis that its rule uses.

    On a mesh whose `fsdp` is 1, a rule that lists axes for `fsdp` only replicates its parameters without an error.
    """
    if math.prod(shape) <= LARGE or any(param_spec(path, shape, mesh)):
        return
    rule, start = find_rule(path, shape)
    sizes = dict(zip(rule.axes, shape[start:], strict=True))
    reasons = [
        f"mesh axis {axis} {mesh.shape[axis]} divides none of {', '.join(f'{x} {sizes[x]}' for x in letters)}"
        for axis, letters in (("tensor", rule.tensor), ("fsdp", rule.fsdp))
        if letters and mesh.shape[axis] > 1
    ]
    if not rule.tensor + rule.fsdp and max(mesh.shape["tensor"], mesh.shape["fsdp"]) > 1:
        reasons = ["its rule lists no axis to shard"]
    if reasons:
        raise UserError(
            f"parameter {path!r} of shape {tuple(shape)}, {math.prod(shape):,} elements, would be replicated on every "
            f"device: {'; '.join(reasons)} (rule {rule.path!r}, axes {rule.axes!r}, in hybridgen/core/param_rules.py)"
        )


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings for a nested dict of parameters (or their averages). Raises the UserError of `check_divided`."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = _name(path)
        check_divided(name, leaf.shape, mesh)
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def gathered(params: Any) -> Any:
    """Gathers a nested dict of parameters over the current mesh's `fsdp`; they stay sharded over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        spec = param_spec(_name(path), leaf.shape, mesh)
        kept = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, kept)

    # the barriers: parameters cast to a narrower dtype are sent in it, and a loop does not gather them again
    params = jax.lax.optimization_barrier(params)
    return jax.lax.optimization_barrier(jax.tree_util.tree_map_with_path(place, params))


def mirror_shardings(tree: Any, params: Any, mesh: Mesh) -> Any:
    """NamedShardings of an optimiser's state: a moment is sharded like its parameter, everything else is replicated.

    A moment's path ends in its parameter's path and it has the same shape; factored moments (Adafactor) have not.
    """
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = dict(zip(shapes, jax.tree.leaves(param_shardings(params, mesh)), strict=True))

    def place(path: tuple, leaf: Any) -> NamedSharding:
        ends = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
        return next((places[end] for end in ends if shapes.get(end) == leaf.shape), replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, tree)
