"""The cascade: an AR prior generates an image as tokens (the plan), a diffusion decoder renders pixels from the plan.

It uses roles only, so any prior works with any decoder. Each of the two is a part (trained before, frozen) or, if the
option `prior` or `decoder` gives a family and its options, a member, which is trained here (two members in one step).
The option `mode` is the coupling, which is what the decoder reads from the prior: "tokens" (no gradient to the prior),
"soft" (expected codes under the prior's distribution) or "features" (the prior's hidden states). A part that a prior or
decoder needs, such as a text tower, must be a part of the cascade by the same name.

`own` is the share of training pictures whose plan is sampled from the prior: in parallel from its teacher-forced
logits, or every `rollout_every` steps by autoregressive generation. The decoder thereby learns to correct the prior's
mistakes. In mode "soft" it reads the codes of the sampled tokens for these pictures, and expected codes for the others.

Sampling is one program: prefill, a scan over tokens, draft, a scan over diffusion steps.

Letters: b batch, n tokens, v codes, h w plan grid, d code or hidden width, H W picture.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.entries import WEIGHT
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import count, share
from hybridgen.models.contract import Member, Part, Parts, Shape, find, fit, need, optional, returned
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.nn.linear import at_least_float32

ROLE = "generator"
PARTS = ("tokenizer", "prior", "decoder")
RANGES = {"own": share(), "rollout_every": count(), "prior_weight": WEIGHT, "decoder_weight": WEIGHT}
OTHERS = ("text", "text_mask", "label")  # entries of a batch that a decoder may read besides the plan


@dataclasses.dataclass(frozen=True)
class Cascade:
    """The members that are trained here, if any, and how they are coupled."""

    prior: Member | None = None
    decoder: Member | None = None
    mode: str = "tokens"
    own: float = 0.0
    rollout_every: int = 0
    prior_weight: float = 1.0
    decoder_weight: float = 1.0


def build(config: Any) -> Cascade:
    options = dict(config)
    for name in ("prior", "decoder"):
        options[name] = Member.build(options[name]) if options.get(name) else None
    model = Cascade(**options)
    if model.mode not in COUPLINGS:
        raise UserError(f"cascade mode {model.mode!r} is not one of {', '.join(COUPLINGS)}")
    return model


def members(model: Cascade) -> dict[str, Member]:
    """The members that are trained here, by name."""
    both = {"prior": model.prior, "decoder": model.decoder}
    return {name: member for name, member in both.items() if member}


def for_shape(model: Cascade, shape: Shape, parts: Parts) -> Cascade:
    """The cascade for pictures of `shape`, with the same arrays."""
    fitted = {
        name: member._replace(model=fit(find(member.family), member.model, parts, shape))
        for name, member in members(model).items()
    }
    return dataclasses.replace(model, **fitted)


def coupled(model: Cascade, parts: Parts) -> dict[str, Member]:
    """The members; in mode "features" the decoder is built for plans of the prior's width."""
    found = members(model)
    if model.mode == "features" and model.decoder:
        prior = model.prior.model if model.prior else need(parts, "prior", "a cascade").model
        function = optional(find(model.decoder.family), "for_plan")
        if function is None:
            raise UserError(f"cascade mode 'features': {model.decoder.family} does not support plans of another width")
        found["decoder"] = model.decoder._replace(model=function(model.decoder.model, prior.width))
    return found


def part(model: Cascade, name: str, params: Any, parts: Parts) -> Part:
    """The prior or the decoder as a Part: a member with its subtree of `params`, or the part of that name."""
    member = coupled(model, parts).get(name)
    return Part(params[name], {}, *member) if member else need(parts, name, "a cascade")


