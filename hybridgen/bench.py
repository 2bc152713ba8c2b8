"""Step time, tokens and images a second, and fraction of this machine's rate, of training and sampling with a config.

    python -m hybridgen.bench --config configs/ar/raster.py:bench
    python -m hybridgen.bench --config configs/recipes/shapes.py:cpu --stage decoder --what train --json decoder.json

Times the programs that `train` and `sample` run, on one batch of the config's data, on this machine. Runs of a program
take turns with runs of a large matrix product (float32 on a CPU, bfloat16 elsewhere), so that both see the same
machine: the fraction of its matmul rate is the median over turns. FLOPs are counted from the trace (hybridgen.flops).
Parts that name a config are used untrained. Nothing is written but FILE.

JSON: {"config", "family", "platform", "device", "devices", "batch", "dtype", "parameters", "load" (of the machine in
the minute before, in busy cores), "matmul": {"dtype", "flops_per_s": median of one device}, "train" and "sample": {
  "seconds" of a step or call: {"median", "q1", "q3", "min", "runs"}, "images" of a step or call, "images_per_s",
  "tokens_per_s" (image tokens, or patches), "flops" of a step or call: {"matmul", "attention", "convolution", "total"},
  "flops_per_s", "matmul_fraction", "lower_s" (trace and lower), "compile_s",
  "memory" a device as compiled: {"arguments", "outputs", "aliased", "temporaries", "peak"} in bytes,
  "measured_peak": bytes in use at most so far, a device's or, on a CPU, this process's}}
"""

import argparse
import itertools
import os
import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from hybridgen import config as config_lib
from hybridgen import programs, rundir, trees
from hybridgen.cli import command, make_parser
from hybridgen.state import inference_params

PATIENCE = 90.0  # seconds of turns after which a program is not run again, if it ran three times


def bench(built: programs.Programs, what: tuple[str, ...], runs: int) -> dict[str, Any]:
    """Times the programs named in `what`, `runs` times each, and prints a line for each; returns the report."""
    config, mesh = built.experiment.config, built.experiment.mesh
    device = mesh.devices.flat[0]
    report = {
        "family": config.family,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "batch": config.batch,
        "dtype": config.model.get("dtype", "float32"),
        "parameters": trees.count(built.state["params"]),
        "load": os.getloadavg()[0],
    }
    print(headline(report), HEAD, sep="\n", flush=True)
    matmul = Matmul(device)
    state, batch, parts, cond, keys = built.make()
    rates: list[float] = []
    with jax.set_mesh(mesh):
        for name in what:
            if name == "train":
                compiled, entry = programs.compile_timed(built.step, built.train_arguments())
                turns = steps(compiled, state, batch, parts)
                images, flops = config.batch, built.train_flops()
            else:
                compiled, entry = programs.compile_timed(built.draw, built.sample_arguments())
                given = inference_params(state["params"], state["ema"]), state["extra"], parts, cond, keys
                turns = (compiled(*given) for _ in itertools.count())
                images, flops = len(keys), built.sample_flops()
            seconds, beside, last = alternate(turns, matmul, runs)
            state = last[0] if name == "train" else state
            rates += beside
            entry |= summary(seconds, beside, images, images * built.tokens(), flops, report)
            report[name] = entry | {"measured_peak": measured_peak(device)}
            print(line(name, report[name]), flush=True)
    report["matmul"] = {"dtype": matmul.dtype, "flops_per_s": statistics.median(rates)}
    print(f"\nmatmul rate {programs.human(statistics.median(rates), 'FLOP/s')} a device, {matmul.dtype}")
    return report


