"""Compilation targets that this machine lacks: TPU slices such as "v5e:16x16", GPUs such as "h100:8" or "h100:4x8".

libtpu has the compiler for TPUs, JAX's CUDA plugin that for GPUs; neither needs the chip. XLA for GPUs needs the
numbers that its heuristics use (processors, shared memory, cache); GPUS has them from the makers' architecture papers
and from drivers. Without a GPU there is no autotuning, which selects the fastest of several kernels.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from hybridgen.core import config as config_lib
from hybridgen.core.arguments import TOPOLOGIES
from hybridgen.core.errors import UserError
from hybridgen.cost import chips

# keep libtpu from looking for a TPU, a metadata server, or another process that uses a TPU
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
USED = 0.9  # share of a GPU's memory that a program started by launch/local.sh may use
KIB, MIB = 2**10, 2**20


class GPU(NamedTuple):
    """The numbers of a GPU that XLA's heuristics use. Memory in bytes."""

    name: str
    capability: int
    processors: int  # streaming multiprocessors
    lanes: int  # float32 units per multiprocessor
    shared: int  # shared memory, per block
    cache: int  # L2
    clock: float  # GHz


GPUS = {
    "a100": GPU("NVIDIA A100", 8, 108, 64, 163 * KIB, 40 * MIB, 1.41),
    "h100": GPU("NVIDIA H100", 9, 132, 128, 227 * KIB, 50 * MIB, 1.98),
    "h200": GPU("NVIDIA H200", 9, 132, 128, 227 * KIB, 50 * MIB, 1.98),
    "b200": GPU("NVIDIA B200", 10, 148, 128, 227 * KIB, 126 * MIB, 1.965),
}


def describe(name: str, slices: int = 1) -> tuple[list, float]:
    """(devices to compile for, bytes that a program may use on each) of `slices` topologies such as "v5e:16x16".

    Raises UserError for an unknown topology, and if the compiler is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    known = {kind: chip for kind, chip in chips.CHIPS.items() if chip.sides or kind in GPUS}
    chip = known.get(found[1]) if found else None
    if chip is None:
        kind = name.partition(":")[0]
        near = ", whose size is not like 16x16" if kind in known else config_lib.hint(kind, known)
        raise UserError(f"--topology: no topology {name!r}{near}; known: {TOPOLOGIES}")
    sides = [int(side) for side in found[2].split("x")]
    if not chip.sides:
        return _gpus(name, found[1], sides, slices), USED * chip.memory
    if len(sides) != chip.sides:
        text = f"--topology {name!r} has {len(sides)} axes, but {found[1]} has {chip.sides}"
        raise UserError(f"{text}; known: {TOPOLOGIES}")
    return _slices(name, sides, slices), chip.memory


def _slices(name: str, sides: list[int], slices: int) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chips_per_host_bounds": (1,) * 3} if set(sides) == {1} else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        return _devices("tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology: no topology {name!r}: {reason}; known: {TOPOLOGIES}") from None


def _gpus(name: str, kind: str, sides: list[int], slices: int) -> list:
    if len(sides) > 2 or min(sides) < 1:
        raise UserError(f"--topology {name!r}: give GPUs as a number, h100:8, or as hosts x GPUs per host, h100:4x8")
    if slices > 1:
        raise UserError(f"--slices {slices} is for TPUs; for several hosts give --topology {kind}:{slices}x{sides[-1]}")
    hosts, each = (1, *sides)[-2:]
    options = {"topology": f"1x{hosts}x{each}", "target_config": target(GPUS[kind], chips.CHIPS[kind])}
    try:
        return _devices("cuda", topology_name="", **options)
    except NotImplementedError:
        need = "JAX's CUDA plugin and cuDNN: pip install -e '.[gpu]'"
        raise UserError(f"--topology: compiling for {name} needs {need}") from None


def _devices(platform: str, **options: Any) -> list:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform=platform, **options).devices)


def target(gpu: GPU, chip: chips.Chip) -> str:
    """A GPU in XLA's format: a stream_executor.GpuTargetConfigProto as text."""
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "core_count": gpu.processors,
        "fpus_per_core": gpu.lanes,
        "shared_memory_per_block": 48 * KIB,  # of a kernel that does not request more
        "shared_memory_per_block_optin": gpu.shared,
        "shared_memory_per_core": gpu.shared + KIB,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
    }
    lines = [f"{name}: {value}" for name, value in numbers.items()]
    lines += [f"cuda_compute_capability {{ major: {gpu.capability} }}", 'runtime_version: "13.0.0"']
    lines += ['driver_version: "13.0.0"', f'name: "{gpu.name}"']
    ends = ['platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 12 }"]
    return "\n".join(["gpu_device_info {", *lines, "}", *ends, f'device_description_str: "{gpu.name}"'])
