"""Estimates memory and speed of a config on TPUs or GPUs, by compiling its programs for them on a CPU.

    python -m hybridgen.preflight --config configs/ar/raster.py:3b --topology v5e:16x16
    python -m hybridgen.preflight --config configs/ar/raster.py:3b --topology v5e:16x16 --slices 2
    python -m hybridgen.preflight --config configs/ar/raster.py:3b --topology v5e:8x8 --suggest
    python -m hybridgen.preflight --config configs/ar/raster.py:3b --topology h100:4x8    # four hosts of eight
    python -m hybridgen.preflight --config configs/recipes/shapes.py:cpu --stage decoder --json FILE   # this machine

Reports for the training step and the sampling program whether it fits in a device's memory, how much is left, and what
to change if it does not fit; the bytes that its collectives move; and a roofline (cost/roofline.py). No program is run.
The exit code is 1 if a program does not fit. A topology needs the extra `tpu` (libtpu) or `gpu` (the CUDA plugin and
cuDNN), but no TPU or GPU. Parts that name a config are used untrained, so nothing has to be trained before.

`--suggest` estimates all meshes, remat policies and batches, and compiles the most promising (cost/suggest.py).
`--slices N` compiles for N slices, data parallel between them (mesh axis `dcn`). For TPUs, XLA compiles training steps
with fewer optimizations than the run will (`--exact`: with all): a 3B prior then compiles in half a minute instead of
three. The temporaries of such a program were up to 25 % larger and 10 % smaller than those of the run.

JSON: {"config", "family", "topology" (null: this machine), "slices", "device", "devices", "mesh", "batch", "count"
(images generated at a time), "shape": height and width of the images, the largest of several shapes (null: only one),
"dtype", "parameters", "fits", "capacity": bytes per device that a program may use (null: unknown), "train" and
"sample": {
  "fits", "spare": bytes per device that are left (negative: missing; null: unknown),
  "changes": what to change if it does not fit, the most effective first,
  "memory": bytes per device {"arguments", "outputs", "aliased", "temporaries", "peak"} (null if it did not compile),
  "flops" per step or call, all devices: {"matmul", "attention", "convolution", "total"},
  "collectives": [{"kind", "axis" (of the mesh; "?": unknown), "group": its size in devices, "count" per step or call,
    "bytes" per device in total: of its input or output, whichever is larger}],
  "roofline": null if it did not compile, or {"seconds": lower bound per step or call, "limit": "compute", "memory" or
    "network", "times": seconds by these, "recomputed_flops": by remat, all devices, "memory_bytes": read and written
    per device, "images_per_s" and "tokens_per_s" per device, "mfu": upper bound},
  "lower_s" (trace and lower), "compile_s", "error": null, or the compiler's message}}
With --suggest: {"config", "topology", "slices", "device", "devices", "capacity", "tried", "compiled", "fits": whether
any does, "suggestions": [{"options" for the command line, "mesh", "remat", "batch", "estimate": {"bytes",
"images_per_s"}, "fits", "spare", "images_per_s" per device, "limit", "mfu"}], the best first}
"""

import os
import re
import time
from typing import Any

import jax

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing
from hybridgen.cost import chips, hlo, programs, roofline, suggest, topology
from hybridgen.runs import folder

GIB = 2**30
QUICK = {"exec_time_optimization_effort": -0.5}
LISTED = 6  # largest number of kinds of collectives that are printed


def capacity() -> float | None:
    """Bytes that a program may use on a device of this machine; on a CPU, the device's share of the memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def preflight(
    built: programs.Programs, what: tuple[str, ...], room: float | None, options: dict | None = None
) -> dict[str, Any]:
    """Compiles the programs named in `what`, prints a row for each, and returns the report (see the module docstring).

    room: bytes that a program may use on a device, if known; options: XLA compiler options.
    """
    config, mesh = built.experiment.config, built.experiment.mesh
    report = {
        "family": config.family,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch": config.batch,
        "count": built.keys.shape[0],
        "shape": built.rule.shape(built.batch),
        "dtype": built.dtype,
        "parameters": trees.count(built.state["params"]),
        "capacity": room,
    }
    print(headline(report), HEAD, sep="\n", flush=True)
    with doing("measuring this device"):
        chip = chips.of(mesh.devices.flat[0])
    for name in what:
        with doing(f"compiling the program {name!r}"):
            entry = attempt(built, name, chip, room, options)
        report[name] = entry
        print(line(name, entry), *details(entry), sep="\n", flush=True)
    report["fits"] = all(report[name]["fits"] for name in what)
    return report


def attempt(
    built: programs.Programs, name: str, chip: chips.Chip, room: float | None, options: dict | None
) -> dict[str, Any]:
    """The report of one program. Running out of memory while compiling is a result; other errors are raised.

    options: XLA compiler options for the training step only: sampling compiles fast, and with fewer optimizations it
    would read its weights twice.
    """
    if name == "train":
        function, arguments, (flops, again) = built.step, built.train_arguments(), built.train_flops()
    else:
        function, arguments, (flops, again) = built.draw, built.sample_arguments(), (built.sample_flops(), 0.0)
    total, mesh = sum(flops.values()), built.experiment.mesh
    entry = {"flops": flops | {"total": total}, "collectives": [], "roofline": None, "changes": [], "error": None}
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled, measured = programs.compile_timed(function, arguments, options if name == "train" else None)
    except jax.errors.JaxRuntimeError as error:
        over = exceeded(str(error))
        if over is None:
            raise
        entry |= {"lower_s": 0.0, "compile_s": time.perf_counter() - start}
        entry |= {"memory": None, "fits": False, "spare": -over, "error": str(error)[:2000]}
    else:
        spare = None if room is None else room - measured["memory"]["peak"]
        collectives, moved = hlo.read(compiled.as_text(), mesh)
        images = built.experiment.config.batch if name == "train" else built.keys.shape[0]
        rates = roofline.roofline(chip, built.dtype, mesh, total, again, moved, collectives, images, built.tokens())
        entry |= measured | {"spare": spare, "fits": spare is None or spare >= 0}
        entry |= {"collectives": collectives, "roofline": rates}
    if not entry["fits"]:
        entry["changes"] = roofline.changes(built, name, entry, room or chip.memory or 0.0)
    return entry


def exceeded(message: str) -> float | None:
    """The bytes by which memory is exceeded according to a compiler's message; None for any other message."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message:
        return None
    size = r"([\d.]+)\s*([KMGT]?)i?B?"
    by = re.search(rf"[Ee]xceeded .{{0,40}}capacity by {size}", message)
    if by:
        return _bytes(by[1], by[2])
    pair = re.search(rf"[Uu]sed {size} of {size}", message)
    pair = pair or re.search(rf"{size}\)? exceeds (?:available \w+ \()?{size}", message)
    return _bytes(pair[1], pair[2]) - _bytes(pair[3], pair[4]) if pair else 0.0


