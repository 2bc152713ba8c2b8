"""The transformer blocks that most systems use: Llama's block, and the adaLN block of diffusion transformers.

Both are pre-norm attention and feed-forward. A system with another block defines it in its own file, from Attention,
MLP, Norm, `modulate` and `dropout`; nn/stack.py scans over any block.

Letters: b batch, t positions, s context positions, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.sharding import shard
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Linear, zeros
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary


class LlamaBlock(nn.Module):
    """Llama's block (Touvron et al. 2023): RMSNorm, rotary positions, gated feed-forward. `x [b, t, d] -> [b, t, d]`.

    With `dropout` and `keys [b]`, one per sample, dropout applies to the outputs of both branches.
    """

    heads: int
    head_width: int
    hidden: int
    kv_heads: int | None = None
    mlp: str = "swiglu"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        rotary: Rotary | None = None,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        options: dict[str, Any] = {"dtype": self.dtype, "out_scale": self.out_scale}
        attend = Attention(
            self.heads, self.head_width, self.kv_heads, self.qk_norm, self.bias, name="attention", **options
        )
        y, cache = attend(
            Norm(eps=self.norm_eps, name="attention_norm")(x), mask, rotary=rotary, cache=cache, layer=layer
        )
        x = x + dropout(y, keys, "attention", layer, self.dropout)
        y = MLP(self.hidden, self.mlp, self.mlp_bias, name="mlp", **options)(
            Norm(eps=self.norm_eps, name="mlp_norm")(x)
        )
        x = x + dropout(y, keys, "mlp", layer, self.dropout)
        return shard(x, "batch", None, None), cache


class AdaLNBlock(nn.Module):
    """The block of DiT (Peebles & Xie 2022, adaLN-zero): a condition `[b, d]` gives shift, scale and gate of both
    branches. With a context (`[b, s, d']`, and its valid positions `[b, s]` or None) it has cross-attention in between.
    """

    heads: int
    head_width: int
    hidden: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    bias: bool = False
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        condition: jax.Array,
        rotary: Rotary | None = None,
        context: tuple[jax.Array, jax.Array | None] | None = None,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        del layer, keys
        options: dict[str, Any] = {"dtype": self.dtype, "out_scale": self.out_scale}
        attention = {"heads": self.heads, "head_width": self.head_width, "bias": self.bias} | options
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = adaln(condition, x.shape[-1], self.dtype)

        y = modulate(Norm(self.norm, self.norm_eps, affine=False, name="attention_norm")(x), shift_a, scale_a)
        y, cache = Attention(name="attention", **attention)(y, mask, rotary=rotary, cache=cache)
        x = x + gate_a * y
        if context is not None:
            features, valid = context
            y = Norm(self.norm, self.norm_eps, name="cross_norm")(x)
            x = x + Attention(name="cross_attention", **attention)(y, Mask(valid=valid), context=features)[0]
        y = modulate(Norm(self.norm, self.norm_eps, affine=False, name="mlp_norm")(x), shift_m, scale_m)
        x = x + gate_m * MLP(self.hidden, self.mlp, self.bias, name="mlp", **options)(y)
        return shard(x, "batch", None, None), cache


def adaln(condition: jax.Array, width: int, dtype: str) -> tuple[jax.Array, ...]:
    """Shift, scale and gate of two branches, `[b, 1, width]` each, from a condition `[b, d]`; called in a block."""
    gates = Linear((6, width), bias=True, dtype=dtype, init=zeros, name="modulation")(nn.silu(condition))  # b 6 d
    gates = shard(gates, "batch", None, "mlp")  # the product is sharded like its kernel ...
    gates = shard(gates, "batch", None, None)  # ... and then gathered, like the activations that it modulates
    return tuple(gates[:, i, None, :] for i in range(6))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x * (1 + scale) + shift`, all `[b, t or 1, d]`."""
    return x * (1 + scale) + shift


def dropout(
    x: jax.Array, keys: jax.Array | None, name: str, layer: jax.Array | int = 0, rate: float = 0.0
) -> jax.Array:
    """Dropout of `x [b, ...]` with one key per sample, `keys [b]`; no change without keys or rate."""
    if keys is None or not rate:
        return x
    kept = rng.bernoulli(rng.fold_in(rng.named(keys, name), layer), 1 - rate, x.shape[1:])
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
