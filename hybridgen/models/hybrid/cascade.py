"""The cascade: an AR prior plans an image as tokens, a diffusion decoder renders pixels from the plan.

Written on roles only, so that any prior and any decoder fit. A member is either a part (trained apart, frozen) or, if
`prior` or `decoder` names a family and its options, trained here, jointly and in one step. What flows between them is
`mode`: "tokens" (no gradient to the prior), "soft" (expected codes under the prior's distribution) or "features" (the
prior's hidden states). What a member needs itself, such as the tower of a prior on text features, is a part of the
cascade by the same name. `own` is the share of pictures whose plan is the prior's own, drawn in parallel from its
teacher-forced logits, or, every `rollout_every` steps, by a true rollout: so the decoder learns to forgive. In mode
"soft" these are told as codes of the drawn tokens, the others as expected codes.

Sampling is one program: prefill, a scan over the cache, draft, a scan over diffusion steps.

Letters: b batch, n tokens, v codes, h w plan grid, d code or hidden width, H W picture.
"""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import rng
from hybridgen.core.errors import UserError
from hybridgen.models.contract import Part, Parts, Shape, find, need
from hybridgen.models.losses import cross_entropy, rows, weighted
from hybridgen.nn.linear import at_least_float32

MODES = ("tokens", "soft", "features")


class Cascade(nn.Module):
    """Options only: `prior` and `decoder` are JSON texts {"family", "model"} of members trained here, or empty."""

    prior: str = ""
    decoder: str = ""
    mode: str = "tokens"
    own: float = 0.0
    rollout_every: int = 0
    prior_weight: float = 1.0
    decoder_weight: float = 1.0
    shape: tuple[int, ...] = ()  # of the pictures, where it is not the members' own


def build(config: Any) -> Cascade:
    options = dict(config)
    for name in ("prior", "decoder"):
        if options.get(name) and not isinstance(options[name], str):
            options[name] = json.dumps(options[name], sort_keys=True)
    model = Cascade(**options)
    if model.mode not in MODES:
        raise UserError(f"cascade mode {model.mode!r} is not one of {', '.join(MODES)}")
    return model


def for_shape(model: Cascade, shape: Shape, parts: Parts) -> Cascade:
    """The model for pictures of `shape`, on the same arrays: members trained here are of it, as parts are."""
    for name in ("prior", "decoder"):
        if getattr(model, name):
            family, network = _trained(model, name, parts)
            if not hasattr(find(family), "for_shape"):
                raise UserError(f"its {name}, {family}, takes pictures of one shape")
            find(family).for_shape(network, shape, parts)
    return model.clone(shape=shape)


def members(model: Cascade) -> list[nn.Module]:
    """The networks that are trained here."""
    return [_network(text)[1] for text in (model.prior, model.decoder) if text]


def _network(text: str, **changes: Any) -> tuple[str, nn.Module]:
    """(family, model) of a member trained here."""
    member = json.loads(text)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in member["model"].items()}
    return member["family"], find(member["family"]).build(options | changes)


def _trained(model: Cascade, name: str, parts: Parts) -> tuple[str, nn.Module]:
    """(family, model) of a member trained here; told hidden states, a decoder has a plan as wide as the prior."""
    if name == "decoder" and model.mode == "features":
        prior = _network(model.prior)[1] if model.prior else need(parts, "prior", "a cascade").model
        family, network = _network(model.decoder, plan_width=prior.width)
    else:
        family, network = _network(getattr(model, name))
    return family, find(family).for_shape(network, model.shape, parts) if model.shape else network


def member(model: Cascade, name: str, params: Any, parts: Parts) -> Part:
    """The prior or the decoder, trained here or given."""
    if not getattr(model, name):
        return need(parts, name, "a cascade")
    family, network = _trained(model, name, parts)
    return Part(params[name], {}, family, network)


