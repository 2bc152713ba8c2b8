"""The role "decoder", shared by denoisers: functions over a `Denoiser`, which is a network with its process.

A family defines its network and builds a `Denoiser` from it; it imports the other functions of a decoder from here.
Training renders a batch's pictures (or latents) from their tokens, text and labels. Tokens are corrupted and conditions
dropped at random, so that the decoder tolerates a prior's mistakes and supports guidance.

cond: "plan" b h w d codes, "draft" b H W c, "text" and "text_mask" (and "features" b l d, if already encoded), "label",
and "drop_plan", "drop_text", "drop_label" b bool.

Letters: b batch, H W picture or latent, c channels, h w plan grid, n tokens, d width of codes.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core import entries, rng
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count, number, one_of, share
from hybridgen.models.contract import Inputs, Option, Parts, Shape, divided, find, need, optional, sides
from hybridgen.models.diffusion import process as continuous
from hybridgen.models.diffusion import variance as discrete
from hybridgen.models.diffusion.process import Network, Process
from hybridgen.models.losses import per_sample, rows, weighted
from hybridgen.nn.linear import cast_for_inference
from hybridgen.sampling import guidance, schedules
from hybridgen.sampling.solvers import SOLVERS

CONTINUOUS = ("shift", "spacing")  # sampling options for continuous times only


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network `network(x [b, H, W, c], t [b], cond) -> prediction`, its process and its training options."""

    network: nn.Module
    process: Process
    plan_drop_prob: float = 0.1
    cond_drop_prob: float = 0.1  # of text and label, which are dropped together
    token_corruption: float = 0.0  # each picture's tokens are replaced at a rate drawn from [0, token_corruption]
    posterior: str = "mean"  # training uses the "mean" of an autoencoder's Gaussian, or a "sample" of it

    def __post_init__(self) -> None:
        if self.posterior not in ("mean", "sample"):
            raise UserError(f"model.posterior {self.posterior!r} is not one of 'mean', 'sample'")
        if self.draft and not self.plan_width:
            raise UserError("model.draft is true, but model.plan_width is 0: the draft is the picture of a plan")
        if self.process.relative and not self.draft:
            raise UserError("process.relative needs model.draft: it divides errors by those of the draft")

    @property
    def shape(self) -> Shape:
        """(H, W) of the rendered picture or latent."""
        return sides(self.network.resolution)

    @property
    def channels(self) -> int:
        """Channels c of the rendered picture or latent."""
        return self.network.channels

    @property
    def length(self) -> int:
        """Number of patches n that the network attends over; 0 if it has none."""
        return getattr(self.network, "length", 0)

    @property
    def plan_width(self) -> int:
        """Width d of the plan's codes; 0: the network has no plan input."""
        return getattr(self.network, "plan_width", 0)

    @property
    def draft(self) -> bool:
        """Whether the network takes the tokenizer's reconstruction of the plan."""
        return getattr(self.network, "draft", False)

    @property
    def text_vocab(self) -> int:
        """Vocabulary size of the text that the network reads; 0: it reads none."""
        return getattr(self.network, "text_vocab", 0)

    @property
    def text_length(self) -> int:
        """Number of positions of the text that the network reads."""
        return getattr(self.network, "text_length", 0)

    @property
    def classes(self) -> int:
        """Number of classes that the network takes as labels; 0: it takes none."""
        return getattr(self.network, "classes", 0)


TRAINING = {field.name: field.default for field in dataclasses.fields(Denoiser)[2:]}


def split_options(config: Any, process: Process) -> tuple[dict[str, Any], Process, dict[str, Any]]:
    """`config.model` -> (network options, the process, training options); `process` has the defaults."""
    options = dict(config)
    process = dataclasses.replace(process, **options.pop("process", {}))
    training = {name: options.pop(name, default) for name, default in TRAINING.items()}
    return options, process, training


def init(model: Denoiser, key: jax.Array, specs: dict, parts: Parts) -> dict[str, Any]:
    del specs
    shape = (1, *model.shape, model.channels)
    cond = {"label": jnp.zeros((1,), jnp.int32)}
    if model.plan_width:
        h, w = need(parts, "tokenizer", "a decoder with a plan").model.grid
        cond |= {"plan": jnp.zeros((1, h, w, model.plan_width)), "draft": jnp.zeros(shape)}
    if model.text_vocab:
        text = jnp.zeros((1, model.text_length), jnp.int32)
        cond |= {"text": text, "text_mask": text == 0}
    params = model.network.init(key, jnp.zeros(shape), jnp.zeros((1,)), cond)["params"]
    return {"params": params, "extra": {}}


