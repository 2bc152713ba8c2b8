"""A small text tower that is trained with its model: embeddings, learned positions and a few bidirectional blocks.

Depth 0 means embeddings and positions only. Role: `encode(text, mask) -> features b l d, mask`. A family may also use
the module inside its own; the parameters are then part of that family's.

Letters: b batch, l text positions, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import entries
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import count
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock
from hybridgen.nn.linear import Embed, cast, normal
from hybridgen.nn.norm import Norm
from hybridgen.nn.stack import Stack

ROLE = "text"
PARTS = ()
RANGES = entries.TRANSFORMER | {"depth": count(0, 2**14), "vocab": count(1, 2**24), "length": count(1, 2**20)}


class TextTower(nn.Module):
    """`text [b, l] int, mask [b, l] bool -> [b, l, d]`."""

    vocab: int
    length: int
    width: int
    depth: int = 2
    heads: int = 4
    hidden: int = 0  # 0: 8/3 of the width
    unroll: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, text: jax.Array, mask: jax.Array) -> jax.Array:
        if text.shape[1] != self.length:
            raise UserError(f"the text has {text.shape[1]} positions, but this text tower takes {self.length}")
        x = Embed(self.vocab, self.width, self.dtype, normal(0.5), name="words")(text)
        x = x + cast(self.param("position", nn.initializers.normal(0.1), (self.length, self.width)), self.dtype)
        if self.depth:
            options = {
                "heads": self.heads,
                "head_width": self.width // self.heads,
                "hidden": self.hidden or round_up(self.width * 8 / 3),
                "dtype": self.dtype,
            }
            stack = Stack(self.depth, LlamaBlock, options, unroll=self.unroll, name="blocks")
            x, _ = stack(x, Mask(valid=mask))
        return Norm(name="norm")(x)


def round_up(size: float, to: int = 32) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -int(-size // to) * to


def build(config: Any) -> TextTower:
    return TextTower(**config)


def init(model: TextTower, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    text = jnp.zeros((1, model.length), jnp.int32)
    return {"params": model.init(key, text, text > 0)["params"], "extra": {}}


def encode(model: TextTower, params: Any, extra: Any, text: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features `[b, l, d]` and the mask of valid positions."""
    return model.apply({"params": params}, text, mask), mask
