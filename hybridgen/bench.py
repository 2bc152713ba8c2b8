"""Measures training and sampling on this machine: step time, tokens and images per second, FLOP/s, MFU and memory.

    python -m hybridgen.bench --config configs/ar/raster.py:bench
    python -m hybridgen.bench --config configs/recipes/shapes.py:cpu --stage decoder --what train --json decoder.json
    python -m hybridgen.bench --config configs/ar/raster.py:3b --json prior.json     # on an accelerator

Times the programs that `train` and `sample` run, on one batch of the config's data. It also times cached decoding of a
prior alone (decode) and a few training steps fed by the data loader, to measure the time spent waiting for batches.
Runs of a program alternate with runs of a large matrix product (float32 on a CPU, bfloat16 elsewhere), so that both see
the same load; the fraction of the matmul rate is the median over these pairs. Decode alternates with a large copy.
FLOPs are counted from the trace (cost/flops.py), without recomputation by remat. Parts that name a config are used
untrained. The only file written is FILE; compiled programs go to a temporary folder, to time a warm compile cache.

JSON: {"config", "family", "platform", "device", "devices", "batch", "shape": height and width of the images, the
largest of several shapes (null: only one), "dtype", "parameters", "load": the machine's load average of the last
minute, "matmul": {"dtype", "flops_per_s": median of one device}, "copy": {"bytes_per_s": median of one device, reads
plus writes}, "chip": {"flops_per_s" in this dtype, "bytes_per_s"} by cost/chips.py (null: unknown chip), "train" and
"sample": {
  "seconds" per step or call: {"median", "q1", "q3", "min", "runs"}, "images" per step or call, "images_per_s",
  "tokens_per_s" (image tokens, or patches), "flops" per step or call: {"matmul", "attention", "convolution", "total"},
  "flops_per_s", "matmul_fraction", "mfu": fraction of the chip's peak (null: unknown chip),
  "memory_bytes": read and written per device as compiled (cost/hlo.py), "copy_fraction": their rate / copy rate,
  "lower_s" (trace and lower), "compile_s" with an empty compile cache, "warm_compile_s" from the compile cache,
  "memory" per device as compiled: {"arguments", "outputs", "aliased", "temporaries", "peak"} in bytes,
  "measured_peak": largest number of bytes in use so far, of a device or, on a CPU, of this process,
  in "train" "input": {"steps", "wait_s": median wait for a batch, "stall": waiting / total time} (null with --cached),
  in "sample" "decode": null, or {"seconds": as above, "steps" of the prior, "tokens_per_s", "bytes": that a device must
    read per step (parameters in their compute dtype and the filled cache), "copy_fraction": their rate / copy rate,
    "bandwidth_fraction": of the chip's (null: unknown), "compile_s", ...}},
  and with --against torch (cost/against.py) "against": {"torch": its version, "threads", "train" and "decode":
    {"ours" and "theirs": median seconds, "ratio": theirs / ours, "cpu_ratio", "seconds", "load"}}}
"""

import contextlib
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.cost import against, chips, hlo, programs
from hybridgen.runs import folder as run_folder
from hybridgen.runs.reading import inference_params

FED = 8  # largest number of steps fed by the data loader
PATIENCE = 90.0  # seconds after which a program is not run again, if it ran three times


def bench(built: programs.Programs, what: tuple[str, ...], runs: int, rival: bool = False) -> dict[str, Any]:
    """Times the programs named in `what`, `runs` times each, and prints a row for each; returns the report.

    rival: also time the same model in PyTorch.
    """
    config, mesh = built.experiment.config, built.experiment.mesh
    device = mesh.devices.flat[0]
    chip = chips.find(device.device_kind)
    report = {
        "family": config.family,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "batch": config.batch,
        "shape": built.rule.shape(built.batch),
        "dtype": built.dtype,
        "parameters": trees.count(built.state["params"]),
        "load": os.getloadavg()[0],
        "chip": chip and {"flops_per_s": chip.peak(built.dtype), "bytes_per_s": chip.bandwidth},
    }
    print(headline(report), HEAD, sep="\n", flush=True)
    # compiled outside jax.set_mesh: a program compiled inside it would reject arrays of a single device
    ceilings = Ceilings(chips.Matmul(device), chips.Copy(device), [], [])
    state, batch, parts, cond, keys = built.make()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder, cached(folder):
        for name in what:
            if name == "train":
                entry, state = train(built, (state, batch, parts), ceilings, runs, report)
            else:
                given = inference_params(state["params"], state["ema"]), state["extra"], parts, cond, keys
                entry = sample(built, given, ceilings, runs, report)
            report[name] = entry | {"measured_peak": measured_peak(device)}
            print(line(name, report[name]), *details(report[name]), sep="\n", flush=True)
        if rival:
            report["against"], state = against.compare(built, (state, batch, parts, cond, keys), what, runs)
            print("", *against.lines(report["against"]), sep="\n", flush=True)
    rate, moved = statistics.median(ceilings.products), statistics.median(ceilings.copies)
    report["matmul"] = {"dtype": ceilings.matmul.dtype, "flops_per_s": rate}
    report["copy"] = {"bytes_per_s": moved}
    rates = f"matmul rate {programs.human(rate, 'FLOP/s')} per device, {ceilings.matmul.dtype}"
    print(f"\n{rates}; copy rate {programs.human(moved, 'B/s')}")
    return report