def _bytes(number: str, prefix: str) -> float:
    return float(number) * 1024 ** " KMGT".index(prefix or " ")


def headline(report: dict) -> str:
    """The line above the table."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one device"
    several = ", images of {} x {}, the largest of several shapes".format(*report["shape"]) if report["shape"] else ""
    room = f", {report['capacity'] / GIB:.2f} GiB each" if report["capacity"] else ""
    return (
        f"{report['family']}: {report['parameters']:,} parameters, batch {report['batch']}, samples {report['count']}, "
        f"on {report['devices']} x {report['device']}{room}, mesh {mesh}{several}"
    )


HEAD = "GiB/device   arguments  outputs  aliased  temporary    peak     FLOP   compile"
COLUMNS = {"arguments": 10, "outputs": 9, "aliased": 9, "temporaries": 11, "peak": 8}


def line(name: str, entry: dict) -> str:
    """A row of the table under HEAD, with the verdict."""
    memory = entry["memory"] or {}
    sizes = {key: f"{memory[key] / GIB:.2f}" if memory else "-" for key in COLUMNS}
    row = "".join(f"{sizes[key]:>{width}}" for key, width in COLUMNS.items())
    return (
        f"{name:12}{row}{programs.human(entry['flops']['total']):>9}{entry['lower_s'] + entry['compile_s']:>8.0f} s"
        f"  {verdict(entry)}"
    )


def verdict(entry: dict) -> str:
    """Whether a program fits, and by how much."""
    if entry["spare"] is None:
        return "compiles; the memory of this device is unknown"
    if entry["fits"]:
        return f"fits with {entry['spare'] / GIB:.2f} GiB to spare"
    return f"does not fit by {-entry['spare'] / GIB:.2f} GiB"


def details(entry: dict) -> list[str]:
    """Lines under a row of the table: what to change, the roofline, and the collectives."""
    human, out = programs.human, [f"{'':12}{'or' if i else 'try'} {text}" for i, text in enumerate(entry["changes"])]
    if entry["roofline"]:
        top = entry["roofline"]
        times = ", ".join(f"{name} {human(seconds, 's')}" for name, seconds in top["times"].items())
        out.append(
            f"{'':12}at least {human(top['seconds'], 's')}, limited by {top['limit']} ({times}): "
            f"{human(top['images_per_s'])} images/s and {human(top['tokens_per_s'])} tokens/s per device, "
            f"MFU {top['mfu']:.0%}"
        )
    for it in entry["collectives"][:LISTED]:
        many = f"{it['count']} over {it['axis']} (groups of {it['group']}), {human(it['bytes'], 'B')} per device"
        out.append(f"{'':12}{it['kind']}: {many}")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("preflight")
    args, overrides = config_lib.parse(parser, argv)
    json = programs.writable(args.json)
    if args.slices < 1 or (args.slices > 1 and args.topology is None):
        raise UserError(f"--slices {args.slices} must be at least 1, and more than 1 needs --topology")
    if args.topology is not None:
        jax.config.update("jax_platforms", "cpu")  # the target's devices are not on this machine
        with doing(f"describing the topology {args.topology}"):
            devices, room = topology.describe(args.topology, args.slices)
    else:
        devices, room = None, capacity()
    hurry = devices is not None and devices[0].platform == "tpu" and not args.exact
    options = QUICK if hurry else None
    if args.suggest:

        def trial(built: programs.Programs, chip: chips.Chip) -> dict[str, Any]:
            return attempt(built, "train", chip, room, options)

        report = suggest.search(args, overrides, devices, room, trial)
    else:
        with doing(f"building the programs of {args.config}"):
            built = programs.load(args, overrides, devices, {"mesh.dcn": args.slices} if args.slices > 1 else None)
        report = preflight(built, built.names(args.what), room, options)
    report = {"config": args.config, "topology": args.topology, "slices": args.slices} | report
    if json:
        folder.write_report(json, report)
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    command(main)
