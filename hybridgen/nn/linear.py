"""Linear layers and embedding tables.

Compute dtype: "bfloat16" casts inputs and weights to bfloat16; "float32" promotes to *at least* float32, so that a
float64 test stays float64. Reductions that lose digits (norms, softmax, losses) use `at_least_float32`.

Letters: b batch, n tokens, d width in, f width out, v rows of a table.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.sharding import gathered, shard

Init = Callable[..., jax.Array]
FEW = 64  # rows of a decoding step, unlike a training step; see `few`


def few(rows: int, d: int) -> bool:
    """Whether the product of `rows` rows with a kernel of `d` rows is bound by reading the kernel."""
    return rows <= max(FEW, d // 2)


def cast(x: jax.Array, dtype: str) -> jax.Array:
    """`x` in the compute dtype: exactly bfloat16 if `dtype` is that, otherwise at least `dtype`."""
    wanted = jnp.dtype(dtype)
    return x.astype(wanted if wanted == jnp.bfloat16 else jnp.promote_types(x.dtype, wanted))


def cast_for_inference(params: Any, dtype: str, gather: bool = True) -> Any:
    """Parameters for a loop over a model that computes in `dtype`; results do not change.

    Kernels and tables are cast to `dtype` before the loop. Otherwise layers cast them in every iteration and read twice
    the bytes, unless the compiler moves the cast (XLA for GPUs does not). With `gather` they are gathered over the mesh
    axis `fsdp` before the loop, instead of in every iteration.
    """

    def narrow(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in ("kernel", "table") else leaf

    if jnp.dtype(dtype) == jnp.bfloat16:
        params = jax.tree_util.tree_map_with_path(narrow, params)
    return gathered(params) if gather else params


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x`, promoted to at least float32: for norms, softmax and losses."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def fan_in(scale: float = 1.0, axes: int = 1) -> Init:
    """Truncated normal with variance scale / fan-in: the product of the first `axes` axes of the kernel."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan = 1
        for size in shape[:axes]:
            fan *= size
        # 0.87962566 is the standard deviation of a unit normal cut at two sigma
        std = (scale / fan) ** 0.5 / 0.87962566
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


def normal(std: float) -> Init:
    """Normal with this standard deviation."""
    return nn.initializers.normal(std)


zeros = nn.initializers.zeros
ones = nn.initializers.ones


class Linear(nn.Module):
    """`x [..., d] -> [..., *features]`; parameters `kernel [d, *features]` and optionally `bias [*features]`.

    wide: the result is in at least float32 (logits).

    parts: splits the second to last feature axis: the result is a list of arrays, each from its own product. Splitting
    the result of one product is slower, because the gradient pads every part to the full size and sums them. For few
    rows it is one product nevertheless: its time is that of reading the kernel, and splitting would copy the kernel.
    """

    features: int | tuple[int, ...]
    bias: bool = False
    dtype: str = "float32"
    init: Init = fan_in()
    parts: tuple[int, ...] = ()
    wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        kernel = cast(self.param("kernel", self.init, (x.shape[-1], *features)), self.dtype)  # d *features
        bias = cast(self.param("bias", zeros, features), self.dtype) if self.bias else None
        x = cast(x, self.dtype)
        if not self.parts:
            return affine(x, kernel, bias, self.wide)
        if few(x.size // x.shape[-1], x.shape[-1]):
            y = affine(x, kernel, bias, self.wide)
            return jax.lax.split(y, self.parts, y.ndim - 2)
        kernels = jax.lax.split(kernel, self.parts, kernel.ndim - 2)
        biases = [None] * len(kernels) if bias is None else jax.lax.split(bias, self.parts, bias.ndim - 2)
        return [affine(x, *pair) for pair in zip(kernels, biases, strict=True)]


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, wide: bool = False) -> jax.Array:
    """`x [..., d] @ kernel [d, *features] + bias`, as a product of two matrices; wide: in at least float32.

    With flattened leading axes, the kernel's gradient contracts one axis; with more axes, the CPU backend copies both
    operands to transpose them, which takes as long as the product. If `keeps_axes`, the kernel is not flattened.
    """
    d, *features = kernel.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32) if wide else None
    rows = x.reshape(-1, d)
    if keeps_axes(kernel, few(rows.shape[0], d)):
        y = jnp.tensordot(rows, kernel, 1, preferred_element_type=dtype)
    else:
        y = jnp.matmul(rows, kernel.reshape(d, -1), preferred_element_type=dtype)
    y = y.reshape(*x.shape[:-1], *features)
    return y if bias is None else y + bias


def keeps_axes(kernel: jax.Array, few_rows: bool) -> bool:
    """Whether the axes of a kernel must not be flattened into one, on a mesh that shards kernels over `tensor`.

    Flattening gathers a sharded axis over `tensor` unless it is the first of the flattened axes. So `[d, n, f]`, which
    is sharded in its last axis, is never flattened. An attention kernel `[d, h, n, k]` or `[h, n, k, d]` is sharded by
    head, the first axis; if the heads do not divide, it is sharded by `k`, and gathering it is cheaper than gathering
    the results, except for few rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1:
        return False
    return kernel.ndim == 3 or (kernel.ndim > 3 and few_rows)


class Embed(nn.Module):
    """Table lookup `ids [...] int -> [..., d]`; parameter `table [v, d]`. `attend(x)`: logits with the same table."""

    size: int
    width: int
    dtype: str = "float32"
    init: Init = normal(0.02)

    def setup(self) -> None:
        self.table = self.param("table", self.init, (self.size, self.width))  # v d

    def __call__(self, ids: jax.Array) -> jax.Array:
        # gathered over fsdp like any kernel: rows with a part of the width would have to be exchanged
        return lookup(shard(cast(self.table, self.dtype), "vocab", None), ids)

    def attend(self, x: jax.Array) -> jax.Array:
        return affine(cast(x, self.dtype), cast(self.table, self.dtype).T, wide=True)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `[..., d]` of `table [v, d]` at `ids [...]`; all lookups use this function."""
    rows = jnp.take(table, ids, axis=0, mode="clip")  # ... d
    return shard(rows, "batch", *(None,) * (rows.ndim - 1))