class Matmul:
    """A product that fills the machine: the rate that everything is compared with."""

    def __init__(self, device: Any):
        cpu = device.platform == "cpu"
        self.size, self.chain, self.dtype = (2048, 1, "float32") if cpu else (8192, 8, "bfloat16")
        key = jax.random.key(0)
        self.x = jax.device_put(jax.random.normal(key, (self.size, self.size), self.dtype), device)
        self.product = jax.jit(self._product).lower(self.x, self.x).compile()  # now: a mesh in force would object later
        jax.block_until_ready(self.product(self.x, self.x))

    def _product(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, self.chain, lambda _, y: (y @ w) * self.size**-0.5, x)

    def rate(self) -> float:
        """FLOP/s of one device, now: the best of three in a row, since the first finds caches full of other things."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(self.product(self.x, self.x))
            seconds.append(time.perf_counter() - start)
        return 2 * self.chain * self.size**3 / min(seconds)


def steps(compiled: Any, state: dict, batch: dict, parts: Any) -> Iterator[tuple[dict, dict]]:
    """Training steps without end on one batch."""
    while True:
        state, metrics = compiled(state, batch, parts)
        yield state, metrics


def alternate(turns: Iterator, matmul: Matmul, runs: int) -> tuple[list[float], list[float], Any]:
    """(seconds of each turn, matmul rate around each, the last turn's result) of `runs` turns, after two unmeasured."""
    seconds, rates = [], []
    for _ in range(2):
        jax.block_until_ready(next(turns))
    before, started = matmul.rate(), time.perf_counter()
    while len(seconds) < runs and (len(seconds) < 3 or time.perf_counter() - started < PATIENCE):
        start = time.perf_counter()
        last = jax.block_until_ready(next(turns))
        seconds.append(time.perf_counter() - start)
        after = matmul.rate()
        rates.append((before + after) / 2)
        before = after
    return seconds, rates, last


def summary(seconds: list, rates: list, images: int, tokens: int, flops: dict, report: dict) -> dict[str, Any]:
    """What a program did in the median of its runs."""
    median, total = statistics.median(seconds), sum(flops.values())
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    # on a CPU all devices are one machine, and one product fills it
    devices = 1 if report["platform"] == "cpu" else report["devices"]
    fractions = [total / second / rate / devices for second, rate in zip(seconds, rates, strict=True)]
    return {
        "seconds": {"median": median, "q1": q1, "q3": q3, "min": min(seconds), "runs": len(seconds)},
        "images": images,
        "images_per_s": images / median,
        "tokens_per_s": tokens / median,
        "flops": dict(flops) | {"total": total},
        "flops_per_s": total / median,
        "matmul_fraction": statistics.median(fractions),
    }


def measured_peak(device: Any) -> int:
    """Most bytes in use so far: of the device as it counts them, or of this process on a CPU."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


HEAD = "              time   spread   tokens/s  images/s      FLOP  of matmul  compile      peak"


def headline(report: dict) -> str:
    """The first lines of the report."""
    text = (
        f"{report['family']}: {report['parameters']:,} parameters, batch {report['batch']}, {report['dtype']}, "
        f"on {report['devices']} {report['device']} device{'s' * (report['devices'] > 1)}"
    )
    if report["platform"] == "cpu" and report["load"] > 0.5:
        text += f"\nthe load of this machine is {report['load']:.1f}: what else runs makes the numbers noisy"
    return text


def line(name: str, entry: dict) -> str:
    """A row of the table under HEAD."""
    seconds, human = entry["seconds"], programs.human
    spread = (seconds["q3"] - seconds["q1"]) / seconds["median"]
    return (
        f"{name:8}{human(seconds['median'], 's'):>10}{spread:>9.1%}{human(entry['tokens_per_s']):>11}"
        f"{human(entry['images_per_s']):>10}{human(entry['flops']['total']):>10}{entry['matmul_fraction']:>11.1%}"
        f"{entry['lower_s'] + entry['compile_s']:>7.1f} s{entry['memory']['peak'] / 2**30:>6.2f} GiB"
    )


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("bench", __doc__)
    programs.add_arguments(parser)
    parser.add_argument("--steps", type=positive, default=10, help="timed runs of each program (default 10)")
    args, overrides = config_lib.parse(parser, argv)
    json = programs.writable(args.json)
    built = programs.load(args, overrides)
    report = {"config": args.config} | bench(built, built.names(args.what), args.steps)
    if json:
        rundir.write_json(json, report)
    return 0


if __name__ == "__main__":
    command(main)
