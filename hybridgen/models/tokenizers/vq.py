"""Convolutional image tokenizer: pictures to a grid of codes and back.

VQ-VAE (van den Oord et al. 2017) with options that a config sets: finite scalar quantisation ("fsq", Mentzer et al.
2023), lookup-free quantisation ("lfq", Yu et al. 2023), vector quantisation ("vq") with plain or l2-normalised codes, a
codebook learned by gradient or by moving averages, and revival of dead codes; codes drawn from logits ("gumbel", Jang
et al. 2016); "none" is a plain autoencoder with a continuous latent. The convolutions are our light ones, or with
`residual` those of official tokenizers: VQGAN (Esser et al. 2021) and LlamaGen's (Sun et al. 2024) are this family with
the options that their tables in weights/ set. With `adversarial` a discriminator judges the pictures (judging.py).

`extra`: `use [v]`, the moving average of tokens a step per code, from zero on: what usage and perplexity are read from.
With a moving codebook also `codebook [v, d]` and what it is the quotient of, `total [v, d]` and `count [v]`, where a
reborn code starts with a fair share. With `used`, the rows `used [v]` of the codebook that tokens number. With a
continuous latent `mean [d]` and `square [d]`, the moving averages of its moments: `encode` gives it with mean 0 and
variance 1, as the noise schedules of a diffusion over it take it to be.

Letters: b batch, H W picture, h w grid, n = h*w tokens, d code width, v codes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Parts, Shape, divided, sides
from hybridgen.models.losses import per_sample, rows, weighted
from hybridgen.models.tokenizers import judging
from hybridgen.nn import quantize
from hybridgen.nn.autoencoder import Autoencoder
from hybridgen.nn.conv import Decoder, Encoder
from hybridgen.nn.linear import Linear

QUANTIZERS = ("fsq", "lfq", "vq", "gumbel", "none")
POOL = 1024  # least slots for encoder outputs that dead codes may be reborn at


class VQ(nn.Module):
    """`features`: image -> grid of raw codes; `picture`: grid of quantised codes -> image."""

    resolution: int | Shape = 32  # of a square, or height and width
    patch: int = 4
    channels: tuple[int, ...] = (128, 256)
    blocks: int = 1
    attention: bool = True
    local: bool = False  # tokens tell of their neighbourhood only: plans compose, and a prior learns them faster
    residual: Mapping = FrozenDict()  # options of nn/autoencoder.py, which then stands in for our light one
    quantizer: str = "fsq"  # fsq | lfq | vq | gumbel | none
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq
    bits: int = 10  # lfq
    codes: int = 1024  # vq, gumbel
    width: int = 8  # vq, gumbel, none: code width
    l2: bool = True  # vq: codes on the unit sphere
    moving: bool = True  # vq: codebook by moving averages, otherwise by gradient
    exact: bool = False  # vq: looked up with the roundings of official code
    legacy: bool = False  # vq: VQGAN's loss, whose two weights are swapped
    used: int = 0  # vq by gradient, gumbel: tokens number so many rows of the codebook (VQGAN's remap); 0: all
    divergence: float = 5e-4  # gumbel: weight of the distance of a token's distribution from an even one
    # gumbel: scores are so many times the cosines of an output and the codes; 0: an own linear map (the official form).
    # Of an own map a code's score and its place have nothing to do with each other until training has joined them.
    sharpness: float = 0.0
    temperature: tuple[float, float] = (1.0, 0.0625)  # gumbel: from, to ...
    cooling: int = 0  # ... over so many steps; 0: it stays
    decay: float = 0.99
    revive_below: float = 0.03  # vq: a code with less than this share of its fair use is dead
    commitment: float = 0.25
    # of a microbatch, as the pull of a gradient codebook on its dead codes: accumulated is not the large batch here
    entropy: float = 0.0  # fsq: weight of the entropy of the batch's use of the codes ...
    fill: float = 0.7  # ... up to this share of the codebook; others: weight of the entropy of a token's soft code ...
    diversity: float = 1.0  # ... less (lfq: so many times) that of the batch's use
    softness: float = 0.5  # temperature of the soft codes that entropies are of
    joint: int = 10  # lfq: bits that the batch's entropy is exact for; groups of so many count as independent
    mse: float = 1.0  # weights of the squared error, ...
    l1: float = 0.0  # ... the absolute one, ...
    perceptual: float = 0.0  # ... and the distance that the part `perceptual` sees
    adversarial: Mapping = FrozenDict()  # options of judging.Game; empty: no discriminator
    dtype: str = "float32"

    def setup(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"quantizer {self.quantizer!r} is not one of {', '.join(map(repr, QUANTIZERS))}")
        if self.quantizer == "fsq" and min(self.levels) < 2:
            raise UserError(f"levels {self.levels}: every channel needs at least 2")
        if self.quantizer == "lfq" and not 1 <= self.bits <= 24:
            raise UserError(f"bits {self.bits}: a code has 1 to 24")
        options = {"channels": tuple(self.channels), "blocks": self.blocks, "dtype": self.dtype}
        if self.residual:
            if self.patch != 1 or self.local:
                raise UserError(f"patch {self.patch}, local {self.local}: the residual autoencoder has 1 and False")
            self.net = Autoencoder(code=self.code_width, middle=self.attention, **options, **self.residual)
        else:
            options |= {"patch": self.patch, "attention": self.attention}
            self.encoder = Encoder(self.code_width, local=self.local, **options)
            self.decoder = Decoder(3, **options)
        if self.learned:
            self.codebook = self.param("codebook", nn.initializers.normal(1.0), (self.codes, self.width))
        elif self.used:
            raise UserError(f"used {self.used} rows: only a codebook that learns by gradient has rows that are not")
        if self.quantizer == "gumbel" and not self.sharpness:
            self.score = Linear(self.codes, bias=True, wide=True)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): the token grid of a picture."""
        return tuple(side // self.reduction for side in sides(self.resolution))

    @property
    def reduction(self) -> int:
        """Pixels along a side of a token."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def length(self) -> int:
        """Tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def code_width(self) -> int:
        return {"fsq": len(self.levels), "lfq": self.bits}.get(self.quantizer, self.width)

    @property
    def vocab(self) -> int:
        """Number of codes; 0 for a continuous latent."""
        if self.quantizer == "fsq":
            return quantize.fsq_size(self.levels)
        if self.quantizer == "lfq":
            return 2**self.bits
        return 0 if self.quantizer == "none" else self.used or self.codes

    @property
    def learned(self) -> bool:
        """Whether the codebook is a parameter."""
        return self.quantizer == "gumbel" or (self.quantizer == "vq" and not self.moving)

    @property
    def judge(self) -> judging.Judge:
        """What a picture is judged by."""
        game = judging.game(self.adversarial)
        return judging.Judge(self.l1, self.mse, self.perceptual, game, dtype=self.dtype)

    @property
    def last(self) -> str:
        """Path of the decoder's last kernel."""
        return "net/decoder/conv_out/kernel" if self.residual else "decoder/head_pixels/kernel"

    def on_sphere(self, x: jax.Array) -> jax.Array:
        """Codes or outputs as they are compared: vq with `l2` and gumbel by cosines on the unit sphere."""
        if not {"vq": self.l2, "gumbel": self.sharpness}.get(self.quantizer):
            return x
        return quantize.unit(x) if self.exact else quantize.normalise(x)

    def raw(self, image: jax.Array) -> jax.Array:
        z = self.net.encode(image) if self.residual else self.encoder(image)
        return z.astype(jnp.promote_types(image.dtype, jnp.float32))  # b h w d

    def features(self, image: jax.Array) -> jax.Array:
        return self.on_sphere(self.raw(image))

    def logits(self, z: jax.Array) -> jax.Array:
        if not self.sharpness:
            return self.score(z)  # b h w codes
        return quantize.cosine_scores(z, self.on_sphere(self.codebook), self.sharpness)

    def picture(self, codes: jax.Array) -> jax.Array:
        return (self.net.decode if self.residual else self.decoder)(codes).astype(codes.dtype)  # b H W 3

    def encoded(self, image: jax.Array, hidden: bool = False) -> jax.Array:
        return self.net.encoded(image, hidden)

    def __call__(self, image: jax.Array) -> jax.Array:
        z = self.features(image)
        if self.quantizer == "gumbel":
            self.logits(z)
        return self.picture(z)


def build(config: Any) -> VQ:
    return VQ(**config)


def for_shape(model: VQ, shape: Shape, parts: Parts) -> VQ:
    """The model for pictures of `shape`, on the same arrays."""
    del parts
    divided(shape, model.reduction)
    return model.clone(resolution=shape)


def init(model: VQ, key: jax.Array, specs: dict, parts: Any) -> dict[str, Any]:
    """Fresh arrays; a moving codebook starts on random points, and codes without a token are reborn from step 1 on."""
    del parts
    image = jnp.zeros((1, *specs["image"].shape[1:]), specs["image"].dtype)
    key, code_key = jax.random.split(key)
    params = {**model.init(key, image)["params"], **judging.init(model.judge, jax.random.fold_in(key, 1), image)}
    if not model.vocab:
        return {"params": params, "extra": {"mean": jnp.zeros((model.width,)), "square": jnp.ones((model.width,))}}
    extra = {"use": jnp.zeros((model.vocab,))} | ({"used": jnp.arange(model.used)} if model.used else {})
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
    if model.quantizer == "lfq":
        return quantize.lfq(z)
    if model.quantizer == "none":
        return z, None
    codebook = _codebook(model, params, extra)
    if model.quantizer == "gumbel":
        ids = jnp.argmax(logits(model, params, extra, z), -1).astype(jnp.int32)
        return quantize.codes_of(ids, codebook), ids
    points = jax.lax.stop_gradient((z, codebook))
    if model.exact:
        ids = jnp.argmin(quantize.distances(*points), -1).astype(jnp.int32)
    else:
        ids = quantize.nearest(*points)
    return quantize.straight_through(z, quantize.codes_of(ids, codebook)), ids


def logits(model: VQ, params: Any, extra: Any, z: jax.Array) -> jax.Array:
    """Gumbel: scores of the codes that tokens number, of raw codes `z [b, h, w, d]` -> `[b, h, w, v]`."""
    scores = model.apply({"params": params}, z, method="logits")
    return scores[..., extra["used"]] if model.used else scores


def _codebook(model: VQ, params: Any, extra: Any) -> jax.Array:
    codebook = params["codebook"] if model.learned else extra["codebook"]  # v d
    return model.on_sphere(quantize.codes_of(extra["used"], codebook) if model.used else codebook)


def loss(
    model: VQ, params: Any, batch: dict, key: jax.Array, *, parts: Any, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """What the picture is judged by (judging.py), commitment, and use of the codebook."""
    image = batch["image"]  # b H W 3
    z = model.apply({"params": params}, image, method="features")  # b h w d
    drawn = model.quantizer == "gumbel" and train
    codes, ids = _drawn(model, params, extra, z, key, batch, step) if drawn else quantise(model, params, extra, z)

    def paint(params: Any) -> jax.Array:
        return model.apply({"params": params}, codes, method="picture")

    options = {"parts": parts, "step": step, "train": train}
    near, metrics = judging.reconstruction_loss(model.judge, params, batch, paint, model.last, **options)
    total, sums, seen = _code_terms(model, params, extra, z, ids)
    if model.quantizer == "vq" and model.moving:
        # by sample: the candidates are the same on every mesh and with any accumulation
        u = rng.uniform(rng.sample_keys(key, batch["id"]), (model.length,))  # b n
        flat = jax.lax.stop_gradient(z).reshape(-1, model.width)
        sums |= quantize.vq_pool(flat, u.reshape(-1), max(model.vocab, POOL))
    scalar, weight = weighted(total, rows(batch, total))
    metrics |= seen
    if model.vocab:
        metrics["perplexity"] = quantize.perplexity(extra["use"]) / model.vocab
        metrics["usage"] = quantize.in_use(extra["use"], model.decay)
    return near + scalar, {"metrics": metrics, "weight": weight, "extra": sums if train else {}}


def _code_terms(
    model: VQ, params: Any, extra: Any, z: jax.Array, ids: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """What the codes cost, a number a picture; sums over tokens for `merge`; metrics."""
    flat, total = z.reshape(-1, model.code_width), jnp.zeros(z.shape[:1], z.dtype)  # (b n) d
    if not model.vocab:
        places, still = jnp.asarray(flat.shape[0], z.dtype), jax.lax.stop_gradient(flat)
        return total, {"mean": still.sum(0), "square": jnp.square(still).sum(0), "places": places}, {}
    if model.quantizer == "vq":
        return *_vq_terms(model, params, extra, z, ids, total), {}
    sums = {"count": jnp.zeros((model.vocab,), z.dtype).at[ids.reshape(-1)].add(1.0)}
    if model.quantizer == "lfq":
        total = model.commitment * per_sample(jnp.square(z - jax.lax.stop_gradient(quantize.lfq(z)[0])))
        if not model.entropy:
            return total, sums, {}
        doubt, use = quantize.lfq_entropy(flat, model.softness, model.joint)
        return total + model.entropy * (doubt - model.diversity * use), sums, {"entropy": use, "doubt": doubt}
    if model.quantizer == "gumbel":
        scores = logits(model, params, extra, z)
        total = model.divergence * per_sample(quantize.prior_divergence(scores, model.codes))
        if model.entropy:
            total = total + model.entropy * quantize.distance_entropy(-scores, model.softness)
        return total, sums, {}
    if not model.entropy:
        return total, sums, {}
    use = quantize.fsq_entropy(flat, model.levels, model.softness)
    return total + model.entropy * jnp.maximum(jnp.log(model.fill * model.vocab) - use, 0.0), sums, {"entropy": use}


def _drawn(
    model: VQ, params: Any, extra: Any, z: jax.Array, key: jax.Array, batch: dict, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gumbel in training: as `quantise`, codes drawn at the temperature of this step; the gradient is the soft one."""
    scores = logits(model, params, extra, z)  # b h w v
    u = rng.uniform(rng.sample_keys(key, batch["id"]), scores.shape[1:])
    noise = -jnp.log(-jnp.log(jnp.clip(u, 1e-20, 1 - 1e-7)))
    temperature = quantize.cooled(step, *model.temperature, model.cooling)
    one_hot, ids = quantize.gumbel(scores, noise.astype(scores.dtype), temperature)
    return jnp.einsum("...v,vd->...d", one_hot, _codebook(model, params, extra)), ids


def _vq_terms(
    model: VQ, params: Any, extra: Any, z: jax.Array, ids: jax.Array, total: jax.Array
) -> tuple[jax.Array, dict]:
    """Commitment (and, for a codebook learned by gradient, its own pull and the pull on dead codes), and sums."""
    codebook = _codebook(model, params, extra)
    chosen = quantize.codes_of(ids, codebook)  # b h w d
    still = jax.lax.stop_gradient
    of_encoder, of_codes = (1.0, model.commitment) if model.legacy else (model.commitment, 1.0)
    total = total + of_encoder * per_sample(jnp.square(z - still(chosen)))
    if model.entropy:
        total = total + model.entropy * quantize.distance_entropy(quantize.distances(z, codebook), model.softness)
    flat = still(z).reshape(-1, model.width)  # (b n) d
    if model.moving:
        return total, quantize.vq_sums(flat, ids.reshape(-1), model.vocab)
    total = total + of_codes * per_sample(jnp.square(still(z) - chosen))
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
        return extra | {"use": use}
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
    return codes_at(model, params, extra, tokens).reshape(tokens.shape[0], *model.grid, -1)


def codes_at(model: VQ, params: Any, extra: Any, tokens: jax.Array) -> jax.Array:
    """`tokens [...]` -> their codes `[..., d]`."""
    if model.quantizer == "fsq":
        return quantize.fsq_codes(tokens, model.levels)
    if model.quantizer == "lfq":
        return quantize.lfq_codes(tokens, model.bits)
    return quantize.codes_of(tokens, _codebook(model, params, extra))


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
