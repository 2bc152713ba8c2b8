"""CLIP's text tower (Radford et al. 2021): a causal transformer with learned positions, as used by diffusion models.

Role: `encode(text, mask) -> features b l d, mask`: of the last layer, after the final norm, or of the layer `skip`
before it, without that norm (SDXL and SD3 use `skip` 1); `pooled(text, mask) -> b p`: the state at the end token, after
the norm and, if the tower has one, the projection into the space that it shares with pictures.

Without a mask, padding is visible too, as in official pipelines, which give no mask.

Letters: b batch, l text positions, d width, p width of the pooled vector.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.core.sharding import shard
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Embed, Linear, cast
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.stack import Stack

ROLE = "text"
PARTS = ()


class CLIPBlock(nn.Module):
    """Pre-norm with layer norms and biases, `x [b, l, d] -> [b, l, d]`."""

    heads: int
    hidden: int
    activation: str
    norm_eps: float
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        del layer, keys
        options: dict[str, Any] = {"bias": True, "dtype": self.dtype, "out_scale": self.out_scale}
        attend = Attention(self.heads, x.shape[-1] // self.heads, name="attention", **options)
        x = x + attend(Norm("layer", self.norm_eps, name="attention_norm")(x), mask)[0]
        y = Norm("layer", self.norm_eps, name="mlp_norm")(x)
        x = x + MLP(self.hidden, self.activation, name="mlp", **options)(y)
        return shard(x, "batch", None, None), cache


class CLIPText(nn.Module):
    """`text [b, l] int -> [b, l, d]`, after the final norm; `states` and `pooled` are the other outputs."""

    vocab: int = 49408
    length: int = 77  # the longest text
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection: int = 0  # width of the pooled vector; 0: no projection, the width of the tower
    end: int = -1  # id of the end token, whose first position is pooled; -1: the largest id in the text
    skip: int = 0  # number of last layers that `encode` does not use
    unroll: int = 1
    dtype: str = "float32"

    def setup(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide by heads {self.heads}")
        if not 0 <= self.skip <= self.depth:
            raise UserError(f"skip {self.skip} is not within 0 and depth {self.depth}")
        self.words = Embed(self.vocab, self.width, self.dtype)
        self.position = self.param("position", nn.initializers.normal(0.01), (self.length, self.width))
        block = {"heads": self.heads, "hidden": self.hidden, "activation": self.activation, "norm_eps": self.norm_eps}
        self.blocks = Stack(self.depth, CLIPBlock, {**block, "dtype": self.dtype}, unroll=self.unroll)
        self.norm = Norm("layer", self.norm_eps)
        if self.projection:
            self.project = Linear(self.projection, dtype=self.dtype)

    def enter(self, text: jax.Array) -> jax.Array:
        if text.shape[1] > self.length:
            raise UserError(f"the text has {text.shape[1]} positions, but this text tower takes at most {self.length}")
        return self.words(text) + cast(self.position, self.dtype)[: text.shape[1]]  # b l d

    def states(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The input of the first layer and the output of each layer: `[depth + 1, b, l, d]`."""
        x = self.enter(text)
        return jnp.concatenate([x[None], self.blocks(x, Mask("causal", valid=mask), every=True)[0]])

    def __call__(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.norm(self.blocks(self.enter(text), Mask("causal", valid=mask))[0])

    def features(self, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.states(text, mask)[-1 - self.skip] if self.skip else self(text, mask)

    def pooled(self, text: jax.Array, mask: jax.Array | None = None, mapped: bool = True) -> jax.Array:
        """The pooled vector `[b, p]`; with `mapped=False` before the projection, `[b, d]`."""
        place = text.argmax(-1) if self.end < 0 else (text == self.end).argmax(-1)  # b
        x = jnp.take_along_axis(self(text, mask), place[:, None, None], 1)[:, 0]  # b d
        return self.project(x) if self.projection and mapped else x


def build(config: Any) -> CLIPText:
    return CLIPText(**config)


def init(model: CLIPText, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    del specs, parts
    return {"params": model.init(key, jnp.zeros((1, 1), jnp.int32), method="pooled")["params"], "extra": {}}


def encode(
    model: CLIPText, params: Any, extra: Any, text: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Features `[b, l, d]` and the mask of valid positions (without a mask: all)."""
    del extra
    seen = jnp.ones(text.shape, bool) if mask is None else mask
    return model.apply({"params": params}, text, mask, method="features"), seen


def pooled(model: CLIPText, params: Any, extra: Any, text: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """One vector per text, `[b, p]`."""
    del extra
    return model.apply({"params": params}, text, mask, method="pooled")
