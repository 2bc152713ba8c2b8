"""The loss of a tokenizer's picture: reconstruction, perceptual and adversarial terms (VQGAN, Esser et al. 2021).

The discriminator's parameters are `params/disc`, and it trains in the same step: the generator loss holds it fixed, the
discriminator loss holds the picture fixed, both at their values before the step. Before step `start` it is neither
trained nor computed.

The adaptive weight is the ratio of the norms of two gradients with respect to the decoder's last kernel: of the
reconstruction loss and of the generator loss. Each is a gradient with respect to the picture, pulled back through the
last convolution. The gradients with respect to the picture are computed once, for the weight and for backpropagation.

Letters: b batch, H W picture, h w grid of the discriminator's patches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridgen.core.entries import WEIGHT
from hybridgen.core.errors import UserError
from hybridgen.core.ranges import FLAG, count
from hybridgen.models.contract import Parts, need
from hybridgen.models.losses import attached, hinge, per_sample, rows, weighted
from hybridgen.nn.discriminator import PatchGAN

DISC = "disc"
RANGES = {
    "mse": WEIGHT,
    "l1": WEIGHT,
    "perceptual": WEIGHT,
    "adversarial.weight": WEIGHT,
    "adversarial.start": count(),
    "adversarial.adaptive": FLAG,
    "adversarial.width": count(1, 2**12),
    "adversarial.depth": count(1, 10),
    "adversarial.groups": count(1, 2**12),
}


class Adversarial(NamedTuple):
    """Options of the adversarial terms, `model.adversarial` of a config."""

    weight: float = 0.8
    start: int = 0  # first step with these terms
    adaptive: bool = True  # multiplies weight by the gradient ratio; per microbatch, so accumulation changes it
    width: int = 64  # of the discriminator, as depth and groups
    depth: int = 3
    groups: int = 32


def adversarial(options: Mapping[str, Any]) -> Adversarial | None:
    """The options in `model.adversarial`; None if it is empty. Raises UserError for an unknown option."""
    if unknown := sorted(set(options) - set(Adversarial._fields)):
        raise UserError(f"model.adversarial has no option {unknown[0]!r}, only {', '.join(Adversarial._fields)}")
    return Adversarial(**options) if options else None


@dataclasses.dataclass(frozen=True)
class PictureLoss:
    """Weights of the terms of a picture's loss; a call computes the loss of the picture `decode(params)`."""

    l1: float
    mse: float
    perceptual: float
    adversarial: Adversarial | None
    last: str  # path of the decoder's last kernel
    values: int = 1  # factor from our objective to the published one, on which the adaptive weight is computed
    dtype: str = "float32"

    @classmethod
    def of(cls, model: Any, last: str, values: int = 1) -> "PictureLoss":
        """From a tokenizer's options `l1`, `mse`, `perceptual`, `adversarial` and `dtype`."""
        weights = model.l1, model.mse, model.perceptual
        return cls(*weights, adversarial(model.adversarial), last, values, model.dtype)

    @property
    def discriminator(self) -> PatchGAN:
        options = self.adversarial
        return PatchGAN(options.width, options.depth, options.groups, self.dtype)

    def init(self, key: jax.Array, image: jax.Array) -> dict[str, Any]:
        """Initial parameters of the discriminator, to be merged with the tokenizer's: {"disc": ...}, or {}."""
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
        """Loss of the picture `decode(params)` against `batch["image"]`, both `[b, H, W, 3]`, and metrics.

        The value is that of the reconstruction terms only, in training and evaluation: the adversarial terms add their
        gradients but not their values, which do not decrease in training.
        """

        def reconstruction(out: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return reconstruction_loss(self, batch, out, parts)

        if not (self.adversarial and train):
            return reconstruction(decode(params))
        out, pull = jax.vjp(lambda kernel: decode(_replaced(params, self.last, kernel)), _leaf(params, self.last))
        still = jax.lax.stop_gradient
        (value, metrics), slope = jax.value_and_grad(reconstruction, has_aux=True)(still(out))
        # all inputs are fixed: branches are not differentiated, so the branch not taken costs nothing
        given = jax.tree.map(still, (out, slope, pull, params[DISC]))
        branches = (_adversarial_step(self, batch, active) for active in (True, False))
        seen, by_out, by_disc = jax.lax.cond(step >= self.adversarial.start, *branches, given)
        total = attached(value, slope, out) + attached(0.0, by_out, out) + attached(0.0, by_disc, params[DISC])
        return total, metrics | seen


def reconstruction_loss(
    loss: PictureLoss, batch: dict, out: jax.Array, parts: Parts
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of squared, absolute and perceptual error of `out [b, H, W, 3]`, and metrics."""
    image = batch["image"]
    squared = per_sample(jnp.square(out - image))  # b
    total, metrics = loss.mse * squared + loss.l1 * per_sample(jnp.abs(out - image)), {}
    if loss.perceptual:
        part = need(parts, "perceptual", f"model.perceptual {loss.perceptual} (0: none)")
        distance = part.call("distance", out, image)  # b
        total, metrics = total + loss.perceptual * distance, {"perceptual": _mean(batch, distance)}
    mse = _mean(batch, squared)
    metrics |= {"mse": mse, "psnr": 10 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))}
    return _mean(batch, total), metrics


def generator_loss(batch: dict, fake: jax.Array) -> jax.Array:
    """The tokenizer's term: logits of decoded pictures `[b, h, w]` -> scalar, low where they look real."""
    return -_mean(batch, per_sample(fake))


def discriminator_loss(batch: dict, real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss: logits of real and of decoded pictures `[b, h, w]` -> scalar."""
    return _mean(batch, hinge(real, fake))


def adaptive_weight(loss: PictureLoss, pull: Callable, slope: jax.Array, by_out: jax.Array) -> jax.Array:
    """Ratio of the gradient norms of reconstruction and generator loss at the last kernel, at most 10^4.

    slope, by_out: their gradients with respect to the picture `[b, H, W, 3]`; pull: pulls them back to the kernel.
    """
    near, other = (loss.values * jnp.linalg.norm(pull(slope)[0]), jnp.linalg.norm(pull(by_out)[0]))
    return jnp.clip(near / (other + 1e-4), 0.0, 1e4)


def _adversarial_step(loss: PictureLoss, batch: dict, active: bool) -> Callable:
    """A function (picture, gradient of the reconstruction loss, pull-back to the last kernel, discriminator) ->
    (metrics, gradient for the picture, gradients for the discriminator); all zeros if not `active`."""

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
    """Mean of `values [b]` over the batch's valid rows."""
    return weighted(values, rows(batch, values))[0]


def _leaf(params: Any, path: str) -> jax.Array:
    for name in path.split("/"):
        params = params[name]
    return params


def _replaced(params: Any, path: str, leaf: jax.Array) -> Any:
    name, _, rest = path.partition("/")
    return {**params, name: _replaced(params[name], rest, leaf) if rest else leaf}
