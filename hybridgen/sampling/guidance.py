"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) on logits, noise, velocity or clean predictions.

The form is `c + (s - 1) * (c - u)`: with s = 1 it equals the conditional branch bit for bit. If the scale is None or
the Python number 1, the unconditional branch is not computed (`is_on`). A scale is a Python number, a traced scalar, or
a function of progress in [0, 1] (position / last position, or 1 - time): see `schedule`. Branches must be finite.

**Levels.** Several named conditions (text "c", plan "z", history "h") are guided by terms. A term compares two
branches, each named by the conditions that it drops, and `combine_levels` is

    full + sum over terms of (scale - 1) * (branch[base] - branch[drop])

so with all scales 1 the result is exactly the full branch. Configs write terms as plain data (see `parse`):

    {"c": 4.0}                          ordinary guidance: full against dropped c
    {"z": 2.0, "c+z": 1.5}              each against the full branch
    {"c": 3.0, "c+z|c": 1.5}            nested: full against no c, then no c against no c and no z

**Rows.** K branches run as one batch of K * B rows, picture after picture: row K * b + k is branch k of picture b, in
the order of `branches(terms)`, so for ordinary guidance [conditional of 0; unconditional of 0; conditional of 1; ...].
A device then has all branches of its pictures and combines them without communication. Only `repeat`, `join` and
`split` depend on this order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.sampling.schedules import Network

Number = float | np.number | jax.Array  # an array is a traced scalar
Scale = Number | Callable[[jax.Array | float], jax.Array]  # or a function of progress


def is_on(scale: Scale | None) -> bool:
    """Whether the second branch must be computed: False for None and for a Python (or NumPy) number equal to 1."""
    return not (scale is None or (isinstance(scale, (int, float, np.number)) and scale == 1))


def at(scale: Scale, progress: jax.Array | float) -> Number:
    """The scale at a progress in [0, 1]: a number or traced scalar is constant, a schedule is called."""
    return scale(progress) if callable(scale) else scale


def combine(cond: jax.Array, uncond: jax.Array, scale: Number) -> jax.Array:
    """cond + (scale - 1) * (cond - uncond), in at least float32. Both arrays have the same shape."""
    cond, uncond = _wide(cond), _wide(uncond)
    return cond + (scale - 1) * (cond - uncond)


def _wide(a):
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


# ---------------------------------------------------------------- schedules over progress

RAMPS = {
    "constant": lambda p: jnp.ones_like(p),
    "linear": lambda p: p,
    "cosine": lambda p: (1 - jnp.cos(jnp.pi * p)) / 2,
}


def schedule(name: str, scale: Number | None, interval: Sequence[float] = (0.0, 1.0)) -> Scale | None:
    """A scale over progress: from 1 to `scale` along ramp `name` (constant, linear, cosine), and 1 outside `interval`.

    Returns a function progress -> float32, or the number itself if it does not depend on progress (`is_on` needs that).
    The interval is that of Kynkaanniemi et al. 2024 (arXiv 2404.07724), in progress: 0 is the first position, or noise.
    Raises UserError for an unknown ramp or an invalid interval.
    """
    if name not in RAMPS:
        raise UserError(f"guidance schedule {name!r} is not one of {', '.join(RAMPS)}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval {tuple(interval)} is not within 0 <= low <= high <= 1")
    if not is_on(scale) or (name == "constant" and (low, high) == (0, 1)):
        return scale
    return functools.partial(_scale_at, RAMPS[name], scale, low, high)