class Ceilings(NamedTuple):
    """Upper bounds of this machine: a matmul and a copy program, and their measured rates in FLOP/s and bytes/s."""

    matmul: chips.Matmul
    copy: chips.Copy
    products: list[float]
    copies: list[float]


@contextlib.contextmanager
def cached(folder: str) -> Iterator[None]:
    """Uses an empty folder as JAX's compile cache, for all programs, however fast they compile."""
    new = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    old = {name: getattr(jax.config, name) for name in new}
    try:
        _configure(new)
        yield
    finally:
        _configure(old)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # otherwise JAX keeps the settings that it read first


def compile_twice(function: Any, arguments: tuple) -> tuple[Any, dict[str, Any]]:
    """As programs.compile_timed, and "warm_compile_s": seconds to compile again from the compile cache."""
    compiled, entry = programs.compile_timed(function, arguments)
    function.clear_cache()  # the in-memory copy: a new process would have the files only
    return compiled, entry | {"warm_compile_s": programs.compile_timed(function, arguments)[1]["compile_s"]}


def train(
    built: programs.Programs, given: tuple, ceilings: Ceilings, runs: int, report: dict
) -> tuple[dict[str, Any], dict]:
    """(the entry "train" of the report, the state after it)."""
    state, batch, parts = given
    compiled, entry = compile_twice(built.step, built.train_arguments())
    turns = steps(compiled, state, batch, parts)
    seconds, beside, last = alternate(turns, ceilings.matmul, runs)
    ceilings.products.extend(beside)
    state, waits = last[0], None
    if built.stream:
        state, waits = loaded(compiled, state, parts, built.stream, min(runs, FED))
    entry |= summary(seconds, beside, built.experiment.config.batch, built.tokens(), built.train_flops()[0], report)
    return entry | moved(compiled, built, seconds, ceilings) | {"input": waits}, state


def loaded(compiled: Any, state: dict, parts: Any, stream: Any, count: int) -> tuple[dict, dict[str, Any]]:
    """(the state, {"steps", "wait_s", "stall"}) of `count` steps on batches of the data loader, as in training."""
    waits, whole = [], 0.0
    with stream() as batches:
        state, _ = jax.block_until_ready(compiled(state, next(batches), parts))  # the first batch always waits
        for _ in range(count):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            state, _ = jax.block_until_ready(compiled(state, batch, parts))
            whole += time.perf_counter() - start
    return state, {"steps": count, "wait_s": statistics.median(waits), "stall": sum(waits) / whole}


def sample(built: programs.Programs, given: tuple, ceilings: Ceilings, runs: int, report: dict) -> dict[str, Any]:
    """The entry "sample" of the report, with "decode" where a prior draws tokens."""
    compiled, entry = compile_twice(built.draw, built.sample_arguments())
    seconds, beside, _ = alternate((compiled(*given) for _ in itertools.count()), ceilings.matmul, runs)
    ceilings.products.extend(beside)
    count = built.keys.shape[0]
    entry |= summary(seconds, beside, count, built.tokens(), built.sample_flops(), report)
    entry |= moved(compiled, built, seconds, ceilings) | {"decode": None}
    decoding = built.decoding()
    if decoding:
        compiled, decode = compile_twice(decoding.plan, built.sample_arguments())
        seconds, beside, _ = alternate((compiled(*given) for _ in itertools.count()), ceilings.copy, runs)
        ceilings.copies.extend(beside)
        rate, share = decoding.bytes * decoding.steps, shared(report)
        fractions = [rate / second / copy * share for second, copy in zip(seconds, beside, strict=True)]
        median = statistics.median(seconds)
        chip = report["chip"]
        entry["decode"] = decode | {
            "seconds": quartiles(seconds),
            "steps": decoding.steps,
            "tokens_per_s": count * (decoding.steps + 1) / median,
            "bytes": decoding.bytes,
            "copy_fraction": statistics.median(fractions),
            "bandwidth_fraction": chip and rate / median / chip["bytes_per_s"],
        }
    return entry


def moved(compiled: Any, built: programs.Programs, seconds: list, ceilings: Ceilings) -> dict[str, Any]:
    """Bytes that a program reads and writes, and their rate as a fraction of the copy rate."""
    mesh = built.experiment.mesh
    size, rate = hlo.read(compiled.as_text(), mesh)[1], ceilings.copy.rate()
    ceilings.copies.append(rate)
    share = mesh.devices.size if mesh.devices.flat[0].platform == "cpu" else 1
    return {"memory_bytes": size, "copy_fraction": size * share / statistics.median(seconds) / rate}


def shared(report: dict) -> int:
    """The number of devices that share one processor: on a CPU all, since one matmul or copy uses all cores."""
    return report["devices"] if report["platform"] == "cpu" else 1


