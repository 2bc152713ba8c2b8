"""Searches mesh, remat policy and batch size: estimates all, compiles the most promising, ranks them by roofline.

Estimates need no compiler. Memory is the state by its shardings, gradients as large as the parameters, and the
activations that the backward pass keeps, counted in a trace of the loss, plus one block under remat. Time is the
roofline of FLOPs from the trace, of these bytes, and of the collectives that a mesh implies (all-gather of weights and
reduce-scatter of gradients over fsdp, all-reduce of gradients over data and of activations over tensor). The memory of
each compiled program corrects later estimates.
"""

import functools
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from hybridgen.core import meshes, sharding, trees
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing
from hybridgen.cost import chips, programs, roofline, steps

POLICIES = ("none", "dots", "full")  # of nn.stack, in decreasing order of kept activations
FACTORS = (0.25, 0.5, 1, 2, 4)  # multiples of the config's batch
COMPILED = 6  # largest number of compilations
PATIENCE = 150.0  # seconds after which no further compilation starts
ROWS = 61  # of the traced batch: a number of which no other dimension is a multiple
GIB = 2**30


class Policy(NamedTuple):
    """The costs under one remat policy that do not depend on mesh and batch."""

    changes: dict[str, str]  # to the config
    kept: float  # bytes per image for the backward pass
    flops: float  # per image
    again: float  # per image, recomputed by remat
    built: programs.Programs


class Candidate(NamedTuple):
    """A combination of policy, mesh and batch, with its estimates."""

    policy: str
    mesh: dict[str, int]
    batch: int
    memory: float  # bytes per device
    rate: float  # images/s per device


def search(args: Namespace, overrides: Any, devices: Any, room: float | None, attempt: Callable) -> dict[str, Any]:
    """The report described in hybridgen.preflight; prints a table. `attempt(built, chip)` compiles a training step.

    args, overrides: of the command line; devices: as for programs.build; room: bytes that a program may use per device.
    Raises UserError if `room` is None.
    """
    devices = list(jax.devices() if devices is None else devices)
    with doing("measuring this device"):
        chip = chips.of(devices[0])
    if room is None:
        raise UserError("--suggest: the memory of this device is unknown: give a --topology")
    policies = dict(_policies(args, overrides, devices))
    batch_size = programs.chosen(args, overrides)[0].batch
    with doing("estimating combinations of mesh, remat and batch"):
        ranked = sorted(_candidates(policies, batch_size, devices, chip, args.slices), key=lambda one: -one.rate)
    where = f"{len(devices)} x {devices[0].device_kind}"
    title = f"estimated {len(ranked)} combinations of mesh, remat and batch on {where}"
    print(title, HEAD, sep="\n", flush=True)
    start, found, scale, over = time.monotonic(), [], dict.fromkeys(POLICIES, 1.0), set()
    for one in ranked:
        where = one.policy, *one.mesh.values()
        late = time.monotonic() - start > PATIENCE and any(entry["fits"] for entry in found)
        if late or len(found) == COMPILED:
            break
        if one.memory * scale[one.policy] > 1.05 * room or where in over:
            continue
        changes = policies[one.policy].changes | {f"mesh.{axis}": size for axis, size in one.mesh.items()}
        number = f"combination {len(found) + 1} of at most {COMPILED}"
        with doing(f"compiling {number}: {_mesh(one.mesh)}, remat {one.policy}, batch {one.batch}"):
            built = programs.load(args, overrides, devices, changes | {"batch": one.batch, "accumulate": 1})
            entry = attempt(built, chip)
        found.append(_described(one, entry, args.stage, changes | {"batch": one.batch}))
        if entry["memory"]:
            scale[one.policy] = entry["memory"]["peak"] / one.memory
        if not entry["fits"]:
            over.add(where)  # larger batches do not fit either, and smaller ones are rarely better
        print(_line(found[-1]), flush=True)
    found.sort(key=lambda entry: (not entry["fits"], -(entry["images_per_s"] or 0.0)))
    best = next((entry for entry in found if entry["fits"]), None)
    print(f"estimated {len(ranked)}, compiled {len(found)}; " + (f"best: {best['options']}" if best else "none fits"))
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "capacity": room,
        "tried": len(ranked),
        "compiled": len(found),
        "fits": best is not None,
        "suggestions": found,
    }


def _policies(args: Namespace, overrides: Any, devices: list) -> Iterator[tuple[str, Policy]]:
    """Yields (name, policy) for every remat policy of the config; only "none" if it has no such option."""
    whole = {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1, "accumulate": 1}
    whole |= {"mesh.dcn": args.slices, "batch": ROWS * len(devices)}
    config, _ = programs.chosen(args, overrides)
    paths = steps.options_named(config.model, "remat")
    for name in POLICIES if paths else POLICIES[:1]:
        changes = dict.fromkeys(paths, name)
        with doing(f"tracing the training step with remat {name}"):
            policy = _traced(programs.load(args, overrides, devices, whole | changes), changes, ROWS * len(devices))
        yield name, policy


