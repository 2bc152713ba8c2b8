"""What a tokenizer's picture is judged by: errors, a perceptual distance and a discriminator (Esser et al. 2021).

The discriminator lives under `params/disc` and trains in the same step: the tokenizer's term sees it fixed, its own
term sees the picture fixed, both as they were before the step. Until `start` it neither trains nor costs anything.

The adaptive weight is the quotient of two gradients by the decoder's last kernel, that of the reconstruction and that
of the discriminator's judgement: each is a gradient by the picture, pulled back through the last convolution alone. The
gradients by the picture are computed once and serve for the weight and for everything before the picture.

Letters: b batch, H W picture.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.models.contract import Parts, need
from hybridgen.models.losses import attached, hinge, per_sample, rows, weighted
from hybridgen.nn.discriminator import PatchGAN

DISC = "disc"


class Game(NamedTuple):
    """Options of the adversarial terms, `model.adversarial` of a config."""

    weight: float = 0.8
    start: int = 0  # step from which on
    adaptive: bool = True  # weight times the quotient of gradients; of a microbatch, so accumulated is another weight
    width: int = 64  # of the discriminator
    depth: int = 3
    groups: int = 32


class Judge(NamedTuple):
    """Weights of the terms of a picture."""

    absolute: float
    squared: float
    perceptual: float
    game: Game | None
    values: int = 1  # the published objective is so many times ours, which the bounds of the adaptive weight go by
    dtype: str = "float32"

    @property
    def disc(self) -> PatchGAN:
        return PatchGAN(self.game.width, self.game.depth, self.game.groups, self.dtype)


def game(options: Mapping[str, Any]) -> Game | None:
    """The game of `model.adversarial`; none if it is empty. Raises UserError for an option that there is not."""
    if odd := sorted(set(options) - set(Game._fields)):
        raise UserError(f"adversarial has no option {odd[0]!r}, only {', '.join(Game._fields)}")
    return Game(**options) if options else None


def init(judge: Judge, key: jax.Array, image: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the discriminator, to stand beside the tokenizer's: {"disc": ...}, or {}."""
    return {DISC: judge.disc.init(key, image)["params"]} if judge.game else {}


def reconstruction_loss(
    judge: Judge,
    params: Any,
    batch: dict,
    paint: Callable[[Any], jax.Array],
    last: str,
    *,
    parts: Parts,
    step: jax.Array,
    train: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the picture `paint(params)` beside `batch["image"]`, both `[b, H, W, 3]`, and metrics.

    last: path of the decoder's last kernel in `params`. The loss has the reconstruction's value alone, in training and
    evaluation: the game's terms bring their gradients in, and have no value that could fall.
    """

    def near(out: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _near(judge, batch, out, parts)

    if not (judge.game and train):
        return near(paint(params))
    out, pull = jax.vjp(lambda kernel: paint(_replaced(params, last, kernel)), _leaf(params, last))
    still = jax.lax.stop_gradient
    (value, metrics), slope = jax.value_and_grad(near, has_aux=True)(still(out))
    # all of it fixed: no gradient is taken of a branch, so that the branch not taken costs nothing
    given = jax.tree.map(still, (out, slope, pull, params[DISC]))
    found = jax.lax.cond(step >= judge.game.start, *(_turn(judge, batch, active) for active in (True, False)), given)
    game_metrics, by_out, by_disc = found
    total = attached(value, slope, out) + attached(0.0, by_out, out) + attached(0.0, by_disc, params[DISC])
    return total, metrics | game_metrics


def _near(judge: Judge, batch: dict, out: jax.Array, parts: Parts) -> tuple[jax.Array, dict[str, jax.Array]]:
    image = batch["image"]
    squared = per_sample(jnp.square(out - image))  # b
    total, metrics = judge.squared * squared + judge.absolute * per_sample(jnp.abs(out - image)), {}
    if judge.perceptual:
        part = need(parts, "perceptual", f"perceptual {judge.perceptual} (0 goes without)")
        far = part.call("distance", out, image)  # b
        total, metrics = total + judge.perceptual * far, {"perceptual": weighted(far, rows(batch, far))[0]}
    mse, _ = weighted(squared, rows(batch, squared))
    metrics |= {"mse": mse, "psnr": 10 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))}
    return weighted(total, rows(batch, total))[0], metrics


def _turn(judge: Judge, batch: dict, active: bool) -> Callable:
    """A turn of the game: (picture, slope of the reconstruction by it, pull to the last kernel, discriminator) ->
    (metrics, slope by the picture, slopes by the discriminator); without `play`, zeros of these."""

    def mean(values: jax.Array) -> jax.Array:
        return weighted(values, rows(batch, values))[0]

    def turn(given: tuple) -> tuple[dict, jax.Array, Any]:
        out, slope, pull, disc = given

        def score(disc: Any, picture: jax.Array) -> jax.Array:
            return judge.disc.apply({"params": disc}, picture)

        def against(disc: Any) -> jax.Array:
            return mean(hinge(score(disc, batch["image"]), score(disc, out)))

        generator, by_out = jax.value_and_grad(lambda out: -mean(per_sample(score(disc, out))))(out)
        discriminator, by_disc = jax.value_and_grad(against)(disc)
        weight = jnp.asarray(judge.game.weight, by_out.dtype)
        if judge.game.adaptive:
            near, other = (judge.values * jnp.linalg.norm(pull(slope)[0]), jnp.linalg.norm(pull(by_out)[0]))
            weight = weight * jnp.clip(near / (other + 1e-4), 0.0, 1e4) / judge.values
        game_metrics = {"generator": generator, "discriminator": discriminator, "adversarial_weight": weight}
        return game_metrics, weight * by_out, by_disc

    def idle(given: tuple) -> tuple[dict, jax.Array, Any]:
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), jax.eval_shape(turn, given))

    return turn if active else idle


def _leaf(params: Any, path: str) -> jax.Array:
    for name in path.split("/"):
        params = params[name]
    return params


def _replaced(params: Any, path: str, leaf: jax.Array) -> Any:
    name, _, rest = path.partition("/")
    return {**params, name: _replaced(params[name], rest, leaf) if rest else leaf}
