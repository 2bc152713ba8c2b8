"""A mixture of sources by weight: the source of a sample is a function of the sample number alone.

Weights are converted to integers with the sum P, and the sources alternate in a fixed pattern of length P. In every
prefix of the pattern each source occurs as often as its weight requires, to within one (Tijdeman 1980, "The chairman
assignment problem"), so in any N samples N times its share, to within two. Within a source, samples come in its own
seeded permutations: each record once per epoch of that source.

Letters: N sample numbers.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.data.shuffle import order
from hybridgen.data.sources.protocol import Source

MAX_PERIOD = 100_000


class Mixture:
    """sources: {name: (source, weight)}, in order; indices count the records of all sources in turn.

    Items are those of the sources. All sources must have the same classes and encoders of cached entries; otherwise
    this raises UserError. A sequential pass has each record once.
    """

    def __init__(self, sources: Mapping[str, tuple], *, split: str = "train", resolution: int):
        del split, resolution  # used by the sources
        if not sources:
            raise UserError("data.options.sources is empty: a mixture needs at least one source")
        self.names, pairs = tuple(sources), tuple(sources.values())
        self.sources = tuple(source for source, _ in pairs)
        self._starts = [0, *itertools.accumulate(len(source) for source in self.sources)]
        classes = {name: list(getattr(source, "class_names", ())) for name, (source, _) in sources.items()}
        self.class_names = classes[self.names[0]]
        for name, found in classes.items():
            if found != self.class_names:
                raise UserError(
                    f"the sources {self.names[0]!r} and {name!r} have different classes: "
                    f"{self.class_names[:8]} and {found[:8]}"
                )
        self.encoders = _encoders({name: getattr(source, "encoders", {}) for name, (source, _) in sources.items()})
        counts = _counts({name: weight for name, (_, weight) in sources.items()})
        self._pattern = np.asarray(_pattern(counts))  # P
        one = np.eye(len(counts), dtype=np.int64)[self._pattern]  # P sources
        self._before = np.cumsum(one, 0) - one  # how often each occurred before, in the pattern

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        which = bisect.bisect_right(self._starts, index) - 1
        return which, index - self._starts[which]

    def source_of(self, index: int) -> Source:
        """The source of a record."""
        return self.sources[self._place(index)[0]]

    def name(self, index: int) -> str:
        """The name of the source and that of the record in it."""
        which, inner = self._place(index)
        return f"{self.names[which]}: {self.sources[which].name(inner)}"

    def __getitem__(self, index: int) -> dict:
        which, inner = self._place(index)
        return self.sources[which][inner]

    def view(self, index: int, own: int) -> dict:
        """A record in the view that the random number `own` picks, if its source has several."""
        which, inner = self._place(index)
        source = self.sources[which]
        return source.view(inner, own) if hasattr(source, "view") else source[inner]

    def after(self, index: int, step: int) -> int:
        """The replacement of a broken record, from the same source."""
        which, inner = self._place(index)
        return self._starts[which] + (inner + step) % len(self.sources[which])

    def arrange(self, positions: np.ndarray, batch: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
        """N sample numbers -> (N indices, N bool: not yet seen in a sequential pass)."""
        del batch
        positions = np.asarray(positions, np.int64)
        if not shuffle:
            return positions % len(self), positions < len(self)
        turn, slot = np.divmod(positions, len(self._pattern))
        which = self._pattern[slot]  # N
        out = np.empty_like(positions)
        for number, source in enumerate(self.sources):
            mine = which == number
            total = self._before[-1, number] + (self._pattern[-1] == number)
            inner = turn[mine] * total + self._before[slot[mine], number]
            out[mine] = self._starts[number] + order(inner, len(source), seed + 7919 * number)
        return out, np.ones(len(out), bool)

    def captions(self) -> Iterator[str]:
        """All captions of the sources that list them."""
        for source in self.sources:
            yield from source.captions() if hasattr(source, "captions") else ()

    def digest(self) -> str:
        """The digests of the sources that have one."""
        return "-".join(source.digest() if hasattr(source, "digest") else str(len(source)) for source in self.sources)


def _encoders(each: Mapping[str, Mapping]) -> dict:
    first, *others = each
    for name in others:
        if dict(each[name]) != dict(each[first]):
            raise UserError(
                f"the sources {first!r} and {name!r} have entries cached by different models: "
                f"{dict(each[first])} and {dict(each[name])}"
            )
    return dict(each[first])


def _counts(weights: Mapping[str, float]) -> list[int]:
    """Weights -> the smallest integers in the same ratio. Raises UserError for an invalid weight."""
    parts = []
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise UserError(f"the weight of the source {name!r} is {weight!r}, but must be a number above 0")
        parts.append(Fraction(repr(weight)))
    share = [part / sum(parts) for part in parts]
    period = np.lcm.reduce([part.denominator for part in share], dtype=object)
    if period > MAX_PERIOD:
        raise UserError(
            f"the weights {tuple(weights.values())} repeat after {period} samples, more than {MAX_PERIOD}: round them"
        )
    return [int(part * period) for part in share]


def _pattern(counts: list[int]) -> list[int]:
    """The source of each sample in a period: of the sources that are due, the one with the earliest deadline."""
    period, taken, out = sum(counts), [0] * len(counts), []
    for place in range(period):
        come = [i for i, count in enumerate(counts) if taken[i] * period < count * (place + 1)]
        which = min(come, key=lambda i: (Fraction((taken[i] + 1) * period, counts[i]), i))
        taken[which] += 1
        out.append(which)
    return out