def scheduled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose `guidance` is a schedule, made from `guidance_schedule` and `guidance_until` (end of the interval).

    `guidance` is a scale, or one scale per dropped condition: {"plan": 1.5, "text": 3.0}.
    """
    out = dict(options)
    interval = (0.0, out.pop("guidance_until", 1.0))
    ramp = functools.partial(schedule, out.pop("guidance_schedule", "constant"), interval=interval)
    if "guidance" in out:
        scale = out["guidance"]
        out["guidance"] = {name: ramp(s) for name, s in scale.items()} if hasattr(scale, "items") else ramp(scale)
    return out


def _scale_at(ramp, scale, low, high, progress):
    progress = jnp.asarray(progress, jnp.float32)
    inside = (progress >= low) & (progress <= high)
    return jnp.where(inside, 1 + (scale - 1) * ramp(progress), 1.0)


def until(scale: Number | None, last: int, length: int) -> Scale | None:
    """`scale` for tokens 0 to `last + 1` of `length`, 1 for later ones: LlamaGen's `cfg_interval`.

    LlamaGen counts steps over the cache from 0 (the first one gives token 1); a negative `last` means all tokens.
    """
    if last < 0 or last + 1 >= length - 1:
        return scale
    return schedule("constant", scale, (0.0, (last + 1.5) / (length - 1)))  # half a token for rounding


# ---------------------------------------------------------------- levels


class Term(NamedTuple):
    """(scale - 1) * (branch[base] - branch[drop]); a branch is named by the sorted conditions that it drops."""

    drop: tuple[str, ...]
    base: tuple[str, ...]
    scale: Scale


def parse(spec: Scale | Mapping[str, Scale | None] | None) -> tuple[Term, ...]:
    """Plain data -> terms, without those whose scale is off (`is_on`).

    spec: None, one scale (it drops "c"), or {"names dropped" or "names dropped|names dropped in the base": scale}, with
    names joined by +. Raises UserError for a malformed name.
    """
    if not hasattr(spec, "items"):
        spec = {"c": spec}
    terms = (Term(*_branch_pair(name), scale) for name, scale in spec.items())
    return tuple(term for term in terms if is_on(term.scale))


def _branch_pair(text):
    sides = [tuple(sorted(filter(None, side.split("+")))) for side in text.split("|")]
    drop, base = (sides + [()])[:2]
    if len(sides) > 2 or not set(base) < set(drop):
        raise UserError(f"guidance term {text!r} is not 'dropped' or 'dropped|base', where the base drops fewer")
    return drop, base


def branches(terms: Sequence[Term]) -> tuple[tuple[str, ...], ...]:
    """The branches to compute, in row order, each as the conditions that it drops. The first is (), the full branch."""
    return tuple(dict.fromkeys([(), *(side for term in terms for side in (term.base, term.drop))]))


def combine_levels(outputs: Sequence[jax.Array], terms: Sequence[Term], progress: jax.Array | float = 0.0) -> jax.Array:
    """outputs: one array for each of `branches(terms)`, in that order -> the guided output, same shape, float32."""
    outputs = {name: _wide(a) for name, a in zip(branches(terms), outputs, strict=True)}
    total = outputs[()]
    for term in terms:
        total = total + (at(term.scale, progress) - 1) * (outputs[term.base] - outputs[term.drop])
    return total


# ---------------------------------------------------------------- rows


def repeat(tree: Any, count: int) -> Any:
    """Every leaf B ... -> count*B ...: each row repeated once per branch."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), tree) if count > 1 else tree


def join(outputs: Sequence[jax.Array]) -> jax.Array:
    """K arrays B ..., one for each branch -> their rows K*B ...."""
    rows = jnp.stack(outputs, 1)  # B K ...
    return rows.reshape(-1, *rows.shape[2:])


def split(rows: jax.Array, count: int) -> list[jax.Array]:
    """K*B ... -> K arrays B ..., one for each branch: the inverse of `join`."""
    each = rows.reshape(-1, count, *rows.shape[1:])  # B K ...
    return [each[:, k] for k in range(count)]


def guided(call: Network, spec: Scale | Mapping[str, Scale | None] | None, channels: int | None = None) -> Network:
    """call(x K*B ..., t K*B) -> K*B ..., over the rows of `branches(parse(spec))`, -> a function of x B ..., t B.

    channels: only the first `channels` of the last axis are guided; the others are those of the full branch (DiT guides
    three of a latent's four). None: all.

    For diffusion: t is time (1 is noise), progress is 1 - t of the first row. With guidance off, K is 1 and `call` is
    returned unchanged. Conditions that `call` closes over must have K*B rows, in the order of `repeat` and `join`.
    """
    terms = parse(spec)
    count = len(branches(terms))
    if count == 1:
        return call

    def guided_call(x, t):
        outputs = split(call(repeat(x, count), repeat(t, count)), count)
        rest = outputs[0][..., channels:] if channels is not None and channels < outputs[0].shape[-1] else None
        if rest is None:
            return combine_levels(outputs, terms, 1 - t[0])
        guided = combine_levels([out[..., :channels] for out in outputs], terms, 1 - t[0])
        return jnp.concatenate([guided, rest.astype(guided.dtype)], -1)

    return guided_call
