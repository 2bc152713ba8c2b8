"""Functions shared by tokenizers: pictures to a grid of codes (or latents) and back, and the reconstruction loss.

A model has `resolution`, `reduction` (ratio of picture and grid sides), `quantizer` (nn/quantizers), `picture_loss`
(the loss of a decoded picture) and the methods `features`, image -> projected outputs of the encoder, and `picture`,
codes -> image. A family imports the functions that it does not define itself from here.

    grid = property(tokenizer.grid)         # in the module: attributes that priors and decoders read

Letters: b batch, H W picture, h w grid, n = h*w tokens, d code width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import entries
from hybridgen.core.ranges import count
from hybridgen.models.contract import Parts, Shape, divided, sides
from hybridgen.models.losses import rows, weighted
from hybridgen.nn import codebook
from hybridgen.nn.quantizers import Training

RANGES = entries.DTYPE | {
    "resolution": entries.SIZE,
    "channels": count(1, 2**16, least=1, most=16, alone=False),
    "blocks": count(1, 2**10),
}


# ---------------------------------------------------------------- properties of a module


def grid(model: nn.Module) -> tuple[int, int]:
    """(h, w): the grid of a picture."""
    height, width = sides(model.resolution)
    return height // model.reduction, width // model.reduction


def length(model: nn.Module) -> int:
    """Number of grid positions, which is that of tokens n."""
    return model.grid[0] * model.grid[1]


def vocab(model: nn.Module) -> int:
    """Number of codes v; 0 for a continuous latent."""
    return model.quantizer.size


def code_width(model: nn.Module) -> int:
    """Channels d of a code or a latent."""
    return model.quantizer.width


# ---------------------------------------------------------------- functions of a family


def for_shape(model: nn.Module, shape: Shape, parts: Parts) -> nn.Module:
    """The model for pictures of `shape`, with the same arrays."""
    del parts
    divided(shape, model.reduction)
    return model.clone(resolution=shape)


def init_networks(model: nn.Module, key: jax.Array, specs: dict) -> dict[str, Any]:
    """Initial parameters of encoder, decoder and discriminator."""
    image = jnp.zeros((1, *specs["image"].shape[1:]), specs["image"].dtype)
    params = model.init(key, image)["params"]
    return {**params, **model.picture_loss.init(jax.random.fold_in(key, 1), image)}


def init(model: nn.Module, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    """Initial arrays of the networks and of the quantiser."""
    del parts
    learned, extra = model.quantizer.init(key)
    return {"params": {**init_networks(model, jax.random.split(key)[0], specs), **learned}, "extra": extra}


def loss(
    model: nn.Module,
    params: Any,
    batch: dict,
    key: jax.Array,
    *,
    parts: Parts,
    extra: Any,
    step: jax.Array,
    train: bool,
) -> tuple[jax.Array, dict]:
    """The loss of the picture plus that of its codes; the metrics include the use of the codebook."""
    quantizer, training = model.quantizer, Training(key, batch["id"], step) if train else None
    z = model.apply({"params": params}, batch["image"], method="features")  # b h w d
    codes, ids = quantizer.encode(params, extra, z, training)

    def decode(params: Any) -> jax.Array:
        return model.apply({"params": params}, codes, method="picture")

    reconstruction, metrics = model.picture_loss(params, batch, decode, parts=parts, step=step, train=train)
    terms, sums, seen = quantizer.loss(params, extra, z, ids, training)
    cost, weight = weighted(terms, rows(batch, terms))
    metrics |= seen
    if quantizer.size:
        metrics["perplexity_share"] = codebook.perplexity(extra["use"]) / quantizer.size
        metrics["usage"] = codebook.in_use(extra["use"], quantizer.decay)
    return reconstruction + cost, {"metrics": metrics, "weight": weight, "extra": sums if train else {}}


def merge(model: nn.Module, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
    """`extra` after a step, from the sums over the global batch."""
    return model.quantizer.merge(extra, sums, key, step)


def encode(model: nn.Module, params: Any, extra: Any, image: jax.Array) -> jax.Array:
    """`image [b, H, W, 3]` -> tokens `[b, n]` in raster order, or the latent `[b, h, w, d]` without a quantiser."""
    z = model.apply({"params": params}, image, method="features")
    if not model.quantizer.size:
        return model.quantizer.standardise(extra, z)
    _, ids = model.quantizer.encode(params, extra, z)
    return ids.reshape(ids.shape[0], -1)


def embed(model: nn.Module, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
    """`tokens [b, n]` -> codes `[b, h, w, d]`."""
    return model.quantizer.codes(params, extra, tokens).reshape(tokens.shape[0], *model.grid, -1)


def decode(model: nn.Module, params: Any, extra: Any, codes: jax.Array) -> jax.Array:
    """Codes (or latents, or expected codes) `[b, h, w, d]` -> image `[b, H, W, 3]`."""
    if not model.quantizer.size:
        codes = model.quantizer.restore(extra, codes)
    return model.apply({"params": params}, codes, method="picture")


def sample(
    model: nn.Module, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Reconstructions of `cond["image"]`."""
    del keys, parts, options
    tokens = encode(model, params, extra, cond["image"])
    codes = embed(model, params, extra, tokens) if model.quantizer.size else tokens
    return {"image": jnp.clip(decode(model, params, extra, codes), -1, 1), "tokens": tokens}
