"""Convolutional image tokenizer: pictures to a grid of codes and back.

VQ-VAE (van den Oord et al. 2017) with options that a config sets: finite scalar quantisation ("fsq", Mentzer et al.
2023), vector quantisation ("vq") with plain or l2-normalised codes, a codebook learned by gradient or by moving
averages, and revival of dead codes; "none" is a plain autoencoder with a continuous latent.

`extra`: `use [v]`, the moving average of tokens a step per code, from zero on: what usage and perplexity are read from.
With a moving codebook also `codebook [v, d]` and what it is the quotient of, `total [v, d]` and `count [v]`, where a
reborn code starts with a fair share. With a continuous latent `mean [d]` and `square [d]`, the moving averages of its
moments: `encode` gives it with mean 0 and variance 1, as the noise schedules of a diffusion over it take it to be.

Letters: b batch, H W picture, h w grid, n = h*w tokens, d code width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen import rng
from hybridgen.errors import UserError
from hybridgen.models.losses import per_sample, rows, weighted
from hybridgen.nn import quantize
from hybridgen.nn.conv import Decoder, Encoder

POOL = 1024  # least slots for encoder outputs that dead codes may be reborn at


class VQ(nn.Module):
    """`features`: image -> grid of raw codes; `picture`: grid of quantised codes -> image."""

    resolution: int = 32
    patch: int = 4
    channels: tuple[int, ...] = (128, 256)
    blocks: int = 1
    attention: bool = True
    local: bool = False  # tokens tell of their neighbourhood only: plans compose, and a prior learns them faster
    quantizer: str = "fsq"  # fsq | vq | none
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq
    codes: int = 1024  # vq
    width: int = 8  # vq and none: code width
    l2: bool = True  # vq: codes on the unit sphere
    moving: bool = True  # vq: codebook by moving averages, otherwise by gradient
    decay: float = 0.99
    revive_below: float = 0.03  # vq: a code with less than this share of its fair use is dead
    commitment: float = 0.25
    # of a microbatch, as the pull of a gradient codebook on its dead codes: accumulated is not the large batch here
    entropy: float = 0.0  # fsq: weight of the entropy of the batch's use of the codes ...
    fill: float = 0.7  # ... up to this share of the codebook
    l1: float = 0.0  # weight of the absolute error beside the squared one
    dtype: str = "float32"

    def setup(self) -> None:
        if self.quantizer not in ("fsq", "vq", "none"):
            raise UserError(f"quantizer {self.quantizer!r} is not one of 'fsq', 'vq', 'none'")
        if self.quantizer == "fsq" and min(self.levels) < 2:
            raise UserError(f"levels {self.levels}: every channel needs at least 2")
        options = {
            "channels": tuple(self.channels),
            "patch": self.patch,
            "blocks": self.blocks,
            "attention_grid": self.grid if self.attention else None,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(self.code_width, local=self.grid if self.local else None, **options)
        self.decoder = Decoder(3, **options)
        if self.quantizer == "vq" and not self.moving:
            self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.codes, self.width))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): the token grid of a picture."""
        side = self.resolution // (self.patch * 2 ** (len(self.channels) - 1))
        return side, side

    @property
    def length(self) -> int:
        """Tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def code_width(self) -> int:
        return len(self.levels) if self.quantizer == "fsq" else self.width

    @property
    def vocab(self) -> int:
        """Number of codes; 0 for a continuous latent."""
        return {"fsq": quantize.fsq_size(self.levels), "vq": self.codes, "none": 0}[self.quantizer]

    def features(self, image: jax.Array) -> jax.Array:
        z = self.encoder(image).astype(jnp.promote_types(image.dtype, jnp.float32))  # b h w d
        return quantize.normalise(z) if self.quantizer == "vq" and self.l2 else z

    def picture(self, codes: jax.Array) -> jax.Array:
        return self.decoder(codes).astype(codes.dtype)  # b H W 3

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.picture(self.features(image))


def build(config: Any) -> VQ:
    return VQ(**config)


def init(model: VQ, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    """Fresh arrays; a moving codebook starts on random points, and codes without a token are reborn from step 1 on."""
    del parts
    image = jnp.zeros((1, *specs["image"].shape[1:]), specs["image"].dtype)
    key, code_key = jax.random.split(key)
    params = model.init(key, image)["params"]
    if not model.vocab:
        return {"params": params, "extra": {"mean": jnp.zeros((model.width,)), "square": jnp.ones((model.width,))}}
    extra = {"use": jnp.zeros((model.vocab,))}
    if model.quantizer == "vq" and model.moving:
        codebook = jax.random.normal(code_key, (model.vocab, model.width))
        codebook = quantize.normalise(codebook) if model.l2 else codebook
        # of weight nothing: a code that takes tokens is their mean at once, one that takes none stays or is reborn
        extra |= {"codebook": codebook, "total": jnp.zeros_like(codebook), "count": jnp.zeros((model.vocab,))}
    return {"params": params, "extra": extra}


def quantise(model: VQ, params: Any, extra: Any, z: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Raw codes `z [b, h, w, d]` -> (quantised codes with a straight-through gradient, ids [b, h, w])."""
    if model.quantizer == "fsq":
        return quantize.fsq(z, model.levels)
    if model.quantizer == "none":
        return z, None
    codebook = _codebook(model, params, extra)
    ids = quantize.nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
    return quantize.straight_through(z, quantize.codes_of(ids, codebook)), ids