def init(model: Cascade, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    params = {
        name: _params(find(member.family), member.model, rng.step_key(key, 0, name), specs, parts)
        for name, member in coupled(model, parts).items()
    }
    return {"params": params, "extra": {}}


def _params(family: ModuleType, *arguments: Any) -> dict[str, Any]:
    return returned(family, "init", family.init(*arguments))["params"]


# ---------------------------------------------------------------- couplings


class Flow(NamedTuple):
    """The inputs of a coupling: the three components, and the prior's outputs for a batch."""

    prior: Part
    decoder: Part
    tokenizer: Part
    parts: Parts
    cond: dict  # conditions of the prior
    plan: jax.Array  # b n, tokens
    own: jax.Array  # b bool: the plan is sampled from the prior
    logits: jax.Array | None  # b n v: teacher-forced logits of the prior

    def conditioning(self, codes: jax.Array) -> dict:
        """The decoder's conditions from codes `[b, h, w, d]`."""
        return find(self.decoder.family).plan_conditioning(self.decoder.model, codes, self.parts)

    def codes(self) -> jax.Array:
        """Codes of the plan `[b, h, w, d]`, without a gradient."""
        return jax.lax.stop_gradient(self.tokenizer.call("embed", self.plan))


def by_tokens(flow: Flow) -> dict:
    """The decoder reads the codes of the plan."""
    return flow.conditioning(flow.codes())


def by_soft_codes(flow: Flow) -> dict:
    """The decoder reads expected codes, or the plan's codes if it is sampled from the prior."""
    hard = flow.codes()  # b h w d
    h, w = flow.tokenizer.model.grid
    vocab = flow.tokenizer.model.vocab
    ids = jnp.arange(-(-vocab // (h * w)) * h * w) % vocab  # all codes, padded to full grids
    table = flow.tokenizer.call("embed", ids.reshape(-1, h * w)).reshape(ids.size, -1)[:vocab]  # v d
    codes = jnp.einsum("bnv,vd->bnd", jax.nn.softmax(flow.logits.astype(table.dtype), -1), table)
    own = flow.own[:, None, None, None]
    return flow.conditioning(jnp.where(own, hard, codes.reshape(-1, h, w, codes.shape[-1])))


def by_features(flow: Flow) -> dict:
    """The decoder reads the prior's hidden states on the grid; its draft is decoded from the plan's codes."""
    hard = flow.codes()
    hidden = flow.prior.call("features", flow.plan, flow.cond)  # b n d
    hidden = hidden.reshape(hidden.shape[0], *flow.tokenizer.model.grid, -1)
    return flow.conditioning(hard) | {"plan": at_least_float32(hidden)}


COUPLINGS: dict[str, Callable[[Flow], dict]] = {"tokens": by_tokens, "soft": by_soft_codes, "features": by_features}


# ---------------------------------------------------------------- training and sampling


def loss(
    model: Cascade, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Weighted sum of the prior's cross-entropy and the decoder's loss on the plan, with the coupling of `mode`."""
    del extra
    if not members(model):
        raise UserError("this cascade has nothing to train: both models are parts; set model.prior or model.decoder")
    prior, decoder = (part(model, name, params, parts) for name in ("prior", "decoder"))
    tokenizer, decoding = need(parts, "tokenizer", "a cascade"), find(decoder.family)
    keys = rng.sample_keys(key, batch["id"])
    tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])  # b n
    prompt = find(prior.family).conditioning(prior.model, batch, parts)
    dropped = rng.bernoulli(rng.named(keys, "drop"), prior.model.cond_drop_prob if train and model.prior else 0.0)
    cond = prompt | {"drop": dropped}
    logits = prior.call("score", tokens, cond)  # b n v
    nll = cross_entropy(logits, tokens)  # b n

    plan, own = tokens, jnp.zeros(tokens.shape[:1], bool)
    if train and model.own:
        owned = own_tokens(model, prior, prompt, logits, rng.named(keys, "own plan"), step)
        own = rng.bernoulli(rng.named(keys, "own"), model.own)  # b
        plan = jnp.where(own[:, None], owned, tokens)
    if train and decoder.model.token_corruption:
        plan = decoding.corrupt_tokens(plan, keys, tokenizer.model.vocab, decoder.model.token_corruption)
    flow = Flow(prior, decoder, tokenizer, parts, cond, plan, own, logits)
    read = COUPLINGS[model.mode](flow) | others(batch)
    out = decoding.decoder_loss(decoder.model, decoder.params, batch, read, rng.named(keys, "decoder"), parts, train)
    rendered, aux = returned(decoding, "decoder_loss", out)
    planned, _ = weighted(nll, rows(batch, nll))
    total = model.prior_weight * planned + model.decoder_weight * rendered
    metrics = {"nll": planned, "render": rendered} | aux["metrics"]
    return total, {"metrics": metrics, "weight": aux["weight"], "extra": {}}


def own_tokens(
    model: Cascade, prior: Part, cond: dict, logits: jax.Array, keys: jax.Array, step: jax.Array
) -> jax.Array:
    """A plan `[b, n]` sampled from the prior: in parallel from teacher-forced logits, or autoregressively."""
    parallel = rng.categorical(keys, jax.lax.stop_gradient(logits))
    if not model.rollout_every:
        return parallel
    frozen = dataclasses.replace(prior, params=jax.lax.stop_gradient(prior.params))
    return jax.lax.cond(
        step % model.rollout_every == 0, lambda: frozen.call("generate", cond, keys, {})[0], lambda: parallel
    )


def others(batch: dict) -> dict:
    """The entries of a batch that a decoder may read besides the plan."""
    return {name: batch[name] for name in OTHERS if name in batch}


def sample(
    model: Cascade, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """From text ids to pictures: {"image": render, "draft": the tokenizer's decoding, "tokens", "logprob"}."""
    prior, decoder = (part(model, name, params, parts) for name in ("prior", "decoder"))
    tokenizer = need(parts, "tokenizer", "a cascade")
    prompt = find(prior.family).conditioning(prior.model, cond, parts)
    if "tokens" in cond:
        tokens, logprob = cond["tokens"], jnp.zeros(cond["tokens"].shape)
    else:
        with jax.named_scope("plan"):
            tokens, logprob = prior.call("generate", prompt, rng.named(keys, "plan"), options.get("prior", {}))
    logits = prior.call("score", tokens, prompt) if model.mode == "soft" else None
    own = jnp.zeros(tokens.shape[:1], bool)
    flow = Flow(prior, decoder, tokenizer, parts, prompt, tokens, own, logits)
    read = COUPLINGS[model.mode](flow) | others(cond)
    image = decoder.call("render", read, rng.named(keys, "render"), parts, options.get("decoder", {}))
    draft = tokenizer.call("decode", tokenizer.call("embed", tokens))
    return {"image": image, "draft": jnp.clip(draft, -1, 1), "tokens": tokens, "logprob": logprob}
