"""How the process keeps its memory while it computes on the CPU."""

import ctypes
import sys

# Of glibc's malloc.h; mallopt returns 0 for what it does not know.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """Lets the allocator keep the buffers of a step for the next one.

    By default glibc hands every large buffer back to the kernel and has it zeroed again a moment later: up to a third
    of a small model's step on CPU. To be called before there are threads: those that have an arena of their own go on
    so. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        # Other arenas than the first have room for small buffers only.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, -1)
