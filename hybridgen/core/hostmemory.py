"""Host memory of a program that computes on the CPU: glibc's malloc keeps large blocks, in huge pages.

By default glibc requests each large block from the kernel (mmap) and returns it on free. The temporaries of a compiled
step are such blocks, and the page faults of fresh 4 KiB pages take a third of a small model's step or more.
"""

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # constants of malloc.h
MADV_HUGEPAGE = 14
PAGE = 2**21
MOST = 16 * 2**30  # bytes of address space; untouched pages take no memory


def keep() -> bool:
    """Configures malloc so that it keeps large blocks; returns whether it did.

    It does nothing if the environment configures malloc already, outside glibc on Linux, or with an accelerator, whose
    temporaries are in its own memory. Call it before any thread starts.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform != "linux" or chosen or accelerated():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # one arena, the process's heap: the arenas of threads are mapped elsewhere
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    start = libc.sbrk(0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    libc.free(libc.malloc(min(MOST, memory // 2)))  # extends the heap by this size without touching its pages
    start, end = -(-start // PAGE) * PAGE, libc.sbrk(0) // PAGE * PAGE
    return end > start and libc.madvise(start, end - start, MADV_HUGEPAGE) == 0


def accelerated() -> bool:
    """Whether JAX may find a device other than a CPU on this machine."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return any(next(Path("/dev").glob(pattern), None) for pattern in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd"))