def inputs(model: Denoiser) -> Inputs:
    """The entries of a batch that the network is conditioned on."""
    return Inputs(bool(model.text_vocab), model.classes)


def for_shape(model: Denoiser, shape: Shape, parts: Parts) -> Denoiser:
    """The model for pictures of `shape`, with the same arrays, for a network of patches."""
    shape = parts["autoencoder"].model.grid if "autoencoder" in parts else shape
    divided(shape, model.network.patch)
    return dataclasses.replace(model, network=model.network.clone(resolution=shape))


def predict(model: Denoiser, params: Any, extra: Any, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
    """The network's prediction at `t [b]` in [0, 1], of the type `model.process.prediction_type`."""
    del extra
    t = discrete.timestep(model.process, t) if model.process.timesteps else t
    return model.network.apply({"params": params}, x, t, cond)


# ---------------------------------------------------------------- conditions, within a network


def dropped(cond: dict, name: str, b: int) -> jax.Array:
    """True for rows whose condition `name` is dropped, `[b]` bool."""
    return cond.get(f"drop_{name}", jnp.zeros((b,), bool))


def kept_draft(cond: dict) -> jax.Array:
    """`cond["draft"] [b, H, W, c]`, zero where the plan is dropped."""
    draft = cond["draft"]
    keep = ~dropped(cond, "plan", draft.shape[0])
    return draft * keep[:, None, None, None]


def label_ids(cond: dict, classes: int, null_class: bool) -> jax.Array:
    """`cond["label"] [b]`, or the null class `classes` where the label is dropped. UserError without a null class."""
    if "drop_label" not in cond:
        return cond["label"]
    if not null_class:
        raise UserError("guidance for 'label' needs a null class, which needs model.cond_drop_prob above 0 in training")
    return jnp.where(cond["drop_label"], classes, cond["label"])


# ---------------------------------------------------------------- conditions, from a batch


def conditioning(model: Denoiser, batch: dict, parts: Parts, tokens: jax.Array | None = None) -> dict:
    """cond of a batch: codes and draft of its tokens (given, cached or from the tokenizer), text and label."""
    names = (("text", "text_mask") if model.text_vocab else ()) + (("label",) if model.classes else ())
    cond = {name: batch[name] for name in names}
    if model.plan_width:
        tokenizer = need(parts, "tokenizer", "a decoder with a plan")
        if tokens is None:
            tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])
        cond |= plan_conditioning(model, tokenizer.call("embed", tokens), parts)
    return jax.lax.stop_gradient(cond)


def plan_conditioning(model: Denoiser, codes: jax.Array, parts: Parts) -> dict:
    """The entries of cond that depend on codes `[b, h, w, d]`; gradients reach soft codes."""
    cond = {"plan": codes}
    if model.draft:
        picture = parts["tokenizer"].call("decode", codes)
        cond["draft"] = parts["autoencoder"].call("encode", picture) if "autoencoder" in parts else picture
    return cond


def clean(model: Denoiser, batch: dict, parts: Parts, keys: jax.Array | None = None) -> jax.Array:
    """The clean target `[b, H, W, c]`: the cached latent, an autoencoder's latent, or the picture.

    keys `[b]`: used to draw the latent if `model.posterior` is "sample"; a cached one was drawn when it was cached.
    """
    if "latent" in batch:
        return batch["latent"]
    if "autoencoder" not in parts:
        return batch["image"]
    auto, draws = parts["autoencoder"], model.posterior == "sample" and keys is not None
    if draws and optional(find(auto.family), "moments") is None:
        raise UserError(f"model.posterior is 'sample', but {auto.family} predicts no Gaussian: set it to 'mean'")
    noise = {"keys": rng.named(keys, "posterior")} if draws else {}
    return jax.lax.stop_gradient(auto.call("encode", batch["image"], **noise))


# ---------------------------------------------------------------- training


