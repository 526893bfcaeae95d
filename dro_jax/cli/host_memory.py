"""How the process keeps its memory while it computes on the CPU."""

import ctypes
import sys
from typing import Any

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
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        # Other arenas than the first have room for small buffers only.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Hands what is free to the kernel after all.

    To be called before work of another kind than the steps: what lasts of it may come to lie in the middle of what a
    step has freed, and the next step's buffer would then be taken beside it and not there.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library, None where it has no such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
