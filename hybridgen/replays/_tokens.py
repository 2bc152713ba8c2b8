"""Shared by the replays of next-token priors: recorded ids, teacher-forced logits, greedy tokens.

Letters: b batch, n tokens, v vocabulary.
"""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part
from hybridgen.models.losses import cross_entropy, weighted
from hybridgen.replays import Case


def take_ids(case: Case, name: str, size: int) -> np.ndarray:
    """Recorded ids below `size`. Raises UserError for others."""
    ids = case.takes(name)
    if ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) >= size:
        raise UserError(f"{case.folder / 'io.npz'}: {name} must be integers within 0 and {size - 1}")
    return ids


class Tokens:
    """Teacher-forced logits of `tokens [b, n]` under a condition, each computed once."""

    def __init__(self, case: Case, part: Part, tokens: np.ndarray, cond: dict):
        self.case, self.part, self.tokens, self.cond = case, part, jnp.asarray(tokens), cond

    def score(self, **changes: jax.Array) -> jax.Array:
        run = jax.jit(lambda part, tokens, cond: part.call("score", tokens, cond))
        return run(self.part, self.tokens, self.cond | changes)

    @cached_property
    def logits(self) -> jax.Array:
        """`[b, n, v]` under the condition."""
        return self.score()

    @cached_property
    def null(self) -> jax.Array:
        """`[b, n, v]` with the condition dropped."""
        return self.score(drop=jnp.ones(self.tokens.shape[:1], bool))

    def loss(self) -> jax.Array:
        """Mean cross-entropy over tokens, of the `valid` rows if that array was recorded."""
        each = cross_entropy(self.logits, self.tokens)
        if not self.case.has("valid"):
            return each.mean()
        valid = self.case.takes("valid").reshape(-1, 1)
        return weighted(each, jnp.broadcast_to(jnp.asarray(valid), each.shape))[0]

    def greedy(self, scale: object = 1.0) -> jax.Array:
        """The likeliest tokens `[b, n]` over a cache, guided by a scale or a schedule."""
        keys = jax.random.split(jax.random.key(0), self.tokens.shape[0])
        options = {"guidance": scale, "temperature": 0.0}
        return jax.jit(lambda part, cond: part.call("generate", cond, keys, options)[0])(self.part, self.cond)
