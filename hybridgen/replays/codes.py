"""Replays of tokenizers with codes: VQGAN (nearest and Gumbel) and LlamaGen's.

Recorded pictures are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, h w grid, d code width, v codes.
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.tokenizers import vq
from hybridgen.nn import quantize
from hybridgen.replays import Case, rows_first, rows_last


class Codes:
    """What all of them compute from a picture, each thing once."""

    def __init__(self, case: Case):
        self.case, (_, self.part) = case, case.imported
        self.model = self.part.model

    def apply(self, method: str, *args: Any, **options: Any) -> jax.Array:
        """A method of the model, compiled."""
        run = jax.jit(lambda params, *args: self.model.apply({"params": params}, *args, method=method, **options))
        return run(self.part.params, *args)

    @cached_property
    def image(self) -> np.ndarray:
        return rows_last(self.case.takes("image"))

    @cached_property
    def raw(self) -> jax.Array:
        return self.apply("raw", self.image)

    @cached_property
    def quantised(self) -> tuple[jax.Array, jax.Array]:
        z = self.model.on_sphere(self.raw)
        return vq.quantise(self.model, self.part.params, self.part.extra, z)

    def codes(self, ids: np.ndarray) -> jax.Array:
        """Codes of `ids [..]`. Raises UserError for one that is not in the codebook."""
        if ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= self.model.vocab:
            raise UserError(f"{self.case.folder / 'io.npz'}: code ids are not within 0 and {self.model.vocab - 1}")
        return vq.codes_at(self.model, self.part.params, self.part.extra, jnp.asarray(ids))

    def picture(self, codes: Any) -> np.ndarray:
        return rows_first(self.apply("picture", jnp.asarray(codes)))

    def common(self) -> None:
        """The outputs that every one of them may have."""
        gives = self.case.gives
        gives("enc_prenorm", lambda: rows_first(self.apply("encoded", self.image, hidden=True)))
        gives("enc", lambda: rows_first(self.apply("encoded", self.image)))
        gives("pre_quant", lambda: rows_first(self.raw))
        gives("indices", lambda: self.quantised[1])
        gives("quant", lambda: rows_first(self.quantised[0]))
        gives("recon", lambda: self.picture(self.quantised[0]))
        gives("decode_code", self.decoded)

    def decoded(self) -> np.ndarray:
        """Pictures of given codes; how many and how large they are, the recorded ones tell."""
        ids, (b, _, height, width) = self.case.takes("code_ids"), self.case.arrays["decode_code"].shape
        reduction = 2 ** (len(self.model.channels) - 1)
        grid = (b, height // reduction, width // reduction)
        if ids.size != np.prod(grid):
            raise UserError(f"{self.case.folder / 'io.npz'}: {ids.size} code ids for a grid of {grid}")
        return self.picture(self.codes(ids.reshape(grid)))


def taming_vqgan(case: Case) -> None:
    """VQGAN with the nearest code; its loss has the two weights swapped, which its value does not show."""
    it = Codes(case)
    it.common()

    def loss() -> jax.Array:
        error = jnp.square(it.codes(np.asarray(it.quantised[1])) - it.raw).mean()
        return error + it.model.commitment * error

    case.gives("vq_loss", loss)


def llamagen_vq(case: Case) -> None:
    """LlamaGen's tokenizer: codes on the unit sphere, and the terms of its loss."""
    it = Codes(case)
    it.common()

    def error() -> jax.Array:
        return jnp.square(it.codes(np.asarray(it.quantised[1])) - it.model.on_sphere(it.raw)).mean()

    def entropy() -> jax.Array:
        codes = it.codes(np.arange(it.model.vocab))  # v d
        value = quantize.distance_entropy(quantize.distances(it.model.on_sphere(it.raw), codes))
        return case.config.get("entropy_loss_ratio", 0.0) * value

    case.gives("vq_loss", error)
    case.gives("commit_loss", lambda: it.model.commitment * error())
    case.gives("entropy_loss", entropy)


def taming_gumbel(case: Case) -> None:
    """VQGAN with Gumbel codes: the likeliest ones, and those drawn with recorded noise (temperature 1)."""
    it = Codes(case)
    it.common()

    def logits() -> jax.Array:
        return it.apply("logits", it.raw)

    def numbered() -> jax.Array:
        return vq.logits(it.model, it.part.params, it.part.extra, it.raw)  # b h w v

    def drawn() -> tuple[jax.Array, jax.Array]:
        one_hot, ids = quantize.gumbel(numbered(), jnp.asarray(rows_last(case.takes("gumbel"))), jnp.float32(1.0))
        return one_hot @ it.codes(np.arange(it.model.vocab)), ids

    case.gives("logits", lambda: rows_first(logits()))
    case.gives("kl", lambda: it.model.divergence * quantize.prior_divergence(numbered(), it.model.codes).mean())
    case.gives("gumbel_indices", lambda: drawn()[1])
    case.gives("gumbel_quant", lambda: rows_first(drawn()[0]))
    case.gives("gumbel_recon", lambda: it.picture(drawn()[0]))
