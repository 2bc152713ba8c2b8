"""Attention: one function that selects the kernel, and the layer around it.

Masks are descriptions, not dense arrays, so that every kernel supports them: a kind ("full", "causal", or "prefix":
full over the first `prefix` positions and causal after them), and the valid keys. Grouped queries (Ainslie et al. 2023)
have the group as an axis: q is `[b, t, h, g, k]` over `h` key heads.

Letters: b batch, t query positions, s key positions, h key heads, g queries per key head, k head width, d width.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.core.meshes import platform
from hybridgen.core.sharding import shard
from hybridgen.nn import cache as kv
from hybridgen.nn.flash import flash_attention
from hybridgen.nn.linear import Linear, affine, cast, fan_in, few, keeps_axes
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary, rotate


class Mask(NamedTuple):
    """An attention mask. offset: position of the first query (traced while decoding). valid: which keys are visible.

    own: a causal query attends to its own position even if that is not valid (kernel "xla" only).
    """

    kind: str = "full"
    prefix: int = 0
    valid: jax.Array | None = None  # b s
    offset: jax.Array | int = 0
    own: bool = False

    def dense(self, t: int, s: int) -> jax.Array | None:
        """The mask as booleans that broadcast to [b, h, g, t, s], or None if all keys are visible."""
        seen = None
        if self.kind != "full":
            query = self.offset + jnp.arange(t)[:, None]  # t 1
            key = jnp.arange(s)[None, :]  # 1 s
            seen = key <= query
            if self.kind == "prefix":
                seen = seen | ((key < self.prefix) & (query < self.prefix))
            elif self.kind != "causal":
                raise UserError(f"mask kind {self.kind!r} is not one of 'full', 'causal', 'prefix'")
        if self.valid is not None:
            valid = self.valid[:, None, None, None, :]
            valid = valid | (key == query) if self.own else valid
            seen = valid if seen is None else seen & valid
        return seen

    def scope(self, t: int, s: int) -> str:
        """Name scope for profiles and FLOP counts: "attend.{t}x{s}.{number of visible (query, key) pairs}".

        If the offset is traced (with a cache), a chunk counts as if its offset were 0, and a single query as "loop".
        """
        known = isinstance(self.offset, int)
        if self.kind == "full" or (t == 1 and not known):
            return f"attend.{t}x{s}.{t * s if self.kind == 'full' else 'loop'}"
        query = np.arange(t) + (self.offset if known else 0)
        ends = np.where((self.kind == "prefix") & (query < self.prefix), self.prefix, query + 1)
        return f"attend.{t}x{s}.{np.minimum(ends, s).sum()}"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, kernel: str = "auto", relative: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention: `q [b, t, h, g, k]`, `k, v [b, s, h, k]` -> `[b, t, h, g, k]`.

    kernel: "xla" on any platform, "cudnn" on NVIDIA GPUs (half precision), "splash" on TPUs (with a static offset;
    "splash interpreted" runs on any platform, slowly); "auto" selects. The softmax is in at least float32. A query
    without visible keys gives zeros. relative `[h, g, t, s]`: added to the scores (kernel "xla" only). Raises UserError
    for an unknown kernel or one that does not support the arguments.
    """
    special = relative is not None or (mask.own and mask.valid is not None)
    if kernel == "auto":
        kernel = "xla" if special else pick(q, k, mask)
    if special and kernel != "xla":
        raise UserError(f"attention kernel {kernel!r} does not support relative scores and a mask's `own`; use 'xla'")
    if kernel == "cudnn":
        return _cudnn(q, k, v, mask)
    if kernel in ("splash", "splash interpreted"):
        return _splash(q, k, v, mask, interpret=kernel != "splash")
    if kernel != "xla":
        raise UserError(f"attention kernel {kernel!r} is not one of 'auto', 'xla', 'cudnn', 'splash'")
    return _xla(q, k, v, mask, relative)


