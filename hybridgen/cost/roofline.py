"""A lower bound of the time of a compiled program on a chip, what limits it, and what to change if it does not fit.

Roofline (Williams et al. 2009): the largest of three times, assuming that they overlap perfectly. Compute: the FLOPs of
a device (with recomputation by remat) at the chip's peak rate. Memory: the bytes that the compiled program reads and
writes at the memory bandwidth. Network: its collectives one after the other, as rings over the links of their mesh
axes. A real run takes longer, but the order of two programs is mostly right.
"""

import math
from typing import Any

import jax

from hybridgen.cost import programs, steps
from hybridgen.cost.chips import Chip

GIB = 2**30
# bytes through a device's links, in units of a collective's size, for a large group
TURNS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "ragged-all-to-all": 1.0}


def roofline(
    chip: Chip,
    dtype: str,
    mesh: jax.sharding.Mesh,
    flops: float,
    again: float,
    memory: float,
    collectives: list[dict],
    images: int,
    tokens: int,
) -> dict[str, Any]:
    """Times and rates of one program; the keys are documented in hybridgen.preflight.

    flops, again: of all devices, without remat and recomputed by it; memory: bytes per device; images: per step or
    call, of `tokens` each.
    """
    peak, devices = chip.peak(dtype), mesh.devices.size
    times = {
        "compute": (flops + again) / devices / peak,
        "memory": memory / chip.bandwidth,
        "network": sum(seconds(chip, mesh, entry) for entry in collectives),
    }
    limit = max(times, key=times.get)
    each = images / times[limit] / devices
    return {
        "seconds": times[limit],
        "limit": limit,
        "times": times,
        "recomputed_flops": again,
        "memory_bytes": memory,
        "images_per_s": each,
        "tokens_per_s": each * tokens,
        "mfu": flops / devices / peak / times[limit],
    }


def seconds(chip: Chip, mesh: jax.sharding.Mesh, entry: dict) -> float:
    """Seconds of one kind of collective; 0 if the links are unknown (devices of one CPU)."""
    rate, n = rate_of(chip, mesh, entry["axis"]), entry["group"]
    moved = entry["bytes"] * TURNS.get(entry["kind"], 1.0) * ((n - 1) / n if n > 1 else 1.0)
    return moved / rate if rate else 0.0


def rate_of(chip: Chip, mesh: jax.sharding.Mesh, axis: str) -> float | None:
    """Bytes/s through a device's links along mesh axes ("data+fsdp"): a torus has a pair of links per axis."""
    names = axis.split("+")
    ring = mesh.devices[tuple(slice(None) if name in names else 0 for name in mesh.axis_names)].reshape(-1)
    tpu = ring[0].platform == "tpu"
    if "dcn" in names or (not tpu and len({device.process_index for device in ring}) > 1):
        return chip.network
    if chip.link is None:
        return None
    places = [device.coords for device in ring] if tpu else []
    return chip.link * max(sum(len(set(side)) > 1 for side in zip(*places, strict=True)), 1)


def changes(built: programs.Programs, name: str, entry: dict, room: float) -> list[str]:
    """Changes for a program that does not fit, the most effective first. `entry`: of preflight's report."""
    config, mesh = built.experiment.config, built.experiment.mesh
    train = name == "train"
    resident = programs.bytes_each(built.state if train else built.sample_arguments()[0])
    resident += programs.bytes_each(built.experiment.parts)
    out = []
    if resident > 0.5 * room:
        most = mesh.devices.size // mesh.shape["dcn"] // mesh.shape["tensor"]
        ways = 2 ** math.ceil(math.log2(resident / (0.4 * room)))
        fsdp = min(mesh.shape["fsdp"] * ways, most)
        after = resident * mesh.shape["fsdp"] / fsdp
        if fsdp > mesh.shape["fsdp"]:
            what = "the state is" if train else "the parameters are"
            why = f"{what} {resident / GIB:.1f} GiB per device, and would be about {after / GIB:.1f}"
            out.append(f"--config.mesh.fsdp={fsdp} --config.mesh.data=-1 ({why})")
        if after > 0.7 * room:
            need = 2 ** math.ceil(math.log2(mesh.devices.size * after / (0.5 * room)))
            out.append(f"more devices, about {need}: on these, fully sharded, it is {after / GIB:.1f} GiB per device")
        if after > room:
            return out  # no batch would be small enough
    if not train:
        count = built.keys.shape[0]
        ways = mesh.devices.size // mesh.shape["tensor"]
        if count > ways:
            out.append(f"--count {max(count // 2, ways)} (instead of {count} images per call)")
        return out
    for path, policy in steps.options_named(config.model, "remat").items():
        if policy != "full":
            out.append(f"--config.{path}=full (instead of {policy}, which keeps activations)")
    ways = math.prod(mesh.shape[axis] for axis in ("dcn", "data", "fsdp"))
    rows = config.batch // config.accumulate // ways
    if rows > 1:
        fewer = min(rows, _parts(entry, room))
        parts = config.accumulate * fewer
        out.append(f"--config.accumulate={parts} (the same batch in parts), or --config.batch={config.batch // fewer}")
    elif mesh.shape["tensor"] == 1:
        out.append("--config.mesh.tensor=2 (each device has only one row of the batch)")
    return out


def _parts(entry: dict, room: float) -> int:
    """The number of accumulation steps, a power of two, with which the temporaries fit next to the arguments."""
    memory = entry["memory"]
    if memory is None:
        return 2 ** max(1, math.ceil(math.log2(1 - entry["spare"] / room)))
    left = room - memory["peak"] + memory["temporaries"]
    return 2 ** max(1, math.ceil(math.log2(memory["temporaries"] / left))) if left > 0 else 2
