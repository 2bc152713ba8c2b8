"""T5's encoder (Raffel et al. 2020; gated as in T5 1.1 and Flan): bidirectional, with relative positions only.

Attention scores are not divided by the root of the head width, and a table [buckets, heads], shared by all layers, is
added to them. A text may have any length.

Role: `encode(text, mask) -> features b l d, mask`. There is no pooled vector.

Letters: b batch, l text positions, d width, h heads.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.sharding import shard
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Embed, cast, normal
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import relative_buckets
from hybridgen.nn.stack import Stack

ROLE = "text"
PARTS = ()


class T5Block(nn.Module):
    """Pre-norm with RMSNorm and without biases, `x [b, l, d] -> [b, l, d]`; `relative [h, 1, l, l]` adds to scores."""

    heads: int
    head_width: int
    hidden: int
    mlp: str
    norm_eps: float
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        relative: jax.Array,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        del layer, keys
        options: dict[str, Any] = {"dtype": self.dtype, "out_scale": self.out_scale}
        attend = Attention(self.heads, self.head_width, scale=1.0, name="attention", **options)
        x = x + attend(Norm(eps=self.norm_eps, name="attention_norm")(x), mask, relative=relative)[0]
        y = Norm(eps=self.norm_eps, name="mlp_norm")(x)
        x = x + MLP(self.hidden, self.mlp, name="mlp", **options)(y)
        return shard(x, "batch", None, None), cache


class T5Encoder(nn.Module):
    """`text [b, l] int -> [b, l, d]`; positions outside `mask [b, l]` are not attended to."""

    vocab: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_width: int = 64
    hidden: int = 10240
    mlp: str = "geglu"
    norm_eps: float = 1e-6
    buckets: int = 32
    farthest: int = 128  # all distances from this one on share a bucket
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        self.words = Embed(self.vocab, self.width, self.dtype, normal(1.0))
        self.relative = self.param("relative", normal(self.width**-0.5), (self.buckets, self.heads))
        block = {"heads": self.heads, "head_width": self.head_width, "hidden": self.hidden, "mlp": self.mlp}
        block |= {"norm_eps": self.norm_eps, "dtype": self.dtype}
        self.blocks = Stack(self.depth, T5Block, block, unroll=self.unroll)
        self.norm = Norm(eps=self.norm_eps)

    def scores(self, length: int) -> jax.Array:
        """The bias that is added to the attention scores, `[h, 1, l, l]`."""
        distance = np.arange(-length + 1, length)  # key position minus query position
        rows = cast(self.relative, "float32")[relative_buckets(distance, self.buckets, self.farthest)]  # 2l-1 h
        places = np.arange(length)[None, :] - np.arange(length)[:, None] + length - 1  # l l
        return jnp.moveaxis(rows[places], -1, 0)[:, None]

    def states(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The output of each layer, `[depth, b, l, d]`."""
        scores = self.scores(text.shape[1])
        return self.blocks(self.words(text), Mask(valid=mask), relative=scores, every=True)[0]

    def __call__(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.norm(self.blocks(self.words(text), Mask(valid=mask), relative=self.scores(text.shape[1]))[0])


def build(config: Any) -> T5Encoder:
    return T5Encoder(**config)


def init(model: T5Encoder, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del specs, parts
    return {"params": model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], "extra": {}}


def encode(
    model: T5Encoder, params: Any, extra: Any, text: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Features `[b, l, d]` and the mask of valid positions (without a mask: all)."""
    del extra
    seen = jnp.ones(text.shape, bool) if mask is None else mask
    return model.apply({"params": params}, text, mask), seen