def init(model: Cascade, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    params = {}
    for name in ("prior", "decoder"):
        if getattr(model, name):
            family, network = _trained(model, name, parts)
            params[name] = find(family).init(network, rng.step_key(key, 0, name), specs, parts)["params"]
    return {"params": params, "extra": {}}


def loss(
    model: Cascade, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Weighted sum of the prior's cross-entropy and the decoder's error on the plan that `mode` names."""
    del extra
    if not (model.prior or model.decoder):
        raise UserError("nothing trains in this cascade: both members are parts; give model.prior or model.decoder")
    prior, decoder = (member(model, name, params, parts) for name in ("prior", "decoder"))
    tokenizer = need(parts, "tokenizer", "a cascade")
    keys = rng.sample_keys(key, batch["id"])
    tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])  # b n
    prompt = find(prior.family).conditioning(prior.model, batch, parts)
    dropped = rng.bernoulli(rng.named(keys, "drop"), prior.model.cond_drop_prob if train and model.prior else 0.0)
    cond = prompt | {"drop": dropped}
    logits = prior.call("score", tokens, cond)  # b n v
    nll = cross_entropy(logits, tokens)  # b n

    plan, own, decoding = tokens, jnp.zeros(tokens.shape[:1], bool), find(decoder.family)
    if train and model.own:
        owned = own_tokens(model, prior, prompt, logits, rng.named(keys, "own plan"), step)
        own = rng.bernoulli(rng.named(keys, "own"), model.own)  # b
        plan = jnp.where(own[:, None], owned, tokens)
    if train and decoder.model.corrupt:
        plan = decoding.corrupt_tokens(plan, keys, tokenizer.model.vocab, decoder.model.corrupt)
    flow = connect(model, prior, decoder, tokenizer, plan, logits, own, cond, parts) | other_conditions(batch)
    rendered, aux = decoding.decoder_loss(
        decoder.model, decoder.params, batch, flow, rng.named(keys, "decoder"), parts, train
    )
    planning_loss, _ = weighted(nll, rows(batch, nll))
    total = model.prior_weight * planning_loss + model.decoder_weight * rendered
    metrics = {"nll": planning_loss, "render": rendered} | aux["metrics"]
    return total, {"metrics": metrics, "weight": aux["weight"], "extra": {}}


def own_tokens(
    model: Cascade, prior: Part, cond: dict, logits: jax.Array, keys: jax.Array, step: jax.Array
) -> jax.Array:
    """The prior's own plan `[b, n]`: one parallel draw from teacher-forced logits, at times a true rollout."""
    parallel = rng.categorical(keys, jax.lax.stop_gradient(logits))
    if not model.rollout_every:
        return parallel
    still = jax.lax.stop_gradient(prior.params)
    frozen = Part(still, prior.extra, prior.family, prior.model)
    return jax.lax.cond(
        step % model.rollout_every == 0, lambda: frozen.call("generate", cond, keys, {})[0], lambda: parallel
    )


def connect(
    model: Cascade,
    prior: Part,
    decoder: Part,
    tokenizer: Part,
    plan: jax.Array,
    logits: jax.Array,
    own: jax.Array,
    cond: dict,
    parts: Parts,
) -> dict:
    """What the decoder is told: codes of the plan; expected codes, but where `own [b]`; hidden states on the grid."""
    family, b = find(decoder.family), plan.shape[0]
    hard = jax.lax.stop_gradient(tokenizer.call("embed", plan))  # b h w d
    if model.mode == "tokens":
        return family.plan_conditioning(decoder.model, hard, parts)
    h, w = tokenizer.model.grid
    if model.mode == "soft":
        vocab = tokenizer.model.vocab
        ids = jnp.arange(-(-vocab // (h * w)) * h * w) % vocab  # every code, filled up to whole grids
        table = tokenizer.call("embed", ids.reshape(-1, h * w)).reshape(ids.size, -1)[:vocab]  # v d
        codes = jnp.einsum("bnv,vd->bnd", jax.nn.softmax(logits.astype(table.dtype), -1), table)
        codes = jnp.where(own[:, None, None, None], hard, codes.reshape(b, h, w, -1))
        return family.plan_conditioning(decoder.model, codes, parts)
    hidden = prior.call("features", plan, cond).reshape(b, h, w, -1)
    return family.plan_conditioning(decoder.model, hard, parts) | {"plan": at_least_float32(hidden)}


def other_conditions(batch: dict) -> dict:
    """What else a decoder may be conditioned on."""
    return {name: batch[name] for name in ("text", "text_mask", "label") if name in batch}


def sample(
    model: Cascade, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """From text ids to pictures: {"image" render, "draft" the tokenizer's own picture, "tokens", "logprob"}.

    options: {"prior": {guidance, temperature, top_k, top_p}, "decoder": {guidance, solver, steps, shift}}.
    """
    prior, decoder = (member(model, name, params, parts) for name in ("prior", "decoder"))
    tokenizer = need(parts, "tokenizer", "a cascade")
    prompt = find(prior.family).conditioning(prior.model, cond, parts)
    if "tokens" in cond:
        tokens, logprob = cond["tokens"], jnp.zeros(cond["tokens"].shape)
    else:
        with jax.named_scope("plan"):
            tokens, logprob = prior.call("generate", prompt, rng.named(keys, "plan"), options.get("prior", {}))
    logits = prior.call("score", tokens, prompt) if model.mode == "soft" else None
    own = jnp.zeros(tokens.shape[:1], bool)
    flow = connect(model, prior, decoder, tokenizer, tokens, logits, own, prompt, parts) | other_conditions(cond)
    image = decoder.call("render", flow, rng.named(keys, "render"), parts, options.get("decoder", {}))
    draft = tokenizer.call("decode", tokenizer.call("embed", tokens))
    return {"image": image, "draft": jnp.clip(draft, -1, 1), "tokens": tokens, "logprob": logprob}
