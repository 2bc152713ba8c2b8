"""Memory of a program that computes on the CPU: large blocks stay with the process, in huge pages.

glibc takes a large block from the kernel anew each time and gives it back at once. A compiled step takes its
temporaries so, and touching fresh pages of 4 KiB each step costs a third of a small model's step or more.
"""

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h
MADV_HUGEPAGE = 14
PAGE = 2**21
MOST = 16 * 2**30  # bytes of address space; what is not touched takes no memory


def keep() -> bool:
    """Sets this process's allocator so, if it can be and nothing else was asked for; whether it did.

    To be called before there are threads. Not where there is an accelerator: temporaries are its own there.
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
    # one heap, that of the process: a thread's own lies elsewhere
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    start = libc.sbrk(0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    libc.free(libc.malloc(min(MOST, memory // 2)))  # the heap has grown by that now, untouched
    start, end = -(-start // PAGE) * PAGE, libc.sbrk(0) // PAGE * PAGE
    return end > start and libc.madvise(start, end - start, MADV_HUGEPAGE) == 0


def accelerated() -> bool:
    """Whether JAX may find something here that is not a CPU."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return any(next(Path("/dev").glob(pattern), None) for pattern in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd"))