def loss(
    model: Denoiser, params: Any, batch: dict, key: jax.Array, *, parts: Parts, extra: Any, step: jax.Array, train: bool
) -> tuple[jax.Array, dict]:
    """Error of the prediction at random times, for the batch's tokens with corruption."""
    del step, extra
    keys = rng.sample_keys(key, batch["id"])  # b
    tokens = None
    if model.plan_width:
        tokenizer = need(parts, "tokenizer", "a decoder with a plan")
        tokens = batch["tokens"] if "tokens" in batch else tokenizer.call("encode", batch["image"])
        if train and model.token_corruption:
            tokens = corrupt_tokens(tokens, keys, tokenizer.model.vocab, model.token_corruption)
    cond = conditioning(model, batch, parts, tokens)
    return decoder_loss(model, params, batch, cond, keys, parts, train)


def corrupt_tokens(tokens: jax.Array, keys: jax.Array, vocab: int, most: float) -> jax.Array:
    """`tokens [b, n]`, some of them replaced at random, at a rate per picture that is uniform in [0, most]."""
    n = tokens.shape[1]
    rate = most * rng.uniform(rng.named(keys, "corruption rate"))  # b
    hit = rng.uniform(rng.named(keys, "corrupted places"), (n,)) < rate[:, None]  # b n
    return jnp.where(hit, rng.randint(rng.named(keys, "corrupted codes"), (n,), 0, vocab), tokens)


def decoder_loss(
    model: Denoiser, params: Any, batch: dict, cond: dict, keys: jax.Array, parts: Parts, train: bool
) -> tuple[jax.Array, dict]:
    """The loss for given conditions, some of which are dropped in training."""
    if train:
        plan = rng.bernoulli(rng.named(keys, "drop plan"), model.plan_drop_prob)
        other = rng.bernoulli(rng.named(keys, "drop text"), model.cond_drop_prob)
        cond = cond | {"drop_plan": plan, "drop_text": other} | ({"drop_label": other} if model.cond_drop_prob else {})
    x = clean(model, batch, parts, keys if train else None)
    errors = _kind_of(model.process).errors
    each, metrics = errors(model.process, lambda x, t, cond: predict(model, params, {}, x, t, cond), x, keys, cond)
    if model.process.relative:
        each = each / (draft_error(x, cond) + 1e-4)
    valid = rows(batch, each)
    scalar, weight = weighted(each, valid)
    report = {name: weighted(value, valid)[0] for name, value in metrics.items()}
    return scalar, {"metrics": report, "weight": weight, "extra": {}}


def draft_error(x: jax.Array, cond: dict) -> jax.Array:
    """Squared error `[b]` of the draft, or of zeros where the plan is dropped, with respect to `x`."""
    return jax.lax.stop_gradient(per_sample(jnp.square(kept_draft(cond) - x)))


def _kind_of(process: Process) -> ModuleType:
    """The module with `errors` and `render` of a process."""
    return discrete if process.timesteps else continuous


# ---------------------------------------------------------------- sampling


def integrate(
    process: Process, network: Network, cond: dict, keys: jax.Array, shape: tuple[int, ...], options: Mapping[str, Any]
) -> jax.Array:
    """Samples `[b, *shape]` with a solver. `cond` has b rows; guided branches repeat them with conditions dropped.

    options: those of `OPTIONS`. "guidance" is a scale per condition, {"plan": s, "text": s}, see sampling.guidance; a
    single number applies to the first of plan, text and label that exists. A condition "x" is dropped by the entry
    `drop_x [b] bool` of `cond`. Raises UserError for guidance of a condition that the decoder does not have.
    """
    known = [name for name in ("plan", "text", "label") if name in cond]
    spec = options.get("guidance", 1.0)
    spec = spec if hasattr(spec, "items") or not guidance.is_on(spec) else {(known or ["plan"])[0]: spec}
    branches = guidance.branches(guidance.parse(spec))
    for name in {name for branch in branches for name in branch}:
        if name not in known:
            raise UserError(f"guidance for {name!r}: the decoder is conditioned on {', '.join(known) or 'nothing'}")
    b = keys.shape[0]
    full = guidance.repeat(cond, len(branches))
    for name in {name for branch in branches for name in branch}:
        full[f"drop_{name}"] = guidance.join([jnp.full(b, name in branch) for branch in branches])

    channels = options.get("guidance_channels", 0) or shape[-1]  # predicted variances are never guided
    call = guidance.guided(lambda x, t: network(x, t, full), spec, channels)
    noise = rng.normal(rng.named(keys, "noise"), shape)  # b H W c; sigma is 1 at t = 1
    with jax.named_scope("render"):
        return _kind_of(process).render(process, call, noise, rng.named(keys, "solver"), options)


