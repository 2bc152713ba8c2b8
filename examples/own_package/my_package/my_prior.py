"""An example of a prior outside of hybridgen: a small class-conditional transformer over image tokens.

It has learned positions and a sampling option of its own: `flatness` mixes the uniform distribution over all tokens
into the distribution of each sampled token.

Letters: b batch, n image tokens, t positions of a chunk, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.models.contract import Inputs, Option
from hybridgen.models.roles import next_token
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import LlamaBlock
from hybridgen.nn.linear import Embed, Linear
from hybridgen.nn.norm import Norm
from hybridgen.nn.stack import Stack

ROLE = "prior"
OPTIONS = {"prior": next_token.OPTIONS | {"flatness": Option(0.0, "share of an even distribution in each draw", 0, 1)}}
prefill, step, score, features = next_token.prefill, next_token.step, next_token.score, next_token.features


class MyPrior(nn.Module):
    """The sequence is `[class][tokens]`; class number `classes` represents a dropped class."""

    vocab: int
    grid: tuple[int, int]
    classes: int
    width: int = 64
    depth: int = 2
    heads: int = 2
    cond_drop_prob: float = 0.1
    flatness: float = 0.0
    unroll: int = 1
    dtype: str = "float32"

    has_unconditional = True
    prefix = 0  # positions before the one from which the first token is predicted

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width)
        self.start = Embed(self.classes + 1, self.width)
        self.position = Embed(self.length, self.width)
        block = {"heads": self.heads, "head_width": self.width // self.heads, "hidden": 4 * self.width}
        self.blocks = Stack(self.depth, LlamaBlock, block, unroll=self.unroll)
        self.norm = Norm()
        self.head = Linear(self.vocab)

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.heads, self.width // self.heads

    def embed_condition(self, cond: dict) -> tuple[jax.Array, None]:
        """The prefix `[b, 1, d]`; every position of it is visible."""
        drop = cond.get("drop", jnp.zeros(cond["label"].shape, bool))  # b
        return self.start(jnp.where(drop, self.classes, cond["label"]))[:, None], None

    def embed_positions(self, x: jax.Array, at: Any = 0, keys: Any = None) -> tuple[jax.Array, None]:
        """`x [b, t, d]` from position `at` on as it enters the blocks; no rotary table."""
        return x + self.position(at + jnp.arange(x.shape[1])), None

    def mask(self, valid: jax.Array | None = None) -> Mask:
        return Mask("causal", valid=valid)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[b, t, d] -> [b, t, v]`."""
        logits = next_token.head_logits(self, hidden)
        if not self.flatness:
            return logits
        return jnp.log((1 - self.flatness) * nn.softmax(logits) + self.flatness / self.vocab)

    features = next_token.hidden_states
    prefill, step, grow = next_token.start_cache, next_token.extend_cache, next_token.grow_cache


def build(config: Any) -> MyPrior:
    return MyPrior(**config)


def init(model, key, specs, parts):
    tokens, cond = jnp.zeros((1, model.length), jnp.int32), {"label": jnp.zeros((1,), jnp.int32)}
    return {"params": model.init(key, tokens, cond, method=next_token.forward)["params"], "extra": {}}


def inputs(model):
    return Inputs(classes=model.classes)


def conditioning(model, batch, parts):
    return {"label": batch["label"]}


def loss(model, params, batch, key, *, parts, extra, step, train):
    tokens, cond = next_token.tokens_of(batch, parts), conditioning(model, batch, parts)
    if train:
        cond = next_token.drop_condition(model, cond, rng.sample_keys(key, batch["id"]))
    return next_token.token_loss(model, params, batch, tokens, cond)


def generate(model, params, extra, cond, keys, options):
    flat = model.clone(flatness=options.get("flatness", 0.0))
    return next_token.generate(flat, params, extra, cond, keys, options)


def sample(model, params, cond, keys, *, parts, extra, options):
    prior = options.get("prior", {})
    tokens, logprob = generate(model, params, extra, conditioning(model, cond, parts), keys, prior)
    picture = next_token.sample_image(model, params, extra, {"tokens": tokens}, keys, parts, options)
    return picture | {"logprob": logprob}
