"""Grids of the official schedulers (diffusers), with their rounding: timesteps and noise levels as pipelines use them.

    bar = alphas_bar("scaled_linear", start=0.00085, end=0.012)          # T float32
    steps = spaced("leading", 50, 1000, offset=1)                        # n, noisiest first
    sigmas = karras(sigmas_of(bar)[::-1], 20)

In official schedulers the timestep that the network receives may differ from the noise level of its input: by rounding,
by grids between the training timesteps, and by quirks that change results. These functions on NumPy arrays therefore
return both, and solvers get a Level made from them. Our own samplers use schedules.py.

Letters: n steps, T training timesteps.
"""

import math
import re

import numpy as np
from scipy import stats

from hybridgen.core.errors import UserError
from hybridgen.sampling.schedules import Level

F32 = np.float32


def betas(name: str, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """T betas in float32: linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace."""
    if name == "linear":
        return _line(start, end, steps)
    if name == "scaled_linear":
        return np.square(_line(start**0.5, end**0.5, steps))
    if name == "sigmoid":
        return (1 / (1 + np.exp(-_line(-6, 6, steps))) * F32(end - start) + F32(start)).astype(F32)
    at = np.arange(steps + 1) / steps
    if name == "squaredcos_cap_v2":
        bar = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
    elif name == "laplace":
        half = -0.5 * np.copysign(1, 0.5 - at) * np.log(1 - 2 * np.abs(0.5 - at) + 1e-6)
        bar = np.sqrt(np.exp(half) / (1 + np.exp(half)))
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace"
        raise UserError(f"beta schedule {name!r} is not one of {known}")
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(F32)


def _line(start: float, end: float, count: int) -> np.ndarray:
    """torch.linspace: `count` float32 from start to end, each half computed from its own end with a rounded step."""
    first, last, at = F32(start), F32(end), np.arange(count)
    step = np.float64((last - first) / F32(max(count - 1, 1)))
    return np.where(at < count // 2, first + step * at, last - step * (count - 1 - at)).astype(F32)


def alphas_bar(betas: np.ndarray, zero_snr: bool = False, floor: bool = False) -> np.ndarray:
    """Products of 1 - beta, T float32. zero_snr: rescaled so that the last one is 0; floor: 2^-24 replaces that 0."""
    if zero_snr:
        root = np.sqrt(_product(1 - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        square = np.square(root)
        betas = 1 - np.concatenate([square[:1], square[1:] / square[:-1]])
    bar = _product(1 - betas)
    if zero_snr and floor:
        bar[-1] = 2.0**-24
    return bar


def _product(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(F32)  # accumulated in float64, stored in float32


def variance_preserving(timesteps: np.ndarray, bar: np.ndarray) -> Level:
    """The levels of timesteps with their alpha-bars, n each."""
    bar = np.asarray(bar, np.float64)
    zero = np.zeros_like(bar)
    return Level(np.asarray(timesteps, np.float64), np.sqrt(bar), np.sqrt(1 - bar), zero, zero)


def exploding(sigmas: np.ndarray) -> Level:
    """Variance-exploding levels: alpha is 1, t is sigma."""
    sigmas = np.asarray(sigmas, np.float64)
    return Level(sigmas, np.ones_like(sigmas), sigmas, np.zeros_like(sigmas), np.ones_like(sigmas))


def from_ratio(timesteps: np.ndarray, ratio: np.ndarray) -> Level:
    """Variance-preserving levels from sigma / alpha, n."""
    ratio = np.asarray(ratio, np.float64)
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return Level(np.asarray(timesteps, np.float64), alpha, ratio * alpha, np.zeros_like(ratio), np.zeros_like(ratio))


def sigmas_of(bar: np.ndarray) -> np.ndarray:
    """sigma / alpha from alpha-bars, float32."""
    return np.sqrt((1 - bar) / bar)


def spaced(spacing: str, n: int, steps: int, offset: int = 0) -> np.ndarray:
    """n of the timesteps 0 .. T-1, noisiest first: linspace (not rounded), leading (plus offset), trailing."""
    if not 1 <= n <= steps:
        raise UserError(f"steps {n} is not within 1 and {steps} timesteps")
    if spacing == "linspace":
        return np.linspace(0, steps - 1, n)[::-1]
    if spacing == "leading":
        return (np.arange(n) * (steps // n))[::-1] + float(offset)
    if spacing == "trailing":
        return np.round(np.arange(steps, 0, -steps / n)) - 1
    raise UserError(f"timestep spacing {spacing!r} is not one of linspace, leading, trailing")


def spaced_by_solver(spacing: str, n: int, steps: int, last: int, offset: int = 0) -> np.ndarray:
    """Like `spaced`, as multistep solvers do it: n of n+1 timesteps up to `last`, rounded."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[::-1][:-1]
    if spacing == "leading":
        return (np.arange(n + 1) * (last // (n + 1)))[::-1][:-1] + float(offset)
    if spacing == "trailing":
        return np.round(np.arange(last, 0, -steps / n)) - 1
    raise UserError(f"timestep spacing {spacing!r} is not one of linspace, leading, trailing")


def respaced(text: str, steps: int) -> np.ndarray:
    """The timesteps of T that are kept, ascending, in the notation of DiT and iDDPM.

    "250": this many, evenly from the first to the last; "10,15": these numbers in sections of equal size; "ddim25":
    this many with an integer stride from the first one. If the last section keeps one timestep, it is the last of all
    (official code keeps the section's first one), where sampling starts. Raises UserError if it is not possible.
    """
    read = re.fullmatch(r"ddim([0-9]{1,8})|[0-9]{1,8}(,[0-9]{1,8})*", text)
    if not read:
        raise UserError(f"respacing {text!r} is not of the form '250', '10,10' or 'ddim25'")
    if read[1]:
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == int(read[1]):
                return np.arange(0, steps, stride)
        raise UserError(f"respacing {text!r}: no integer stride gives {read[1]} of {steps} timesteps")
    counts, kept, start = [int(part) for part in text.split(",")], [], 0
    for number, n in enumerate(counts):
        size = steps // len(counts) + (number < steps % len(counts))
        if n > size:
            raise UserError(f"respacing {text!r}: a section of {size} timesteps cannot give {n}")
        alone = n == 1 and number == len(counts) - 1
        stride, place = (size - 1) / (n - 1) if n > 1 else 1, float(size - 1) * alone
        for _ in range(n):
            kept.append(start + round(place))
            place += stride  # accumulated as in official code, since rounding may decide
        start += size
    if not kept:
        raise UserError(f"respacing {text!r} keeps no timestep")
    return np.unique(kept)


def clipped(bar: np.ndarray, least: float) -> int:
    """The number of timesteps, from the cleanest on, whose half log-SNR is at least `least`."""
    half = np.log(np.sqrt(bar)) - np.log(np.sqrt(1 - bar))
    return len(bar) - int(np.searchsorted(half[::-1], F32(least)))


def timestep_of(sigma: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """The fractional timestep of each sigma, n, interpolated in `log_sigmas`, T ascending."""
    log = np.log(np.maximum(sigma, 1e-10))
    low = np.clip(np.cumsum(log[None] >= log_sigmas[:, None], 0).argmax(0), None, len(log_sigmas) - 2)
    weight = np.clip((log_sigmas[low] - log) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def karras(most: float, least: float, n: int) -> np.ndarray:
    """n sigmas, largest first, evenly spaced in their seventh root (Karras et al. 2022, eq. 5)."""
    ends = most ** (1 / 7), least ** (1 / 7)
    return (ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0])) ** 7


def exponential(most: float, least: float, n: int) -> np.ndarray:
    """n sigmas, largest first, evenly spaced in their logarithm."""
    return np.exp(np.linspace(np.log(most), np.log(least), n))


def beta(most: float, least: float, n: int) -> np.ndarray:
    """n sigmas, largest first, at even quantiles of the distribution Beta(0.6, 0.6) between the two."""
    return least + stats.beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (most - least)


REGRIDDED = {"karras": karras, "exponential": exponential, "beta": beta}


def flow_sigmas(steps: int, shift: float) -> np.ndarray:
    """T sigmas of a rectified flow's training timesteps, largest first, float32."""
    return shifted((np.arange(steps, 0, -1, dtype=F32) / F32(steps)), F32(shift))


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Like schedules.shifted, in the precision of the arguments."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_by(sigmas: np.ndarray, mu: float, kind: str = "exponential") -> np.ndarray:
    """Sigmas shifted by a resolution-dependent number (Flux): exp(mu), or mu itself if kind is "linear"."""
    shift = {"exponential": math.exp, "linear": float}[kind](mu)  # a Python float keeps the precision of the sigmas
    return shift / (shift + (1 / sigmas - 1))


def stretched(sigmas: np.ndarray, last: float) -> np.ndarray:
    """Sigmas rescaled about 1 so that the last one is `last` (shift_terminal)."""
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - last))
