"""A stack of blocks of any kind, as a scan over depth.

A block is a module `block(x, mask, *, cache, layer, keys, ...) -> (x, cache)`; the stack passes on all further inputs
(rotary tables, a condition, a context). Layers are stacked on a leading axis of every parameter; `unroll` layers run
per iteration of the scan (-1: all, which is faster to run and slower to compile), and `remat` recomputes activations in
the backward pass. For decoding the layers may be unstacked, each with its own parameters and cache, and run one by one.

Letters: b batch, t positions, d width, l layers.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.core.meshes import platform
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Mask

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """`depth` blocks of the class `block` with the fields `options`; parameters have a leading layer axis.

    If the block has a field `out_scale`, its residual branches are initialised smaller in a deeper stack.
    """

    depth: int
    block: type[nn.Module]
    options: Mapping[str, Any]
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        cache: kv.Cache | None = None,
        keys: jax.Array | None = None,
        each: Mapping[str, jax.Array] | None = None,
        every: bool = False,
        **inputs: Any,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """`x [b, t, d]` -> (output of the last block, or with `every` of all, `[l, b, t, d]`; the cache).

        inputs: further inputs of every block. each: inputs `[l, ...]`, of which each block takes its own row.
        """
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if not self.unroll:
            raise UserError("unroll is 0, but must be -1 (all layers) or the number of layers per iteration")
        options = dict(self.options)
        if "out_scale" in self.block.__dataclass_fields__:
            # residual branches start smaller in deep stacks, so that the sum over layers keeps its variance (GPT-2)
            options.setdefault("out_scale", 1.0 / (2 * self.depth))
        kind = mask.kind, mask.prefix
        valid, offset, own = mask.valid, mask.offset, mask.own

        def body(block: nn.Module, carry: tuple, layer: jax.Array) -> tuple[tuple, jax.Array | None]:
            x, cache = carry
            own_inputs = {name: value[layer] for name, value in (each or {}).items()}
            described = Mask(*kind, valid, offset, own)
            x, cache = block(x, described, cache=cache, layer=layer, keys=keys, **inputs, **own_inputs)
            return (x, cache), x if every else None

        if self.has_variable("params", "layer_0"):  # parameters from `unstack_layers`
            outputs = []
            for layer in range(self.depth):
                (x, cache), y = body(self.block(**options, name=f"layer_{layer}"), (x, cache), layer)
                outputs.append(y)
            return jnp.stack(outputs) if every else x, cache
        if self.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.depth if self.unroll < 0 else self.unroll,
        )
        (x, cache), outputs = scan(self.block(**options, name="layers"), (x, cache), jnp.arange(self.depth))
        return outputs if every else x, cache


def layers_are_unstacked(unroll: int) -> bool:
    """Whether decoding uses unstacked layers: if they are not scanned, and on a GPU.

    A scan slices each layer's weights from the stacked arrays. XLA for TPUs fuses the slice into the product; for GPUs
    it writes a copy first, which triples the bytes of a memory-bound step.
    """
    return unroll < 0 or platform() in ("gpu", "cuda")


def unstack_layers(params: Any, unroll: int) -> Any:
    """Parameters for decoding: if `layers_are_unstacked`, each layer has its own entry `layer_{i}`.

    Call it outside the loop over tokens, so that the loop body does not slice the stacked arrays.
    """
    if not layers_are_unstacked(unroll):
        return params
    if "layers" in params:
        depth = jax.tree.leaves(params["layers"])[0].shape[0]
        return {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(depth)}
    return {name: unstack_layers(value, unroll) if hasattr(value, "items") else value for name, value in params.items()}