def render(
    model: Denoiser, params: Any, extra: Any, cond: dict, keys: jax.Array, parts: Parts, options: Mapping[str, Any]
) -> jax.Array:
    """Renders `[b, H, W, 3]` in [-1, 1] from cond. Raises UserError for latents without an autoencoder."""
    if "autoencoder" not in parts and model.channels != 3:
        need(parts, "autoencoder", f"a decoder of latents of {model.channels} channels")
    if model.text_vocab:  # encoded once, because it is the same at every step of the solver
        cond = cond | {"features": model.network.apply({"params": params}, cond, method="encode_text")}
    params = cast_for_inference(params, model.network.dtype, options.get("gather", 1))  # outside the loop
    shape = (*model.shape, model.channels)
    x = integrate(
        model.process, lambda x, t, cond: predict(model, params, extra, x, t, cond), cond, keys, shape, options
    )
    if "autoencoder" in parts:
        x = parts["autoencoder"].call("decode", x)
    return jnp.clip(x, -1, 1)


def sample(
    model: Denoiser, params: Any, cond: dict, keys: jax.Array, *, parts: Parts, extra: Any, options: dict
) -> dict[str, jax.Array]:
    """Renders `cond["tokens"]`, or the tokens of `cond["image"]`, or from text and label only."""
    ready = conditioning(model, cond, parts)
    return {"image": render(model, params, extra, ready, keys, parts, options.get("decoder", {}))} | (
        {"draft": jnp.clip(ready["draft"], -1, 1)} if "draft" in ready and "autoencoder" not in parts else {}
    )


def options_of(process: Process) -> dict[str, Option]:
    """The sampling options of a decoder; the defaults of solver and steps are those of its process."""
    ramps, ramp = tuple(guidance.RAMPS), "schedule of the decoder's guidance over the steps"
    scale = "classifier-free guidance scale of the decoder (1: none), or one scale per condition"
    known = {
        "guidance": Option(1.0, scale, 0.0, 100.0, by_condition=True, flag="decoder_guidance", off=1),
        "guidance_schedule": Option("constant", ramp, choices=ramps, flag="decoder_guidance_schedule"),
        "guidance_until": Option(
            1.0, "share of the steps to guide, from the first on", 0.0, 1.0, flag="decoder_guidance_until"
        ),
        "guidance_channels": Option(0, "guide the first N channels only (0: all)", 0, 1_000_000),
        "solver": Option(process.solver, "diffusion solver", choices=tuple(SOLVERS)),
        "steps": Option(process.steps, "steps of the diffusion solver", 1, 1000),
        "respacing": Option("", "timesteps to keep, instead of steps: '250', '10,10' or 'ddim25'"),
        "shift": Option(1.0, "shift of the time grid: above 1, more steps are at high noise (SD3)", 0.01, 100.0),
        "spacing": Option("uniform", "spacing of the time grid", choices=("uniform", "cosine")),
        "gather": Option(1, "gather parameters once before the loop (1) or in every step (0)", 0, 1),
    }
    return {name: option for name, option in known.items() if not process.timesteps or name not in CONTINUOUS}


OPTIONS = options_of(Process())
RANGES = entries.TRANSFORMER | entries.CLASSES
RANGES |= {"resolution": entries.SIZE, "channels": count(1, 2**16), "patch": count(1, 2**12)}
RANGES |= {"plan_drop_prob": share(), "token_corruption": share(), "posterior": one_of("mean", "sample")}
RANGES |= {
    "process.schedule": one_of("flow", "cosine", "linear", "scaled_linear", "squaredcos"),
    "process.prediction_type": one_of(*schedules.KINDS),
    "process.loss_type": one_of(*schedules.KINDS),
    "process.relative": FLAG,
    "process.time_mean": number(-100.0, 100.0),
    "process.time_std": number(0.0, 100.0),
    "process.time_min": share(),
    "process.timesteps": count(0, 100_000),
    "process.learned_variance": FLAG,
    "process.variance": one_of("large", "small"),
    "process.solver": one_of(*SOLVERS),
    "process.steps": count(1, 1000),
}