def _codebook(model: VQ, params: Any, extra: Any) -> jax.Array:
    codebook = extra["codebook"] if model.moving else params["codebook"]  # v d
    return quantize.normalise(codebook) if model.l2 else codebook


def loss(
    model: VQ, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Squared (and absolute) error of the reconstruction, commitment, and use of the codebook."""
    del parts, step
    still = jax.lax.stop_gradient
    image = batch["image"]  # b H W 3
    z = model.apply({"params": params}, image, method="features")  # b h w d
    codes, ids = quantise(model, params, extra, z)
    out = model.apply({"params": params}, codes, method="picture")
    error = per_sample(jnp.square(out - image))
    total = error + model.l1 * per_sample(jnp.abs(out - image))  # b
    metrics, sums = {}, {}
    flat = z.reshape(-1, model.code_width)  # (b n) d
    if model.quantizer == "vq":
        total, sums = _vq_terms(model, params, extra, z, ids, total)
        if model.moving:
            # by sample: the candidates are the same on every mesh and with any accumulation
            u = rng.uniform(rng.sample_keys(key, batch["id"]), (model.length,))  # b n
            sums |= quantize.vq_pool(still(flat), u.reshape(-1), max(model.vocab, POOL))
    elif model.quantizer == "fsq":
        sums = {"count": jnp.zeros((model.vocab,), z.dtype).at[ids.reshape(-1)].add(1.0)}
        if model.entropy:
            use = quantize.fsq_entropy(flat, model.levels)
            metrics["entropy"] = use
            total = total + model.entropy * jnp.maximum(jnp.log(model.fill * model.vocab) - use, 0.0)
    else:
        places = jnp.asarray(flat.shape[0], z.dtype)
        sums = {"mean": still(flat).sum(0), "square": jnp.square(still(flat)).sum(0), "places": places}
    scalar, weight = weighted(total, rows(batch, total))
    mse, _ = weighted(error, rows(batch, error))
    metrics |= {"mse": mse, "psnr": 10 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))}
    if model.vocab:
        metrics["perplexity"] = quantize.perplexity(extra["use"]) / model.vocab
        metrics["usage"] = quantize.in_use(extra["use"], model.decay)
    return scalar, {"metrics": metrics, "weight": weight, "extra": sums if train else {}}


def _vq_terms(
    model: VQ, params: Any, extra: Any, z: jax.Array, ids: jax.Array, total: jax.Array
) -> tuple[jax.Array, dict]:
    """Commitment (and, for a codebook learned by gradient, its own pull and the pull on dead codes), and sums."""
    codebook = _codebook(model, params, extra)
    chosen = quantize.codes_of(ids, codebook)  # b h w d
    still = jax.lax.stop_gradient
    total = total + model.commitment * per_sample(jnp.square(z - still(chosen)))
    flat = still(z).reshape(-1, model.width)  # (b n) d
    if model.moving:
        return total, quantize.vq_sums(flat, ids.reshape(-1), model.vocab)
    total = total + per_sample(jnp.square(still(z) - chosen))
    # a dead code gets no gradient from any token: pull it to an encoder output of this batch
    candidates = min(model.vocab, flat.shape[0])
    target = flat[jnp.arange(model.vocab) % candidates * (flat.shape[0] // candidates)]  # v d, spread over the batch
    dead = extra["use"] < model.revive_below * extra["use"].mean()  # v
    total = total + (dead[:, None] * jnp.square(codebook - target)).sum() / flat.shape[0]
    return total, {"count": jnp.zeros((model.vocab,), z.dtype).at[ids.reshape(-1)].add(1.0)}


def merge(model: VQ, extra: Any, sums: Any, key: jax.Array, step: jax.Array) -> Any:
    """`extra` after a step, from the sums of the whole batch; dead codes are reborn at encoder outputs of the batch."""
    del step
    if not model.vocab:
        return {name: quantize.vq_usage(extra[name], sums[name] / sums["places"], model.decay) for name in extra}
    use = quantize.vq_usage(extra["use"], sums["count"], model.decay)
    if "codebook" not in extra:
        return {"use": use}
    count = quantize.vq_usage(extra["count"], sums["count"], model.decay)
    total = quantize.vq_usage(extra["total"], sums["total"], model.decay)
    codebook = quantize.vq_moving(extra["codebook"], count, total)
    dead = count < model.revive_below * count.mean()  # v
    reborn, born = quantize.vq_born(dead, sums, key)  # v, v d
    fresh = count.mean()
    return {
        "use": use,
        "count": jnp.where(reborn, fresh, count),
        "total": jnp.where(reborn[:, None], born * fresh, total),
        "codebook": jnp.where(reborn[:, None], born, codebook),
    }


def encode(model: VQ, params: Any, extra: Any, image: jax.Array) -> jax.Array:
    """`image [b, H, W, 3]` -> tokens `[b, n]` in raster order, or the latent `[b, h, w, d]` without a quantiser."""
    z = model.apply({"params": params}, image, method="features")
    if not model.vocab:
        mean, deviation = _moments(extra)
        return (z - mean) / deviation
    _, ids = quantise(model, params, extra, z)
    return ids.reshape(ids.shape[0], -1)


def _moments(extra: Any) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation `[d]` of a continuous latent."""
    return extra["mean"], jnp.sqrt(jnp.maximum(extra["square"] - jnp.square(extra["mean"]), 1e-6))


def embed(model: VQ, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
    """`tokens [b, n]` -> codes `[b, h, w, d]`."""
    if model.quantizer == "fsq":
        codes = quantize.fsq_codes(tokens, model.levels)
    else:
        codes = quantize.codes_of(tokens, _codebook(model, params, extra))
    return codes.reshape(tokens.shape[0], *model.grid, -1)


def decode(model: VQ, params: Any, extra: Any, codes: jax.Array) -> jax.Array:
    """Codes (or latents, or expected codes) `[b, h, w, d]` -> image `[b, H, W, 3]`."""
    if not model.vocab:
        mean, deviation = _moments(extra)
        codes = codes * deviation + mean
    return model.apply({"params": params}, codes, method="picture")


def sample(
    model: VQ, params: Any, cond: dict, keys: jax.Array, *, parts: Any, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Reconstructions of `cond["image"]`: a tokenizer has nothing else to draw."""
    del keys, parts, options
    tokens = encode(model, params, extra, cond["image"])
    codes = embed(model, params, extra, tokens) if model.vocab else tokens
    return {"image": jnp.clip(decode(model, params, extra, codes), -1, 1), "tokens": tokens}
