"""Rotary scaling of a transformers config (`rope_scaling`), as options of `nn.position.stretched`.

Every kind except "dynamic" divides each frequency by a number; YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024)
also multiply cosine and sine by a gain. Letters: k head width.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options

NEVER = 1e30  # the divisor of a frequency that is not used (no rotation)


def scaling(options: Options, length: int, k: int) -> tuple[float, dict[str, Any]]:
    """(base, scaling) of a config in either form; `length`: its longest text. UserError if not supported."""
    base = 10_000.0 if options.take("rope_theta", None) is None else options.number("rope_theta")
    old, new = (options.take(name, None) for name in ("rope_scaling", "rope_parameters"))
    kinds = ("default", *KINDS)
    with Options(old or new or {}, "rope_scaling" if old else "rope_parameters") as rope:
        rope.only("type", *kinds)
        kind = rope.only("rope_type", *kinds) if "rope_type" in rope.config else rope.take("type", "default")
        base = rope.number("rope_theta", base)
        if base <= 0:
            raise UserError(f"{rope.where}: rope_theta {base:g} is not positive")
        if kind == "default":
            rope.skip("partial_rotary_factor")  # only the other kinds read it
            return base, {}
        if kind != "proportional":
            rope.only("partial_rotary_factor", 1.0, 1)
        return base, KINDS[kind](rope, base, length, k)


def _positive(rope: Options, name: str, default: float | None = None) -> float:
    """A number above 0; a missing or null value is `default`, if that is given."""
    missing = default is not None and rope.take(name, None) is None
    value = default if missing else rope.number(name)
    if value <= 0:
        raise UserError(f"{rope.where}: {name} {value} is not positive")
    return value


def _linear(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    return {"kind": "linear", "factor": _positive(rope, "factor")}


def _dynamic(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    return {"kind": "dynamic", "factor": _positive(rope, "factor"), "trained": length}


def _llama3(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    out = {"kind": "llama3", "factor": _positive(rope, "factor")}
    out |= {"low": rope.number("low_freq_factor"), "high": rope.number("high_freq_factor")}
    if not 0 < out["low"] < out["high"]:
        factors = f"low_freq_factor {out['low']} and high_freq_factor {out['high']}"
        raise UserError(f"{rope.where}: {factors} must be positive and increasing")
    return out | {"trained": rope.count("original_max_position_embeddings", length)}


def _yarn(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    """YaRN: a frequency is divided by more, the fewer turns it makes within the training length."""
    trained = rope.count("original_max_position_embeddings", length)
    factor = _positive(rope, "factor", length / trained)
    turns = _positive(rope, "beta_fast", 32.0), _positive(rope, "beta_slow", 1.0)
    if base <= 1:
        raise UserError(f"{rope.where}: rope_theta {base:g} is not above 1")
    low, high = (k * math.log(trained / (2 * math.pi * each)) / (2 * math.log(base)) for each in turns)
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, k - 1)
    share = np.clip((np.arange(k // 2) - low) / (high - low or 0.001), 0, 1)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    weights = rope.take("mscale", None), rope.take("mscale_all_dim", None)
    gain = scale(1.0)
    if all(weights):
        gain = scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    by = tuple((1 / (1 - share + share / factor)).tolist())
    return {"kind": "each", "by": by, "gain": _positive(rope, "attention_factor", gain)}


def _longrope(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    """LongRoPE: frequencies are divided by listed numbers, with a second list for texts beyond the training length."""
    trained = rope.count("original_max_position_embeddings", length, least=2)
    factor = _positive(rope, "factor", length / trained)
    gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    by, far = (_numbers(rope, name, k // 2) for name in ("short_factor", "long_factor"))
    gain = _positive(rope, "attention_factor", gain)
    return {"kind": "each", "by": by, "far": far, "trained": trained, "gain": gain}


def _numbers(rope: Options, name: str, count: int) -> tuple[float, ...]:
    values = rope.take(name)
    if not isinstance(values, list | tuple) or len(values) != count:
        raise UserError(f"{rope.where}: {name} is not a list of {count} numbers, one for each frequency")
    numbered = Options({str(i): value for i, value in enumerate(values)}, f"{rope.where}: {name}")
    return tuple(_positive(numbered, str(i)) for i in range(count))


def _proportional(rope: Options, base: float, length: int, k: int) -> dict[str, Any]:
    """All frequencies are divided by one number; the last ones do not rotate."""
    factor, turning = _positive(rope, "factor", 1.0), _positive(rope, "partial_rotary_factor", 1.0)
    kept = min(int(turning * k // 2), k // 2)
    return {"kind": "each", "by": (factor,) * kept + (NEVER,) * (k // 2 - kept)}


KINDS: dict[str, Callable[[Options, float, int, int], dict[str, Any]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