def steps(compiled: Any, state: dict, batch: dict, parts: Any) -> Iterator[tuple[dict, dict]]:
    """An endless iterator of training steps on one batch."""
    while True:
        state, metrics = compiled(state, batch, parts)
        yield state, metrics


def alternate(turns: Iterator, ceiling: Any, runs: int) -> tuple[list[float], list[float], Any]:
    """(seconds of each run, ceiling rate around each, the last result) of `runs` runs, after two warm-up runs."""
    seconds, rates = [], []
    for _ in range(2):
        jax.block_until_ready(next(turns))
    before, started = ceiling.rate(), time.perf_counter()
    while len(seconds) < runs and (len(seconds) < 3 or time.perf_counter() - started < PATIENCE):
        start = time.perf_counter()
        last = jax.block_until_ready(next(turns))
        seconds.append(time.perf_counter() - start)
        after = ceiling.rate()
        rates.append((before + after) / 2)
        before = after
    return seconds, rates, last


def quartiles(seconds: list) -> dict[str, float]:
    """Median, quartiles, minimum and number of times."""
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": statistics.median(seconds), "q1": q1, "q3": q3, "min": min(seconds), "runs": len(seconds)}


def summary(seconds: list, rates: list, images: int, tokens: int, flops: dict, report: dict) -> dict[str, Any]:
    """Rates of a program at the median time of its runs; `tokens`: per image."""
    median, total = statistics.median(seconds), sum(flops.values())
    devices = report["devices"] // shared(report)
    fractions = [total / second / rate / devices for second, rate in zip(seconds, rates, strict=True)]
    return {
        "seconds": quartiles(seconds),
        "images": images,
        "images_per_s": images / median,
        "tokens_per_s": images * tokens / median,
        "flops": dict(flops) | {"total": total},
        "flops_per_s": total / median,
        "matmul_fraction": statistics.median(fractions),
        "mfu": report["chip"] and total / median / devices / report["chip"]["flops_per_s"],
    }


def measured_peak(device: Any) -> int:
    """The largest number of bytes in use so far: of the device, or of this process on a CPU."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HEAD = "              time      IQR   tokens/s  images/s      FLOP  of matmul  compile      peak"


def headline(report: dict) -> str:
    """The lines above the table."""
    text = (
        f"{report['family']}: {report['parameters']:,} parameters, batch {report['batch']}, {report['dtype']}, "
        f"on {report['devices']} {report['device']} device{'s' * (report['devices'] > 1)}"
    )
    if report["shape"]:
        text += "\nimages of {} x {}, the largest of several shapes".format(*report["shape"])
    if report["platform"] == "cpu" and report["load"] > 0.5:
        text += f"\nthe load average of this machine is {report['load']:.1f}: other processes make the numbers noisy"
    return text


def line(name: str, entry: dict) -> str:
    """A row of the table under HEAD."""
    seconds, human = entry["seconds"], programs.human
    relative = (seconds["q3"] - seconds["q1"]) / seconds["median"]
    return (
        f"{name:8}{human(seconds['median'], 's'):>10}{relative:>9.1%}{human(entry['tokens_per_s']):>11}"
        f"{human(entry['images_per_s']):>10}{human(entry['flops']['total']):>10}{entry['matmul_fraction']:>11.1%}"
        f"{entry['lower_s'] + entry['compile_s']:>7.1f} s{entry['memory']['peak'] / 2**30:>6.2f} GiB"
    )


def details(entry: dict) -> list[str]:
    """Lines under a row of the table: memory traffic, waiting for data, decoding."""
    human, mfu = programs.human, f"{entry['mfu']:.1%} of the chip's peak, " if entry["mfu"] else ""
    out = [
        f"{'':8}{mfu}{human(entry['memory_bytes'], 'B')} read and written, {entry['copy_fraction']:.1%} of the copy "
        f"rate; compiles from the compile cache in {entry['warm_compile_s']:.1f} s"
    ]
    waits, decode = entry.get("input"), entry.get("decode")
    if waits:
        waited = human(waits["wait_s"], "s")
        out.append(f"{'':8}with the data loader: waits {waited} per step, {waits['stall']:.1%} of the time")
    if decode:
        out.append(
            f"{'':8}decode: {human(decode['seconds']['median'], 's')}, {decode['steps']} steps that read at least "
            f"{human(decode['bytes'], 'B')} per device, {human(decode['tokens_per_s'])} tokens/s, "
            f"{decode['copy_fraction']:.1%} of the copy rate"
        )
    return out


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("bench")
    args, overrides = config_lib.parse(parser, argv)
    json = programs.writable(args.json)
    args.cached = args.cached or bool(args.against)  # the PyTorch model has no tokenizer
    built = programs.load(args, overrides)
    if args.against:
        against.check(built)
    report = {"config": args.config} | bench(built, built.names(args.what), args.steps, bool(args.against))
    if json:
        run_folder.write_report(json, report)
    return 0


if __name__ == "__main__":
    command(main)
