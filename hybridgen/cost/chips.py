"""Known chips: memory, rates and links of a device; measures the rates of a device that is not in the table.

A device is a JAX device: one of two cores on TPU v2, v3 and 7x, otherwise a chip. Rates are the makers' for dense
matmuls. Sources: cloud.google.com/tpu/docs (one page per version), "How to Scale Your Model" (Austin et al. 2025,
chapters 2 and 3) for links and networks, the data sheets of the A100, H100, H200 and B200 (SXM modules). The memory of
a TPU is what libtpu 0.0.42 lets a program use; of a GPU it is the total (JAX uses 75 % of it by default).
"""

import time
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """A device, in bytes, FLOP/s and bytes/s. None: unknown, or not applicable."""

    kinds: tuple[str, ...]  # prefixes of `device_kind`
    sides: int | None  # number of axes of a topology
    memory: float | None  # that a program may use
    bfloat16: float  # FLOP/s
    float32: float  # FLOP/s at JAX's default matmul precision: bfloat16 on TPUs, TF32 on GPUs
    bandwidth: float  # of its memory
    link: float | None  # to the neighbours along one axis, both directions together; GPUs: NVLink, outgoing
    network: float | None  # out of a slice or node, per device

    def peak(self, dtype: str) -> float:
        """FLOP/s in a compute dtype."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


CHIPS = {
    "v2": Chip(("TPU v2",), 2, 7.48 * GIB, 23e12, 23e12, 350e9, 62e9, 3.1e9),
    "v3": Chip(("TPU v3",), 2, 15.48 * GIB, 61.5e12, 61.5e12, 450e9, 82e9, 3.1e9),
    "v4": Chip(("TPU v4",), 3, 15.25 * GIB, 275e12, 275e12, 1228e9, 90e9, 6.25e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 2, 15.75 * GIB, 197e12, 197e12, 819e9, 90e9, 6.25e9),
    "v5p": Chip(("TPU v5p", "TPU v5"), 3, 95.74 * GIB, 459e12, 459e12, 2765e9, 180e9, 6.25e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 2, 31.25 * GIB, 918e12, 918e12, 1640e9, 180e9, 12.5e9),
    "tpu7x": Chip(("TPU7x", "TPU7"), 3, 94.75 * GIB, 1153e12, 1153e12, 3690e9, 100e9, 12.5e9),
    "a100": Chip(("NVIDIA A100",), None, 79.1 * GIB, 312e12, 156e12, 2039e9, 300e9, 25e9),
    "h100": Chip(("NVIDIA H100",), None, 79.6 * GIB, 989e12, 495e12, 3350e9, 450e9, 50e9),
    "h200": Chip(("NVIDIA H200",), None, 139.8 * GIB, 989e12, 495e12, 4800e9, 450e9, 50e9),
    "b200": Chip(("NVIDIA B200",), None, 178.4 * GIB, 2250e12, 1125e12, 7700e9, 900e9, 50e9),
}


def find(kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`, such as "TPU v5 lite", by the longest prefix. None: unknown."""
    found = [(len(name), chip) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def of(device: Any) -> Chip:
    """The chip of a device of this machine; a device that is not in the table (a CPU) is measured in about 2 s.

    The devices of a CPU share its rates equally.
    """
    known = find(device.device_kind)
    if known:
        return known
    share = jax.local_device_count() if device.platform == "cpu" else 1
    matmul, copy = Matmul(device), Copy(device)
    rate, moved = matmul.rate() / share, copy.rate() / share
    return Chip((device.device_kind,), None, None, rate, rate, moved, None, None)


class Matmul:
    """A matmul that uses the whole device, to measure its highest FLOP/s: float32 on a CPU, bfloat16 elsewhere."""

    def __init__(self, device: Any):
        cpu = device.platform == "cpu"
        self.size, self.chain, self.dtype = (2048, 1, "float32") if cpu else (8192, 8, "bfloat16")
        key = jax.random.key(0)
        self.x = jax.device_put(jax.random.normal(key, (self.size, self.size), self.dtype), device)
        self.product = jax.jit(self._product).lower(self.x, self.x).compile()  # outside of jax.set_mesh
        jax.block_until_ready(self.product(self.x, self.x))

    def _product(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, self.chain, lambda _, y: (y @ w) * self.size**-0.5, x)

    def rate(self) -> float:
        """FLOP/s of one device, now: the best of three in a row, since the first runs with cold caches."""
        return 2 * self.chain * self.size**3 / _best(lambda: self.product(self.x, self.x))


class Copy:
    """An array that is read and written, to measure the highest memory bandwidth."""

    def __init__(self, device: Any):
        cpu = device.platform == "cpu"
        count = 2**26 if cpu else 2**29  # 256 MiB, 2 GiB: larger than any cache
        self.x = jax.device_put(jax.numpy.ones((count,), "float32"), device)
        # donated: written in place, without allocating new pages
        self.copy = jax.jit(lambda x: x + 1, donate_argnums=0).lower(self.x).compile()
        self.rate()

    def rate(self) -> float:
        """Bytes/s of one device, now, reads plus writes: the best of three in a row."""

        def once() -> jax.Array:
            self.x = self.copy(self.x)
            return self.x

        return 2 * self.x.nbytes / _best(once)


def _best(function: Any) -> float:
    """Seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
