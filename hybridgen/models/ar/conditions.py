"""What the raster prior is told before the first token: the kinds of prefix that are not our own.

"start" is our own: `[text][start]`. "class" is one position with a class or, dropped, the row behind the classes
(LlamaGen, Sun et al. 2024). "caption" is features of a text tower through a small network, padded on the left (LlamaGen
from text). "codes" are tokens of the prior's own vocabulary: a class as its number, codes of another picture, or token
0 alone where there is no condition (taming-transformers, Esser et al. 2021); nothing of it can be dropped.

Letters: b batch, l text positions, c width of text features, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Parts, need
from hybridgen.nn.linear import Linear, cast, normal

PREFIXES = ("start", "class", "caption", "codes")


class Captions(nn.Module):
    """`features [b, l, c]` -> `[b, l, d]`; where `drop [b]`, of fixed random features in their place."""

    length: int
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array, drop: jax.Array) -> jax.Array:
        c = features.shape[-1]
        # a buffer in official code, so it is never trained; decay is by path and does not name it
        null = jax.lax.stop_gradient(self.param("null", normal(c**-0.5), (self.length, c)))
        null = null[: features.shape[1]].astype(features.dtype)
        x = cast(jnp.where(drop[:, None, None], null, features), self.dtype)
        x = nn.gelu(Linear(self.width, dtype=self.dtype, name="up")(x))
        return Linear(self.width, dtype=self.dtype, name="down")(x)


def conditioning(model: Any, batch: dict, parts: Parts) -> dict:
    """The entries of a batch that a prior is conditioned on; text features are cached there, or of the part "text"."""
    if model.prefixed == "caption":
        return captions(model, batch, parts)
    names = (("text", "text_mask") if model.text_vocab else ()) + (("label",) if model.classes else ())
    if model.prefixed == "codes" and not model.classes:
        if "cond_tokens" in batch:
            return {"cond_tokens": batch["cond_tokens"]}
        if model.cond_length > 1:
            raise UserError(f"this prior is conditioned on {model.cond_length} codes: the batch needs 'cond_tokens'")
        b = next(iter(batch.values())).shape[0]
        return {"cond_tokens": jnp.zeros((b, 1), jnp.int32)}
    return {name: batch[name] for name in names}


def captions(model: Any, batch: dict, parts: Parts) -> dict:
    """Features and mask, the padding moved to the left."""
    if "text_features" in batch:
        features, mask = batch["text_features"], batch["text_features_mask"]
    else:
        tower = need(parts, "text", "a prior on text features")
        features, mask = tower.call("encode", batch["text"], batch["text_mask"])
    features = jax.lax.stop_gradient(features)
    if features.shape[1:] != (model.text_length, model.text_width):
        given, wanted = "x".join(map(str, features.shape[1:])), f"{model.text_length}x{model.text_width}"
        hint = "" if features.shape[1] == model.text_length else " (positions: data.text.length)"
        raise UserError(f"text features are {given}, positions by width, and this prior takes {wanted}{hint}")
    order = jnp.argsort(mask, axis=1, stable=True)  # b l: padding first, both in their order
    moved = jnp.take_along_axis(features, order[..., None], 1)
    return {"text_features": moved, "text_features_mask": jnp.take_along_axis(mask, order, 1)}


def example(model: Any) -> dict:
    """A condition of one row, for the shapes of parameters."""
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.prefixed == "caption":
        cond |= {"text_features": jnp.zeros((1, model.text_length, model.text_width))}
        cond |= {"text_features_mask": jnp.ones((1, model.text_length), bool)}
    elif model.prefixed == "codes" and not model.classes:
        cond |= {"cond_tokens": jnp.zeros((1, model.cond_length), jnp.int32)}
    elif model.text_vocab:
        cond |= {"text": jnp.zeros((1, model.text_length), jnp.int32)}
        cond |= {"text_mask": jnp.ones((1, model.text_length), bool)}
    return cond


def redrawn(params: Any, key: jax.Array, std: float, zero_head: bool) -> Any:
    """Parameters as official code starts them: kernels and tables normal with one deviation, the head's perhaps 0."""

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        name = "/".join(part.key for part in path)
        if not name.endswith(("kernel", "table")) or name.startswith("position"):
            return leaf
        if zero_head and name == "head/kernel":
            return jnp.zeros_like(leaf)
        return std * jax.random.normal(rng.step_key(key, 0, name), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(start, params)
