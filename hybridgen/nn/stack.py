"""The transformer block, and a stack of them by scan over depth.

One block serves language models and diffusion transformers: pre-norm attention and feed-forward, with options that a
config sets. With `modulated`, a condition vector gives shift, scale and gate of both branches (adaLN-zero, Peebles &
Xie 2022). Layers are stacked on a leading axis of every parameter; `unroll` layers run per iteration of the scan (all
of them: faster to run and slower to compile), and `remat` recomputes activations in the backward pass. For decoding
the layers may also stand `apart`, each with parameters and a cache of its own, and run one by one. With `dropout` and
one key a sample, both branches lose some of their outputs (Srivastava et al. 2014).

Letters: b batch, t positions, s context positions, d width, l layers, h key heads, g queries per key head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.core.sharding import platform, shard
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Linear, zeros
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.position import Rotary

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """`x [b, t, d] -> [b, t, d]` and the cache. Context `[b, s, d']` is attended to if given."""

    heads: int
    head_width: int
    hidden: int
    kv_heads: int | None = None
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 0.0  # of the norm before the feed-forward; 0: as norm_eps
    mlp_norm_affine: bool = False  # that norm has scale and bias though the block is modulated
    qk_norm: bool = False
    bias: bool = False
    mlp_bias: bool | None = None  # None: as bias
    qkv_bias: bool = True  # with `bias`, queries, keys and values have one too
    scale: float = 0.0  # of the attention scores; 0: head_width ** -0.5
    dropout: float = 0.0
    modulated: bool = False
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
        condition: jax.Array | None = None,
        context: tuple[jax.Array, jax.Array | None] | None = None,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        def norm(name: str, eps: float = 0.0, affine: bool = False) -> Norm:
            return Norm(self.norm, eps or self.norm_eps, affine=affine or not self.modulated, name=name)

        attention = {
            "heads": self.heads,
            "head_width": self.head_width,
            "kv_heads": self.kv_heads,
            "qk_norm": self.qk_norm,
            "bias": self.bias,
            "qkv_bias": self.qkv_bias,
            "scale": self.scale,
            "dtype": self.dtype,
            "out_scale": self.out_scale,
        }
        gates = (None,) * 6
        if self.modulated:
            options = {"bias": True, "dtype": self.dtype, "init": zeros}
            gates = Linear((6, x.shape[-1]), name="modulation", **options)(nn.silu(condition))  # b 6 d
            gates = tuple(gates[:, i, None, :] for i in range(6))  # six of b 1 d
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = gates

        y = modulate(norm("attention_norm")(x), shift_a, scale_a)
        attend = Attention(name="attention", **attention)
        y, cache = attend(y, mask, rotary=rotary, relative=relative, cache=cache, layer=layer)
        y = dropped(y, keys, "attention", layer, self.dropout)
        x = x + (y if gate_a is None else gate_a * y)
        if context is not None:
            features, valid = context
            y = Norm(self.norm, self.norm_eps, name="cross_norm")(x)
            x = x + Attention(name="cross_attention", **attention)(y, Mask(valid=valid), context=features)[0]
        y = modulate(norm("mlp_norm", self.mlp_norm_eps, self.mlp_norm_affine)(x), shift_m, scale_m)
        bias = self.bias if self.mlp_bias is None else self.mlp_bias
        y = MLP(self.hidden, self.mlp, bias, self.dtype, self.out_scale, name="mlp")(y)
        y = dropped(y, keys, "mlp", layer, self.dropout)
        x = x + (y if gate_m is None else gate_m * y)
        return shard(x, "batch", None, None), cache


def modulate(x: jax.Array, shift: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    """`x * (1 + scale) + shift`, or `x` without a condition."""
    return x if shift is None else x * (1 + scale) + shift


def dropped(
    x: jax.Array, keys: jax.Array | None, name: str, layer: jax.Array | int = 0, rate: float = 0.0
) -> jax.Array:
    """Dropout of `x [b, ...]` by one key a sample, `keys [b]`; `x` as it is without keys or rate."""
    if keys is None or not rate:
        return x
    kept = rng.bernoulli(rng.fold_in(rng.named(keys, name), layer), 1 - rate, x.shape[1:])
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Stack(nn.Module):
    """`depth` blocks; parameters carry a leading layer axis. `block` holds Block's options.

    `every`: in place of the last block's output `[b, t, d]`, that of each, `[l, b, t, d]`. A condition is `[b, d]`, or
    `[l, b, d]`: one of its own for each block.
    """

    depth: int
    block: Any  # hashable: tuple of (option, value)
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        rotary: Rotary | None = None,
        relative: jax.Array | None = None,
        condition: jax.Array | None = None,
        context: tuple[jax.Array, jax.Array | None] | None = None,
        cache: kv.Cache | None = None,
        keys: jax.Array | None = None,
        every: bool = False,
    ) -> tuple[jax.Array, kv.Cache | None]:
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        options = dict(self.block)
        # deep residual branches start smaller, so that the sum over layers keeps its variance (GPT-2)
        options.setdefault("out_scale", 1.0 / (2 * self.depth))
        kind = mask.kind, mask.prefix
        valid, offset, own = mask.valid, mask.offset, mask.own
        by_layer = condition is not None and condition.ndim == 3

        def body(block: Block, carry: tuple, layer: jax.Array) -> tuple[tuple, jax.Array | None]:
            x, cache = carry
            x, cache = block(
                x,
                Mask(*kind, valid, offset, own),
                rotary=rotary,
                relative=relative,
                condition=condition[layer] if by_layer else condition,
                context=context,
                cache=cache,
                layer=layer,
                keys=keys,
            )
            return (x, cache), x if every else None

        if self.has_variable("params", "layer_0"):  # of `apart`
            each = []
            for layer in range(self.depth):
                (x, cache), y = body(Block(**options, name=f"layer_{layer}"), (x, cache), layer)
                each.append(y)
            return jnp.stack(each) if every else x, cache
        if self.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.depth if self.unroll < 0 else self.unroll,
        )
        (x, cache), each = scan(Block(**options, name="layers"), (x, cache), jnp.arange(self.depth))
        return each if every else x, cache


def layers_are_unstacked(unroll: int) -> bool:
    """Whether layers stand apart in decoding: where they are not scanned, and on a GPU.

    A scan reads a layer's weights out of their stacks. XLA for TPUs does so within the product; for GPUs it writes them
    down first, three times the bytes of a step that is bound by them.
    """
    return unroll < 0 or platform() in ("gpu", "cuda")


def unstack_layers(params: Any, unroll: int) -> Any:
    """Parameters for decoding: where layers stand apart, those of each an entry of their own.

    To be called outside of the loop over tokens, so that its body does not cut the layers out of the stacks anew.
    """
    if not layers_are_unstacked(unroll):
        return params
    if "layers" in params:
        depth = jax.tree.leaves(params["layers"])[0].shape[0]
        return {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(depth)}
    return {name: unstack_layers(value, unroll) if hasattr(value, "items") else value for name, value in params.items()}
