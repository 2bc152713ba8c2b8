"""Shared by the replays of tokenizers with codes: VQGAN (nearest and Gumbel) and LlamaGen's.

Recorded pictures are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, h w grid, d code width, v codes.
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.replays import Case, rows_first, rows_last


class Codes:
    """The common outputs of a picture, each computed once."""

    def __init__(self, case: Case):
        self.case, (_, self.part) = case, case.imported
        self.model, self.quantizer = self.part.model, self.part.model.quantizer

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
    def projected(self) -> jax.Array:
        return self.quantizer.project(self.raw)

    @cached_property
    def quantised(self) -> tuple[jax.Array, jax.Array]:
        return self.quantizer.encode(self.part.params, self.part.extra, self.projected)

    def codes(self, ids: np.ndarray) -> jax.Array:
        """Codes of `ids [..]`. Raises UserError for one that is not in the codebook."""
        if ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= self.model.vocab:
            raise UserError(f"{self.case.folder / 'io.npz'}: code ids must be within 0 and {self.model.vocab - 1}")
        return self.quantizer.codes(self.part.params, self.part.extra, jnp.asarray(ids))

    def picture(self, codes: Any) -> np.ndarray:
        return rows_first(self.apply("picture", jnp.asarray(codes)))

    def common(self) -> None:
        """The outputs that every such tokenizer may have."""
        gives = self.case.gives
        gives("enc_prenorm", lambda: rows_first(self.apply("encoded", self.image, hidden=True)))
        gives("enc", lambda: rows_first(self.apply("encoded", self.image)))
        gives("pre_quant", lambda: rows_first(self.raw))
        gives("indices", lambda: self.quantised[1])
        gives("quant", lambda: rows_first(self.quantised[0]))
        gives("recon", lambda: self.picture(self.quantised[0]))
        gives("decode_code", self.decoded)

    def decoded(self) -> np.ndarray:
        """Pictures of given codes; their number and size are those of the recorded output."""
        ids, (b, _, height, width) = self.case.takes("code_ids"), self.case.arrays["decode_code"].shape
        reduction = 2 ** (len(self.model.channels) - 1)
        grid = (b, height // reduction, width // reduction)
        if ids.size != np.prod(grid):
            raise UserError(f"{self.case.folder / 'io.npz'}: {ids.size} code ids do not fill the grid {grid}")
        return self.picture(self.codes(ids.reshape(grid)))
