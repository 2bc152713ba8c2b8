"""Reads the text of a compiled program: its collectives and the bytes that it reads and writes, with loops expanded.

XLA's `cost_analysis` counts the body of a loop once, so only one of all layers and tokens. A collective's axis is found
from its groups of devices: the mesh axes along which the members of a group differ. Bytes are counted as in XLA's cost
analysis, by the inputs and outputs of fusions; a slice counts its own size, an in-place update the size of the update.
Buffers that the compiler for TPUs keeps on the chip (memory space 1) are not counted. On TPUs a collective that
overlaps with several fusions appears in each of them, and is counted where it starts.

A collective is {"kind", "axis" ("fsdp", "data+fsdp", or "?"), "group": its size in devices, "count": times it runs,
"bytes": per device, of its input or output, whichever is larger, summed over its runs}.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SIZES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
# instructions that move no data: other names of existing buffers, and the ends of asynchronous operations
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
FREE += ("optimization-barrier", "add-dependency", "domain", "iota", "send", "recv")
SLICES = ("dynamic-slice", "slice", "gather")
CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One instruction (line) of a computation."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    text: str  # between the parentheses
    rest: str  # attributes
    root: bool

    def calls(self) -> list[str]:
        """The computations that it calls."""
        branches = BRANCHES.search(self.rest)
        return CALLS.findall(self.rest) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


class Use(NamedTuple):
    """The cost of one run of a computation: collectives by (kind, axis, group), and bytes of memory."""

    count: Counter
    bytes: Counter
    memory: float

    def times(self, n: int) -> "Use":
        return Use(*(Counter({k: n * v for k, v in part.items()}) for part in self[:2]), n * self.memory)


def read(text: str, mesh: Any) -> tuple[list[dict], float]:
    """(collectives, bytes of memory read and written by a device) of one run of a compiled program.

    text: `compiled.as_text()`; mesh: the jax.sharding.Mesh it was compiled for.
    """
    computations, entry = parse(text)
    use = _Reader(computations, dict(mesh.shape)).use(entry)
    order = sorted(use.bytes, key=lambda key: -use.bytes[key])
    names = ("kind", "axis", "group")
    found = [dict(zip(names, key, strict=True)) | {"count": use.count[key], "bytes": use.bytes[key]} for key in order]
    return found, use.memory


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry) of an HLO module's text."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # "}}" ends an attribute of several lines
            current = None
        else:
            found = _instruction(line)
            if found:
                current[found.name] = found
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    inside = rest[start + 1 : end - 1]
    return Instruction(head[2], shape, rest[:start], NAME.findall(inside), inside, rest[end:], bool(head[1]))


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.end()
    return len(text)


def sizes(shape: str, everywhere: bool = False) -> list[float]:
    """Bytes of the arrays of a type (f32[2,3]{1,0}, ...); 0 for an array outside main memory, unless `everywhere`."""
    out = []
    for kind, sides, layout in ARRAY.findall(shape):
        if kind not in SIZES:
            bits = re.match(r"[a-z]+(\d+)", kind)
            SIZES[kind] = int(bits[1]) / 8 if bits else 0
        elsewhere = re.search(r"S\((\d+)\)", layout or "")
        count = math.prod(int(side) for side in re.findall(r"\d+", sides))
        out.append(0.0 if elsewhere and elsewhere[1] != "0" and not everywhere else SIZES[kind] * count)
    return out


class _Reader:
    """Counts computations, each once."""

    def __init__(self, computations: dict, mesh: dict[str, int]):
        self.computations, self.mesh = computations, mesh
        self.known: dict[str, Use] = {}
        self.taking: dict[str, dict] = {}

    def use(self, name: str) -> Use:
        if name not in self.known:
            total = Use(Counter(), Counter(), 0.0)
            for instruction in self.computations.get(name, {}).values():
                one = self.one(instruction, self.computations[name])
                total = Use(total.count + one.count, total.bytes + one.bytes, total.memory + one.memory)
            if name.startswith("all-reduce-scatter"):  # a reduce-scatter, which TPUs write as all-reduce and slice
                renamed = [{("reduce-scatter", *key[1:]): n for key, n in part.items()} for part in total[:2]]
                total = Use(*map(Counter, renamed), total.memory)
            self.known[name] = total
        return self.known[name]

    def one(self, it: Instruction, among: dict) -> Use:
        """The cost of an instruction."""
        if _goes_on(it, among):
            return Use(Counter(), Counter(), 0.0)
        kind = it.kind.removesuffix("-start")
        inner = [self.use(name) for name in it.calls()] if kind not in KINDS else []
        memory = self.moved(it, among)
        if kind == "while":
            n = trips(it, self.computations)
            return _sum(use.times(n) for use in inner)
        if kind == "conditional":
            return max(inner, key=lambda use: use.memory, default=Use(Counter(), Counter(), 0.0))
        if kind in ("call", "async"):
            return _sum(inner)
        count, size = Counter(), Counter()
        for use in inner:  # a fusion may hold a collective
            count, size = count + use.count, size + use.bytes
        crossing = re.search(r'_transfer_rendezvous="([a-z\-]+)', it.rest) if kind == "send" else None
        if kind in KINDS or crossing:
            axis, group = ("dcn", self.mesh.get("dcn", 1)) if crossing else self.axis(it)
            key = (crossing[1].rstrip("-") if crossing else kind, axis, group)
            given = sum(sum(sizes(among[name].shape, True)) for name in it.operands if name in among)
            # the result type of a send or a start includes the operands
            got = 0.0 if crossing else max(sum(sizes(it.shape, True)) - given * it.kind.endswith("-start"), 0.0)
            count[key] += 1
            size[key] += max(given, got)
        return Use(count, size, memory)

    def moved(self, it: Instruction, among: dict) -> float:
        """Bytes of memory that an instruction itself reads and writes."""
        kind = it.kind
        if kind in FREE or kind.endswith("-done") or kind in ("while", "conditional", "call", "async-start"):
            return 0.0
        if kind == "fusion":
            called = it.calls()[0]
            read = sum(self.taken(called, i, sum(sizes(among[name].shape))) for i, name in _numbered(it, among))
            return read + self.written(self.computations.get(called, {}), it)
        if kind == "copy-start":
            return sum(sizes(it.shape)[:2])
        if kind in SLICES:
            return 2 * sum(sizes(it.shape))
        if kind == "dynamic-update-slice":
            return 2 * sum(sizes(among[it.operands[1]].shape)) if it.operands[1] in among else 0.0
        given = sum(sum(sizes(among[name].shape)) for name in it.operands if name in among)
        return given + (0.0 if kind.endswith("-start") else sum(sizes(it.shape)))

    def taken(self, name: str, number: int, whole: float) -> float:
        """Bytes that the fused computation `name` reads of its argument `number`, which is `whole` bytes large."""
        inside, users = self.computations.get(name, {}), self.users(name)
        start = users.get(number)
        if not start or not whole:
            return 0.0
        total, seen = 0.0, [start[0].name]
        for place in seen:  # grows: follows instructions that only rename it
            for it in users.get(place, ()):
                if it.kind in ("bitcast", "reshape"):
                    seen.append(it.name)
                elif it.kind in SLICES and it.operands[0] == place:
                    total += sum(sizes(it.shape, True))
                elif it.kind == "fusion":
                    places = [i for i, other in _numbered(it, inside) if other == place]
                    total += sum(self.taken(it.calls()[0], i, whole) for i in places)
                elif it.kind == "dynamic-update-slice" and it.operands[0] == place:
                    continue
                elif not (_goes_on(it, inside) or (it.root and it.kind == "tuple")):  # which pass it on
                    return whole
        return min(total, whole)

    def users(self, name: str) -> dict[Any, list[Instruction]]:
        """The instructions of a computation by their operands; its parameters by number."""
        if name not in self.taking:
            found: dict[Any, list[Instruction]] = {}
            for it in self.computations.get(name, {}).values():
                for other in {int(it.text)} if it.kind == "parameter" else set(it.operands):
                    found.setdefault(other, []).append(it)
            self.taking[name] = found
        return self.taking[name]

    def written(self, inside: dict, it: Instruction) -> float:
        """Bytes that a fusion writes; for an in-place update those of the update."""
        root = next((other for other in inside.values() if other.root), None)
        while root is not None and root.kind in ("bitcast", "reshape"):
            root = inside.get(root.operands[0])
        roots = [inside.get(name) for name in root.operands] if root is not None and root.kind == "tuple" else [root]
        total, whole = 0.0, sizes(it.shape)
        for size, result in zip(whole, roots * (len(whole) if len(roots) == 1 else 1), strict=False):
            update = result is not None and result.kind == "dynamic-update-slice" and inside.get(result.operands[1])
            kept = result is not None and (result.kind == "parameter" or _goes_on(result, inside))
            total += min(size, sum(sizes(update.shape, True))) if update else size * (not kept)
        return total

    def axis(self, it: Instruction) -> tuple[str, int]:
        """(mesh axes that a collective runs along, devices in a group)."""
        group = first_group(it.rest)
        if group is None:
            return "?", 0
        group = group if len(group) else np.arange(math.prod(self.mesh.values()))
        places = np.stack(np.unravel_index(group, tuple(self.mesh.values())))  # axes x members
        crossed = [name for name, row in zip(self.mesh, places, strict=True) if len(set(row.tolist())) > 1]
        full = math.prod(self.mesh[name] for name in crossed) == len(group) or it.kind.startswith("collective-permute")
        return ("+".join(crossed) if full and crossed else "?"), len(group)


def _goes_on(it: Instruction, among: dict) -> bool:
    """Whether this is a later part of a collective that started elsewhere."""
    if "chain_id" not in it.rest or it.kind not in KINDS:
        return False
    return not any("AsyncCollectiveStart" in other.rest for other in among.values() if other.kind == "custom-call")


def _sum(uses: Iterable[Use]) -> Use:
    total = Use(Counter(), Counter(), 0.0)
    for use in uses:
        total = Use(total.count + use.count, total.bytes + use.bytes, total.memory + use.memory)
    return total


def _numbered(it: Instruction, among: dict) -> Iterator[tuple[int, str]]:
    return ((i, name) for i, name in enumerate(it.operands) if name in among)


def trips(loop: Instruction, computations: dict) -> int:
    """The trip count of a loop: the compiler's, or the number in its condition; 1 if unknown."""
    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if trips:
        return int(trips[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    found, names = [], [condition[1]] if condition else []
    for name in names:  # grows: the comparison may be inside a fusion
        for it in computations.get(name, {}).values():
            found += [int(it.text)] if it.kind == "constant" and re.fullmatch(r"\d+", it.text) else []
            names += it.calls()
    return max(found, default=1)


def first_group(rest: str) -> np.ndarray | None:
    """Devices of a collective's first group; empty: one group of all; None: unknown syntax.

    Groups are written out, {{0,1},{2,3}}; or as iotas, [2,2]<=[4] and [2,2]<=[2,2]T(1,0); or as axes of a mesh of their
    own, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest)
    if mesh:
        sides = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", mesh[1])}
        places = _folded(mesh[2] or f"[{math.prod(sides.values())}]").reshape(tuple(sides.values()))
        along = re.findall(r"'([\w.]+)'(?!:)", mesh[3])
        if ":" in mesh[3] or not set(along) <= set(sides):
            return None
        return places[tuple(slice(None) if name in along else 0 for name in sides)].reshape(-1)
    folded = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if folded:
        return _folded(folded[3]).reshape(int(folded[1]), int(folded[2]))[0]
    pairs = re.search(r"source_target_pairs=\{(\{[\d{},]*\})\}", rest)
    if pairs:  # without pairs of a device with itself
        moves = [pair for pair in re.findall(r"(\d+),(\d+)\}", pairs[1]) if pair[0] != pair[1]]
        return np.array([int(i) for i in moves[0]]) if moves else None
    listed = re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", rest)
    return None if listed is None else np.array([int(i) for i in re.findall(r"\d+", listed[1] or "")], int)


def _folded(text: str) -> np.ndarray:
    """Expands an iota of device ids: [2,2]T(1,0) -> 0 2 1 3."""
    sides = [int(side) for side in re.search(r"\[([\d,]+)\]", text)[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(math.prod(sides)).reshape(sides)
    return (ids.transpose([int(i) for i in order[1].split(",")]) if order else ids).reshape(-1)
