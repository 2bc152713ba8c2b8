"""The transformer of VQGAN (Esser et al. 2021, arXiv 2012.09841): a GPT over the tokens of a picture.

Layer norm, exact GELU, biases and learned positions. The sequence is `[codes][tokens]`: the condition is tokens of the
prior's own vocabulary: a class index, the codes of another picture, or only token 0 for the unconditional model. The
condition is never dropped, so there is no guidance. With `pkeep` below 1, some input tokens are replaced at random.

cond: {"label" b int} or {"cond_tokens" b p int}.

Letters: b batch, p condition tokens, n image tokens, t positions, d width, v codes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import count, share
from hybridgen.core.sharding import shard
from hybridgen.models.contract import Inputs, Parts
from hybridgen.models.roles import next_token
from hybridgen.nn import cache as kv
from hybridgen.nn.attention import Attention, Mask
from hybridgen.nn.linear import Embed, Linear, fan_in, zeros
from hybridgen.nn.mlp import MLP
from hybridgen.nn.norm import Norm
from hybridgen.nn.stack import Stack

ROLE = "prior"
PARTS = ("tokenizer",)
OPTIONS = {"prior": next_token.OPTIONS}
RANGES = next_token.RANGES | {name: count(0, 2**24) for name in ("block_size", "unmasked")}
RANGES |= {"cond_length": count(1, 2**20), "pkeep": share()}
prefill, step, score, features = next_token.prefill, next_token.step, next_token.score, next_token.features
generate = next_token.generate
NORM_EPS = 1e-5
INIT_STD = 0.02  # standard deviation of initial kernels and tables; positions start at zero


class GPTBlock(nn.Module):
    """`x [b, t, d] -> [b, t, d]`, and the cache."""

    heads: int
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        *,
        rotary: None = None,
        cache: kv.Cache | None = None,
        layer: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        del rotary, keys
        width = x.shape[-1]
        options: dict[str, Any] = {"bias": True, "dtype": self.dtype, "out_scale": self.out_scale}
        attend = Attention(self.heads, width // self.heads, name="attention", **options)
        y, cache = attend(Norm("layer", NORM_EPS, name="attention_norm")(x), mask, cache=cache, layer=layer)
        x = x + y
        y = Norm("layer", NORM_EPS, name="mlp_norm")(x)
        x = x + MLP(4 * width, "gelu_exact", name="mlp", **options)(y)
        return shard(x, "batch", None, None), cache


class Taming(nn.Module):
    """`features` is the forward pass without a cache; `prefill` and `step` use a cache."""

    vocab: int
    grid: tuple[int, int]
    width: int = 1024
    depth: int = 24
    heads: int = 16
    classes: int = 0
    cond_length: int = 1  # condition tokens p
    block_size: int = 0  # rows of the position table; 0: the number of positions
    unmasked: int = 0  # number of first positions that attend to each other in both directions, also image tokens
    pkeep: float = 1.0  # share of input tokens kept in training; the others are random
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    has_unconditional = False
    cond_drop_prob = 0.0

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width, self.dtype)
        self.position = Embed(self.block_size or self.prefix + self.length, self.width, self.dtype, zeros)
        block = {"heads": self.heads, "dtype": self.dtype}
        self.blocks = Stack(self.depth, GPTBlock, block, remat=self.remat, unroll=self.unroll)
        self.norm = Norm("layer", NORM_EPS)
        self.head = Linear(self.vocab, dtype=self.dtype, init=fan_in(0.1), wide=True)

    @property
    def length(self) -> int:
        """Image tokens n."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Positions p - 1 before the one from which the first token is predicted."""
        return self.cond_length - 1

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.heads, self.width // self.heads

    def embed_condition(self, cond: dict) -> tuple[jax.Array, None]:
        """The prefix `[b, p, d]`, and None: all of it is visible."""
        return self.tokens(cond["label"][:, None] if self.classes else cond["cond_tokens"]), None

    def embed_positions(
        self, x: jax.Array, at: jax.Array | int = 0, keys: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        del keys
        return x + self.position(at + jnp.arange(x.shape[1])), None

    def mask(self, valid: jax.Array | None = None) -> Mask:
        return Mask("prefix" if self.unmasked else "causal", self.unmasked, valid)

    logits, features = next_token.head_logits, next_token.hidden_states
    prefill, step, grow = next_token.start_cache, next_token.extend_cache, next_token.grow_cache


def build(config: Any) -> Taming:
    model = Taming(**config)
    if model.block_size and model.block_size < model.prefix + model.length:
        raise UserError(f"block_size {model.block_size} is below the {model.prefix + model.length} positions")
    if model.classes > model.vocab:
        raise UserError(
            f"classes {model.classes} exceed vocab {model.vocab}: a class is a token of the same vocabulary"
        )
    return model


def init(model: Taming, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    del specs, parts
    cond = {"label": jnp.zeros((1,), jnp.int32), "cond_tokens": jnp.zeros((1, model.cond_length), jnp.int32)}
    tokens = jnp.zeros((1, model.length), jnp.int32)
    params = model.init(key, tokens, cond, method=next_token.forward)["params"]
    return {"params": next_token.redraw(params, key, INIT_STD), "extra": {}}


def inputs(model: Taming) -> Inputs:
    """The entries of a batch that it is conditioned on."""
    return Inputs(classes=model.classes)


def conditioning(model: Taming, batch: dict, parts: Parts) -> dict:
    """The class; or the batch's condition tokens; or only token 0 if the batch has none and `cond_length` is 1."""
    del parts
    if model.classes:
        return {"label": batch["label"]}
    if "cond_tokens" in batch:
        return {"cond_tokens": batch["cond_tokens"]}
    if model.cond_length > 1:
        raise UserError(f"'cond_tokens' is missing in the batch: this prior needs {model.cond_length} condition codes")
    b = next(iter(batch.values())).shape[0]
    return {"cond_tokens": jnp.zeros((b, 1), jnp.int32)}


def loss(
    model: Taming, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Next-token cross-entropy in nats per token."""
    del extra, step
    tokens = inputs = next_token.tokens_of(batch, parts)  # b n
    cond = conditioning(model, batch, parts)
    if train and model.pkeep < 1:
        keys = rng.sample_keys(key, batch["id"])  # b
        kept = rng.bernoulli(rng.named(keys, "keep"), model.pkeep, tokens.shape[1:])  # b n
        inputs = jnp.where(kept, tokens, rng.randint(rng.named(keys, "random"), tokens.shape[1:], 0, model.vocab))
    return next_token.token_loss(model, params, batch, tokens, cond, inputs=inputs)


def sample(
    model: Taming, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Tokens (drawn, or `cond["tokens"]`), and their picture if there is a tokenizer."""
    cond = cond if "tokens" in cond else conditioning(model, cond, parts)
    return next_token.sample_image(model, params, extra, cond, keys, parts, options)
