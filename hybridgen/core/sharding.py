"""Shardings: one table for parameters (path patterns), one for activations (logical axes).

Parameters match the first rule of `PARAM_RULES` whose pattern is found in their path; a stacked layer
axis in front is never sharded. Every parameter must match a rule. Activations are named by
`shard(x, "batch", None, "mlp")`, which does nothing outside a mesh.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridgen.core.meshes import DATA_AXES
from hybridgen.core.placement import replicated

# logical axis -> mesh axes
LOGICAL: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
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


def logical_spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of logical axis names. Two logical axes on one mesh axis are an error."""
    spec = [LOGICAL[name] if name else None for name in names]
    used = [axis for axes in spec for axis in axes or ()]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {names} put two dimensions on one mesh axis: {spec}")
    return PartitionSpec(*spec)


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