def _traced(built: programs.Programs, changes: dict[str, str], batch: int) -> Policy:
    """The policy of programs that were built with `changes`."""
    built.names(("train",))
    loss, (trainable, *rest) = built.objective()
    count, again = built.train_flops()
    kept = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(functools.partial(_backward, loss), trainable, *rest))
        if any(side and side % batch == 0 for side in leaf.shape)
    )
    return Policy(changes, kept / batch, sum(count.values()) / batch, again / batch, built)


def _backward(loss: Callable, trainable: Any, *rest: Any) -> Callable:
    """The backward pass: a pytree of all arrays that it keeps."""
    return jax.vjp(lambda trainable: loss(trainable, *rest), trainable)[1]


def _candidates(
    policies: dict[str, Policy], batch_size: int, devices: list, chip: chips.Chip, slices: int
) -> Iterator[Candidate]:
    """Every valid combination of mesh, remat policy and batch (from a quarter to four times `batch_size`)."""
    base = next(iter(policies.values())).built
    config, inner = base.experiment.config, len(devices) // slices
    heads = math.gcd(*steps.options_named(config.model, "heads").values())
    powers = [2**i for i in range(inner.bit_length()) if inner % 2**i == 0]
    for fsdp, tensor in itertools.product(powers, (1, 2, 4, 8)):
        if inner % (fsdp * tensor) or heads % tensor:
            continue
        sizes = {"dcn": slices, "data": inner // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
        try:
            mesh = meshes.make_mesh(sizes, devices)
            places = sharding.param_shardings(base.state["params"], mesh)
        except (NotImplementedError, ValueError):  # no such mesh on this torus, or a large parameter is replicated
            continue
        ways = len(devices) // tensor
        batches = {max(ways, round(batch_size * factor / ways) * ways) for factor in FACTORS}
        for (name, policy), batch in itertools.product(policies.items(), sorted(batches)):
            memory, rate = _estimate(policies, policy, places, mesh, chip, batch)
            yield Candidate(name, sizes, batch, memory, rate)


def _estimate(
    policies: dict[str, Policy], policy: Policy, places: Any, mesh: Any, chip: chips.Chip, batch: int
) -> tuple[float, float]:
    """(bytes per device, images/s per device) of training with a mesh and batch."""
    built, fsdp, tensor = policy.built, mesh.shape["fsdp"], mesh.shape["tensor"]
    width = 2 if built.dtype == "bfloat16" else 4
    total = trees.count(built.state["params"])
    params = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(built.state["params"]), jax.tree.leaves(places), strict=True)
    )
    leaves = jax.tree.leaves(built.state)
    state = params * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / (4 * total)
    rows = batch * tensor / mesh.devices.size
    all_kept, least = (policies[name].kept for name in ("none", next(reversed(policies))))
    depth = max(steps.options_named(built.experiment.config.model, "depth").values(), default=1)
    block = all_kept / depth if policy.again else 0.0
    kept = rows * (policy.kept if policy.kept == least else policy.kept / tensor) + rows * block / tensor
    memory = state + params + kept + programs.bytes_each(built.experiment.parts)

    turns = 2 + bool(policy.again)  # passes over the weights
    weights = total * width / tensor
    size = {"fsdp": (turns + 1) * weights * (fsdp > 1), "data": 2 * params * width / 4 * (mesh.shape["data"] > 1)}
    size |= {"tensor": 4 * turns * rows * least * (tensor > 1), "dcn": 2 * params * width / 4 * (mesh.shape["dcn"] > 1)}
    rates = {axis: roofline.rate_of(chip, mesh, axis) for axis in size}
    times = (
        (policy.flops + policy.again) * batch / mesh.devices.size / chip.peak(built.dtype),
        (2 * state + 2 * params + turns * weights + 4 * rows * all_kept / tensor) / chip.bandwidth,
        sum(size[axis] / rate for axis, rate in rates.items() if rate),
    )
    return memory, batch / mesh.devices.size / max(times)


def _described(one: Candidate, entry: dict, stage: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    prefix = f"--config.stages.{stage}." if stage else "--config."
    given = {name: value for name, value in changes.items() if name != "mesh.dcn" or value > 1}
    top = entry["roofline"] or dict.fromkeys(("images_per_s", "limit", "mfu"))
    return {
        "options": " ".join(f"{prefix}{name}={value}" for name, value in given.items()),
        "mesh": {axis: size for axis, size in one.mesh.items() if size > 1},
        "remat": one.policy,
        "batch": one.batch,
        "estimate": {"bytes": one.memory, "images_per_s": one.rate},
        "fits": entry["fits"],
        "spare": entry["spare"],
    } | {name: top[name] for name in ("images_per_s", "limit", "mfu")}


HEAD = "mesh                          remat    batch    images/s/device      MFU  limit      memory"


def _mesh(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _line(entry: dict) -> str:
    mesh = _mesh(entry["mesh"])
    rate = programs.human(entry["images_per_s"]) if entry["images_per_s"] else "-"
    share = f"{entry['mfu']:.0%}" if entry["mfu"] else "-"
    verdict = f"{'spare' if entry['fits'] else 'over'} {abs(entry['spare']) / GIB:.2f} GiB"
    return f"{mesh:30}{entry['remat']:6}{entry['batch']:>8}{rate:>19}{share:>9}  {entry['limit'] or '-':10} {verdict}"