def pick(q: jax.Array, k: jax.Array, mask: Mask) -> str:
    """The kernel for these shapes on the platform that the program runs on."""
    place = platform()
    if place in ("gpu", "cuda"):
        fits = q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] > 1
        return "cudnn" if fits else "xla"
    # for smaller shapes the attention weights fit on the chip, and one product over all heads is faster
    large = q.shape[1] >= 128 and q.shape[1] * k.shape[1] >= 256 * 256
    fits = large and q.dtype in (jnp.bfloat16, jnp.float32) and isinstance(mask.offset, int)
    return "splash" if fits and place == "tpu" else "xla"


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, interpret: bool) -> jax.Array:
    if not isinstance(mask.offset, int):
        raise UserError("attention kernel 'splash' needs a static mask offset; with a cache use 'xla'")
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    seen = None
    if mask.valid is not None:
        seen = jnp.broadcast_to(mask.dense(t, s), (b, 1, 1, t, s)).any(-1)[:, 0, 0]  # b t
    static = {"kind": mask.kind, "prefix": mask.prefix, "offset": mask.offset}
    return flash_attention(q, k, v, mask.valid, seen, interpret=interpret, **static)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, relative: jax.Array | None) -> jax.Array:
    b, t, h, g, width = q.shape
    # transposed once to heads before positions: all products, also in the backward pass, are then plain batched matrix
    # products; otherwise the CPU backend copies the t x s arrays to transpose them
    q = (q * width**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, h, g * t, width)  # b h gt k
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # b h s k
    scores = _product(q, k, 3).reshape(b, h, g, t, -1)  # b h g t s
    scores = scores if relative is None else scores + relative.astype(scores.dtype)
    low = jnp.finfo(scores.dtype).min
    seen = mask.dense(t, k.shape[2])
    if seen is not None:
        scores = jnp.where(seen, scores, low)
    # the floor makes exp(low - top) zero in a row without visible keys
    top = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), low / 2)
    weights = jnp.exp(scores - top).reshape(b, h, g * t, -1)  # b h gt s
    # normalising after the product touches t*k numbers instead of t*s
    total = weights.sum(-1, keepdims=True)  # b h gt 1
    out = _product(weights.astype(v.dtype), v, 2) / jnp.where(total == 0, 1.0, total)
    return out.astype(q.dtype).reshape(b, h, g, t, width).transpose(0, 3, 1, 2, 4)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Product batched over b and h that contracts the last axis of `x [b, h, m, n]` and `axis` of y, in >= float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=wide)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    b, t, h, g, width = q.shape
    s = k.shape[1]
    # the kernel's own causal mask skips hidden blocks; every other mask is added to the scores
    causal = mask.kind == "causal" and isinstance(mask.offset, int) and mask.offset == 0
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    q = q.reshape(b, t, h * g, width)
    if mask.valid is None and (causal or mask.kind == "full"):
        return kernel(q, k, v).reshape(b, t, h, g, width)
    seen = jnp.broadcast_to(mask.dense(t, s), (b, 1, 1, t, s))[:, 0]  # b 1 t s
    # masks must have even lengths, so a query and a hidden key are added if needed
    odd, short = t % 2, s % 2
    q = jnp.pad(q, ((0, 0), (0, odd), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (k, v))
    out = kernel(q, k, v, mask=jnp.pad(seen, ((0, 0), (0, 0), (0, odd), (0, short))))[:, :t]
    # a row without visible keys would be a mean over hidden ones: zero here, also in its gradient
    return jnp.where(seen.any(-1)[:, 0, :, None, None], out, 0).reshape(b, t, h, g, width)


class Attention(nn.Module):
    """Self-attention, or cross-attention if `context` is given; `x [b, t, d] -> [b, t, d]`, and the cache.

    One product computes queries, keys and values: kernel `[d, h, g + 2, k]`, sharded by key head, so that a device has
    a key head together with its queries. Raises UserError if the heads do not divide by the key heads.
    """

    heads: int
    head_width: int
    kv_heads: int | None = None
    qk_norm: bool = False
    bias: bool = False
    qkv_bias: bool = True  # with `bias`: queries, keys and values have a bias too
    scale: float = 0.0  # factor of the scores; 0: head_width ** -0.5
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        rotary: Rotary | None = None,
        relative: jax.Array | None = None,
        context: jax.Array | None = None,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, kv.Cache | None]:
        h = self.kv_heads or self.heads
        if self.heads % h:
            raise UserError(f"heads {self.heads} (queries) do not divide by kv_heads {h}")
        g, width = self.heads // h, self.head_width
        options = {"bias": self.bias and self.qkv_bias, "dtype": self.dtype}
        if context is None:
            q, k, v = Linear((h, g + 2, width), parts=(g, 1, 1), name="qkv", **options)(x)
            q, k, v = (shard(part, "batch", None, "heads", None, None) for part in (q, k, v))
            k, v = k[..., 0, :], v[..., 0, :]
        else:
            q = Linear((h, g, width), name="q", **options)(x)  # b t h g k
            both = Linear((h, 2, width), name="kv", **options)(context)  # b s h 2 k
            k, v = both[..., 0, :], both[..., 1, :]
        if self.qk_norm:
            q, k = Norm(name="q_norm")(q), Norm(name="k_norm")(k)
        if self.scale:
            q = q * (self.scale * width**0.5)  # kernels divide by the root of the width
        if rotary is not None:
            b, t = q.shape[:2]
            q = rotate(q.reshape(b, t, h * g, width), rotary).reshape(q.shape)
            k = rotate(k, rotary)
        if cache is not None:
            cache, k, v = kv.write(cache, layer, k, v)
            mask = mask._replace(valid=cache["valid"], offset=cache["index"])
        with jax.named_scope(mask.scope(q.shape[1], k.shape[1])):
            out = attend(q, cast(k, self.dtype), cast(v, self.dtype), mask, relative=relative)  # b t h g k
        return _Out(x.shape[-1], self.bias, self.dtype, self.out_scale, name="out")(out), cache


class _Out(nn.Module):
    """Output projection: `x [b, t, h, g, k] -> [b, t, d]`, kernel `[h, g, k, d]`."""

    width: int
    bias: bool
    dtype: str
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[-3:], self.width)
        kernel = cast(self.param("kernel", fan_in(self.scale, axes=3), shape), self.dtype)  # h g k d
        bias = cast(self.param("bias", nn.initializers.zeros, (self.width,)), self.dtype) if self.bias else None
        d = kernel.size // self.width
        if keeps_axes(kernel, few(x.size // d, d)):
            y = jnp.tensordot(x, kernel, 3)
            return y if bias is None else y + bias
        return affine(x.reshape(*x.shape[:-3], -1), kernel.reshape(-1, self.width), bias)
