"""The loss of a tokenizer's picture: reconstruction, perceptual and adversarial terms (VQGAN, Esser et al. 2021).

The discriminator lives under `params/disc` and trains in the same step: the generator loss sees it fixed, the
discriminator loss sees the picture fixed, both as they were before the step. Until `start` it neither trains nor costs
anything.

The adaptive weight is the quotient of two gradients by the decoder's last kernel, that of the reconstruction loss and
that of the generator loss: each is a gradient by the picture, pulled back through the last convolution alone. The
gradients by the picture are computed once and serve for the weight and for everything before the picture.

Letters: b batch, H W picture, h w grid of the discriminator's patches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Parts, need
from hybridgen.models.losses import attached, hinge, per_sample, rows, weighted
from hybridgen.nn.discriminator import PatchGAN

DISC = "disc"


class Adversarial(NamedTuple):
    """Options of the adversarial terms, `model.adversarial` of a config."""

    weight: float = 0.8
    start: int = 0  # step from which on
    adaptive: bool = True  # weight times the quotient of gradients; of a microbatch, so accumulated is another weight
    width: int = 64  # of the discriminator
    depth: int = 3
    groups: int = 32


def adversarial(options: Mapping[str, Any]) -> Adversarial | None:
    """The terms of `model.adversarial`; none if it is empty. Raises UserError for an option that there is not."""
    if unknown := sorted(set(options) - set(Adversarial._fields)):
        raise UserError(f"adversarial has no option {unknown[0]!r}, only {', '.join(Adversarial._fields)}")
    return Adversarial(**options) if options else None


@dataclasses.dataclass(frozen=True)
class PictureLoss:
    """Weights of the terms of a picture; called for the loss of the picture that `decode(params)` makes."""

    l1: float
    mse: float
    perceptual: float
    adversarial: Adversarial | None
    last: str  # path of the decoder's last kernel
    values: int = 1  # the published objective is so many times ours, which the bounds of the adaptive weight go by
    dtype: str = "float32"

    @classmethod
    def of(cls, model: Any, last: str, values: int = 1) -> "PictureLoss":
        """As a tokenizer's options say: `l1`, `mse`, `perceptual`, `adversarial`, `dtype`."""
        weights = model.l1, model.mse, model.perceptual
        return cls(*weights, adversarial(model.adversarial), last, values, model.dtype)

    @property
    def discriminator(self) -> PatchGAN:
        options = self.adversarial
        return PatchGAN(options.width, options.depth, options.groups, self.dtype)

    def init(self, key: jax.Array, image: jax.Array) -> dict[str, Any]:
        """Fresh parameters of the discriminator, to stand beside the tokenizer's: {"disc": ...}, or {}."""
        return {DISC: self.discriminator.init(key, image)["params"]} if self.adversarial else {}

    def __call__(
        self,
        params: Any,
        batch: dict,
        decode: Callable[[Any], jax.Array],
        *,
        parts: Parts,
        step: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of the picture `decode(params)` beside `batch["image"]`, both `[b, H, W, 3]`, and metrics.

        The loss has the reconstruction's value alone, in training and evaluation: the adversarial terms bring their
        gradients in, and have no value that could fall.
        """

        def reconstruction(out: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return reconstruction_loss(self, batch, out, parts)

        if not (self.adversarial and train):
            return reconstruction(decode(params))
        out, pull = jax.vjp(lambda kernel: decode(_replaced(params, self.last, kernel)), _leaf(params, self.last))
        still = jax.lax.stop_gradient
        (value, metrics), slope = jax.value_and_grad(reconstruction, has_aux=True)(still(out))
        # all of it fixed: no gradient is taken of a branch, so that the branch not taken costs nothing
        given = jax.tree.map(still, (out, slope, pull, params[DISC]))
        branches = (_adversarial_step(self, batch, active) for active in (True, False))
        seen, by_out, by_disc = jax.lax.cond(step >= self.adversarial.start, *branches, given)
        total = attached(value, slope, out) + attached(0.0, by_out, out) + attached(0.0, by_disc, params[DISC])
        return total, metrics | seen


def reconstruction_loss(
    loss: PictureLoss, batch: dict, out: jax.Array, parts: Parts
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared, absolute and perceptual error of `out [b, H, W, 3]` by their weights, and metrics."""
    image = batch["image"]
    squared = per_sample(jnp.square(out - image))  # b
    total, metrics = loss.mse * squared + loss.l1 * per_sample(jnp.abs(out - image)), {}
    if loss.perceptual:
        part = need(parts, "perceptual", f"perceptual {loss.perceptual} (0 goes without)")
        distance = part.call("distance", out, image)  # b
        total, metrics = total + loss.perceptual * distance, {"perceptual": _mean(batch, distance)}
    mse = _mean(batch, squared)
    metrics |= {"mse": mse, "psnr": 10 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))}
    return _mean(batch, total), metrics


def generator_loss(batch: dict, fake: jax.Array) -> jax.Array:
    """The tokenizer's term: logits of decoded pictures `[b, h, w]` -> scalar, low where they look real."""
    return -_mean(batch, per_sample(fake))


def discriminator_loss(batch: dict, real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss: logits of pictures and of decoded ones `[b, h, w]` -> scalar."""
    return _mean(batch, hinge(real, fake))


def adaptive_weight(loss: PictureLoss, pull: Callable, slope: jax.Array, by_out: jax.Array) -> jax.Array:
    """Quotient of the gradients by the last kernel of the reconstruction and of the generator loss, at most 10^4.

    slope, by_out: their gradients by the picture `[b, H, W, 3]`; pull: from there to the kernel.
    """
    near, other = (loss.values * jnp.linalg.norm(pull(slope)[0]), jnp.linalg.norm(pull(by_out)[0]))
    return jnp.clip(near / (other + 1e-4), 0.0, 1e4)


def _adversarial_step(loss: PictureLoss, batch: dict, active: bool) -> Callable:
    """(picture, slope of the reconstruction by it, pull to the last kernel, discriminator) -> (metrics, slope by the
    picture, slopes by the discriminator); without `active`, zeros of these."""

    def logits(disc: Any, picture: jax.Array) -> jax.Array:
        return loss.discriminator.apply({"params": disc}, picture)

    def step(given: tuple) -> tuple[dict, jax.Array, Any]:
        out, slope, pull, disc = given
        generator, by_out = jax.value_and_grad(lambda out: generator_loss(batch, logits(disc, out)))(out)
        discriminator, by_disc = jax.value_and_grad(
            lambda disc: discriminator_loss(batch, logits(disc, batch["image"]), logits(disc, out))
        )(disc)
        weight = jnp.asarray(loss.adversarial.weight, by_out.dtype)
        if loss.adversarial.adaptive:
            weight = weight * adaptive_weight(loss, pull, slope, by_out) / loss.values
        metrics = {"generator": generator, "discriminator": discriminator, "adversarial_weight": weight}
        return metrics, weight * by_out, by_disc

    def idle(given: tuple) -> tuple[dict, jax.Array, Any]:
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), jax.eval_shape(step, given))

    return step if active else idle


def _mean(batch: dict, values: jax.Array) -> jax.Array:
    """Mean over the batch's valid rows of a number a picture, `[b]`."""
    return weighted(values, rows(batch, values))[0]


def _leaf(params: Any, path: str) -> jax.Array:
    for name in path.split("/"):
        params = params[name]
    return params


def _replaced(params: Any, path: str, leaf: jax.Array) -> Any:
    name, _, rest = path.partition("/")
    return {**params, name: _replaced(params[name], rest, leaf) if rest else leaf}
